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
from torch.utils._python_dispatch import TorchDispatchMode

from dsnet.data.training_images import InMemoryImages
from dsnet.errors import CheckpointError, ConfigError, NonFiniteLossError
from dsnet.families import create, rebuild
from dsnet.network.batchnorm import recalibrate
from dsnet.network.supernet import Supernet
from dsnet.stored.checkpoint import load_checkpoint, load_supernet
from dsnet.stored.names import checkpoint_stems
from dsnet.training.losses import scale_penalty
from dsnet.training.optimization import learning_rate, make_optimizer
from dsnet.training.settings import REGIMES, BootstrapSettings, Regime, TrainSettings
from dsnet.training.step import StepPlan
from dsnet.training.supernet import STUDENT_VIEW, TrainingCallbacks, _Session, train_supernet
from dsnet.training.supernet_run import SupernetRun
from dsnet.training.workers import SingleWorker
from tests.dsnet.samples import (
    NORMALIZATION,
    SMALL_OPTIONS,
    random_images,
    random_labels,
    random_pixels,
    small_run,
    small_supernet,
    task,
)

NUM_IMAGES = 52  # 3 whole batches of 16 an epoch, and a rest
OPTIONS = {"width": 0.5, "num_routes": 3, "dropout": 0.2}


class Kept:
    """A reporter that keeps the reports."""

    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []

    def on_curve(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)


class Killed(BaseException):
    """Stands for a kill of the process: nothing catches it."""


class KillAt:
    """A `should_stop` that raises at its n-th call, as a kill at that step would end the
    process."""

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
    run = run if run is not None else small_run()
    net = keywords.pop("net", None)
    images = keywords.pop("images", random_pixels(NUM_IMAGES, 8))
    data = InMemoryImages(images, keywords.pop("labels", random_labels(NUM_IMAGES)), run.augmentation)
    workers = keywords.pop("workers", None)
    return train_supernet(
        net if net is not None else supernet(),
        data,
        run,
        folder=folder,
        workers=workers,
        callbacks=TrainingCallbacks(**keywords),
    )


def kill(folder: Path, call: int, run: SupernetRun | None = None) -> None:
    """A run that is killed at its n-th step: it leaves the checkpoints of whole epochs."""
    with pytest.raises(Killed):
        train(folder, run, should_stop=KillAt(call, die))


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


@pytest.mark.slow
@pytest.mark.parametrize("calls", [(1,), (2,), (4,), (5,), (8, 3, 2)])
@pytest.mark.parametrize("way", ["stopped", "killed"])
def test_stop_and_resume_is_bit_identical_to_an_uninterrupted_run(
    uninterrupted: Path, tmp_path: Path, way: str, calls: tuple[int, ...]
) -> None:
    for call in calls:
        if way == "stopped":
            assert train(tmp_path, should_stop=KillAt(call, lambda: True)) is None
        else:
            kill(tmp_path, call)
        assert not (tmp_path / "final.json").exists()
    assert train(tmp_path) == tmp_path / "final"
    assert final_bytes(tmp_path) == final_bytes(uninterrupted)
    assert curve_rows(tmp_path) == curve_rows(uninterrupted)


def test_a_stop_keeps_the_steps_of_its_epoch(uninterrupted: Path, tmp_path: Path) -> None:
    train(tmp_path, should_stop=KillAt(6, lambda: True))
    assert [stem.name for stem in checkpoint_stems(tmp_path)] == ["epoch-00001", "epoch-00001-step-00000005"]
    calls = KillAt(99, die)
    train(tmp_path, should_stop=calls)
    assert calls.count == 12 - 5  # steps that were left
    assert final_bytes(tmp_path) == final_bytes(uninterrupted)


def test_whoever_looks_at_the_end_of_an_epoch_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, list[str], bool]] = []

    def look(epochs: int, net: Supernet) -> None:
        torch.rand(7)
        is_kept = all(not parameter.requires_grad for parameter in net.parameters())  # the EMA copy's
        seen.append((epochs, [stem.name for stem in checkpoint_stems(tmp_path)][-1:], is_kept))

    final = train(tmp_path, should_stop=KillAt(8, lambda: True), on_epoch=look)
    assert final is None
    assert [epochs for epochs, *_ in seen] == [1, 2]
    final = train(tmp_path, on_epoch=look)
    # The run stopped inside the third epoch, so the second one's end is not met again; the last
    # one's is the result's.
    assert seen == [(epochs, [f"epoch-{epochs:05d}"], True) for epochs in (1, 2, 3)]
    assert final is not None
    assert load_checkpoint(final)[1]["sha256"] == load_checkpoint(uninterrupted / "final")[1]["sha256"]


def test_a_run_that_goes_on_from_the_end_of_an_epoch_shows_it_again(tmp_path: Path) -> None:
    seen: list[int] = []

    def look(epochs: int, net: Supernet) -> None:
        seen.append(epochs)
        if len(seen) == 2:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path, on_epoch=look)
    train(tmp_path, on_epoch=look)
    assert seen == [1, 2, 2, 3]


@pytest.mark.slow
def test_curves_do_not_tell_where_a_run_was_stopped(tmp_path: Path) -> None:
    """Nine steps an epoch make a report of every second one: a stop between two reports must not
    change the means."""
    run = small_run(train=replace(small_run().train, epochs=2, batch_size=4))
    images, labels = random_pixels(36, 8), random_labels(36)
    train(tmp_path / "a", run, images=images, labels=labels)
    for call in (2, 5):
        train(tmp_path / "b", run, images=images, labels=labels, should_stop=KillAt(call, lambda: True))
    train(tmp_path / "b", run, images=images, labels=labels)
    assert [row["step"] for row in curve_rows(tmp_path / "a")] == [2, 4, 6, 8, 9, 10, 12, 14, 16, 18]
    assert curve_rows(tmp_path / "b") == curve_rows(tmp_path / "a")


def test_a_kill_between_tensors_and_json_of_a_checkpoint_is_survived(uninterrupted: Path, tmp_path: Path) -> None:
    kill(tmp_path, 5)
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", REGIMES)
def test_every_regime_and_optimiser_lowers_the_loss(tmp_path: Path, name: str) -> None:
    regime = REGIMES[name]
    settings = TrainSettings(
        epochs=8, batch_size=16, lr=0.02 if name == "ib" else 0.1, optimizer="adamw" if name == "ib" else "sgd"
    )
    labels = random_labels(NUM_IMAGES, 3)
    images = random_pixels(NUM_IMAGES, 8) // 4 + (80 * labels[:, None, None, None]).to(torch.uint8)
    net = create("ds_tiny", task(image_size=8), OPTIONS, norm=regime.norm, seed=4)
    train(tmp_path, small_run(train=settings, regime=regime), net=net, images=images, labels=labels)
    rows = [row["metrics"] for row in curve_rows(tmp_path)]
    for name, share in (("loss/largest", 0.8), ("loss/subnet-00", 0.95)):
        assert sum(row[name] for row in rows[-3:]) < share * sum(row[name] for row in rows[:3]), name
    final, _ = load_supernet(tmp_path / "final")
    assert final.spec.norm == (regime.norm or "private_stats")
    untouched = [name for name, value in final.named_buffers() if ".updates_" in name and int(value) == 0]
    assert untouched == []


MVCO = replace(small_run().regime, views="own")


def test_two_equal_views_are_in_place_bootstrapping_to_the_bit(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "two", small_run(regime=MVCO))
    assert final_bytes(tmp_path / "two") != final_bytes(uninterrupted)
    monkeypatch.setattr("dsnet.training.supernet.TEACHER_VIEW", STUDENT_VIEW)
    train(tmp_path / "equal", small_run(regime=MVCO))
    assert final_bytes(tmp_path / "equal") == final_bytes(uninterrupted)


def test_a_resumed_training_repeats_both_views(tmp_path: Path) -> None:
    run = small_run(regime=MVCO, train=replace(small_run().train, epochs=2, accumulate=2))
    train(tmp_path / "a", run)
    train(tmp_path / "b", run, should_stop=KillAt(2, lambda: True))  # within an epoch
    kill(tmp_path / "b", 3, run)
    train(tmp_path / "b", run)
    assert final_bytes(tmp_path / "a") == final_bytes(tmp_path / "b")


def test_all_widths_train_in_every_step(tmp_path: Path) -> None:
    train(tmp_path, small_run(regime=REGIMES["ce"]))
    for row in curve_rows(tmp_path):
        losses = {name for name in row["metrics"] if name.startswith("loss/")}
        assert losses == {"loss/largest", "loss/subnet-00", "loss/subnet-01", "loss/subnet-02"}


def test_statistics_that_only_recalibration_makes_are_left_alone_by_training(tmp_path: Path) -> None:
    net = create("ds_tiny", task(image_size=8), OPTIONS, norm="recalibrate", seed=4)
    train(tmp_path, small_run(regime=REGIMES["us_net"]), net=net)
    tensors, _ = load_checkpoint(checkpoint_stems(tmp_path)[-1])
    counts = {int(value) for name, value in tensors.items() if ".updates_" in name}
    assert counts == {0}


def test_one_step_of_micro_batches_is_the_mean_of_their_gradients() -> None:
    """Without BatchNorm, whose statistics are those of a micro-batch, it is the step on the whole
    batch."""
    states = []
    for parts in (1, 4):
        net = create("ds_tiny", task(image_size=8), {**OPTIONS, "dropout": 0.0}, norm="group_norm", seed=4)
        state = session(net, run=small_run(train=TrainSettings(batch_size=16, accumulate=parts)))
        images = NORMALIZATION.apply(random_pixels(16, 8))
        losses = state.update(images, random_labels(16), state.plan(state.between[:1]), SingleWorker())
        states.append((state, losses))
    (whole, whole_losses), (split, split_losses) = states
    assert whole_losses.keys() == split_losses.keys()
    for name, loss in whole_losses.items():
        torch.testing.assert_close(split_losses[name], loss, rtol=1e-5, atol=1e-6)
    for first, second in zip(whole.student.parameters(), split.student.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"precision": "bf16"}, {"channels_last": True}, {"accumulate": 2}, {"schedule": "one_cycle"}, {"grad_clip": 0.5}],
)
def test_every_way_of_training_resumes_bit_identically(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = small_run(train=replace(small_run().train, epochs=2, **settings))
    train(tmp_path / "a", run)
    for call in (2, 3):
        train(tmp_path / "b", run, should_stop=KillAt(call, lambda: True))
    train(tmp_path / "b", run)
    assert final_bytes(tmp_path / "a") == final_bytes(tmp_path / "b")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_optimiser_states_come_back_in_the_memory_order_of_their_weights(
    tmp_path: Path, optimizer: str, channels_last: bool
) -> None:
    run = small_run(train=TrainSettings(epochs=2, batch_size=16, optimizer=optimizer, channels_last=channels_last))
    train(tmp_path, run, should_stop=KillAt(3, lambda: True))
    state = session(supernet(), run=run)
    state.steps_per_epoch = 3
    state.load(checkpoint_stems(tmp_path)[-1])
    compared = 0
    for parameter, values in state.optimizer.state.items():
        for value in values.values():
            if value is not None and value.shape == parameter.shape:
                assert value.stride() == parameter.stride()
                compared += parameter.ndim == 4
    assert compared >= 5


@pytest.mark.parametrize("norm", ["private_affine", "group_norm"])
def test_weights_that_join_late_train_with_every_optimiser(tmp_path: Path, norm: str) -> None:
    for optimizer in ("sgd", "adamw"):
        net = create("ds_tiny", task(image_size=8), {**OPTIONS, "num_routes": 6}, norm=norm, seed=4)
        run = small_run(train=TrainSettings(epochs=1, batch_size=8, optimizer=optimizer, lr=0.01))
        assert train(tmp_path / optimizer, run, net=net) is not None


class NoReading(TorchDispatchMode):
    """Refuses operations that make the host wait for the device: reading a value."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(function), "a value was read from the device"
        assert "nonzero" not in str(function), "the shape of a result was read from the device"
        return function(*arguments, **(keywords or {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("family", ["ds_tiny", "ds_resnet"])
def test_a_step_never_waits_for_the_device(name: str, family: str) -> None:
    regime = REGIMES[name]
    net = small_supernet(family)
    if regime.norm is not None:
        net = create(family, task(), SMALL_OPTIONS[family], norm=regime.norm)
    run = small_run(regime=regime, train=TrainSettings(batch_size=8, grad_clip=1.0, accumulate=2))
    state = session(net, run=run)
    images, labels = random_images(8), random_labels(8)
    plan = drawn_plan(state, torch.Generator().manual_seed(0))
    state.update(images, labels, plan, SingleWorker())  # the first one makes the optimiser's state
    with NoReading():
        state.update(images, labels, plan, SingleWorker())


def test_a_stop_after_a_non_finite_loss_tells_the_step_and_stores_nothing(tmp_path: Path) -> None:
    run = small_run(train=TrainSettings(epochs=3, batch_size=4, lr=1e6, warmup_epochs=0.0))
    images, labels = random_pixels(64, 8), random_labels(64)
    with pytest.raises(NonFiniteLossError, match=r"is nan at step \d+; lower"):
        train(tmp_path, run, images=images, labels=labels, should_stop=KillAt(12, lambda: True))
    assert not list(tmp_path.glob("epoch-*"))


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    kill(tmp_path, 5)
    (tmp_path / "epoch-00009.safetensors").write_bytes(b"left over")
    train(tmp_path)
    assert {path.stem for path in tmp_path.glob("epoch-*.safetensors")} == {"epoch-00003", "epoch-00004"}


def test_another_number_of_steps_an_epoch_is_refused(tmp_path: Path) -> None:
    """Three workers would make smaller whole batches of these, and a step would mean something
    else."""
    run = small_run(train=TrainSettings(epochs=2, batch_size=11))
    train(tmp_path, run, should_stop=KillAt(3, lambda: True))
    three = SingleWorker()
    three.size = 3
    with pytest.raises(CheckpointError, match="continue with as many workers as before"):
        train(tmp_path, run, workers=three)


def test_no_epochs_keep_the_weights_and_recalibrate_them(tmp_path: Path) -> None:
    net = supernet()
    before = {name: value.clone() for name, value in net.named_parameters()}
    assert train(tmp_path, small_run(train=TrainSettings(epochs=0, batch_size=16)), net=net) is not None
    final, _ = load_supernet(tmp_path / "final")
    assert all(torch.equal(value, before[name]) for name, value in final.named_parameters())
    assert {int(value) for name, value in final.named_buffers() if ".updates_" in name} == {1}


def test_statistics_can_be_kept_as_they_are(tmp_path: Path) -> None:
    net = supernet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    train(tmp_path, small_run(train=TrainSettings(epochs=0, batch_size=16), recalibration_images=0), net=net)
    final, _ = load_supernet(tmp_path / "final")
    assert all(torch.equal(value, before[name]) for name, value in final.state_dict().items())


@pytest.mark.slow
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


@pytest.mark.slow
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
    """A last batch of one image would weigh as much as a full one, and has no variance where a
    layer has one pixel."""
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


@pytest.mark.slow
def test_checkpoints_can_be_rarer_than_epochs(uninterrupted: Path, tmp_path: Path) -> None:
    run = small_run(train=replace(small_run().train, checkpoint_every=3))
    kill(tmp_path, 11, run)
    assert [stem.name for stem in checkpoint_stems(tmp_path)] == ["epoch-00003"]
    train(tmp_path, run)
    assert [stem.name for stem in checkpoint_stems(tmp_path)] == ["epoch-00003", "epoch-00004"]
    assert final_bytes(tmp_path) == final_bytes(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "torn json", "no object", "no version"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path: Path, damage: str) -> None:
    kill(tmp_path, 5)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 5},
        {"train": TrainSettings(epochs=9, batch_size=16)},
        {"regime": REGIMES["ieb"]},
        {"bootstrapping": BootstrapSettings(ema_decay=0.9)},
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
    with pytest.raises(
        NonFiniteLossError, match=r"the loss of sub-network largest is nan at step 1; lower supernet\.train\.lr"
    ):
        train(tmp_path, small_run("none"), net=net)
    assert not checkpoint_stems(tmp_path)


def test_a_diverging_run_ends_before_it_stores_anything(tmp_path: Path) -> None:
    run = small_run(train=TrainSettings(epochs=3, batch_size=16, lr=1e6, warmup_epochs=0.0))
    with pytest.raises(NonFiniteLossError, match=r"at step [0-9]+; lower"):
        train(tmp_path, run)
    assert not (tmp_path / "final.json").exists()


def session(net: Supernet, num_random: int = 2, run: SupernetRun | None = None, **bootstrap: Any) -> _Session:
    settings = small_run(regime=Regime(num_random=num_random), bootstrapping=BootstrapSettings(**bootstrap))
    return _Session(net, run if run is not None else settings, 10, torch.device("cpu"))


def drawn_plan(state: _Session, generator: torch.Generator) -> StepPlan:
    return state.plan(state.draw(generator))


def test_the_sandwich_draws_distinct_members_that_are_neither_smallest_nor_largest() -> None:
    with_teacher = session(create("ds_tiny", task(), {"num_routes": 6}), num_random=2)
    generator = torch.Generator().manual_seed(0)
    drawn: Counter[str] = Counter()
    for _ in range(300):
        plan = drawn_plan(with_teacher, generator)
        assert plan.smallest.name == "subnet-00"
        assert plan.largest.name == "largest"
        assert len({subnet.name for subnet in plan.randoms}) == 2
        drawn.update(subnet.name for subnet in plan.randoms)
    assert set(drawn) == {f"subnet-{k:02d}" for k in range(1, 6)}
    assert min(drawn.values()) > 600 / 5 * 0.7  # each of five is drawn about 120 times


def test_without_a_teacher_the_costliest_member_is_no_random_one() -> None:
    full = create("ds_tiny", task(), {"num_routes": 4}).subnets
    net = rebuild(full.subset([3, 0, 2, 1]))
    plan = drawn_plan(session(net, num_random=5), torch.Generator().manual_seed(0))
    assert plan.largest.name == "subnet-03"
    assert plan.smallest.name == "subnet-00"
    assert {subnet.name for subnet in plan.randoms} == {"subnet-01", "subnet-02"}


def test_soft_labels_ramp_in_and_widths_warm_up() -> None:
    state = session(supernet(), soft_ramp_epochs=2.0, teacher_min_updates=3)
    weights = []
    for step in (0, 5, 10, 20, 40):
        state.step = step
        weights.append(state.plan([]).soft_weight)
    assert weights == [0.0, 0.25, 0.5, 1.0, 1.0]
    state.updates = {"subnet-00": 2, "subnet-01": 3, "subnet-02": 9, "largest": 0}
    assert state.plan([]).cold == {"subnet-00", "largest"}


def test_soft_labels_ramp_to_their_weight() -> None:
    run = small_run(train=TrainSettings(soft_weight=0.8), bootstrapping=BootstrapSettings(soft_ramp_epochs=2.0))
    state, weights = session(supernet(), run=run), []
    for step in (0, 5, 20, 40):
        state.step = step
        weights.append(state.plan([]).soft_weight)
    assert weights == pytest.approx([0.0, 0.2, 0.8, 0.8])


def test_temperature_and_weight_of_the_settings_arrive_in_the_step() -> None:
    losses = {}
    for name, train in (("plain", {}), ("soft", {"temperature": 3.0}), ("labels", {"soft_weight": 0.0})):
        run = small_run("inplace_distillation", train=TrainSettings(batch_size=16, **train), bootstrapping=FULL)
        state = session(supernet(dropout=0.0), run=run)
        found = state.update(
            NORMALIZATION.apply(random_pixels(16, 8)), random_labels(16), state.plan([]), SingleWorker()
        )
        losses[name] = found
    assert len({float(each["largest"]) for each in losses.values()}) == 1
    assert len({float(each["subnet-00"]) for each in losses.values()}) == 3
    alone = session(supernet(dropout=0.0), run=small_run("none", train=TrainSettings(batch_size=16)))
    found = alone.update(NORMALIZATION.apply(random_pixels(16, 8)), random_labels(16), alone.plan([]), SingleWorker())
    assert torch.equal(found["subnet-00"], losses["labels"]["subnet-00"])


FULL = BootstrapSettings(trust="full")


class Noted(SingleWorker):
    """A worker that notes the gradients on which the optimiser steps."""

    def average_gradients(self, parameters: Any) -> None:
        self.gradients = [None if each.grad is None else each.grad.clone() for each in parameters]


@pytest.mark.parametrize("norm", ["private_stats", "private_affine", "recalibrate"])
@pytest.mark.parametrize("train", [{}, {"accumulate": 4}, {"precision": "bf16"}, {"grad_clip": 1e-3}], ids=str)
def test_the_penalty_adds_its_factor_times_the_sign_of_every_scale(norm: str, train: Mapping[str, Any]) -> None:
    """Once a step: neither micro-batches nor autocast divide it away."""
    noted = []
    for factor in (0.0, 0.25):
        net = create("ds_tiny", task(image_size=8), {**OPTIONS, "dropout": 0.0}, norm=norm, seed=4)
        with torch.no_grad():
            for bank in net.batch_norms():
                for scale in bank.scales():
                    scale[::2] = -0.5
                    scale[0] = 0.0
        before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        state = session(net, run=small_run(train=TrainSettings(batch_size=16, gamma_l1=factor, **train)))
        worker = Noted()
        images = NORMALIZATION.apply(random_pixels(16, 8))
        state.update(images, random_labels(16), state.plan(state.between[:1]), worker)
        noted.append(dict(zip(before, worker.gradients, strict=True)))
    scales = {id(scale) for bank in net.batch_norms() for scale in bank.scales()}
    names = {name for name, parameter in net.named_parameters() if id(parameter) in scales}
    assert len(names) >= 5
    plain, penalised = noted
    for name, gradient in penalised.items():
        own = plain[name]
        if name not in names:
            assert (gradient is None) == (own is None), name
            assert gradient is None or own is None or torch.equal(gradient, own), name
            continue
        share = 0.25 * before[name].sign()
        assert gradient is not None, name
        assert torch.equal(gradient, share if own is None else own + share), name
        assert gradient.dtype == torch.float32


def test_the_penalty_makes_scales_small() -> None:
    sizes = []
    for factor in (0.0, 0.2):
        state = session(supernet(), run=small_run(train=TrainSettings(batch_size=16, lr=0.05, gamma_l1=factor)))
        generator = torch.Generator().manual_seed(0)
        for _ in range(8):
            images = NORMALIZATION.apply(random_pixels(16, 8))
            state.update(images, random_labels(16), drawn_plan(state, generator), SingleWorker())
        sizes.append(scale_penalty(state.norms).item())
    assert sizes[1] < 0.95 * sizes[0]


def test_a_penalty_on_scales_that_are_not_there_is_refused() -> None:
    net = create("ds_tiny", task(image_size=8), OPTIONS, norm="group_norm")
    with pytest.raises(ConfigError, match=r"gamma_l1 is 1e-05, but this network has no BatchNorm"):
        session(net, run=small_run(train=TrainSettings(gamma_l1=1e-5)))


def test_the_largest_trains_alone_first_where_that_is_asked_for() -> None:
    state = session(supernet(), largest_first=0.25)
    taking_part = []
    for step in (0, state.num_steps // 4 - 1, state.num_steps // 4, state.num_steps - 1):
        state.step = step
        taking_part.append([subnet.name for subnet in state.plan(state.between[:1]).smaller])
    assert taking_part == [[], [], ["subnet-01", "subnet-00"], ["subnet-01", "subnet-00"]]


def test_a_teacher_that_starts_with_good_statistics_is_warm() -> None:
    net = supernet()
    recalibrate(net, [NORMALIZATION.apply(random_pixels(8, 8))] * 5)
    assert session(net, teacher_min_updates=5).plan([]).cold == frozenset()
    assert session(net, teacher_min_updates=6).plan([]).cold == {subnet.name for subnet in net.subnets.all}


def test_a_teacher_without_statistics_is_always_cold() -> None:
    net = create("ds_tiny", task(image_size=8), OPTIONS, norm="recalibrate")
    state = session(net, teacher_min_updates=0)
    assert state.plan([]).cold == {subnet.name for subnet in net.subnets.all}


def test_every_step_moves_the_ema_by_its_own_decay_at_its_own_learning_rate() -> None:
    state = session(supernet(), num_random=1)
    expected = {name: value.clone() for name, value in state.ema.module.named_parameters()}
    images, labels = NORMALIZATION.apply(random_pixels(8, 8)), random_labels(8)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        losses = state.update(images, labels, drawn_plan(state, generator), SingleWorker())
        assert state.optimizer.param_groups[0]["lr"] == learning_rate(step, 40, 10, state.run.train)
        assert len(losses) == 3
        decay = min(0.997, (1 + step) / (10 + step))
        for name, parameter in state.student.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
        for name, parameter in state.ema.module.named_parameters():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)
    assert state.step == 4
    assert state.updates["largest"] == state.updates["subnet-00"] == 4
    assert state.updates["subnet-01"] + state.updates["subnet-02"] == 4


GOLDEN = {
    "largest": (2.30634, 2.32298, 2.25550, 2.17323),
    "subnet-00": (2.30039, 2.29993, 2.29950, 2.29930),
}
"""Losses of the last four steps of the run below. A change that moves them changes the method, not
only the code."""


def test_a_tiny_golden_run_does_not_move(uninterrupted: Path) -> None:
    rows = curve_rows(uninterrupted)[-4:]
    for name, losses in GOLDEN.items():
        assert [row["metrics"][f"loss/{name}"] for row in rows] == pytest.approx(losses, rel=2e-4)


def rates(schedule: str, num_steps: int, warmup: int, peak: float = 0.5) -> list[float]:
    settings = TrainSettings(lr=peak, schedule=schedule)
    return [learning_rate(step, num_steps, warmup, settings) for step in range(num_steps)]


def test_learning_rate_rises_linearly_and_falls_as_half_a_cosine() -> None:
    found = rates("cosine", 110, 10)
    assert found[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert found[10] == 0.5
    assert found[60] == pytest.approx(0.25)
    assert found[10:] == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 100)) for step in range(100)])
    assert rates("cosine", 10, 0)[0] == 0.5


def test_one_cycle_equals_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    # torch counts both ends of each flank: its last step stands at the end value, and its peak one
    # step before the warm-up's end.
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=101, pct_start=21 / 101)
    expected = []
    for _ in range(101):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cycle.step() if len(expected) < 101 else None
    assert [*rates("one_cycle", 100, 20)] == pytest.approx(expected[:100], rel=1e-6)


def test_a_constant_rate_stays_after_its_warm_up() -> None:
    assert rates("constant", 6, 2) == [0.25, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert rates("constant", 3, 0) == [0.5] * 3


def test_one_dimensional_parameters_are_not_decayed() -> None:
    net = supernet()
    for name in ("sgd", "adamw"):
        optimizer = make_optimizer(net, TrainSettings(optimizer=name, weight_decay=0.25))
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert len(decay) == len(list(net.parameters()))
        assert all(decay[id(p)] == (0.25 if p.ndim > 1 else 0.0) for p in net.parameters())


def test_micro_batches_of_one_image_are_refused(tmp_path: Path) -> None:
    """The settings may be fine, and the training split too small for them."""
    with pytest.raises(ConfigError, match=r"\d+ images gives 1 worker.* x 512 micro-batch.* fewer than 2 each"):
        train(tmp_path, small_run(train=TrainSettings(batch_size=1024, accumulate=512)))
