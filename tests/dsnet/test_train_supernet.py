"""The loop of Stage I: schedule, sandwich, curves, checkpoints, resume."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsnet.batchnorm import recalibrate
from dsnet.checkpoint import load_checkpoint, load_supernet
from dsnet.errors import CheckpointError, NonFiniteLossError
from dsnet.families import create, rebuild
from dsnet.supernet import Supernet
from dsnet.training.supernet import (
    MODES,
    BootstrapSettings,
    SupernetRun,
    TrainSettings,
    _Session,
    checkpoint_stems,
    learning_rate,
    make_optimizer,
    train_supernet,
)
from dsnet.training.workers import SingleWorker
from tests.dsnet.samples import NORMALIZATION, random_labels, random_pixels, small_run, task

NUM_IMAGES = 52  # 3 whole batches of 16 an epoch, and a rest
OPTIONS = {"width": 0.5, "num_routes": 3, "dropout": 0.2}


class Kept:
    """A reporter that keeps what it hears."""

    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []

    def on_curve(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)


class Killed(BaseException):
    """Stands for the process's death: nothing catches it."""


class KillAt:
    """A stop question that raises at its n-th call, as a kill at that step would end the process."""

    def __init__(self, call: int, outcome: Callable[[], bool]) -> None:
        self.call = call
        self.outcome = outcome
        self.count = 0

    def __call__(self) -> bool:
        self.count += 1
        return self.outcome() if self.count >= self.call else False


def die() -> bool:
    raise Killed


def supernet(**options: Any) -> Supernet:
    return create("ds_tiny", task(image_size=8), {**OPTIONS, **options}, seed=4)


def train(folder: Path, run: SupernetRun | None = None, **keywords: Any) -> Path | None:
    net = keywords.pop("net", None)
    return train_supernet(
        net if net is not None else supernet(),
        random_pixels(NUM_IMAGES, 8),
        random_labels(NUM_IMAGES),
        run if run is not None else small_run(),
        folder=folder,
        **keywords,
    )


def final_bytes(folder: Path) -> bytes:
    return (folder / "final.safetensors").read_bytes()


def curve_rows(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time_ms"} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert train(folder) == folder / "final"
    return folder


@pytest.mark.parametrize("calls", [(1,), (2,), (4,), (5,), (8, 3, 2)])
@pytest.mark.parametrize("way", ["stopped", "killed"])
def test_stop_and_resume_is_bit_identical_to_an_uninterrupted_run(
    uninterrupted: Path, tmp_path: Path, way: str, calls: tuple[int, ...]
) -> None:
    for call in calls:
        if way == "stopped":
            assert train(tmp_path, should_stop=KillAt(call, lambda: True)) is None
        else:
            with pytest.raises(Killed):
                train(tmp_path, should_stop=KillAt(call, die))
        assert not (tmp_path / "final.json").exists()
    assert train(tmp_path) == tmp_path / "final"
    assert final_bytes(tmp_path) == final_bytes(uninterrupted)
    assert curve_rows(tmp_path) == curve_rows(uninterrupted)


def test_a_kill_between_tensors_and_json_of_a_checkpoint_is_survived(uninterrupted: Path, tmp_path: Path) -> None:
    train(tmp_path, should_stop=KillAt(5, lambda: True))
    (tmp_path / "epoch-00002.safetensors").write_bytes(b"torn")
    with (tmp_path / "curves.jsonl").open("a") as stream:
        stream.write('{"step": 5, "epo')
    train(tmp_path)
    assert final_bytes(tmp_path) == final_bytes(uninterrupted)
    assert curve_rows(tmp_path) == curve_rows(uninterrupted)


def test_launching_a_finished_run_again_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    train(tmp_path)
    train(tmp_path)
    assert final_bytes(tmp_path) == final_bytes(uninterrupted)
    assert curve_rows(tmp_path) == curve_rows(uninterrupted)


def test_the_global_generator_is_neither_read_nor_moved(uninterrupted: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    train(tmp_path, replace(small_run(), weights="student"))
    train(tmp_path / "ema")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert final_bytes(tmp_path / "ema") == final_bytes(uninterrupted)


def test_another_seed_gives_other_weights(uninterrupted: Path, tmp_path: Path) -> None:
    train(tmp_path, small_run(seed=4))
    assert final_bytes(tmp_path) != final_bytes(uninterrupted)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_optimiser_lowers_the_loss(tmp_path: Path, mode: str) -> None:
    settings = TrainSettings(
        epochs=12, batch_size=16, lr=0.02 if mode == "ib" else 0.1, optimizer="adamw" if mode == "ib" else "sgd"
    )
    labels = random_labels(NUM_IMAGES, 3)
    images = random_pixels(NUM_IMAGES, 8) // 4 + (80 * labels[:, None, None, None]).to(torch.uint8)
    train_supernet(supernet(), images, labels, small_run(mode, train=settings), folder=tmp_path)
    rows = [row["metrics"] for row in curve_rows(tmp_path)]
    for name in ("loss/largest", "loss/subnet-00"):
        assert sum(row[name] for row in rows[-3:]) < 0.8 * sum(row[name] for row in rows[:3]), name


def test_adamw_resumes_bit_identically(tmp_path: Path) -> None:
    run = small_run(train=TrainSettings(epochs=3, batch_size=16, lr=0.01, optimizer="adamw", grad_clip=1.0))
    train(tmp_path / "a", run)
    train(tmp_path / "b", run, should_stop=KillAt(5, lambda: True))
    train(tmp_path / "b", run)
    assert final_bytes(tmp_path / "a") == final_bytes(tmp_path / "b")


def test_curves_hold_rising_steps_every_loss_and_what_the_reporter_heard(tmp_path: Path) -> None:
    reporter = Kept()
    train(tmp_path, reporter=reporter)
    rows = curve_rows(tmp_path)
    steps = [row["step"] for row in rows]
    assert steps == list(range(1, 13))
    assert {row["num_steps"] for row in rows} == {12}
    assert rows[-1]["epoch"] == 4.0
    for row in rows:
        losses = {name for name in row["metrics"] if name.startswith("loss/")}
        assert losses == {"loss/largest", "loss/subnet-00", *(losses & {"loss/subnet-01", "loss/subnet-02"})}
        assert len(losses) == 3
        assert {"lr", "epoch"} < set(row["metrics"])
    heard = [{name: value for name, value in row.items() if name != "time_ms"} for row in reporter.records]
    assert heard == rows


@pytest.mark.parametrize("weights", ["ema", "student"])
def test_the_chosen_weights_are_kept_and_recalibrated(tmp_path: Path, weights: str) -> None:
    run = small_run(weights=weights, recalibration_images=40, recalibration_batch=16)
    stem = train(tmp_path, run)
    assert stem is not None
    final, meta = load_supernet(stem)
    tensors, _ = load_checkpoint(checkpoint_stems(tmp_path)[-1])
    for name, parameter in final.named_parameters():
        assert torch.equal(parameter, tensors[f"{weights}.{name}"])
    assert not torch.equal(tensors["student.stem.weight"], tensors["ema.stem.weight"])
    assert meta["run"] == json.loads(json.dumps(run.to_json()))
    assert meta["step"] == 12
    counts = {int(value) for name, value in final.named_buffers() if ".updates_" in name}
    assert counts == {3}  # 40 images in batches of at most 16


def test_recalibration_of_all_images_sees_each_once_in_batches_of_like_size(tmp_path: Path) -> None:
    """A last batch of one image would weigh as much as a full one, and has no variance where a layer has one pixel."""
    run = small_run(train=TrainSettings(epochs=1, batch_size=16), recalibration_batch=NUM_IMAGES - 1)
    stem = train(tmp_path, run, net=supernet(stem_stride=2))
    assert stem is not None
    final, _ = load_supernet(stem)
    tensors, _ = load_checkpoint(checkpoint_stems(tmp_path)[-1])
    expected = supernet(stem_stride=2)
    expected.load_state_dict(
        {name.removeprefix("ema."): value for name, value in tensors.items() if name.startswith("ema.")}
    )
    images = NORMALIZATION.apply(random_pixels(NUM_IMAGES, 8))
    recalibrate(expected, [images])
    norm = final.batch_norms()[0]
    prefix = final.subnets[0].prefix(1)
    mean, _, updates = norm.statistics(prefix)
    assert int(updates) == 2
    torch.testing.assert_close(mean, expected.batch_norms()[0].statistics(prefix)[0], rtol=1e-4, atol=1e-5)


def test_old_checkpoints_are_removed(uninterrupted: Path) -> None:
    assert [stem.name for stem in checkpoint_stems(uninterrupted)] == ["epoch-00003", "epoch-00004"]
    names = {path.name for path in uninterrupted.iterdir()}
    stored = {f"{stem}.{end}" for stem in ("epoch-00003", "epoch-00004", "final") for end in ("json", "safetensors")}
    assert names == stored | {"curves.jsonl"}


def test_checkpoints_can_be_rarer_than_epochs(uninterrupted: Path, tmp_path: Path) -> None:
    run = small_run(train=replace(small_run().train, checkpoint_every=3))
    train(tmp_path, run, should_stop=KillAt(11, lambda: True))
    assert [stem.name for stem in checkpoint_stems(tmp_path)] == ["epoch-00003"]
    train(tmp_path, run)
    assert [stem.name for stem in checkpoint_stems(tmp_path)] == ["epoch-00003", "epoch-00004"]
    assert final_bytes(tmp_path) == final_bytes(uninterrupted)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "torn json", "no object", "no version"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path: Path, damage: str) -> None:
    train(tmp_path, should_stop=KillAt(5, lambda: True))
    tensors, meta = tmp_path / "epoch-00001.safetensors", tmp_path / "epoch-00001.json"
    content = bytearray(tensors.read_bytes())
    match damage:
        case "truncated":
            tensors.write_bytes(content[: len(content) // 2])
        case "flipped":
            content[-5] ^= 1
            tensors.write_bytes(content)
        case "missing":
            tensors.unlink()
        case "torn json":
            meta.write_text(meta.read_text()[:-30])
        case "no object":
            meta.write_text("[]")
        case "no version":
            meta.write_text("{}")
    with pytest.raises(CheckpointError, match="epoch-00001"):
        train(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 5},
        {"train": TrainSettings(epochs=9, batch_size=16)},
        {"bootstrapping": BootstrapSettings(mode="ieb")},
        {"weights": "student"},
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    train(tmp_path, should_stop=KillAt(5, lambda: True))
    with pytest.raises(CheckpointError, match=r"written under other settings \(run\); remove .* to train anew"):
        train(tmp_path, small_run(**change))


def test_how_many_checkpoints_are_kept_may_change_between_launches(tmp_path: Path) -> None:
    train(tmp_path, should_stop=KillAt(5, lambda: True))
    assert checkpoint_stems(tmp_path)
    assert train(tmp_path, small_run(keep_checkpoints=1)) is not None
    assert len(checkpoint_stems(tmp_path)) == 1


def test_a_checkpoint_of_an_architecture_of_like_shapes_is_refused(tmp_path: Path) -> None:
    train(tmp_path, should_stop=KillAt(5, lambda: True))
    with pytest.raises(CheckpointError, match=r"other settings \(spec, subnets\)"):
        train(tmp_path, net=supernet(dropout=0.3))


def test_a_non_finite_loss_names_step_and_sub_network(tmp_path: Path) -> None:
    net = supernet()
    with torch.no_grad():
        net.get_parameter("stem.weight")[net.subnets[0].widths[0] :] = torch.nan  # only the largest reads these filters
    with pytest.raises(NonFiniteLossError, match=r"the loss of largest is nan at step 1; lower supernet\.train\.lr"):
        train(tmp_path, small_run("none"), net=net)
    assert not checkpoint_stems(tmp_path)


def test_a_diverging_run_ends_before_it_stores_anything(tmp_path: Path) -> None:
    run = small_run(train=TrainSettings(epochs=3, batch_size=16, lr=1e30, warmup_epochs=0.0))
    with pytest.raises(NonFiniteLossError, match=r"at step [0-9]+; lower"):
        train(tmp_path, run)
    assert not (tmp_path / "final.json").exists()


def session(net: Supernet, **bootstrap: Any) -> _Session:
    run = small_run(bootstrapping=BootstrapSettings(**bootstrap))
    return _Session(net, run, 10, torch.device("cpu"))


def test_the_sandwich_draws_distinct_members_that_are_neither_smallest_nor_largest() -> None:
    with_teacher = session(create("ds_tiny", task(), {"num_routes": 6}), num_random=2)
    generator = torch.Generator().manual_seed(0)
    drawn: Counter[str] = Counter()
    for _ in range(300):
        plan = with_teacher.plan(generator)
        assert plan.smallest.name == "subnet-00"
        assert plan.largest.name == "largest"
        assert len({subnet.name for subnet in plan.randoms}) == 2
        drawn.update(subnet.name for subnet in plan.randoms)
    assert set(drawn) == {f"subnet-{k:02d}" for k in range(1, 6)}
    assert min(drawn.values()) > 600 / 5 * 0.7  # each of five is drawn about 120 times


def test_without_a_teacher_the_costliest_member_is_no_random_one() -> None:
    full = create("ds_tiny", task(), {"num_routes": 4}).subnets
    net = rebuild(full.subset([3, 0, 2, 1]))
    plan = session(net, num_random=5).plan(torch.Generator().manual_seed(0))
    assert plan.largest.name == "subnet-03"
    assert plan.smallest.name == "subnet-00"
    assert {subnet.name for subnet in plan.randoms} == {"subnet-01", "subnet-02"}


def test_soft_labels_ramp_in_and_widths_warm_up() -> None:
    state = session(supernet(), soft_ramp_epochs=2.0, teacher_min_updates=3)
    generator = torch.Generator().manual_seed(0)
    weights = []
    for step in (0, 5, 10, 20, 40):
        state.step = step
        weights.append(state.plan(generator).soft_weight)
    assert weights == [0.0, 0.25, 0.5, 1.0, 1.0]
    state.updates = {"subnet-00": 2, "subnet-01": 3, "subnet-02": 9, "largest": 0}
    assert state.plan(generator).cold == {"subnet-00", "largest"}


def test_every_step_moves_the_ema_by_its_own_decay_at_its_own_learning_rate() -> None:
    state = session(supernet(), num_random=1)
    expected = {name: value.clone() for name, value in state.ema.named_parameters()}
    images, labels = NORMALIZATION.apply(random_pixels(8, 8)), random_labels(8)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        losses = state.update(images, labels, state.plan(generator), SingleWorker())
        assert state.optimizer.param_groups[0]["lr"] == learning_rate(step, 40, 10, 0.05)
        assert len(losses) == 3
        decay = min(0.997, (1 + step) / (10 + step))
        for name, parameter in state.student.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
        for name, parameter in state.ema.named_parameters():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)
    assert state.step == 4
    assert state.updates["largest"] == state.updates["subnet-00"] == 4
    assert state.updates["subnet-01"] + state.updates["subnet-02"] == 4


GOLDEN = {
    "largest": (2.26137, 2.26712, 2.24415, 2.14140),
    "subnet-00": (2.29976, 2.29933, 2.29868, 2.29844),
}
"""Losses of the last four steps of the run below. A change that moves them changes the method, not only the code."""


def test_a_tiny_golden_run_does_not_move(uninterrupted: Path) -> None:
    rows = curve_rows(uninterrupted)[-4:]
    for name, losses in GOLDEN.items():
        assert [row["metrics"][f"loss/{name}"] for row in rows] == pytest.approx(losses, rel=2e-4)


def test_learning_rate_rises_linearly_and_falls_as_half_a_cosine() -> None:
    rates = [learning_rate(step, 110, 10, 0.5) for step in range(110)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rates[10] == 0.5
    assert rates[60] == pytest.approx(0.25)
    expected = [0.25 * (1 + math.cos(math.pi * step / 100)) for step in range(100)]
    assert rates[10:] == pytest.approx(expected)
    assert learning_rate(0, 10, 0, 0.5) == 0.5


def test_one_dimensional_parameters_are_not_decayed() -> None:
    net = supernet()
    for name in ("sgd", "adamw"):
        optimizer = make_optimizer(net, TrainSettings(optimizer=name, weight_decay=0.25))
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert len(decay) == len(list(net.parameters()))
        assert all(decay[id(p)] == (0.25 if p.ndim > 1 else 0.0) for p in net.parameters())
    with pytest.raises(ValueError, match="unknown optimizer 'lion'"):
        make_optimizer(net, TrainSettings(optimizer="lion"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BootstrapSettings(mode="iib"), "unknown supernet.bootstrapping.mode 'iib'; known: none"),
        (lambda: TrainSettings(epochs=0), "supernet.train.epochs is 0, but must be at least 1"),
        (lambda: small_run(weights="teacher"), "unknown supernet.weights 'teacher'"),
        (lambda: small_run(keep_checkpoints=0), "keep_checkpoints is 0"),
    ],
)
def test_settings_out_of_range_are_refused_when_built(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
