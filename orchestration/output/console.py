"""rich's console for this program."""

from __future__ import annotations

from rich import console


class Console(console.Console):
    """A console whose reader may end, as in `dsnet-orch pareto RUN | head`: that is no error, and
    rich would end the program with exit code 1."""

    def on_broken_pipe(self) -> None:
        """Raise the error again, which the command line takes for the end of the output."""
        raise BrokenPipeError
