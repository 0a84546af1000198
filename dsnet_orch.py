"""The program `dsnet-orch`, under a name of its own: `python -m dsnet_orch` is the same.

Where the user has a module `orchestration`, Python may find that one first. Here our packages are
found beside this file.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line with our own packages, whatever else has their names."""
    root = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, root)
    try:
        import orchestration  # noqa: F401 - it protects all further imports
    finally:
        sys.path.remove(root)
    from orchestration.cli import main as run

    run()


if __name__ == "__main__":
    main()
