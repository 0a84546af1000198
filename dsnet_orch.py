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
    from orchestration.runs.supervisor import supervise, tell_exit

    if sys.argv[1:2] and sys.argv[1] in LONG:
        supervise(_complain)
    from orchestration.cli import main as run

    try:
        run()
    except SystemExit as done:
        tell_exit(done.code if isinstance(done.code, int) else int(done.code is not None))
        if done.code in STOPPED:
            _end_at_once(done.code)
        raise
    except BaseException:
        tell_exit(1)  # Python prints the traceback
        raise


LONG = ("launch", "extend")
"""Commands that run for hours."""


STOPPED = (6, 130)
"""Exit codes of a launch that was stopped."""


def _complain(text: str) -> None:
    from orchestration.commands.messages import complain

    complain(text)


def _end_at_once(code: int) -> None:
    """End without what the interpreter and its libraries do at their end: it takes seconds on a
    busy machine, and all files are written by now."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return  # the ordinary end reports it
    os._exit(code)


if __name__ == "__main__":
    main()
