"""Warnings about a trained supernet, from its training curves and measured sub-networks: too few
steps, widths out of order, and the like.

The checks are pure functions from facts to warnings. A check whose facts are missing gives no
warning, so that runs of earlier releases can be read too. Every threshold is a constant with its
reason, chosen so that a successful training gives no warning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsnet.training.data_defaults import MAX_EPOCHS
from dsnet.wording import plural, subnet_phrase

Floats = NDArray[np.float64]

MIN_STEPS = 400
"""Fewest updates without a warning. With fewer, even small networks had not learnt their task: 240
left a depthwise network 12 points below a plain one trained for as long (2,062 photos of ten
classes), 450 are enough for 8 x 8 digits."""
ENOUGH_STEPS = 2000
"""Updates from which on a loss that still decreases at the end is no reason for a warning: the
learning rate that goes to 0 lowers every loss once more."""
FALLING_SHARE = 0.10
"""Largest part of the total decrease of the loss that the last fifth of a short training may
contribute without a warning."""
ADVISED_STEPS = 1000
"""Fewest updates that the advice for too few steps recommends: with as many, the photos above came
within 2 points of the plain network."""
PLATEAU_SHARE = 0.15
"""Length of a plateau of the loss that gives a warning, as a share of the training. The students'
losses begin to decrease after 6 % on digits, and after 25 % on the photos."""
PLATEAU_CHANGE = 0.02
"""Largest decrease of the loss on a plateau, as a share of its total decrease."""
REMAINING_SHARE = 0.50
"""A plateau counts only if at least this share of the loss's total decrease comes after it. Later
plateaus are normal: the loss settles at a level set by the learning rate and decreases again
when the rate does."""
SPIKE_SHARE = 0.5
"""A rise of the loss is a spike if it is larger than this share of the decrease so far; the noise
of batches is far smaller."""
LEARNT_SHARE = 0.2
"""A spike counts only after the loss has decreased by this share of its initial value."""
MIN_ROWS = 12
"""Fewest points of a curve whose shape is checked."""
SMOOTH_ROWS = 5
"""Number of points of a curve that are averaged before plateaus are searched."""
LEVEL = 0.05
"""Probability of a false alarm over all comparisons of one check together."""
TEACHER_GAP = 0.02
"""Lead in top-1 over the widest route from which a teacher outside the routing space gives a
warning; a small lead is expected, because the teacher is larger."""
OVERFIT_GAP = 0.10
"""Difference of top-1 on images of `train` and on `val` from which there is a warning. It is about
0.05 for networks that generalise well."""


@dataclass(frozen=True)
class Score:
    """Top-1 of a sub-network on a split."""

    name: str
    top1: float
    num_images: int

    @property
    def variance(self) -> float:
        """Variance of the accuracy, estimated with one more right and one more wrong image, so that
        it is not 0 for 100 % of few images."""
        share = (self.top1 * self.num_images + 1) / (self.num_images + 2)
        return share * (1 - share) / (self.num_images + 2)


@dataclass(frozen=True)
class TrainingFacts:
    """Known facts about a trained supernet; unknown ones keep their empty defaults."""

    num_steps: int = 0
    """Number of updates; 0 = not trained here, or its curves are lost."""
    epochs: int = 0
    batch_size: int = 0
    is_from_scratch: bool = True
    """Whether training did not start from pretrained weights."""
    teacher: str = "none"
    """Teacher of the narrower sub-networks, as in `supernet.train.teacher`."""
    trust: str = "label_probability"
    """Weighting of soft labels, as in `supernet.bootstrapping.trust`."""
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    """Sub-network -> (steps, losses), in increasing steps; the first one learns from the labels."""
    routes: Sequence[Score] = ()
    """Scores of the routable sub-networks on `val`, by increasing MAdds."""
    pairs: Sequence[tuple[int, int]] = ()
    """(narrow, wide) positions in `routes`, where the wide sub-network contains the narrow one."""
    correct: NDArray[np.bool_] | None = None
    """[N, K]: whether each route is right on each image of `val`, in the order of `routes`; None =
    only the accuracies are known."""
    outside: Score | None = None
    """Score on `val` of a teacher that is not a route."""
    train: Score | None = None
    """Score of one of the routes on images of `train` without augmentation."""


@dataclass(frozen=True)
class TrainingWarning:
    """A finding that puts the numbers of a run into question."""

    code: str
    """few_steps | stood_still | spike | not_ordered | teacher_above | overfit."""
    text: str
    """The finding with its numbers; a sentence without its full stop."""
    way_out: str
    """Advice on what to change, with the names of the settings."""
    numbers: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.text}; {self.way_out}"

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping."""
        return {"code": self.code, "text": self.text, "way_out": self.way_out, "numbers": dict(self.numbers)}


def training_warnings(facts: TrainingFacts) -> tuple[TrainingWarning, ...]:
    """The warnings of all checks, the gravest causes first."""
    checks = (few_steps, stood_still, spike, not_ordered, teacher_above, overfit)
    return tuple(found for check in checks if (found := check(facts)) is not None)


# ---- the curves


def few_steps(facts: TrainingFacts) -> TrainingWarning | None:
    """Warn of too few updates, by their number or by a loss that still decreases at the end of a
    short training."""
    if not 0 < facts.num_steps < ENOUGH_STEPS or not facts.is_from_scratch:
        return None
    falling = _falling_share(facts)
    if facts.num_steps >= MIN_STEPS and (falling is None or falling <= FALLING_SHARE):
        return None
    text = f"the supernet was trained for only {facts.num_steps:,} steps"
    if falling is not None and falling > FALLING_SHARE:
        text += f", and its loss was still falling: {falling:.0%} of its decrease came in the last fifth"
    wanted = max(ADVISED_STEPS, 2 * facts.num_steps)
    epochs = math.ceil(facts.epochs * wanted / facts.num_steps)
    way_out = f"supernet.train.epochs {epochs} (now {facts.epochs}) gives about {wanted:,} steps"
    smaller = max(8, facts.batch_size // 4)
    if epochs > MAX_EPOCHS:
        way_out = f"more images help most; {way_out}, but so many epochs overfit few images"
    elif smaller < facts.batch_size:
        way_out += (
            f"; so do fewer epochs with a smaller supernet.train.batch_size, such as {smaller} (now {facts.batch_size})"
        )
    numbers = {"steps": facts.num_steps, "min_steps": MIN_STEPS, "falling_share": falling, "epochs": epochs}
    return TrainingWarning("few_steps", text, way_out, numbers)


def _falling_share(facts: TrainingFacts) -> float | None:
    """Share of the total decrease of the loss from the labels that the last fifth of the steps
    contributes; None if it cannot be estimated."""
    if not facts.curves:
        return None
    steps, losses = _curve(next(iter(facts.curves.values())))
    if len(steps) < MIN_ROWS:
        return None
    at = steps / facts.num_steps
    before, end = losses[(at > 0.6) & (at <= 0.8)], losses[at > 0.8]
    if not len(before) or not len(end):
        return None
    fall = losses[: max(1, len(losses) // 20)].mean() - end.mean()
    return None if fall <= 0 else float((before.mean() - end.mean()) / fall)


def stood_still(facts: TrainingFacts) -> TrainingWarning | None:
    """Warn of a loss that did not change for a large part of the training and decreased later, or
    that never decreased."""
    if not facts.is_from_scratch or facts.num_steps <= 0:
        return None
    shares = {
        name: share for name, curve in facts.curves.items() if (share := _still_share(curve, facts.num_steps)) > 0
    }
    slow = {name: share for name, share in shares.items() if share >= PLATEAU_SHARE}
    if not slow:
        return None
    worst = max(slow, key=lambda name: slow[name])
    others = f" and of {plural(len(slow) - 1, 'more sub-network')}" if len(slow) > 1 else ""
    who = f"the loss of {subnet_phrase(worst)}{others}"
    text = f"{who} did not decrease for {slow[worst]:.0%} of the training"
    if facts.teacher == "none":
        way_out = "raise supernet.train.lr, or shorten supernet.train.warmup_epochs"
    else:
        way_out = "raise supernet.train.epochs, or lower supernet.train.lr" + _labels_too(facts)
    return TrainingWarning("stood_still", text, way_out, {"share": slow[worst], "subnets": list(slow), "worst": worst})


def _labels_too(facts: TrainingFacts) -> str:
    """Further advice if sub-networks learn only from a teacher, which is untrained at first."""
    if facts.teacher == "none" or facts.trust != "full":
        return ""
    return "; or weight the soft labels by the teacher's probability of the label (supernet.bootstrapping.trust: label_probability)"


def _still_share(curve: tuple[Sequence[float], Sequence[float]], num_steps: int) -> float:
    """Length of the longest plateau of the loss before its main decrease, as a share of the steps;
    1 if the loss never decreased."""
    steps, losses = _curve(curve)
    if len(steps) < MIN_ROWS:
        return 0.0
    smooth = np.convolve(losses, np.full(SMOOTH_ROWS, 1 / SMOOTH_ROWS), mode="valid")
    at = steps[SMOOTH_ROWS - 1 :]
    lowest = np.minimum.accumulate(smooth)
    fall = lowest[0] - lowest[-1]
    if fall <= PLATEAU_CHANGE * abs(lowest[0]):
        return 1.0
    longest, start = 0.0, 0
    for end in range(len(lowest)):
        if lowest[end] - lowest[-1] < REMAINING_SHARE * fall:
            break
        while lowest[start] - lowest[end] > PLATEAU_CHANGE * fall:
            start += 1
        if end - start < SMOOTH_ROWS:  # means that share rows are similar whatever the loss does
            continue
        begin = float(
            steps[0] if start == 0 else at[start]
        )  # the first row is late if the largest sub-network trained alone at first
        longest = max(longest, (float(at[end]) - begin) / num_steps)
    return longest


def spike(facts: TrainingFacts) -> TrainingWarning | None:
    """Warn of a loss that rose again by a large part of its decrease."""
    found = [
        (rise, name, step, low, high) for name, curve in facts.curves.items() for rise, step, low, high in _rises(curve)
    ]
    if not found:
        return None
    rise, name, step, low, high = max(found)
    text = f"the loss of {subnet_phrase(name)} jumped from {low:.3g} to {high:.3g} near step {step:,}"
    way_out = (
        "lower supernet.train.lr, raise supernet.train.warmup_epochs, or set supernet.train.grad_clip (1 is usual)"
    )
    return TrainingWarning(
        "spike", text, way_out, {"subnet": name, "step": step, "from": low, "to": high, "share": rise}
    )


def _rises(curve: tuple[Sequence[float], Sequence[float]]) -> Iterator[tuple[float, int, float, float]]:
    """Yield the highest rise over the lowest loss so far, if it is a spike: (share of the decrease
    so far, step, from, to)."""
    steps, losses = _curve(curve)
    if len(steps) < MIN_ROWS:
        return
    first = float(losses[:2].min())
    lowest = np.minimum.accumulate(losses)[:-1]
    learnt = first - lowest
    rise = (losses[1:] - lowest) / np.maximum(learnt, 1e-12)
    rise[learnt < LEARNT_SHARE * first] = 0.0
    top = int(rise.argmax())
    if rise[top] > SPIKE_SHARE:
        yield float(rise[top]), int(steps[top + 1]), float(lowest[top]), float(losses[top + 1])


def _curve(curve: tuple[Sequence[float], Sequence[float]]) -> tuple[Floats, Floats]:
    return np.asarray(curve[0], dtype=np.float64), np.asarray(curve[1], dtype=np.float64)


# ---- the measured sub-networks


def not_ordered(facts: TrainingFacts) -> TrainingWarning | None:
    """Warn of a sub-network that contains another one and is significantly worse on `val`,
    corrected for the number of pairs."""
    if not facts.pairs:
        return None
    chances = _worse_by_chance(facts)
    sure = [
        (p, narrow, wide)
        for p, (narrow, wide) in zip(chances, facts.pairs, strict=True)
        if p * len(facts.pairs) < LEVEL
    ]
    if not sure:
        return None
    p, narrow, wide = min(sure)
    small, large = facts.routes[narrow], facts.routes[wide]
    text = (
        f"{subnet_phrase(large.name)} is worse on val than {subnet_phrase(small.name)}, which it contains: "
        f"{large.top1:.1%} and {small.top1:.1%}"
        + (f" (there are {plural(len(sure) - 1, 'more such pair')})" if len(sure) > 1 else "")
    )
    way_out = (
        "the wider ones need more training: raise supernet.train.epochs or supernet.train.num_random; "
        "and check that supernet.recalibration.images is large enough"
    )
    numbers = {"narrow": small.name, "wide": large.name, "p": p, "pairs": len(facts.pairs), "num_found": len(sure)}
    return TrainingWarning("not_ordered", text, way_out, numbers)


def _worse_by_chance(facts: TrainingFacts) -> list[float]:
    """One-sided p-value of each pair: the probability that the wide sub-network is so much worse if
    the two are equally good.

    If the images are known, it is McNemar's test on the images that only one of the two gets right,
    and 1 if the wide one is not worse. Otherwise the two accuracies are taken as independent, which
    is conservative, because sub-networks of one supernet err on the same images.
    """
    narrow, wide = np.asarray(facts.pairs, dtype=np.int64).T
    if facts.correct is None:
        routes = [(facts.routes[a], facts.routes[b]) for a, b in facts.pairs]
        return [_normal_tail((a.top1 - b.top1) / math.sqrt(a.variance + b.variance)) for a, b in routes]
    right = facts.correct.astype(np.float32)  # one product for all pairs: there may be a hundred thousand
    both, each = (right.T @ right)[narrow, wide], right.sum(axis=0)
    lost, won = (np.rint(each[whose] - both).astype(int).tolist() for whose in (narrow, wide))
    return [_binomial_tail(a, a + b) if a > b else 1.0 for a, b in zip(lost, won, strict=True)]


def _normal_tail(z: float) -> float:
    return 0.5 * math.erfc(z / math.sqrt(2))


@cache
def _binomial_tail(count: int, total: int) -> float:
    """P(X >= count) for the number X of heads of `total` fair coins; a normal approximation above
    200."""
    if total > 200:
        return _normal_tail((count - 0.5 - total / 2) / math.sqrt(total / 4))
    ways = tail = math.comb(total, count)
    for k in range(count, total):
        ways = ways * (total - k) // (k + 1)  # C(total, k + 1)
        tail += ways
    return float(tail / 2**total)


def teacher_above(facts: TrainingFacts) -> TrainingWarning | None:
    """Warn of a teacher that is not a route and is far better than the widest route: the routes
    have not learnt enough from it."""
    if facts.outside is None or not facts.routes:
        return None
    widest = facts.routes[-1]
    if not _is_above(facts.outside, widest, TEACHER_GAP):
        return None
    gap = facts.outside.top1 - widest.top1
    text = (
        f"{subnet_phrase(facts.outside.name)}, the teacher, which is not a route, is {100 * gap:.1f} points better on val than "
        f"the widest route, {subnet_phrase(widest.name)}: {facts.outside.top1:.1%} and {widest.top1:.1%}"
    )
    way_out = f"raise supernet.train.epochs, or lower supernet.train.lr{_labels_too(facts)}"
    return TrainingWarning(
        "teacher_above", text, way_out, {"teacher": facts.outside.top1, "widest": widest.top1, "gap": gap}
    )


def overfit(facts: TrainingFacts) -> TrainingWarning | None:
    """Warn of a network that is far better on its training images than on others."""
    on_val = None if facts.train is None else next((own for own in facts.routes if own.name == facts.train.name), None)
    if facts.train is None or on_val is None or not _is_above(facts.train, on_val, OVERFIT_GAP):
        return None
    gap = facts.train.top1 - on_val.top1
    text = (
        f"{subnet_phrase(on_val.name)} has {facts.train.top1:.1%} on training images and {on_val.top1:.1%} on val, "
        f"a difference of {100 * gap:.1f} points"
    )
    way_out = (
        "it overfits: more images help most, then a larger supernet.train.weight_decay; stronger data.augment needs "
        "several times as many supernet.train.epochs"
    )
    return TrainingWarning("overfit", text, way_out, {"train": facts.train.top1, "val": on_val.top1, "gap": gap})


def _is_above(high: Score, low: Score, gap: float) -> bool:
    """Whether the difference is at least `gap` and significant (one-sided, for independent
    samples)."""
    difference = high.top1 - low.top1
    return difference >= gap and _normal_tail(difference / math.sqrt(high.variance + low.variance)) < LEVEL
