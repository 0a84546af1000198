"""Ordered prefetching on threads, with a bounded number of results that wait."""

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
    """Apply `function` to each item on threads; yields the results in the items' order.

    Threads suit work that releases the interpreter lock, as Pillow's does. Nothing starts before
    the first result is requested, and at most `num_ahead` items beyond the requested one are taken.
    When the caller stops early (`close()`) or an item fails, the threads finish the items they are
    working on and end.

    Args:
        function: Called on the threads; its error is raised when the item's turn comes.
        items: Consumed lazily, on the caller's thread.
        num_threads: >= 1; affects the speed, never the results.
        num_ahead: >= 1; bounds the memory.
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
