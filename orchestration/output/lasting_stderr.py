"""stderr of a command that runs for hours, which does not end when its reader does, as in
`dsnet-orch launch sweep.yaml 2>&1 | head`."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stderr
from typing import Any, TextIO


class LastingStream:
    """A text stream over a pipe; what is written after the reader has ended goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; returns its length."""
        return self._do(lambda: self._stream.write(text), len(text))

    def flush(self) -> None:
        """Write what is buffered."""
        self._do(self._stream.flush, None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _do(self, action: Callable[[], Any], instead: Any) -> Any:
        try:
            return action()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            return instead


def lasting_stderr(stream: TextIO) -> AbstractContextManager[Any]:
    """Context manager in which the messages of this process go to such a stream over `stream`."""
    lasting: Any = LastingStream(stream)
    return redirect_stderr(lasting)
