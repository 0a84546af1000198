"""The numbers of the server in the text format of Prometheus."""

from __future__ import annotations

import re

from orchestration.serving.metrics import IMAGES, Tally

SAMPLE = re.compile(r'[a-z_]+(\{[a-z]+="(?:[^"\\]|\\.)*"(,[a-z]+="(?:[^"\\]|\\.)*")*\})? [0-9.e+-]+')


def tally(statuses: dict[int, int], route: str = "narrow", sizes: tuple[int, ...] = ()) -> Tally:
    made = Tally()
    for status, number in statuses.items():
        for _ in range(number):
            made.answered(status, 0.02 if status == 200 else None)
            if status == 200:
                made.classified("knee", route, 300)
    for size in sizes:
        made.batches.add(size)
    return made


def test_merged_tallies_are_the_tally_of_everything() -> None:
    first, second = tally({200: 2, 503: 1}, sizes=(1, 300)), tally({200: 3, 400: 4}, sizes=(1, 2, 3))
    together = tally({200: 5, 503: 1, 400: 4}, sizes=(1, 300, 1, 2, 3))
    first.merge(second)
    assert first.text() == together.text()


def test_the_text_has_cumulative_buckets_means_and_escaped_labels() -> None:
    made = tally({200: 3, 400: 1}, route='a "b"\\\n', sizes=(1, 2, 3, 300))
    lines = made.text().splitlines()
    assert all(line.startswith("# ") or SAMPLE.fullmatch(line) for line in lines), lines
    assert 'dsnet_images_total{point="knee",route="a \\"b\\"\\\\\\n"} 3' in lines
    assert "dsnet_mean_madds 300" in lines
    assert 'dsnet_request_seconds_bucket{le="0.01"} 0' in lines
    assert 'dsnet_request_seconds_bucket{le="0.025"} 3' in lines
    expected = [sum(size <= bound for size in (1, 2, 3, 300)) for bound in (*IMAGES, float("inf"))]
    assert [int(line.split()[-1]) for line in lines if line.startswith("dsnet_batch_images_bucket")] == expected
    assert "dsnet_batch_images_sum 306" in lines
    assert "dsnet_batch_images_count 4" in lines


def test_the_text_of_an_empty_tally_divides_by_nothing() -> None:
    assert "dsnet_mean_madds 0" in Tally().text().splitlines()
