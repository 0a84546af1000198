"""Stage I: training a supernet with in-place bootstrapping (DS-Net, arXiv 2103.13258;
docs/methods.md, section 3) or another regime.

`dsnet.training.step` holds the method; this module is the loop around it: sandwich, schedule, EMA,
curves, checkpoints, resuming.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from dsnet.data.training_images import TrainingImages
from dsnet.errors import CheckpointError, ConfigError
from dsnet.network.batchnorm import recalibrate
from dsnet.network.ema import Ema, ema_decay
from dsnet.network.memory_order import arrange, arranged
from dsnet.network.supernet import Supernet, state_for_saving
from dsnet.seeds import derive_seed
from dsnet.space.spec import Subnet
from dsnet.space.width_space import WidthSpace
from dsnet.stored.checkpoint import (
    load_checkpoint,
    load_exactly,
    save_checkpoint,
    save_supernet,
    supernet_meta,
    tensors_below,
)
from dsnet.stored.names import FINAL, checkpoint_stems
from dsnet.training.balance import class_weights, epoch_order
from dsnet.training.curves import Curves, Progress, Reporter, SilentReporter
from dsnet.training.losses import scale_penalty
from dsnet.training.optimization import learning_rate, make_optimizer
from dsnet.training.settings import penalty_problem
from dsnet.training.step import StepPlan, StepRules, supernet_step
from dsnet.training.supernet_run import SupernetRun
from dsnet.training.workers import SingleWorker, Workers

REPORTS_PER_EPOCH = 4
STUDENT_VIEW, TEACHER_VIEW = "augment", "teacher view"
"""Names in the seeds of the augmentations."""


class _Session:
    """State of one training run, as a checkpoint stores it."""

    def __init__(
        self,
        supernet: Supernet,
        run: SupernetRun,
        steps_per_epoch: int,
        device: torch.device,
        weights: Tensor | None = None,
    ) -> None:
        """`weights` are those of the classes, [C]; None: 1."""
        self.run = run
        self.device = device
        self.student = supernet.to(device).train()
        self.norms = self.student.batch_norms()
        problem = penalty_problem(run.train.gamma_l1, has_batch_norm=bool(self.norms))
        if problem is not None:
            raise ConfigError(problem)
        arrange(self.student, run.train.channels_last)
        self.ema = Ema(self.student)
        self.optimizer = make_optimizer(self.student, run.train)
        self.steps_per_epoch = steps_per_epoch
        self.num_steps = run.train.epochs * steps_per_epoch
        self.step = 0
        # Start weights keep the update counts of their statistics.
        self.updates = {
            subnet.name: min((norm.num_updates(subnet.widths) for norm in self.norms), default=0)
            for subnet in supernet.subnets.all
        }
        self.rules = StepRules(
            teacher=run.regime.teacher,
            smoothing=run.train.label_smoothing,
            precision=run.train.precision,
            trust=run.bootstrapping.trust,
            scale=1.0 / run.train.accumulate,
            temperature=run.train.temperature,
            class_weights=None if weights is None else weights.to(device),
        )
        members = supernet.subnets
        order = members.by_madds()
        self.largest = members.largest
        self.smallest = members[order[0]]
        if run.width_space is not None:
            self.smallest = members.at(run.width_space.smallest(members.spec))
        self.between = [members[k] for k in order[1:] if members[k].widths != self.largest.widths]

    @property
    def kept(self) -> Supernet:
        """The network whose weights are the result: the EMA copy or the student."""
        return self.ema.module if self.run.weights == "ema" else self.student

    @property
    def at(self) -> Progress:
        """The progress of the run."""
        lr = self.optimizer.param_groups[0]["lr"]
        return Progress(self.step, self.num_steps, self.step / self.steps_per_epoch, lr)

    def draw(self, generator: torch.Generator) -> list[Subnet]:
        """Draw one step's random sub-networks; all between the smallest and the largest where every
        width trains."""
        regime = self.run.regime
        if regime.widths == "all":
            return self.between
        if self.run.width_space is not None:
            return self._draw_widths(self.run.width_space, generator)
        count = min(regime.num_random, len(self.between))
        return [self.between[pick] for pick in torch.randperm(len(self.between), generator=generator)[:count].tolist()]

    def _draw_widths(self, space: WidthSpace, generator: torch.Generator) -> list[Subnet]:
        """Draw sub-networks of any widths of a space.

        One that is drawn twice is left out, and so are the smallest and the largest, which take
        part in any case; where the space is tiny, a step has fewer.
        """
        members = self.student.subnets
        drawn = [
            space.draw(lambda count: int(torch.randint(count, (), generator=generator)), members.spec)
            for _ in range(self.run.regime.num_random)
        ]
        takes_part = (self.smallest.widths, self.largest.widths)
        return [members.at(widths) for widths in dict.fromkeys(drawn) if widths not in takes_part]

    def plan(self, randoms: Sequence[Subnet]) -> StepPlan:
        """The plan of the current step, for its random sub-networks."""
        bootstrap = self.run.bootstrapping
        ramp_steps = bootstrap.soft_ramp_epochs * self.steps_per_epoch
        ramp = 1.0 if ramp_steps <= 0 else min(1.0, self.step / ramp_steps)
        soft_weight = ramp * self.run.train.soft_weight
        if self.step < round(bootstrap.largest_first * self.num_steps):
            return StepPlan(self.largest, (), self.largest, soft_weight, frozenset())
        keeps_statistics = self.student.spec.norm != "recalibrate"
        cold = frozenset(
            name
            for name, count in self.updates.items()
            if count < bootstrap.teacher_min_updates or not keeps_statistics
        )
        undeclared = {subnet.name for subnet in (*randoms, self.smallest)} - self.updates.keys()
        return StepPlan(self.largest, tuple(randoms), self.smallest, soft_weight, cold | undeclared)

    def update(
        self, images: Tensor, labels: Tensor, plan: StepPlan, workers: Workers, teacher_images: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Run one optimiser step and one EMA update on normalised images [B, C, H, W]; returns the
        mean losses by name. `teacher_images` is the teacher's own view of them, if it has one."""
        settings, bootstrap = self.run.train, self.run.bootstrapping
        warmup_steps = round(settings.warmup_epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.num_steps, warmup_steps, settings)
        self.optimizer.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = {}
        share = len(labels) // settings.accumulate
        for start in range(0, len(labels), share):
            rows = slice(start, start + share)
            shown = None if teacher_images is None else teacher_images[rows]
            found = supernet_step(self.student, self.ema.module, images[rows], labels[rows], plan, self.rules, shown)
            losses = {name: losses[name] + loss if losses else loss for name, loss in found.items()}
        if settings.gamma_l1:  # once a step: no micro-batch and no autocast changes its share
            (settings.gamma_l1 * scale_penalty(self.norms)).backward()
        workers.average_gradients(self.student.parameters())
        if settings.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), settings.grad_clip)
        self.optimizer.step()
        self.ema.update(ema_decay(self.step, bootstrap.ema_decay, bootstrap.ema_warmup))
        for name in losses.keys() & self.updates.keys():
            self.updates[name] += 1
        self.step += 1
        return (
            losses if settings.accumulate == 1 else {name: loss / settings.accumulate for name, loss in losses.items()}
        )

    def save(self, stem: Path, pending: list[Any]) -> None:
        """Write a checkpoint; `pending` are losses that have not been reported yet.

        Training continues from it as if it had not stopped: bit-identically on the CPU with the
        same kind of processor and the same number of threads.
        """
        tensors = {f"student.{name}": value for name, value in state_for_saving(self.student).items()}
        tensors |= {f"ema.{name}": value for name, value in state_for_saving(self.ema.module).items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if value is not None:
                    tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value).cpu().contiguous()
        meta = {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "updates": self.updates,
            "pending_losses": pending,
            "run": self.run.to_json(),
        }
        save_checkpoint(stem, tensors, {**meta, **supernet_meta(self.student)})

    def load(self, stem: Path) -> list[Any]:
        """Restore the state from a checkpoint of the same run; returns its losses that were not
        reported yet.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another run.
        """
        tensors, meta = load_checkpoint(stem)
        expected = json.loads(json.dumps({"run": self.run.to_json(), **supernet_meta(self.student)}))
        stored = {**meta, "run": result_settings(meta.get("run"))}
        expected["run"] = result_settings(expected["run"])
        changed = [name for name, value in expected.items() if stored.get(name) != value]
        if changed:
            raise CheckpointError(
                f"{stem}.json: was written under other settings ({', '.join(changed)}); remove {stem.parent} to train anew"
            )
        load_exactly(self.student, tensors_below(tensors, "student."), str(stem))
        load_exactly(self.ema.module, tensors_below(tensors, "ema."), str(stem))
        state: dict[int, dict[str, Any]] = {}
        for name, value in tensors_below(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            # In the memory format of the weights: optimisers are slow, or wrong, where the formats
            # differ.
            state.setdefault(int(index), {})[key] = arranged(value, self.run.train.channels_last)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        if not {"step", "updates", "steps_per_epoch"} <= meta.keys():
            raise CheckpointError(
                f"{stem}.json: incomplete (no step or updates); delete it to continue from the one before"
            )
        if meta["steps_per_epoch"] != self.steps_per_epoch:
            raise CheckpointError(
                f"{stem}.json: was written with {meta['steps_per_epoch']} steps an epoch, but with this number of workers "
                f"an epoch has {self.steps_per_epoch}; continue with as many workers as before, or remove {stem.parent}"
            )
        self.step, self.updates = meta["step"], meta["updates"]
        return meta.get("pending_losses", [])


def result_settings(run: Any) -> Any:
    """The settings of a run that determine its weights.

    Frequency and number of checkpoints and the name of the start weights' file are left out: they
    may change between launches.
    """
    if not isinstance(run, dict) or not isinstance(run.get("train"), dict):
        return run
    train = {name: value for name, value in run["train"].items() if name != "checkpoint_every"}
    rest = {name: value for name, value in run.items() if name != "keep_checkpoints"}
    return {**rest, "train": train, "origin": run.get("origin", {}).get("sha256")}


@dataclass(frozen=True, kw_only=True)
class TrainingCallbacks:
    """Functions that a training calls; by default it runs to its end and reports nothing."""

    reporter: Reporter = field(default_factory=SilentReporter)
    """Receives the loss curves."""
    should_stop: Callable[[], bool] = lambda: False
    """Called at every step; True ends training before that step. A single worker then stores a
    checkpoint; several continue from the end of the last epoch."""
    on_epoch: Callable[[int, Supernet], None] = lambda epochs, supernet: None
    """Called on worker 0 with the number of epochs done and the network whose weights would be kept
    now (not to be changed): at the end of every epoch except the last, after its checkpoint, and
    for the epoch's end from which a call continues. It may raise."""


def train_supernet(
    supernet: Supernet,
    data: TrainingImages,
    run: SupernetRun,
    *,
    folder: Path,
    device: torch.device | str = "cpu",
    workers: Workers | None = None,
    callbacks: TrainingCallbacks | None = None,
) -> Path | None:
    """Train, recalibrate and store a supernet; continues from the newest complete checkpoint in
    `folder`.

    Args:
        supernet: Freshly initialised, or with the start weights; equal on every worker.
        data: The training split.
        run: The settings.
        folder: Folder for `epoch-*.safetensors|json`, `curves.jsonl`, and at the end
            `final.safetensors|json`.
        device: The device to train on.
        workers: The data-parallel group; None trains in this process alone.
        callbacks: Functions that receive its progress and may stop it; None: no functions.

    Returns:
        The stem of the final checkpoint, or None where training was stopped or this is not worker
        0.

    Raises:
        NonFiniteLossError: a loss became NaN or infinite; the message names step and sub-network.
        CheckpointError: the checkpoint in `folder` is damaged or of another run.
        ConfigError: the batch is too small for the workers and micro-batches.
    """
    workers = workers if workers is not None else SingleWorker()
    callbacks = callbacks if callbacks is not None else TrainingCallbacks()
    batch_size = whole_batch(run.train.batch_size, len(data.labels), workers.size, run.train.accumulate)
    weights = class_weights(data.labels, supernet.spec.num_classes) if run.balance == "weights" else None
    session = _Session(supernet, run, len(data.labels) // batch_size, torch.device(device), weights)
    folder.mkdir(parents=True, exist_ok=True)
    stems = checkpoint_stems(folder)
    pending = session.load(stems[-1]) if stems else []
    path = folder / "curves.jsonl" if workers.rank == 0 else None
    curves = Curves(path, callbacks.reporter, session.step, session.student.subnets.names)
    curves.restore(pending, session.device)
    while session.step < session.num_steps:
        epoch, steps_into = divmod(session.step, session.steps_per_epoch)
        if workers.rank == 0 and epoch > 0 and steps_into == 0:
            callbacks.on_epoch(epoch, session.kept)
        if not _train_epoch(session, data, batch_size, workers, curves, callbacks.should_stop):
            if workers.size == 1:
                session.save(folder / f"epoch-{epoch:05d}-step-{session.step:08d}", curves.pending(session.at))
                _prune(folder, run.keep_checkpoints)
            return None
        workers.average_buffers([session.student, session.ema.module])
        if workers.rank == 0 and ((epoch + 1) % run.train.checkpoint_every == 0 or epoch + 1 == run.train.epochs):
            session.save(folder / f"epoch-{epoch + 1:05d}", curves.pending(session.at))
            _prune(folder, run.keep_checkpoints)
    return _finish(session, data, folder) if workers.rank == 0 else None


def _train_epoch(
    session: _Session,
    data: TrainingImages,
    batch_size: int,
    workers: Workers,
    curves: Curves,
    should_stop: Callable[[], bool],
) -> bool:
    """Train one epoch, or the rest of it; returns False if it was stopped.

    Every random choice derives from the seed and the epoch or step, so that a resumed run repeats
    it.
    """
    run = session.run
    epoch, first = divmod(session.step, session.steps_per_epoch)
    generator = torch.Generator().manual_seed(derive_seed(run.seed, "epoch", epoch))
    rows = _epoch_batches(epoch_order(data.labels, run.balance, generator), batch_size, workers)
    sandwiches = [session.draw(generator) for _ in rows]
    log_every = max(1, session.steps_per_epoch // REPORTS_PER_EPOCH)
    devices = [session.device] if session.device.type == "cuda" else []

    def view(name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches that are left, in an augmented view of their own."""
        seeds = [derive_seed(run.seed, name, epoch, number, workers.rank) for number in range(len(rows))]
        return data.augmented(list(zip(rows, seeds, strict=True))[first:], session.device)

    teacher_views = view(TEACHER_VIEW) if run.regime.views == "own" else repeat((None, None))
    with torch.random.fork_rng(devices=devices):
        for number, ((images, labels), (shown, _)) in enumerate(
            zip(view(STUDENT_VIEW), teacher_views, strict=False), start=first
        ):
            if workers.agree_to_stop(should_stop()):
                break
            torch.manual_seed(derive_seed(run.seed, "dropout", epoch, number, workers.rank))
            teacher_images = None if shown is None else _inputs(shown, run)
            losses = session.update(
                _inputs(images, run), labels, session.plan(sandwiches[number]), workers, teacher_images
            )
            curves.add(session.step, losses)
            if session.step % log_every == 0:
                curves.flush(session.at)
    is_whole = session.step == (epoch + 1) * session.steps_per_epoch
    if is_whole:
        curves.flush(session.at)
    return is_whole


def _inputs(images: Tensor, run: SupernetRun) -> Tensor:
    """Normalised images in the memory format of the training."""
    return arranged(run.normalization.apply(images), run.train.channels_last)


def _epoch_batches(order: Tensor, batch_size: int, workers: Workers) -> list[Tensor]:
    """The rows of this worker in every full batch of an epoch."""
    starts = range(0, len(order) - batch_size + 1, batch_size)
    return [order[start : start + batch_size][workers.rank :: workers.size] for start in starts]


def whole_batch(wanted: int, num_images: int, num_workers: int, accumulate: int) -> int:
    """The batch size over all workers, rounded down so that all micro-batches of all workers are
    equally large.

    With unequal shares the mean of their gradients would not be the batch's gradient.

    Raises:
        ConfigError: a micro-batch would have fewer than two images, too few for BatchNorm
            statistics.
    """
    shares = num_workers * accumulate
    batch_size = min(wanted, num_images) // shares * shares
    if batch_size < 2 * shares:
        raise ConfigError(
            f"a batch of {min(wanted, num_images)} images gives {num_workers} worker(s) x {accumulate} micro-batch(es) fewer than 2 each; "
            "raise supernet.train.batch_size, or lower supernet.workers or supernet.train.accumulate"
        )
    return batch_size


def _prune(folder: Path, keep: int) -> None:
    for stem in checkpoint_stems(folder)[:-keep]:
        stem.with_suffix(".json").unlink()  # first: a checkpoint without its JSON is not valid
    for tensors in folder.glob("epoch-*.safetensors"):
        if not tensors.with_suffix(".json").exists():  # pruned above, or killed between the two files
            tensors.unlink()


def _finish(session: _Session, data: TrainingImages, folder: Path) -> Path:
    """Recalibrate BatchNorm for every width and store the result."""
    run = session.run
    final = session.kept
    if run.recalibration_images != 0:
        recalibrate(final, recalibration_batches(data, run, session.device))
    save_supernet(folder / FINAL, final.eval(), {"run": run.to_json(), "step": session.step})
    return folder / FINAL


def recalibration_batches(
    data: TrainingImages, run: SupernetRun, device: torch.device
) -> Iterator[Float32[Tensor, "batch channels height width"]]:
    """Unaugmented, normalised images [B, C, H, W] for BatchNorm recalibration; they are a function
    of the run's seed."""
    generator = torch.Generator().manual_seed(derive_seed(run.seed, "recalibration"))
    rows = torch.randperm(len(data.labels), generator=generator)[: run.recalibration_images]
    # Batches of about equal size: the cumulative average weighs them equally, and a batch of one
    # image has no variance at 1x1 pixels.
    parts = rows.tensor_split(math.ceil(len(rows) / run.recalibration_batch))
    return (_inputs(images, run) for images in data.clean(parts, device))
