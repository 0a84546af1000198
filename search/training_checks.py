"""What the curves and the measured sub-networks of a trained supernet say against it: too few
steps, widths out of order, and the like.

Pure functions: facts in, warnings out. A check that lacks its facts says nothing, so that runs of
earlier releases can be read too. Every threshold is a constant with its reason; each is set so that
a training that went well does not meet it.
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

Floats = NDArray[np.float64]

MIN_STEPS = 400
"""Below so many updates even small networks had not learnt their task: 240 left a depthwise network
12 points below a plain one trained for as long (2,062 photos of ten classes), 450 are enough for 8
x 8 digits."""
ENOUGH_STEPS = 2000
"""From here on a loss that falls at the end is the schedule's doing: a learning rate that goes to 0
lowers every loss once more."""
FALLING_SHARE = 0.10
"""Of the whole fall of the loss, what the last fifth of a short training may still bring."""
ADVISED_STEPS = 1000
"""What the way out of too few steps aims at: the photos above came within 2 points of the plain
network there."""
STILL_SHARE = 0.15
"""Of the training, how long a loss may stand still before it falls on. Digits' students begin after
6 %, those of the photos after 25 %."""
STILL_CHANGE = 0.02
"""Of the whole fall of the loss, what counts as standing still."""
FALLS_ON = 0.50
"""A plateau counts only while at least this share of the loss's total decrease is still to come.
Later plateaus are normal: the loss settles at a level set by the learning rate and decreases again
when the rate does."""
SPIKE_SHARE = 0.5
"""Of what a loss had fallen by, what it must rise again to be called a spike; the noise of a batch
is far below."""
LEARNT_SHARE = 0.2
"""Of the loss at the start, what must have been learnt before a spike is one."""
MIN_ROWS = 12
"""Points of a curve below which its shape says nothing."""
SMOOTH_ROWS = 5
"""Points of a curve that are averaged before standing still is looked for."""
LEVEL = 0.05
"""Of all comparisons of one check together, the chance of a false alarm."""
TEACHER_GAP = 0.02
"""Top-1 that a teacher outside the routing space may have over the widest route; it is larger,
after all."""
OVERFIT_GAP = 0.10
"""Top-1 on images of `train` minus top-1 on `val`. Networks that generalise well lose 5 points or
so."""


@dataclass(frozen=True)
class Score:
    """Top-1 of a sub-network on a split."""

    name: str
    top1: float
    num_images: int

    @property
    def variance(self) -> float:
        """Of the share, with one image more of either kind: 100 % of few images is not certain."""
        share = (self.top1 * self.num_images + 1) / (self.num_images + 2)
        return share * (1 - share) / (self.num_images + 2)


@dataclass(frozen=True)
class TrainingFacts:
    """What is known of a trained supernet; what is not known stays empty."""

    num_steps: int = 0
    """0: not trained here, or its curves are lost."""
    epochs: int = 0
    batch_size: int = 0
    is_from_scratch: bool = True
    """Not from weights that somebody trained before."""
    teacher: str = "none"
    """Who taught the narrower sub-networks, as `supernet.train.teacher` names it."""
    trust: str = "label_probability"
    """How soft labels count, as `supernet.bootstrapping.trust` names it."""
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    """Sub-network -> (steps, losses), rising in steps; the first one learns from the labels."""
    routes: Sequence[Score] = ()
    """The routable sub-networks on `val`, by rising MAdds."""
    pairs: Sequence[tuple[int, int]] = ()
    """(narrow, wide) positions in `routes`, where the wide one holds the narrow one."""
    correct: NDArray[np.bool_] | None = None
    """[N, K]: which image of `val` which route gets right, in the order of `routes`; None = only
    the shares are known."""
    outside: Score | None = None
    """On `val`: the teacher that is no route."""
    train: Score | None = None
    """Of one of the routes, on images of `train` without augmentation."""


@dataclass(frozen=True)
class TrainingWarning:
    """Something that a person should know before believing the numbers of a run."""

    code: str
    """few_steps | stood_still | spike | not_ordered | teacher_above | overfit."""
    text: str
    """What was found, with its numbers; a sentence without its full stop."""
    way_out: str
    """What to change, by the names of the settings."""
    numbers: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.text}; {self.way_out}"

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping."""
        return {"code": self.code, "text": self.text, "way_out": self.way_out, "numbers": dict(self.numbers)}


def training_warnings(facts: TrainingFacts) -> tuple[TrainingWarning, ...]:
    """Everything that the checks find, the gravest causes first."""
    checks = (few_steps, stood_still, spike, not_ordered, teacher_above, overfit)
    return tuple(found for check in checks if (found := check(facts)) is not None)


# ---- the curves


def few_steps(facts: TrainingFacts) -> TrainingWarning | None:
    """Too few updates, by their number or by a loss that still falls where a short training
    ends."""
    if not 0 < facts.num_steps < ENOUGH_STEPS or not facts.is_from_scratch:
        return None
    falling = _falling_share(facts)
    if facts.num_steps >= MIN_STEPS and (falling is None or falling <= FALLING_SHARE):
        return None
    text = f"the supernet was trained for {facts.num_steps:,} steps only"
    if falling is not None and falling > FALLING_SHARE:
        text += f", and its loss still falls: the last fifth brought {falling:.0%} of the whole fall"
    wanted = max(ADVISED_STEPS, 2 * facts.num_steps)
    epochs = math.ceil(facts.epochs * wanted / facts.num_steps)
    way_out = f"supernet.train.epochs {epochs} (now {facts.epochs}) gives about {wanted:,}"
    smaller = max(8, facts.batch_size // 4)
    if epochs > MAX_EPOCHS:
        way_out = f"more images help most; {way_out}, but so many epochs learn few images by heart"
    elif smaller < facts.batch_size:
        way_out += (
            f"; so do fewer epochs with a smaller supernet.train.batch_size, such as {smaller} (now {facts.batch_size})"
        )
    numbers = {"steps": facts.num_steps, "min_steps": MIN_STEPS, "falling_share": falling, "epochs": epochs}
    return TrainingWarning("few_steps", text, way_out, numbers)


def _falling_share(facts: TrainingFacts) -> float | None:
    """What the last fifth of the steps adds to the fall of the loss that learns from the labels, as
    a share of the whole fall."""
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
    """A loss that did not move for a large part of the training, and fell later; or one that never
    fell."""
    if not facts.is_from_scratch or facts.num_steps <= 0:
        return None
    shares = {
        name: share for name, curve in facts.curves.items() if (share := _still_share(curve, facts.num_steps)) > 0
    }
    slow = {name: share for name, share in shares.items() if share >= STILL_SHARE}
    if not slow:
        return None
    worst = max(slow, key=lambda name: slow[name])
    who = f"the loss of {worst}" + (f" and of {len(slow) - 1} more sub-networks" if len(slow) > 1 else "")
    text = f"{who} stood still for {slow[worst]:.0%} of the training"
    if facts.teacher == "none":
        way_out = "raise supernet.train.lr, or shorten supernet.train.warmup_epochs"
    else:
        way_out = "raise supernet.train.epochs, or lower supernet.train.lr" + _labels_too(facts)
    return TrainingWarning("stood_still", text, way_out, {"share": slow[worst], "subnets": list(slow), "worst": worst})


def _labels_too(facts: TrainingFacts) -> str:
    """The further way out where sub-networks learn from nothing but a teacher, who knows nothing at
    first."""
    if facts.teacher == "none" or facts.trust != "full":
        return ""
    return "; or let soft labels count as far as the teacher knows the label (supernet.bootstrapping.trust: label_probability)"


def _still_share(curve: tuple[Sequence[float], Sequence[float]], num_steps: int) -> float:
    """The longest stretch, as a share of the steps, over which the loss fell by nearly nothing of
    all that it fell by later."""
    steps, losses = _curve(curve)
    if len(steps) < MIN_ROWS:
        return 0.0
    smooth = np.convolve(losses, np.full(SMOOTH_ROWS, 1 / SMOOTH_ROWS), mode="valid")
    at = steps[SMOOTH_ROWS - 1 :]
    lowest = np.minimum.accumulate(smooth)
    fall = lowest[0] - lowest[-1]
    if fall <= STILL_CHANGE * abs(lowest[0]):
        return 1.0
    longest, start = 0.0, 0
    for end in range(len(lowest)):
        if lowest[end] - lowest[-1] < FALLS_ON * fall:
            break
        while lowest[start] - lowest[end] > STILL_CHANGE * fall:
            start += 1
        if end - start < SMOOTH_ROWS:  # two means with rows in common are alike whatever the loss does
            continue
        begin = float(
            steps[0] if start == 0 else at[start]
        )  # the first row is late where the largest trained alone at first
        longest = max(longest, (float(at[end]) - begin) / num_steps)
    return longest


def spike(facts: TrainingFacts) -> TrainingWarning | None:
    """A loss that rose again by a large part of what it had fallen by."""
    found = [
        (rise, name, step, low, high) for name, curve in facts.curves.items() for rise, step, low, high in _rises(curve)
    ]
    if not found:
        return None
    rise, name, step, low, high = max(found)
    text = f"the loss of {name} jumped from {low:.3g} to {high:.3g} about step {step:,}"
    way_out = (
        "lower supernet.train.lr, raise supernet.train.warmup_epochs, or set supernet.train.grad_clip (1 is usual)"
    )
    return TrainingWarning(
        "spike", text, way_out, {"subnet": name, "step": step, "from": low, "to": high, "share": rise}
    )


def _rises(curve: tuple[Sequence[float], Sequence[float]]) -> Iterator[tuple[float, int, float, float]]:
    """The highest rise over the lowest loss so far that is large enough: (share of what was learnt,
    step, from, to)."""
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


# ---- what was measured


def not_ordered(facts: TrainingFacts) -> TrainingWarning | None:
    """A sub-network that holds another one and is worse on `val`, beyond what chance gives among so
    many pairs."""
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
        f"{large.name} is worse on val than {small.name}, which is a part of it: {large.top1:.1%} and {small.top1:.1%}"
        + (f" (and so are {len(sure) - 1} more pairs)" if len(sure) > 1 else "")
    )
    way_out = (
        "the wider ones are not trained to their end: raise supernet.train.epochs, or supernet.train.num_random; "
        "and look whether supernet.recalibration.images is enough"
    )
    numbers = {"narrow": small.name, "wide": large.name, "p": p, "pairs": len(facts.pairs), "num_found": len(sure)}
    return TrainingWarning("not_ordered", text, way_out, numbers)


def _worse_by_chance(facts: TrainingFacts) -> list[float]:
    """For each pair the chance of the wide one being so much worse if the two were equally good;
    one-sided, 1 where it is not worse.

    With the images known McNemar's test: the images that one gets right and the other wrong fall to
    either side alike. Without them both are taken as independent, which is cautious: sub-networks
    of one supernet err on the same images.
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
    """P(X >= count) for X of `total` fair coins; by the normal distribution where there are
    many."""
    if total > 200:
        return _normal_tail((count - 0.5 - total / 2) / math.sqrt(total / 4))
    ways = tail = math.comb(total, count)
    for k in range(count, total):
        ways = ways * (total - k) // (k + 1)  # C(total, k + 1)
        tail += ways
    return float(tail / 2**total)


def teacher_above(facts: TrainingFacts) -> TrainingWarning | None:
    """A teacher that no image is ever routed to and that is far better than the widest route: what
    it can was not handed down."""
    if facts.outside is None or not facts.routes:
        return None
    widest = facts.routes[-1]
    if not _is_above(facts.outside, widest, TEACHER_GAP):
        return None
    gap = facts.outside.top1 - widest.top1
    text = (
        f"{facts.outside.name}, which teaches and is never routed to, has {100 * gap:.1f} points more on val than the widest route "
        f"{widest.name}: {facts.outside.top1:.1%} and {widest.top1:.1%}"
    )
    way_out = f"raise supernet.train.epochs, or lower supernet.train.lr{_labels_too(facts)}"
    return TrainingWarning(
        "teacher_above", text, way_out, {"teacher": facts.outside.top1, "widest": widest.top1, "gap": gap}
    )


def overfit(facts: TrainingFacts) -> TrainingWarning | None:
    """A network that knows its training images far better than others."""
    on_val = None if facts.train is None else next((own for own in facts.routes if own.name == facts.train.name), None)
    if facts.train is None or on_val is None or not _is_above(facts.train, on_val, OVERFIT_GAP):
        return None
    gap = facts.train.top1 - on_val.top1
    text = (
        f"{on_val.name} has {facts.train.top1:.1%} on images that it was trained on and {on_val.top1:.1%} on val: "
        f"{100 * gap:.1f} points apart"
    )
    way_out = (
        "it learns the images by heart: more images help most, then a larger supernet.train.weight_decay; stronger data.augment needs "
        "several times the supernet.train.epochs"
    )
    return TrainingWarning("overfit", text, way_out, {"train": facts.train.top1, "val": on_val.top1, "gap": gap})


def _is_above(high: Score, low: Score, gap: float) -> bool:
    """Whether the difference is at least `gap`, and more than chance gives (one-sided, as
    independent samples)."""
    difference = high.top1 - low.top1
    return difference >= gap and _normal_tail(difference / math.sqrt(high.variance + low.variance)) < LEVEL
