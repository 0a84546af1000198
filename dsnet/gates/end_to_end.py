"""Stage II on images: the slimming heads of a frozen supernet, trained end to end (docs/methods.md,
sections 4 and 5).

The expectation over routes, which table training sums exactly, is sampled here: choices are drawn
by the straight-through Gumbel-softmax, and the task's loss is propagated back through the network,
for one gate or for several whose choices multiply. It is the published method, and the reference
with which table training is compared.

Training may be interrupted after any epoch and resumed in another process with the same result:
everything that the rest depends on is in its progress. On the CPU the result is the same to the
bit, for one kind of processor and one number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64, Shaped, UInt8
from numpy.typing import NDArray
from torch import Tensor

from dsnet.data.augment import augment
from dsnet.data.normalization import Normalization
from dsnet.errors import NonFiniteLossError, StoppedError
from dsnet.gates.gumbel import gumbel_noise
from dsnet.gates.losses import complexity
from dsnet.gates.mixing import Answers, Chooser, GatedSupernet, Mixed
from dsnet.gates.problem import check_choice, sgs_places
from dsnet.gates.settings import EndToEndSettings, GateSettings
from dsnet.image_size import ImageSize, image_size_of
from dsnet.network.supernet import Supernet
from dsnet.routers.kinds import kind_names
from dsnet.seeds import derive_seed
from dsnet.space.cost import gate_madds, subnet_cost
from dsnet.space.spec import Subnet
from dsnet.space.subnet_set import SubnetSet

STREAMS = ("order", "noise", "augmentation")
"""Names of the random streams of training; each has its own generator."""
SMALLEST_SCALE = 1e-6
"""Lower bound of the scale of a hidden unit, for units that are always zero."""


@dataclass(frozen=True, eq=False)
class GateImages:
    """The gate split: images that the supernet was not trained on."""

    images: UInt8[Tensor, "images channels height width"]
    """uint8 [N, C, H, W], on the CPU: batches move to where the supernet is."""
    labels: Int64[Tensor, " images"]
    """int64 [N]"""
    normalization: Normalization
    """The normalisation that the supernet was trained with."""

    def __post_init__(self) -> None:
        if not 0 < len(self.images) == len(self.labels):
            raise ValueError(
                f"gate training needs images and one label for each, but got {len(self.images)} images and {len(self.labels)} labels"
            )


@dataclass(frozen=True)
class PathCosts:
    """MAdds of every route of a routing space, all its decisions included, and the target in the
    same unit.

    The target is defined in docs/definitions.md, Target.
    """

    madds: Float64[Tensor, " routes"]
    """float64 [R]: MAdds of each route."""
    switched: tuple[Float64[Tensor, "routes _choices"], ...]
    """For each gate float64 [R, K]: MAdds of each route with that gate's choice replaced by each
    choice, and all others kept."""
    target: float
    """Target MAdds, clamped into the range of the routing space."""
    widest: float
    """MAdds of the costliest member of the whole set."""

    @classmethod
    def of(cls, subnets: SubnetSet, gated: GatedSupernet, settings: GateSettings, image_size: ImageSize) -> PathCosts:
        """Count the MAdds of all routes, for images of `image_size`."""
        costs: dict[tuple[int, ...], float] = {}

        def madds_of(widths: tuple[int, ...]) -> float:
            if widths not in costs:
                costs[widths] = float(subnet_cost(subnets.spec, Subnet("path", widths), image_size).madds)
            return costs[widths]

        decision = sum(gate_madds(hidden, num_choices) for num_choices, hidden in gated.head_shapes)
        madds = torch.tensor([madds_of(subnet.widths) for subnet in gated.subnets], dtype=torch.float64) + decision
        switched = []
        for gate, (num_choices, _) in enumerate(gated.head_shapes):
            table = torch.zeros((len(gated.subnets), num_choices), dtype=torch.float64)
            for choice, widths in _widths_by_choice(subnets, gated, gate).items():
                for position, subnet in enumerate(gated.subnets):
                    table[position, choice] = madds_of(_exchanged(subnet.widths, *widths)) + decision
            switched.append(table)
        every = [madds_of(subnet.widths) for subnet in subnets]
        low, high = min(every), max(every)
        wanted = settings.wanted_madds(low, high)
        target = min(max(wanted, float(madds.min())), float(madds.max()))
        return cls(madds, tuple(switched), target, high)

    def expected(self, mixed: Mixed) -> Float[Tensor, ""]:
        """Mean MAdds of a batch (scalar).

        The value is exactly that of the chosen routes. The gradient with respect to a gate's weight
        is the cost of the route with that choice and all other choices as drawn: the gradient of
        the sum, over all paths, of cost times the product of the weights.
        """
        total = self._relative(self.madds, mixed)
        for weights, table in zip(mixed.weights, self.switched, strict=True):
            total = total + ((weights - weights.detach()) * self._relative(table, mixed)).sum(1)
        return total.mean() * self.widest

    def _relative(self, table: Tensor, mixed: Mixed) -> Tensor:
        """Rows of `table` for each image's route, in units of the widest route, because float32
        does not represent MAdds exactly."""
        rows = table[mixed.positions.cpu()] / self.widest
        return rows.to(mixed.logits.device, mixed.logits.dtype)


def _widths_by_choice(subnets: SubnetSet, gated: GatedSupernet, gate: int) -> dict[int, tuple[int, tuple[int, ...]]]:
    """For each choice of a gate that some route takes: the first channel group that it sets, and
    the widths of its groups."""
    spec = subnets.spec
    start = spec.num_prefix_groups(gate)
    stop = spec.num_prefix_groups(gate + 1) if gate + 1 < gated.num_gates else len(spec.groups)
    choices = gated.tree.gates[gate].choice_of
    return {choice: (start, own.widths[start:stop]) for choice, own in zip(choices, gated.subnets, strict=True)}


def _exchanged(widths: tuple[int, ...], start: int, new: tuple[int, ...]) -> tuple[int, ...]:
    return widths[:start] + new + widths[start + len(new) :]


def sgs_targets(
    answers: Float[Tensor, "batch routes classes"], labels: Int64[Tensor, " batch"], settings: GateSettings
) -> Int64[Tensor, " batch"]:
    """The targets of sandwich gate sparsification for a batch (precedence easy > hard > dependent).

    Args:
        answers: logits [B, R, num_classes] of routes from the cheapest to the costliest; `extremes`
            reads the first and the last.
        labels: int64 [B].
        settings: strategy, target and thresholds.

    Returns:
        int64 [B]: positions among these routes.
    """
    is_right = answers.argmax(2) == labels[:, None]
    p = answers[:, [0, -1]].float().softmax(2).gather(2, labels[:, None, None].expand(-1, 2, 1))[:, :, 0]
    return sgs_places(is_right, p, settings)


def sgs_loss(
    gated: GatedSupernet, answers: Answers, choosers: Sequence[Chooser], targets: Int64[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the gates' logits against the target paths: the sum over the gates that
    each path passes (scalar).

    A gate is evaluated at the node of the target path, wherever the sampled choices have led the
    image.

    Args:
        gated: the supernet with its gates.
        answers: the answers, with the hidden vectors at the nodes of all target paths.
        choosers: one for each gate; noise and temperature are not used.
        targets: int64 [B], positions in the routing space.
    """
    total = answers.logits.new_zeros(())
    for (gate, node), hidden in answers.hidden.items():
        branches = gated.tree.gates[gate]
        rows = torch.nonzero(torch.tensor(branches.node_of, device=targets.device)[targets] == node)[:, 0]
        choices = torch.tensor(branches.choice_of, device=targets.device)[targets[rows]]
        logits = choosers[gate].logits(hidden[rows], gated.allowed(gate, node))
        total = total + F.cross_entropy(logits, choices, reduction="sum")
    return total / len(targets)


class GateObjective:
    """The loss of Stage II for a batch of images."""

    def __init__(self, supernet: Supernet, settings: GateSettings, image_size: ImageSize) -> None:
        """Create the loss for one supernet and one router.

        Args:
            supernet: frozen, in eval mode.
            settings: losses, router and routing space.
            image_size: size of the images.

        Raises:
            ValueError: the router cannot be trained end to end, a loss is used that only table
                training has, the routing space is not a list of increasing ids of the set, or the
                set has a single member.
        """
        if not settings.kind.trains_end_to_end:
            able = kind_names(lambda kind: kind.trains_end_to_end)
            raise ValueError(
                f"gate.trainer end_to_end trains the routers {' and '.join(able)}, not {settings.router!r}; "
                "use gate.trainer table"
            )
        if settings.lambda_quality:
            raise ValueError(
                f"gate.losses.quality is {settings.lambda_quality}, but end-to-end training has only the published losses; "
                "set it to 0 or use gate.trainer table"
            )
        check_choice([subnet.name for subnet in supernet.subnets])
        num_routes = len(supernet.subnets)
        routes = settings.routes or tuple(range(num_routes))
        if list(routes) != sorted(set(routes)) or not 0 <= routes[0] <= routes[-1] < num_routes:
            raise ValueError(f"the routing space {routes} must be increasing ids in 0..{num_routes - 1}")
        self.settings = settings
        self.gated = GatedSupernet(supernet, routes, decides_once=not settings.kind.is_tree)
        self.costs = PathCosts.of(supernet.subnets, self.gated, settings, image_size)
        by_cost = self.costs.madds.argsort(stable=True).tolist()
        self.extremes = (by_cost[0], by_cost[-1])
        needs_all = self.gated.num_gates == 1 or settings.sgs_target == "cheapest"
        self.asked: tuple[int, ...] = tuple(by_cost) if needs_all else self.extremes
        """Routes whose answers a batch needs, as positions in the routing space, from the cheapest
        to the costliest."""

    def __call__(
        self,
        images: Float[Tensor, "batch channels height width"],
        labels: Int64[Tensor, " batch"],
        choosers: Sequence[Chooser],
    ) -> Float[Tensor, ""]:
        """The loss lambda_cls CE + lambda_sgs SGS + lambda_complexity C(E[MAdds]) of normalised
        images [B, C, H, W] (scalar)."""
        settings, gated = self.settings, self.gated
        answers = gated.answers(images, self.asked)
        mixed = self.mixed(answers, choosers)
        targets = torch.tensor(self.asked, device=labels.device)[sgs_targets(answers.logits, labels, settings)]
        cls = F.cross_entropy(mixed.logits, labels)
        sgs = sgs_loss(gated, answers, choosers, targets)
        cost = complexity(self.costs.expected(mixed), self.costs.target, self.costs.widest, settings.complexity_form)
        return settings.lambda_cls * cls + settings.lambda_sgs * sgs + settings.lambda_complexity * cost

    def mixed(self, answers: Answers, choosers: Sequence[Chooser]) -> Mixed:
        """Run the batch with straight-through choices."""
        if self.gated.num_gates == 1:
            return self.gated.mix_answers(answers, self.asked, choosers[0])
        return self.gated.mix_segments(answers.trunk, choosers)


@contextmanager
def frozen(supernet: Supernet) -> Iterator[None]:
    """Context in which the supernet is in eval mode and none of its parameters requires a
    gradient; the previous state is restored afterwards."""
    was_training = supernet.training
    took_gradient = [parameter.requires_grad for parameter in supernet.parameters()]
    supernet.eval().requires_grad_(False)
    try:
        yield
    finally:
        supernet.train(was_training)
        for parameter, flag in zip(supernet.parameters(), took_gradient, strict=True):
            parameter.requires_grad_(flag)


Progress = Mapping[str, Shaped[np.ndarray, "..."]]
"""State from which training resumes, by name: together with the arguments, all that the rest of it
depends on; about 20 kB for a head of a few hundred weights."""


@dataclass(frozen=True, eq=False)
class GateStage:
    """Result of a stage of training."""

    heads: list[Float64[Tensor, "_choices _hidden"]]
    """The heads, in the form that `train_end_to_end` returns."""
    progress: Progress
    """The state from which the next stage starts."""


class _Training:
    """A training of heads; to be used within `frozen`."""

    def __init__(
        self,
        supernet: Supernet,
        data: GateImages,
        settings: GateSettings,
        rules: EndToEndSettings,
        start: Progress | None = None,
    ) -> None:
        self.data = data
        self.augmentation = rules.augmentation
        self.batch_size = min(settings.batch_size, len(data.labels))
        self.steps_per_epoch = -(-len(data.labels) // self.batch_size)
        self.settings = replace(settings, steps=rules.epochs * self.steps_per_epoch)
        self.objective = GateObjective(supernet, self.settings, image_size_of(data.images.shape))
        self.device = next(supernet.parameters()).device
        self.heads = [
            torch.zeros(shape, device=self.device, requires_grad=True) for shape in self.objective.gated.head_shapes
        ]
        """Weights for hidden vectors scaled to unit size; initialised to zero as in table training,
        so that all choices are equally likely at first."""
        self.optimizer = _optimizer(self.heads, settings)
        self.order, self.noise, self.pixels = (
            torch.Generator().manual_seed(derive_seed(settings.seed, "end_to_end", stream)) for stream in STREAMS
        )
        self.num_done = 0
        self.scales: list[Tensor] = []
        if start is None:
            self.scales = self._root_mean_squares()
        else:
            self._resume({name: torch.from_numpy(np.array(array)) for name, array in start.items()})

    @property
    def num_epochs(self) -> int:
        """Number of completed epochs."""
        return self.num_done // self.steps_per_epoch

    def progress(self) -> dict[str, NDArray[Any]]:
        """Copies of the changing state, and of the scales, so that they need not be measured again;
        valid only between epochs."""
        state = {"num_done": torch.tensor(self.num_done)}
        for stream, generator in zip(STREAMS, (self.order, self.noise, self.pixels), strict=True):
            state[f"random/{stream}"] = generator.get_state()
        moments = self.optimizer.state_dict()["state"]
        for gate, (head, scale) in enumerate(zip(self.heads, self.scales, strict=True)):
            state |= {f"head/{gate}": head.detach(), f"scale/{gate}": scale}
            own = moments.get(gate, {})  # empty for a head that never had a gradient
            state |= {f"optimizer/{gate}/{name}": value for name, value in own.items() if isinstance(value, Tensor)}
        return {name: np.array(value.cpu().numpy()) for name, value in state.items()}

    def _resume(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state that `progress` returned.

        Raises:
            ValueError: the shapes of its heads are not those of this training.
        """
        shapes = {f"head/{gate}": tuple(head.shape) for gate, head in enumerate(self.heads)}
        met = {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith("head/")}
        if met != shapes:
            raise ValueError(f"the progress holds heads of the shapes {met}, but this training has {shapes}")
        self.num_done = int(state["num_done"])
        for stream, generator in zip(STREAMS, (self.order, self.noise, self.pixels), strict=True):
            generator.set_state(state[f"random/{stream}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer/"):
                _, number, moment = name.split("/")
                moments.setdefault(int(number), {})[moment] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        with torch.no_grad():
            for gate, head in enumerate(self.heads):
                head.copy_(state[f"head/{gate}"])
                self.scales.append(state[f"scale/{gate}"].to(self.device))

    def _root_mean_squares(self) -> list[Tensor]:
        """Root mean square [hidden] of each gate's hidden vectors, over the cheapest and the
        costliest route; this scaling is folded exactly into the heads (ours)."""
        shapes = self.objective.gated.head_shapes
        sums = [torch.zeros(hidden, device=self.device, dtype=torch.float64) for _, hidden in shapes]
        counts = [0] * len(shapes)
        for rows in torch.arange(len(self.data.labels)).split(self.batch_size):
            seen = self.objective.gated.answers(self._inputs(self.data.images[rows]), self.objective.extremes).hidden
            for (gate, _), hidden in seen.items():
                sums[gate] += hidden.double().pow(2).sum(0)
                counts[gate] += len(hidden)
        return [
            (total / count).sqrt().clamp_min(SMALLEST_SCALE).float() for total, count in zip(sums, counts, strict=True)
        ]

    def epoch(self) -> Iterator[Tensor]:
        """Yield the rows, int64 [b], of the batches of one epoch in random order; the last batch
        may be smaller."""
        yield from torch.randperm(len(self.data.labels), generator=self.order).split(self.batch_size)

    def step(self, rows: Tensor) -> None:
        """Train on one batch.

        Raises:
            NonFiniteLossError: its loss is NaN or infinite.
        """
        pixels = self.data.images[rows]
        if self.augmentation is not None:
            pixels = augment(pixels, self.pixels, self.augmentation)
        temperature = self.settings.temperature(self.num_done)
        choosers = [
            Chooser(head / scale, gumbel_noise((len(rows), len(head)), self.noise).to(self.device), temperature)
            for head, scale in zip(self.heads, self.scales, strict=True)
        ]
        loss = self.objective(self._inputs(pixels), self.data.labels[rows].to(self.device), choosers)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the gate's loss is {loss.item()} at step {self.num_done}; lower gate.optimizer.lr (now {self.settings.lr})"
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.num_done += 1

    def _inputs(self, pixels: Tensor) -> Tensor:
        return self.data.normalization.apply(pixels.to(self.device))

    def result(self) -> list[Tensor]:
        """The heads, float64 [K, hidden] each, for raw hidden vectors, on the CPU.

        Raises:
            NonFiniteLossError: a weight is NaN or infinite.
        """
        if not all(bool(torch.isfinite(head).all()) for head in self.heads):
            raise NonFiniteLossError(
                f"the gate's weights are not finite after training; lower gate.optimizer.lr (now {self.settings.lr})"
            )
        return [
            (head.detach().double() / scale.double()).cpu() for head, scale in zip(self.heads, self.scales, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class GateCallbacks:
    """Functions that a gate's training calls; by default it runs to its end and reports nothing."""

    should_stop: Callable[[], bool] = lambda: False
    """Called before every step; training stops when it returns True."""
    on_progress: Callable[[int, int], None] = lambda done, total: None
    """Called with (steps done, steps in all) after every step."""


def train_end_to_end(
    supernet: Supernet,
    data: GateImages,
    settings: GateSettings,
    rules: EndToEndSettings,
    *,
    callbacks: GateCallbacks | None = None,
) -> list[Float64[Tensor, "_choices _hidden"]]:
    """Train the slimming head of a `gate`, or those of `gates`, on images through the frozen
    supernet.

    Args:
        supernet: trained and recalibrated; it is left unchanged.
        data: the `gate` split.
        settings: router, losses, optimiser, batch size, temperatures, seed; `steps` is not used.
        rules: epochs and augmentation.
        callbacks: functions that receive its progress and may stop it; None: no functions.

    Returns:
        a head per gate that decides, float64 [K, hidden], for raw hidden vectors.
        `gate`: one head, with a row per route of the routing space.
        `gates`: one head per gate, with a row per choice over the whole set, including choices that
            no route of the routing space takes.

    Raises:
        NonFiniteLossError: the loss or a weight became NaN or infinite.
        StoppedError: `callbacks.should_stop` returned True.
        ValueError: a setting out of its range.
    """
    return train_stage(supernet, data, settings, rules, callbacks=callbacks).heads


def train_stage(
    supernet: Supernet,
    data: GateImages,
    settings: GateSettings,
    rules: EndToEndSettings,
    *,
    start: Progress | None = None,
    until: int | None = None,
    callbacks: GateCallbacks | None = None,
) -> GateStage:
    """Run one stage of `train_end_to_end`: consecutive stages give the same heads, to the bit, as
    one uninterrupted training.

    Temperatures follow the schedule of the whole training, not that of a shorter one.

    Args:
        supernet, data, settings, rules: as for the whole training, the same in all of its stages.
        start: the progress that the previous stage returned; None = from the beginning.
        until: the epoch after which the stage ends, 1..rules.epochs and no earlier than `start`;
            None = the last epoch.
        callbacks: functions that receive its progress, counted over the whole training, and may
            stop it; None: no functions.

    Raises:
        As `train_end_to_end`; and ValueError: `until` is out of its range, or `start` is the
        progress of another training.
    """
    callbacks = callbacks if callbacks is not None else GateCallbacks()
    if until is None:
        until = rules.epochs
    if not 1 <= until <= rules.epochs:
        raise ValueError(
            f"a stage of training ends after epoch {until}, but must end in 1..{rules.epochs} (gate.end_to_end.epochs)"
        )
    with frozen(supernet):
        training = _Training(supernet, data, settings, rules, start)
        if training.num_epochs > until:
            raise ValueError(f"a stage of training ends after epoch {until}, but starts after {training.num_epochs}")
        while training.num_epochs < until:
            for rows in training.epoch():
                if callbacks.should_stop():
                    raise StoppedError("the gate's training was stopped")
                training.step(rows)
                callbacks.on_progress(training.num_done, training.settings.steps)
        return GateStage(training.result(), training.progress())


def seconds_per_epoch(
    supernet: Supernet, data: GateImages, settings: GateSettings, rules: EndToEndSettings, *, num_steps: int = 3
) -> float:
    """Estimated seconds of one epoch over `data`, from a few timed steps after one that is not
    timed.

    Full batches are timed, and the time is scaled to the number of images.
    """
    with frozen(supernet):
        training = _Training(supernet, data, settings, rules)
        rows = next(training.epoch())
        training.step(rows)
        start = time.perf_counter()
        for _ in range(num_steps):
            training.step(rows)
        if training.device.type == "cuda":
            torch.cuda.synchronize(training.device)
        return (time.perf_counter() - start) / num_steps * len(data.labels) / len(rows)


def _optimizer(heads: Sequence[Tensor], settings: GateSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        return torch.optim.Adam(heads, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(heads, lr=settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay)
