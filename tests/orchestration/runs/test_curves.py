"""Points of loss curves that count: each step once, as the training that went on had it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from orchestration.runs.curves import CurveTail, counted_points


def line(step: int, loss: float) -> str:
    return json.dumps({"step": step, "time_ms": round(1000 * loss) + step, "metrics": {"loss/largest": loss}}) + "\n"


class Training:
    """What a training leaves in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.curves = folder / "curves.jsonl"

    def write(self, *steps: int, loss: float) -> None:
        with self.curves.open("a") as file:
            file.write("".join(line(step, loss) for step in steps))

    def checkpoint(self, name: str, step: int) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps({"step": step}))

    def resume(self, step: int) -> None:
        """Cut the curves back to a checkpoint, as a resumed training does: in a new file."""
        kept = [text for text in self.curves.read_text().splitlines(keepends=True) if json.loads(text)["step"] <= step]
        draft = self.folder / "draft"
        draft.write_text("".join(kept))
        os.replace(draft, self.curves)


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


def read(tail: CurveTail) -> list[tuple[int, float | None]]:
    tail.read()
    return [(point.step, point.metrics["loss/largest"]) for point in tail.counted()]


def test_points_wait_for_the_checkpoint_after_them(training: Training) -> None:
    tail = CurveTail(training.curves)
    assert read(tail) == []
    training.write(1, 2, 3, loss=0.5)
    assert read(tail) == []
    training.checkpoint("epoch-00001", 2)
    assert read(tail) == [(1, 0.5), (2, 0.5)]
    assert read(tail) == []
    training.checkpoint("epoch-00001-step-00000003", 3)
    assert read(tail) == [(3, 0.5)]
    training.write(4, loss=0.5)
    training.checkpoint("final", 4)
    assert read(tail) == [(4, 0.5)]


def test_redone_steps_are_there_once_with_the_values_that_count(training: Training) -> None:
    """The file is longer again before it is looked at, as with fast steps: its length alone tells
    nothing."""
    tail = CurveTail(training.curves)
    training.write(1, 2, loss=0.5)
    training.checkpoint("epoch-00001", 2)
    training.write(3, 4, loss=0.4)
    found = read(tail)
    training.resume(2)
    training.write(3, 4, 5, 6, loss=0.3)
    training.checkpoint("epoch-00002", 4)
    found += read(tail)
    training.checkpoint("final", 6)
    found += read(tail)
    assert found == [(1, 0.5), (2, 0.5), (3, 0.3), (4, 0.3), (5, 0.3), (6, 0.3)]


@pytest.mark.parametrize("num_seen", [0, 1, 2, 3])
def test_a_new_driver_finds_the_same_points_as_one_that_saw_everything(training: Training, num_seen: int) -> None:
    training.write(1, 2, loss=0.5)
    training.checkpoint("epoch-00001", 2)
    training.write(*range(3, 3 + num_seen), loss=0.4)
    before = [point.step for point in counted_points(training.curves)]
    training.resume(2)
    training.write(3, 4, loss=0.3)
    training.checkpoint("final", 4)
    after = {point.step: point.metrics["loss/largest"] for point in counted_points(training.curves)}
    assert before == [1, 2]
    assert after == {1: 0.5, 2: 0.5, 3: 0.3, 4: 0.3}


def test_a_damaged_checkpoint_counts_nothing_more(training: Training) -> None:
    training.write(1, 2, loss=0.5)
    (training.folder / "epoch-00001.json").write_text("{")
    assert counted_points(training.curves) == []
