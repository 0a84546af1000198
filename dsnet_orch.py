"""The program `dsnet-orch`, under a name of its own: `python -m dsnet_orch` is the same.

If the user has a module `orchestration`, Python may find it first. From here our packages are found
beside this file.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line with our own packages, even if other modules have their names."""
    root = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, root)
    try:
        import orchestration  # noqa: F401 - makes all further imports find our packages
    finally:
        sys.path.remove(root)
    from orchestration.cli import main as run

    run()


if __name__ == "__main__":
    main()
