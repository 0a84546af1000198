"""Work done ahead of whoever needs its results, on threads, in order and within a bound."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_threads: int, num_ahead: int
) -> Generator[Result, None, None]:
    """`function` of each item, in the items' order; threads suit work that releases the interpreter, as Pillow's does.

    Nothing starts before the first result is asked for. At most `num_ahead` items beyond the one that is asked for are
    taken. When the caller stops early (`close()`), or an item fails, the threads finish what they have in hand and end.

    Args:
        function: Called on the threads; its error is raised in the item's turn.
        items: Taken lazily, on the caller's thread.
        num_threads: >= 1; decides the speed, never the results.
        num_ahead: >= 1; what bounds the memory.
    """
    executor = ThreadPoolExecutor(num_threads, thread_name_prefix="dsnet-decode")
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > num_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
