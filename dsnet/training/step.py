"""One training step of Stage I: forward and backward of every sub-network (docs/methods.md, section
3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from dsnet.network.prefix_tree import by_prefix
from dsnet.network.slicing import gradients_added_in_place
from dsnet.network.supernet import Supernet
from dsnet.space.spec import Subnet
from dsnet.training.losses import distillation, smoothed_one_hot, soft_cross_entropy
from dsnet.training.settings import EMA_TEACHERS


@dataclass(frozen=True)
class StepPlan:
    """The sub-networks of one step (the sandwich, or all) and the weight of their soft labels.

    They need not be declared, that is, belong to the supernet's set
    (`dsnet.space.subnet_set.subnet_at`).
    """

    largest: Subnet
    randoms: tuple[Subnet, ...]
    """The sub-networks between the largest and the smallest."""
    smallest: Subnet
    """The smallest sub-network; the largest where it trains alone, as in a set of one member."""
    soft_weight: float
    """Weight of the soft labels, 0..1; the hard labels have the remaining weight."""
    cold: frozenset[str]
    """Names of the sub-networks whose running statistics have had too few updates for the teacher
    to use them, and of those that have none because the set does not declare them."""

    @property
    def smaller(self) -> tuple[Subnet, ...]:
        """The sub-networks of the step without the largest; one of the same widths is the same
        network, whatever its name, and takes no step of its own."""
        others = (*self.randoms, self.smallest)
        return tuple(subnet for subnet in others if subnet.widths != self.largest.widths)


@dataclass(frozen=True, kw_only=True)
class StepRules:
    """Settings that are the same in every step of a run."""

    teacher: str
    """One of `dsnet.training.settings.Teacher`."""
    smoothing: float
    """Label smoothing of the hard labels, [0, 1)."""
    precision: str = "float32"
    """One of `dsnet.training.settings.Precision`."""
    trust: str = "full"
    """One of `dsnet.training.settings.Trust`."""
    scale: float = 1.0
    """Factor of every gradient: 1 / number of micro-batches."""
    temperature: float = 1.0
    """Temperature of the soft labels, > 0."""
    class_weights: Float32[Tensor, " classes"] | None = None
    """Factor of the loss of an image of each class; None: 1."""


@dataclass(frozen=True)
class _SoftLabels:
    """A teacher's answer to a batch."""

    probabilities: Float[Tensor, "batch classes"]
    softened: Float[Tensor, "batch classes"]
    """Probabilities at the temperature of the soft labels."""

    @classmethod
    def of(cls, logits: Float[Tensor, "batch classes"], temperature: float) -> _SoftLabels:
        """The soft labels of one sub-network."""
        probabilities = logits.softmax(1)
        return cls(probabilities, probabilities if temperature == 1.0 else (logits / temperature).softmax(1))

    @classmethod
    def mean(cls, parts: Sequence[_SoftLabels]) -> _SoftLabels:
        """The mean of several teachers."""
        return cls(
            torch.stack([part.probabilities for part in parts]).mean(0),
            torch.stack([part.softened for part in parts]).mean(0),
        )


def supernet_step(
    student: Supernet,
    teacher: Supernet | None,
    images: Float[Tensor, "batch channels height width"],
    labels: Int64[Tensor, " batch"],
    plan: StepPlan,
    rules: StepRules,
    teacher_images: Float[Tensor, "batch channels height width"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Run forward and backward of one step for every sub-network of `plan`; gradients add up
    unweighted (docs/methods.md, section 3).

    Sub-networks that share a prefix of widths at a gate run everything up to it once, forward and
    backward; the gradients are the same up to the order of summation. Each head's graph is freed
    before the next one runs, so that the peak of memory is that of one sub-network's activations.

    Args:
        student: The supernet in training mode.
        teacher: Its EMA copy; required by the teachers `ema` and `ema_ensemble`.
        images: [B, C, H, W], normalised.
        labels: [B].
        plan: The step's sub-networks.
        rules: The run's rules for teacher, labels and precision.
        teacher_images: [B, C, H, W], normalised: another view of the same images, which the EMA
            copy sees; None: it sees `images`.

    Returns:
        The detached loss of each sub-network, by name.
    """
    return _Step(student, teacher, images, labels, plan, rules, teacher_images).run()


class _Step:
    """State of one step.

    The largest sub-network runs first: with in-place distillation the others learn from its output.
    """

    def __init__(
        self,
        student: Supernet,
        teacher: Supernet | None,
        images: Tensor,
        labels: Tensor,
        plan: StepPlan,
        rules: StepRules,
        teacher_images: Tensor | None,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.images = images
        self.teacher_images = images if teacher_images is None else teacher_images
        self.plan = plan
        self.rules = rules
        self.labels = labels
        self.hard = smoothed_one_hot(labels, student.spec.num_classes, rules.smoothing)
        self.weights = None if rules.class_weights is None else rules.class_weights[labels]
        self.losses: dict[str, Tensor] = {}
        self.soft: dict[str, _SoftLabels] = {}

    def run(self) -> dict[str, Tensor]:
        if self.rules.teacher in EMA_TEACHERS and self.plan.smaller:
            self.soft = self._teach()
        with gradients_added_in_place():
            self._learn(self.images, [self.plan.largest, *self.plan.smaller], gate=0)
        return self.losses

    def _learn(self, x: Tensor, subnets: Sequence[Subnet], gate: int) -> None:
        """Run forward and backward of `subnets` from the features (or images) `x`; features'
        gradient is in `x.grad`."""
        if gate == len(self.student.spec.gates):
            self._learn_heads(x, subnets)
            return
        for group in by_prefix(self.student, subnets, gate):
            with _autocast(x, self.rules.precision):
                features = self.student.upto_gate(gate, x, group[0]).features
            if not features.requires_grad:  # an entry gate: nothing before it learns
                self._learn(features, group, gate + 1)
                continue
            received = features.detach().requires_grad_()
            self._learn(received, group, gate + 1)
            features.backward(received.grad)

    def _learn_heads(self, features: Tensor, subnets: Sequence[Subnet]) -> None:
        """Run the last segment: the heads' common layers once, then the rest of each head."""
        with _autocast(features, self.rules.precision):
            start = self.student.start_heads(features, subnets)
        if start is None:
            for subnet in subnets:
                self._learn_head(features, subnet, self.student.head)
            return
        received = start.detach().requires_grad_()
        for subnet in subnets:
            self._learn_head(received, subnet, self.student.finish_head)
        start.backward(received.grad)

    def _learn_head(self, x: Tensor, subnet: Subnet, head: Callable[[Tensor, Subnet], Tensor]) -> None:
        with _autocast(x, self.rules.precision):
            logits = _widened(head(x, subnet))
        loss = self._loss(subnet, logits)
        (loss if self.rules.scale == 1.0 else loss * self.rules.scale).backward()
        self.losses[subnet.name] = loss.detach()
        if self.rules.teacher == "inplace" and subnet == self.plan.largest:
            soft = _SoftLabels.of(logits.detach(), self.rules.temperature)
            self.soft = {smaller.name: soft for smaller in self.plan.smaller}

    def _loss(self, subnet: Subnet, logits: Tensor) -> Tensor:
        """The loss of a sub-network: cross-entropy to hard labels, soft labels or a mixture."""
        if subnet == self.plan.largest or self.rules.teacher == "none":
            return soft_cross_entropy(logits, self.hard, self.weights)
        soft, weight = self.soft[subnet.name], self.plan.soft_weight
        trusts = self.rules.trust == "label_probability"
        # [B, 1]: the teacher's probability of the label
        known = soft.probabilities.gather(1, self.labels[:, None]) if trusts else None
        if self.rules.temperature != 1.0:
            share = logits.new_full((len(logits),), weight) if known is None else weight * known[:, 0]
            return distillation(logits, soft.softened, self.hard, share, self.rules.temperature, self.weights)
        if known is not None:
            target = self.hard + weight * known * (soft.probabilities - self.hard)
            return soft_cross_entropy(logits, target, self.weights)
        if weight == 1.0:
            return soft_cross_entropy(logits, soft.probabilities, self.weights)
        target = weight * soft.probabilities + (1.0 - weight) * self.hard
        return soft_cross_entropy(logits, target, self.weights)

    @torch.no_grad()
    def _teach(self) -> dict[str, _SoftLabels]:
        """Soft labels of the smaller sub-networks, by name: the answer of the EMA copy's largest.

        With the teacher `ema_ensemble`, the smallest gets the mean over the largest and the random
        sub-networks.
        """
        plan = self.plan
        largest = self._answer(plan.largest)
        targets = {subnet.name: largest for subnet in plan.smaller}
        if self.rules.teacher == "ema_ensemble" and plan.randoms:
            # Ours: the ensemble uses the students' own random widths; the published code draws them
            # again.
            ensemble = [largest, *(self._answer(subnet) for subnet in plan.randoms)]
            targets[plan.smallest.name] = _SoftLabels.mean(ensemble)
        return targets

    def _answer(self, subnet: Subnet) -> _SoftLabels:
        """The answer of a sub-network of the teacher.

        A cold sub-network normalises by the statistics of the batch and does not update its running
        statistics.
        """
        assert self.teacher is not None, "the teachers ema and ema_ensemble need the EMA copy"
        for norm in self.teacher.batch_norms():
            norm.momentum = 0.0
            norm.train(subnet.name in self.plan.cold)
        with _autocast(self.teacher_images, self.rules.precision):
            logits = self.teacher(self.teacher_images, subnet)
        return _SoftLabels.of(_widened(logits), self.rules.temperature)


def _autocast(x: Tensor, precision: str) -> AbstractContextManager[None]:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16")


def _widened(logits: Tensor) -> Tensor:
    """Logits in at least float32, for losses and probabilities."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
