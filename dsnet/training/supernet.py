"""Stage I: training a supernet with in-place bootstrapping (DS-Net, arXiv 2103.13258; METHODS 3).

`supernet_step` is the whole method in one place; `train_supernet` is the loop around it: schedule, EMA, curves, checkpoints, resume.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dsnet.batchnorm import recalibrate
from dsnet.checkpoint import load_checkpoint, load_exactly, save_checkpoint, save_supernet, supernet_meta, tensors_below
from dsnet.data.augment import Augmentation, augment
from dsnet.data.normalization import Normalization
from dsnet.ema import ema_decay, frozen_copy, update_ema
from dsnet.errors import CheckpointError, NonFiniteLossError
from dsnet.losses import smoothed_one_hot, soft_cross_entropy
from dsnet.seeds import derive_seed
from dsnet.space import Subnet
from dsnet.supernet import Supernet, state_for_saving
from dsnet.training.workers import SingleWorker, Workers

MODES = ("none", "inplace_distillation", "ib", "ieb")
FINAL = "final"


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The optimisation of Stage I."""

    epochs: int = 30
    batch_size: int = 128
    """Images a step, over all workers together."""
    optimizer: str = "sgd"
    """`sgd` (Nesterov) or `adamw`."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    """Not applied to 1-d parameters."""
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.1
    grad_clip: float | None = None
    """Largest gradient norm, or None."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"supernet.train.{name} is {getattr(self, name)}, but must be at least 1")


@dataclass(frozen=True, kw_only=True)
class BootstrapSettings:
    """Who teaches the sub-networks."""

    mode: str = "ib"
    """One of `MODES`."""
    ema_decay: float = 0.997
    ema_warmup: bool = True
    """Ours: start with a short memory (see `ema.ema_decay`)."""
    soft_ramp_epochs: float = 0.0
    """Ours: epochs over which the soft labels take over from the hard ones."""
    num_random: int = 2
    teacher_min_updates: int = 100
    """A teacher width with fewer updates runs on batch statistics."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown supernet.bootstrapping.mode {self.mode!r}; known: {', '.join(MODES)}")


@dataclass(frozen=True, kw_only=True)
class SupernetRun:
    """Everything that decides a supernet's weights beside its architecture and data."""

    train: TrainSettings = TrainSettings()
    bootstrapping: BootstrapSettings = BootstrapSettings()
    augmentation: Augmentation
    normalization: Normalization
    seed: int = 0
    weights: str = "ema"
    """Which weights are kept at the end: `ema` or `student`."""
    recalibration_images: int | None = None
    """Images of the training split for BatchNorm recalibration; None takes all."""
    recalibration_batch: int = 256
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if self.weights not in ("ema", "student"):
            raise ValueError(f"unknown supernet.weights {self.weights!r}; known: ema, student")
        if self.keep_checkpoints < 1:
            raise ValueError(f"supernet.keep_checkpoints is {self.keep_checkpoints}, but must be at least 1")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping, saved with every checkpoint."""
        return asdict(self)


class Reporter(Protocol):
    """Hears how training goes."""

    def on_curve(self, record: Mapping[str, Any]) -> None:
        """A point of the loss curves: step, num_steps, epoch, time_ms, metrics."""
        ...


class SilentReporter:
    """Hears and says nothing."""

    def on_curve(self, record: Mapping[str, Any]) -> None:
        """Nothing."""


@dataclass(frozen=True)
class StepPlan:
    """Which sub-networks take part in one step (the sandwich rule), and how they are taught."""

    largest: Subnet
    randoms: tuple[Subnet, ...]
    smallest: Subnet
    soft_weight: float
    """Weight of the soft labels in 0..1; the rest goes to the hard ones."""
    cold: frozenset[str]
    """Names of sub-networks whose teacher copy has had too few updates for its running statistics."""


def supernet_step(
    student: Supernet,
    teacher: Supernet | None,
    images: Tensor,
    labels: Tensor,
    plan: StepPlan,
    smoothing: float,
    mode: str,
) -> dict[str, Tensor]:
    """Forward and backward of one step for every sub-network of `plan`; gradients accumulate unweighted (METHODS 3).

    The sub-networks that share a trunk run it once, forward and backward: the gradients are the same up to summation order.

    Args:
        student: the supernet in training mode.
        teacher: its EMA copy; needed by `ib` and `ieb`.
        images: [B, C, H, W], normalised.
        labels: [B].
        plan: the step's sub-networks.
        smoothing: label smoothing of the largest's hard labels.
        mode: one of `MODES`.

    Returns:
        the detached loss of each sub-network, by name.
    """
    num_classes = student.spec.num_classes
    logits = student(images, plan.largest)
    loss = soft_cross_entropy(logits, smoothed_one_hot(labels, num_classes, smoothing))
    loss.backward()
    losses = {plan.largest.name: loss.detach()}
    hard = smoothed_one_hot(labels, num_classes, 0.0)
    soft = _soft_targets(logits.detach(), teacher, images, plan, mode)
    for group in student.by_trunk([*plan.randoms, plan.smallest]):
        features = student.trunk(images, group[0]).features
        total = torch.zeros((), device=images.device)
        for subnet in group:
            target = hard if mode == "none" else plan.soft_weight * soft[subnet.name] + (1.0 - plan.soft_weight) * hard
            loss = soft_cross_entropy(student.tail(features, subnet), target)
            losses[subnet.name] = loss.detach()
            total = total + loss
        total.backward()
    return losses


@torch.no_grad()
def _soft_targets(
    student_logits: Tensor, teacher: Supernet | None, images: Tensor, plan: StepPlan, mode: str
) -> dict[str, Tensor]:
    """The distribution that each of the smaller sub-networks learns from."""
    small = [*plan.randoms, plan.smallest]
    if mode == "none":
        return {}
    if mode == "inplace_distillation" or teacher is None:
        probabilities = student_logits.softmax(1)
        return {subnet.name: probabilities for subnet in small}
    largest = _teach(teacher, images, plan.largest, plan).softmax(1)
    targets = {subnet.name: largest for subnet in small}
    if mode == "ieb" and plan.randoms:
        # Ours: the ensemble uses the students' own random widths; the published code draws them again.
        ensemble = [largest, *(_teach(teacher, images, subnet, plan).softmax(1) for subnet in plan.randoms)]
        targets[plan.smallest.name] = torch.stack(ensemble).mean(0)
    return targets


def _teach(teacher: Supernet, images: Tensor, subnet: Subnet, plan: StepPlan) -> Tensor:
    """Teacher logits; a width with too few updates normalises by the batch and leaves its running statistics alone."""
    for norm in teacher.batch_norms():
        norm.momentum = 0.0
        norm.train(subnet.name in plan.cold)
    return teacher(images, subnet)


def learning_rate(step: int, num_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * peak * (1.0 + math.cos(math.pi * progress))


def make_optimizer(supernet: Supernet, settings: TrainSettings) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or AdamW, foreach form; 1-d parameters are not decayed."""
    decayed = [parameter for parameter in supernet.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in supernet.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    match settings.optimizer:
        case "sgd":
            return torch.optim.SGD(
                groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0, foreach=True
            )
        case "adamw":
            return torch.optim.AdamW(groups, lr=settings.lr, foreach=True)
    raise ValueError(f"unknown optimizer {settings.optimizer!r}; known: sgd, adamw")


class _Session:
    """The state of one training run: what a checkpoint holds."""

    def __init__(self, supernet: Supernet, run: SupernetRun, steps_per_epoch: int, device: torch.device) -> None:
        self.run = run
        self.device = device
        self.student = supernet.to(device).train()
        ema = frozen_copy(self.student)
        assert isinstance(ema, Supernet)
        self.ema = ema
        self.optimizer = make_optimizer(self.student, run.train)
        self.steps_per_epoch = steps_per_epoch
        self.num_steps = run.train.epochs * steps_per_epoch
        self.step = 0
        self.updates = {subnet.name: 0 for subnet in supernet.subnets.all}
        members = supernet.subnets
        order = members.by_madds()
        self.smallest = members[order[0]]
        self.largest = members.largest
        self.candidates = [members[k] for k in order[1:] if members[k] != self.largest]

    def plan(self, generator: torch.Generator) -> StepPlan:
        """Draw the step's sandwich."""
        bootstrap = self.run.bootstrapping
        count = min(bootstrap.num_random, len(self.candidates))
        picks = torch.randperm(len(self.candidates), generator=generator)[:count].tolist()
        randoms = tuple(self.candidates[pick] for pick in picks)
        ramp_steps = bootstrap.soft_ramp_epochs * self.steps_per_epoch
        soft_weight = 1.0 if ramp_steps <= 0 else min(1.0, self.step / ramp_steps)
        cold = frozenset(name for name, count in self.updates.items() if count < bootstrap.teacher_min_updates)
        return StepPlan(self.largest, randoms, self.smallest, soft_weight, cold)

    def update(self, images: Tensor, labels: Tensor, plan: StepPlan, workers: Workers) -> dict[str, Tensor]:
        """One optimiser step and one EMA step."""
        settings, bootstrap = self.run.train, self.run.bootstrapping
        warmup_steps = round(settings.warmup_epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.num_steps, warmup_steps, settings.lr)
        self.optimizer.zero_grad(set_to_none=True)
        losses = supernet_step(self.student, self.ema, images, labels, plan, settings.label_smoothing, bootstrap.mode)
        workers.average_gradients(self.student.parameters())
        if settings.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), settings.grad_clip)
        self.optimizer.step()
        update_ema(self.ema, self.student, ema_decay(self.step, bootstrap.ema_decay, bootstrap.ema_warmup))
        for name in losses:
            self.updates[name] += 1
        self.step += 1
        return losses

    def save(self, stem: Path) -> None:
        """Write a checkpoint from which training continues bit-identically."""
        tensors = {f"student.{name}": value for name, value in state_for_saving(self.student).items()}
        tensors |= {f"ema.{name}": value.clone() for name, value in state_for_saving(self.ema).items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if value is not None:
                    tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value).cpu().contiguous()
        meta = {"step": self.step, "updates": self.updates, "run": self.run.to_json(), **supernet_meta(self.student)}
        save_checkpoint(stem, tensors, meta)

    def load(self, stem: Path) -> None:
        """Continue from a checkpoint of the same run.

        Raises:
            CheckpointError: it is damaged or belongs to another run.
        """
        tensors, meta = load_checkpoint(stem)
        expected = json.loads(json.dumps({"run": self.run.to_json(), **supernet_meta(self.student)}))
        stored = {**meta, "run": _without_housekeeping(meta.get("run"))}
        expected["run"] = _without_housekeeping(expected["run"])
        changed = [name for name, value in expected.items() if stored.get(name) != value]
        if changed:
            raise CheckpointError(
                f"{stem}.json: was written under other settings ({', '.join(changed)}); remove {stem.parent} to train anew"
            )
        load_exactly(self.student, tensors_below(tensors, "student."), str(stem))
        load_exactly(self.ema, tensors_below(tensors, "ema."), str(stem))
        state: dict[int, dict[str, Any]] = {}
        for name, value in tensors_below(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        if not {"step", "updates"} <= meta.keys():
            raise CheckpointError(
                f"{stem}.json: incomplete (no step or updates); delete it to continue from the one before"
            )
        self.step, self.updates = meta["step"], meta["updates"]


def _without_housekeeping(run: Any) -> Any:
    """The settings that decide the weights: how often and how many checkpoints are kept may change between launches."""
    if not isinstance(run, dict) or not isinstance(run.get("train"), dict):
        return run
    train = {name: value for name, value in run["train"].items() if name != "checkpoint_every"}
    return {**{name: value for name, value in run.items() if name != "keep_checkpoints"}, "train": train}


class _Curves:
    """Averages losses between reports; finds the step and the sub-network of the first non-finite loss."""

    def __init__(self, path: Path | None, reporter: Reporter, run_start_step: int) -> None:
        self.path = path
        self.reporter = reporter
        self.pending: list[tuple[int, dict[str, Tensor]]] = []
        if path is not None:
            _keep_lines_upto(path, run_start_step)

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        """Remember a step's losses, without reading them from the device."""
        self.pending.append((step, losses))

    def flush(self, session: _Session) -> None:
        """Read the pending losses, check them, report their means.

        Raises:
            NonFiniteLossError: one of them is NaN or infinite.
        """
        if not self.pending:
            return
        rows = [(step, name, loss) for step, losses in self.pending for name, loss in losses.items()]
        values = torch.stack([loss for _, _, loss in rows]).tolist()
        sums: dict[str, list[float]] = {}
        for (step, name, _), value in zip(rows, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss of {name} is {value} at step {step}; lower supernet.train.lr "
                    f"(now {session.run.train.lr}) or set supernet.train.grad_clip"
                )
            sums.setdefault(name, []).append(value)
        self.pending.clear()
        metrics = {f"loss/{name}": sum(items) / len(items) for name, items in sums.items()}
        metrics["epoch"] = session.step / session.steps_per_epoch
        metrics["lr"] = session.optimizer.param_groups[0]["lr"]
        record = {
            "step": session.step,
            "num_steps": session.num_steps,
            "epoch": session.step / session.steps_per_epoch,
            "time_ms": int(time.time() * 1000),
            "metrics": metrics,
        }
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        self.reporter.on_curve(record)


def _keep_lines_upto(path: Path, step: int) -> None:
    """Drop what a killed run wrote after the checkpoint that is continued, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    path.write_text("".join(kept), encoding="utf-8")


def checkpoint_stems(folder: Path) -> list[Path]:
    """The epoch checkpoints of a folder, oldest first."""
    return sorted(path.with_suffix("") for path in folder.glob("epoch-*.json"))


def train_supernet(  # noqa: PLR0913 - all but four are given by name
    supernet: Supernet,
    images: Tensor,
    labels: Tensor,
    run: SupernetRun,
    *,
    folder: Path,
    device: torch.device | str = "cpu",
    workers: Workers | None = None,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Train, recalibrate and store a supernet; continues from the newest whole checkpoint in `folder`.

    Args:
        supernet: freshly initialised; equal on every worker.
        images: the training split, uint8 [N, C, H, W].
        labels: int64 [N].
        run: the settings.
        folder: receives `epoch-*.safetensors|json`, `curves.jsonl`, and at the end `final.safetensors|json`.
        device: where to train.
        workers: the data-parallel group; None trains alone.
        reporter: hears the loss curves.
        should_stop: asked at every step; True ends the call at that step's boundary.

    Returns:
        the stem of the final checkpoint, or None where it was stopped or this is not worker 0.

    Raises:
        NonFiniteLossError: a loss became NaN or infinite; the message names step and sub-network.
        CheckpointError: the checkpoint in `folder` is damaged or of another run.
    """
    workers = workers if workers is not None else SingleWorker()
    reporter = reporter if reporter is not None else SilentReporter()
    device = torch.device(device)
    batch_size = _whole_batch(run.train.batch_size, len(labels), workers.size)
    session = _Session(supernet, run, len(labels) // batch_size, device)
    folder.mkdir(parents=True, exist_ok=True)
    stems = checkpoint_stems(folder)
    if stems:
        session.load(stems[-1])
    curves = _Curves(folder / "curves.jsonl" if workers.rank == 0 else None, reporter, session.step)
    images, labels = images.to(device), labels.to(device)
    while session.step < session.num_steps:
        epoch = session.step // session.steps_per_epoch
        if not _train_epoch(session, images, labels, workers, curves, should_stop):
            return None
        if workers.rank == 0 and ((epoch + 1) % run.train.checkpoint_every == 0 or epoch + 1 == run.train.epochs):
            session.save(folder / f"epoch-{epoch + 1:05d}")
            _prune(folder, run.keep_checkpoints)
    return _finish(session, images, folder) if workers.rank == 0 else None


def _train_epoch(
    session: _Session,
    images: Tensor,
    labels: Tensor,
    workers: Workers,
    curves: _Curves,
    should_stop: Callable[[], bool],
) -> bool:
    """One epoch; False where it was stopped. Every random choice derives from (seed, epoch), so that a resumed run repeats it."""
    run = session.run
    epoch = session.step // session.steps_per_epoch
    batch_size = min(run.train.batch_size, len(labels))
    shared = torch.Generator().manual_seed(derive_seed(run.seed, "epoch", epoch))
    augmenting = torch.Generator(session.device).manual_seed(derive_seed(run.seed, "augment", epoch, workers.rank))
    log_every = max(1, session.steps_per_epoch // 4)
    devices = [session.device] if session.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(run.seed, "dropout", epoch, workers.rank))
        for rows in _epoch_batches(len(labels), batch_size, shared, workers):
            if workers.any_of(should_stop()):
                return False
            rows = rows.to(session.device)
            batch = augment(images[rows], augmenting, run.augmentation)
            losses = session.update(run.normalization.apply(batch), labels[rows], session.plan(shared), workers)
            curves.add(session.step, losses)
            if session.step % log_every == 0:
                curves.flush(session)
    curves.flush(session)
    return True


def _epoch_batches(num_images: int, batch_size: int, generator: torch.Generator, workers: Workers) -> Iterator[Tensor]:
    """This worker's rows of every whole batch of a fresh permutation."""
    order = torch.randperm(num_images, generator=generator)
    for start in range(0, num_images - batch_size + 1, batch_size):
        yield order[start : start + batch_size][workers.rank :: workers.size]


def _whole_batch(wanted: int, num_images: int, num_workers: int) -> int:
    """The batch over all workers: equal shares, since the mean of unequal shares' gradients is not the batch's gradient.

    Raises:
        ValueError: a worker would get fewer than two images, of which BatchNorm can make no statistics.
    """
    batch_size = min(wanted, num_images) // num_workers * num_workers
    if batch_size < 2 * num_workers:
        raise ValueError(
            f"a batch of {min(wanted, num_images)} images gives {num_workers} workers fewer than 2 each; "
            "raise supernet.train.batch_size or lower supernet.workers"
        )
    return batch_size


def _prune(folder: Path, keep: int) -> None:
    for stem in checkpoint_stems(folder)[:-keep]:
        stem.with_suffix(".json").unlink()  # first: without its JSON a checkpoint does not count
        stem.with_suffix(".safetensors").unlink()


def _finish(session: _Session, images: Tensor, folder: Path) -> Path:
    """Recalibrate BatchNorm for every width and store the result."""
    run = session.run
    final = session.ema if run.weights == "ema" else session.student
    rows = _recalibration_rows(len(images), run)
    # Batches of equal size, as the cumulative average weighs them equally; a last batch of one image has no variance at 1x1 pixels.
    parts = rows.tensor_split(math.ceil(len(rows) / run.recalibration_batch))
    recalibrate(final, (run.normalization.apply(images[part.to(images.device)]) for part in parts))
    save_supernet(folder / FINAL, final.eval(), {"run": run.to_json(), "step": session.step})
    return folder / FINAL


def _recalibration_rows(num_images: int, run: SupernetRun) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(run.seed, "recalibration"))
    order = torch.randperm(num_images, generator=generator)
    return order[: run.recalibration_images]
