"""The loop of Stage I over any width of a space: draws, statistics, curves, resume."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsnet.data.training_images import InMemoryImages
from dsnet.errors import CheckpointError, ConfigError
from dsnet.families import create
from dsnet.network.supernet import Supernet
from dsnet.space.width_space import WidthSpace
from dsnet.stored.checkpoint import load_checkpoint
from dsnet.stored.names import checkpoint_stems
from dsnet.training.curves import UNDECLARED
from dsnet.training.settings import REGIMES, Regime, Teacher, TrainSettings
from dsnet.training.supernet import TrainingCallbacks, _Session, train_supernet
from dsnet.training.supernet_run import SupernetRun
from tests.dsnet.cases import FAMILIES
from tests.dsnet.samples import SMALL_OPTIONS, random_labels, random_pixels, small_run, task

NUM_IMAGES, SIZE = 40, 16
SPACE = WidthSpace(0.25, 2)
EPOCHS = TrainSettings(epochs=3, batch_size=8, lr=0.05, warmup_epochs=1.0)


def run_of(teacher: Teacher = "inplace", norm: str | None = None, **changes: Any) -> SupernetRun:
    regime = Regime(teacher=teacher, num_random=2, norm=norm)  # type: ignore[arg-type]
    return small_run(**{"regime": regime, "train": EPOCHS, "width_space": SPACE, **changes})


def network(family: str = "ds_tiny", norm: str | None = "recalibrate") -> Supernet:
    return create(family, task(image_size=SIZE), SMALL_OPTIONS.get(family, {}), norm=norm, seed=4)


def train(folder: Path, run: SupernetRun, net: Supernet | None = None, stop_at: int | None = None) -> Path | None:
    steps = iter(range(1, 1000))
    data = InMemoryImages(random_pixels(NUM_IMAGES, SIZE), random_labels(NUM_IMAGES), run.augmentation)
    return train_supernet(
        net if net is not None else network(),
        data,
        run,
        folder=folder,
        callbacks=TrainingCallbacks(should_stop=lambda: next(steps) == stop_at),
    )


def rows(folder: Path) -> list[Mapping[str, Any]]:
    found = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time_ms"} for row in found]


def session(run: SupernetRun, net: Supernet | None = None) -> _Session:
    return _Session(net if net is not None else network(), run, 10, torch.device("cpu"))


def test_a_sandwich_has_the_largest_the_smallest_of_the_space_and_any_between() -> None:
    state = session(run_of())
    spec, generator = state.student.spec, torch.Generator().manual_seed(0)
    options = SPACE.options(spec)
    drawn: Counter[tuple[int, ...]] = Counter()
    for _ in range(100):
        plan = state.plan(state.draw(generator))
        assert plan.largest == state.student.subnets.largest
        assert plan.smallest.widths == SPACE.smallest(spec)
        assert plan.smallest.name not in state.student.subnets.names
        drawn.update(subnet.widths for subnet in plan.randoms)
    assert len(drawn) > 150  # of 200; the declared set has three members
    for group, widths in enumerate(options):
        assert {each[group] for each in drawn} == set(widths)  # drawn for every group on its own


def test_a_space_of_few_widths_gives_each_at_most_once_and_neither_end() -> None:
    net = network()
    free = WidthSpace(1.0, 1)  # every group whole: the largest alone is left
    plan = session(run_of(width_space=free), net).plan(
        session(run_of(width_space=free), net).draw(torch.Generator().manual_seed(0))
    )
    assert plan.randoms == ()
    assert plan.smaller == ()


def test_undeclared_sub_networks_are_cold_and_never_counted() -> None:
    state = session(run_of("ema_ensemble", None, bootstrapping=small_run().bootstrapping), network(norm=None))
    state.updates = dict.fromkeys(state.updates, 100)
    plan = state.plan(state.draw(torch.Generator().manual_seed(0)))
    assert plan.cold == {subnet.name for subnet in plan.smaller}
    assert state.updates.keys() == state.student.subnets.names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "teacher", "norm"),
    [
        *((family, "inplace", "recalibrate") for family in FAMILIES),
        (FAMILIES[-1], "ema_ensemble", "private_stats"),
        ("ds_tiny", "none", "group_norm"),
    ],
)
def test_training_over_any_widths_learns_and_every_declared_member_can_be_evaluated(
    tmp_path: Path, family: str, teacher: Teacher, norm: str
) -> None:
    net = network(family, norm)
    start = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    stem = train(tmp_path, run_of(teacher, norm), net)
    assert stem is not None
    assert any(not torch.equal(parameter, start[name]) for name, parameter in net.named_parameters())
    names = {name for row in rows(tmp_path) for name in row["metrics"] if name.startswith("loss/")}
    assert {f"loss/{net.subnets.largest.name}", f"loss/{UNDECLARED}"} <= names
    assert names <= {f"loss/{name}" for name in (*net.subnets.names, UNDECLARED)}
    _, meta = load_checkpoint(checkpoint_stems(tmp_path)[-1])
    assert meta["updates"].keys() == net.subnets.names
    assert meta["updates"][net.subnets.largest.name] == 15
    assert SupernetRun.from_json(meta["run"]).width_space == SPACE
    tensors, _ = load_checkpoint(stem)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted training; only to be read."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, run_of())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [2, 5, 8])
def test_a_stopped_training_over_any_widths_continues_bit_identically(
    whole: Path, tmp_path: Path, stop_at: int
) -> None:
    assert train(tmp_path, run_of(), stop_at=stop_at) is None
    assert train(tmp_path, run_of()) is not None
    for name in ("final.safetensors", "epoch-00003.safetensors"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert rows(tmp_path) == rows(whole)


def test_another_space_is_another_training(tmp_path: Path) -> None:
    train(tmp_path, run_of(), stop_at=3)
    with pytest.raises(CheckpointError, match="other settings"):
        train(tmp_path, run_of(width_space=WidthSpace(0.5, 2)))


def test_a_run_without_a_space_is_stored_as_before() -> None:
    plain, own = small_run(), run_of()
    assert "width_space" not in plain.to_json()
    assert SupernetRun.from_json(plain.to_json()) == plain
    assert own.to_json()["width_space"] == {"min_share": 0.25, "step": 2}
    assert SupernetRun.from_json(own.to_json()) == own
    with pytest.raises(ConfigError, match="min_share is 7"):
        SupernetRun.from_json({**own.to_json(), "width_space": {"min_share": 7, "step": 2}})
    with pytest.raises(ConfigError, match="width_space"):
        replace(plain, width_space=3)  # type: ignore[arg-type]


def test_only_the_sandwich_draws_widths() -> None:
    with pytest.raises(ConfigError, match="only the sandwich draws widths"):
        run_of(regime=REGIMES["ce"])
