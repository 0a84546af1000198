"""Work ahead on threads: order, bound, errors, and an end that leaves no thread behind."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest

from dsnet.data.prefetch import in_order


def decoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("dsnet-decode")]


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_ahead", [1, 3, 100])
def test_results_come_in_the_order_of_the_items(num_threads: int, num_ahead: int) -> None:
    delays = random.Random(0).choices([0.0, 0.001, 0.003], k=40)

    def square(number: int) -> int:
        time.sleep(delays[number])
        return number**2

    results = in_order(square, range(40), num_threads=num_threads, num_ahead=num_ahead)
    assert list(results) == [number**2 for number in range(40)]
    assert not decoders()


def test_no_more_than_the_bound_is_taken_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = in_order(lambda number: number, items(), num_threads=2, num_ahead=7)
    assert taken == []  # nothing before the first result is asked for
    for number in range(5):
        assert next(results) == number
        time.sleep(0.005)
        assert len(taken) == number + 1 + 7
    results.close()


def test_stopping_early_ends_the_threads_and_drops_what_waits() -> None:
    done: list[int] = []

    def slow(number: int) -> int:
        time.sleep(0.01)
        done.append(number)
        return number

    results = in_order(slow, range(1000), num_threads=2, num_ahead=200)
    assert next(results) == 0
    assert len(decoders()) == 2
    results.close()
    assert not decoders()
    assert len(done) < 20


def test_an_error_is_raised_in_its_items_turn_and_ends_the_threads() -> None:
    def fails_at_three(number: int) -> int:
        if number == 3:
            raise ValueError("item 3")
        return number

    results = in_order(fails_at_three, range(100), num_threads=4, num_ahead=50)
    seen = [next(results) for _ in range(3)]
    with pytest.raises(ValueError, match="item 3"):
        next(results)
    assert seen == [0, 1, 2]
    assert not decoders()
