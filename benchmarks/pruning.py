"""Errors of Pareto-rank halving: the rule is replayed on end-to-end trials that were all trained to
their end.

Gates with settings spread over the digits example's space are fully trained end to end, with their
objectives on `val` noted at every epoch where some rule has a rung. Then each rule runs over this
complete table: cohorts of 8 in order, for many orders of the trials. It is compared with pruning at
random, with as many trials kept, and with as many unpruned trials as the same number of epochs
allows. Trials that are tied with a front point (docs/definitions.md, Controls and intervals: ties)
are counted too: losing one of two tied trials is no loss. A rule that keeps fewer trials than the
front has points must lose some; the least possible loss is reported beside the actual one.

Without `--run FOLDER` a supernet is trained on digits first; `test`, which is not used, is made
small so that `val` is larger. The intervals are over orders of the trials; the results are
conditional on one supernet and one draw of settings.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gate_fronts import Material
from benchmarks.gate_trials import trial_settings
from benchmarks.harness import NUM_RESAMPLES, Estimate, Headline, Options, Report, Section, run_benchmark
from dsnet.data.normalization import Normalization
from dsnet.data.registry import load_images
from dsnet.data.settings import Augmentation, SplitSizes
from dsnet.data.splits import make_splits
from dsnet.data.tensors import TensorData
from dsnet.data.training_images import InMemoryImages
from dsnet.errors import NonFiniteLossError
from dsnet.families import Task, create
from dsnet.files import atomic_write_text
from dsnet.gates.end_to_end import GateImages, train_stage
from dsnet.gates.fit import calibrate_heads
from dsnet.gates.settings import EndToEndSettings, GateSettings
from dsnet.measure.evaluate import build_routing_table
from dsnet.stored.checkpoint import load_supernet
from dsnet.training.settings import REGIMES, BootstrapSettings, TrainSettings
from dsnet.training.supernet import train_supernet
from dsnet.training.supernet_run import SupernetRun
from search.front.pareto import Goal, front_mask, hypervolume
from search.front.statistics import bootstrap_interval, resample_points, tied_groups
from search.study.halving import ParetoHalving

BENCHMARK = (
    "Pareto-rank halving of end-to-end trials: front points wrongly pruned, over pruning at random (goal: at most half)"
)
GOAL = 0.5
GOALS: tuple[Goal, Goal] = ("maximize", "minimize")
"""Goals of top-1 and mean MAdds."""
COHORT = 8
FACTORS = (2, 3, 4)
FIRST_EPOCHS = (1, 3)
DEFAULT_RULE = (3, 3, True)
"""Factor, first rung, and whether the front is kept, of the headline: as configured by default."""
NUM_PROCESSES = 2
DIGITS_SPLITS = SplitSizes(train=600, gate=400, val=700, test=97)


def digits_material(seed: int, epochs: int) -> Material:
    """A supernet trained on 600 scans of digits, and its tables."""
    images = load_images("digits", None)
    data = TensorData.from_images(images, make_splits(images.labels.numpy(), sizes=DIGITS_SPLITS, seed=seed))
    pixels = data.images("train")
    normalization, augmentation = Normalization.from_images(pixels), Augmentation.for_images(images)
    regime = REGIMES["ib"]
    run = SupernetRun(
        train=TrainSettings(epochs=epochs, batch_size=64, lr=0.1, warmup_epochs=1.0),
        regime=regime,
        bootstrapping=BootstrapSettings(teacher_min_updates=50),
        augmentation=augmentation,
        normalization=normalization,
        seed=seed,
    )
    channels, _, size = data.image_shape
    supernet = create("ds_tiny", Task(data.num_classes, channels, size), {}, norm=regime.norm, seed=seed)
    training = InMemoryImages(pixels, data.labels("train"), augmentation)
    with tempfile.TemporaryDirectory() as folder:
        final = train_supernet(supernet, training, run, folder=Path(folder))
        assert final is not None
        supernet, _ = load_supernet(final)
    gate, val = (build_routing_table(supernet, data, split, normalization) for split in ("gate", "val"))
    return Material(supernet, gate, val, GateImages(data.images("gate"), data.labels("gate"), normalization))


@dataclass(frozen=True, eq=False)
class FullTrial:
    """A trial trained to its end."""

    values: NDArray[np.float64]
    """[C, 2] top-1 and mean MAdds on `val` after each noted epoch."""
    correct: NDArray[np.bool_]
    """[images] of `val`, at the end: whether each is classified rightly."""
    madds: NDArray[np.int64]
    """[images] of `val`, at the end: MAdds spent on each."""


def train_in_full(
    material: Material, settings: Sequence[GateSettings], rules: EndToEndSettings, noted: Sequence[int]
) -> list[FullTrial | None]:
    """Train each trial to its end, in stages that end after the epochs `noted`; None where it
    diverged. One thread."""
    torch.set_num_threads(1)
    return [_full_trial(material, own, rules, noted) for own in settings]


def _full_trial(
    material: Material, settings: GateSettings, rules: EndToEndSettings, noted: Sequence[int]
) -> FullTrial | None:
    values, progress, val = [], None, material.val
    for until in noted:
        try:
            stage = train_stage(material.supernet, material.images, settings, rules, start=progress, until=until)
            fit = calibrate_heads(val, settings, stage.heads)
        except NonFiniteLossError:
            return None
        progress = stage.progress
        values.append((fit.metrics["top1"], fit.metrics["madds_m"]))
    correct = val.correct1[np.arange(val.num_images), fit.run.routes]
    return FullTrial(np.array(values), correct, fit.run.madds)


@dataclass(frozen=True, eq=False)
class CompleteTable:
    """Results of all trials at all noted epochs."""

    epochs: tuple[int, ...]
    """[C] noted epochs; the last is the length of a whole trial."""
    trials: Sequence[FullTrial]

    @property
    def num_trials(self) -> int:
        """Number of trials, N."""
        return len(self.trials)

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """[N, C, 2] top-1 and mean MAdds of all trials at all noted epochs."""
        return np.stack([trial.values for trial in self.trials])

    @property
    def final(self) -> NDArray[np.float64]:
        """[N, 2] top-1 and mean MAdds at the end."""
        return self.values[:, -1]

    @cached_property
    def is_front(self) -> NDArray[np.bool_]:
        """[N] whether each trial is non-dominated at the end; all copies of a point are."""
        return front_mask(self.final, GOALS)

    @cached_property
    def front(self) -> tuple[frozenset[int], ...]:
        """For each point of the front, the trials with its values."""
        points = np.unique(self.final[self.is_front], axis=0)
        return tuple(frozenset(np.flatnonzero((self.final == point).all(axis=1)).tolist()) for point in points)

    @cached_property
    def tied(self) -> tuple[frozenset[int], ...]:
        """For each point of the front, the trials with its values or tied with it: within 1 % of
        its MAdds, and in top-1 within the noise of the images."""
        correct = np.column_stack([trial.correct for trial in self.trials])
        madds = np.column_stack([trial.madds for trial in self.trials])
        groups = tied_groups(resample_points(correct, madds), self.is_front)
        return tuple(own.union(*(groups[index] for index in own)) for own in self.front)

    @cached_property
    def reference(self) -> tuple[float, float]:
        """Reference of the hypervolume: worse than the table's worst values by only a twentieth of
        their range, so that shares are not inflated."""
        low, high = self.final.min(axis=0), self.final.max(axis=0)
        margin = 0.05 * np.where(high > low, high - low, np.abs(high))
        return float(low[0] - margin[0]), float(high[1] + margin[1])

    def at(self, epoch: int) -> NDArray[np.float64]:
        """[N, 2] top-1 and mean MAdds after a noted epoch."""
        return self.values[:, self.epochs.index(epoch)]


@dataclass(frozen=True, eq=False)
class Replay:
    """Result of a rule on the trials of the table in one order."""

    is_kept: NDArray[np.bool_]
    """[N] whether each trial is trained to the end."""
    num_epochs: int
    """Number of epochs of all trials together."""


def replay(table: CompleteTable, halving: ParetoHalving, order: Sequence[int], cohort: int = COHORT) -> Replay:
    """Run the rule over the trials in an order, as a search does: slots are positions in the order,
    and cohorts advance rung by rung."""
    is_kept = np.zeros(table.num_trials, dtype=bool)
    reached: dict[int, list[tuple[float, ...]]] = {rung: [] for rung in halving.rungs}
    num_epochs = 0
    for start in range(0, len(order), cohort):
        left = dict(enumerate(order[start : start + cohort], start))
        done = 0
        for rung in halving.rungs:
            num_epochs += (rung - done) * len(left)
            done = rung
            candidates = {slot: tuple(table.at(rung)[trial].tolist()) for slot, trial in left.items()}
            going_on = halving.survivors(candidates, reached[rung], GOALS)
            reached[rung] += candidates.values()
            left = {slot: trial for slot, trial in left.items() if slot in going_on}
        num_epochs += (table.epochs[-1] - done) * len(left)
        is_kept[list(left.values())] = True
    return Replay(is_kept, num_epochs)


@dataclass(frozen=True)
class Loss:
    """Losses by pruning: parts of the complete front that the kept trials lack."""

    front: float
    """Share of the front's points without a kept trial."""
    front_and_tied: float
    """Share of the trials on the front or tied with one of its points that are not kept."""
    unmatched: float
    """Share of the front's points without a kept trial, even a tied one."""
    hypervolume: float
    """Hypervolume of the kept trials, as a share of that of all trials."""

    @classmethod
    def of(cls, table: CompleteTable, is_kept: NDArray[np.bool_]) -> Loss:
        """Compute the losses of kept trials against the complete table."""
        kept = set(np.flatnonzero(is_kept).tolist())
        wanted = frozenset().union(*table.tied)
        whole = hypervolume(table.final, GOALS, table.reference)
        return cls(
            front=float(np.mean([kept.isdisjoint(own) for own in table.front])),
            front_and_tied=len(wanted - kept) / len(wanted),
            unmatched=float(np.mean([kept.isdisjoint(own) for own in table.tied])),
            hypervolume=hypervolume(table.final[is_kept], GOALS, table.reference) / whole,
        )


WAYS = ("halving", "random", "unpruned")
"""Ways of pruning: the rule; as many trials kept at random; and as many unpruned trials as the
rule's epochs allow."""


@dataclass(frozen=True, eq=False)
class RuleResult:
    """A rule over many orders of the trials."""

    halving: ParetoHalving
    kept: NDArray[np.float64]
    """[orders] share of the trials trained to the end."""
    epochs: NDArray[np.float64]
    """[orders] share of the complete table's epochs that were trained."""
    losses: Mapping[str, Sequence[Loss]]
    """Way of pruning -> losses [orders]."""

    def samples(self, way: str, field: str) -> NDArray[np.float64]:
        """Values of one figure, [orders]."""
        return np.array([getattr(loss, field) for loss in self.losses[way]])


def judge(table: CompleteTable, halving: ParetoHalving, seed: int, num_orders: int) -> RuleResult:
    """Replay a rule on random orders of the trials; the same orders for every rule."""
    rng = np.random.default_rng(seed)
    kept, epochs = [], []
    losses: dict[str, list[Loss]] = {way: [] for way in WAYS}
    for _ in range(num_orders):
        order, other = rng.permutation(table.num_trials), rng.permutation(table.num_trials)
        result = replay(table, halving, order.tolist())
        kept.append(result.is_kept.mean())
        epochs.append(result.num_epochs / (table.num_trials * table.epochs[-1]))
        losses["halving"].append(Loss.of(table, result.is_kept))
        for way, number in (("random", result.is_kept.sum()), ("unpruned", result.num_epochs // table.epochs[-1])):
            chosen = np.zeros(table.num_trials, dtype=bool)
            chosen[other[:number]] = True
            losses[way].append(Loss.of(table, chosen))
    return RuleResult(halving, np.array(kept), np.array(epochs), losses)


def over_orders(samples: NDArray[np.float64]) -> Estimate:
    """The mean, and the range that holds 95 % of the orders."""
    low, high = bootstrap_interval(samples)
    return Estimate(float(samples.mean()), float(low), float(high))


def ratio_of_means(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> Estimate:
    """Ratio of two means with its interval over orders, resampled in pairs."""
    rows = np.random.default_rng(0).integers(len(numerator), size=(NUM_RESAMPLES, len(numerator)))
    low, high = bootstrap_interval(numerator[rows].mean(axis=1) / denominator[rows].mean(axis=1))
    return Estimate(float(numerator.mean() / denominator.mean()), float(low), float(high))


def rules_for(epochs: int) -> list[ParetoHalving]:
    """All rules: every factor with every first rung that can save epochs, with and without keeping
    the front."""
    cases = itertools.product(FIRST_EPOCHS, FACTORS, (False, True))
    return [
        ParetoHalving.geometric(factor, first, epochs, keeps_front=keeps_front)
        for first, factor, keeps_front in cases
        if first < epochs
    ]


def complete_table(
    material: Material, settings: Sequence[GateSettings], epochs: int, rules: Sequence[ParetoHalving]
) -> tuple[CompleteTable, float]:
    """Train all trials to their end on two processes; returns the table of those that did not
    diverge, and the seconds of the training."""
    noted = tuple(sorted({epochs}.union(*(rule.rungs for rule in rules))))
    shares = [list(settings[part::NUM_PROCESSES]) for part in range(NUM_PROCESSES)]
    training = EndToEndSettings(epochs=epochs)
    start = time.perf_counter()
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=get_context("spawn")) as pool:
        parts = pool.map(
            train_in_full, [material] * len(shares), shares, [training] * len(shares), [noted] * len(shares)
        )
        found = [trial for part in parts for trial in part if trial is not None]
    return CompleteTable(noted, found), time.perf_counter() - start


def measure(
    options: Options,
    run: Path | None,
    trials: int | None,
    epochs: int | None,
    batch_size: int,
    orders: int,
    markdown: Path | None,
) -> Report:
    """Make the complete table, then replay every rule on it."""
    trials = trials if trials is not None else 16 if options.quick else 64
    epochs = epochs if epochs is not None else 9 if options.quick else 27
    start = time.perf_counter()
    material = digits_material(options.seed, 3 if options.quick else 20) if run is None else Material.of(run)
    supernet_s = time.perf_counter() - start
    drawn = itertools.islice(trial_settings(material.gate.num_routes, options.seed), trials)
    settings = [replace(own, batch_size=batch_size) for own in drawn]
    rules = rules_for(epochs)
    table, table_s = complete_table(material, settings, epochs, rules)
    results = [judge(table, rule, options.seed, min(orders, 20) if options.quick else orders) for rule in rules]
    sections = [
        _rules_section(table, results),
        _ways_section(table, results),
        _rungs_section(table),
        _facts_section(table, trials, table_s),
    ]
    if markdown is not None:
        from benchmarks.regime_report import markdown as as_markdown  # it needs Plotly

        atomic_write_text(markdown, as_markdown(sections))
    return Report(
        sections, _headline(results), {**_figures(table, results), "supernet_s": supernet_s, "table_s": table_s}
    )


def _headline(results: Sequence[RuleResult]) -> Headline:
    found = [result for result in results if _key(result.halving) == DEFAULT_RULE]
    result = (found or results)[0]
    ratio = ratio_of_means(result.samples("halving", "unmatched"), result.samples("random", "unmatched"))
    label = f"front points without a tied trial that is kept, {_name(result.halving)}, over pruning at random"
    return Headline(label, ratio, "", GOAL)


def _key(halving: ParetoHalving) -> tuple[int, int, bool]:
    return halving.factor, halving.rungs[0], halving.keeps_front


def _name(halving: ParetoHalving) -> str:
    kept = " + front" if halving.keeps_front else ""
    return f"1/{halving.factor}{kept} at {', '.join(map(str, halving.rungs))}"


def _percent(samples: NDArray[np.float64], digits: int = 0) -> str:
    return over_orders(100 * samples).text(digits)


def _rules_section(table: CompleteTable, results: Sequence[RuleResult]) -> Section:
    rows = [
        (
            _name(result.halving),
            _percent(result.kept),
            _percent(result.epochs),
            *(_percent(result.samples("halving", field)) for field in ("front", "front_and_tied", "unmatched")),
            _percent(result.samples("halving", "hypervolume"), 1),
        )
        for result in results
    ]
    columns = ("goes on", "to the end", "epochs", "front lost", "front, ties pruned", "unmatched", "hypervolume")
    whole = f"all {table.num_trials} trials of {table.epochs[-1]} epochs"
    return Section(f"Shares of {whole}, %, cohorts of {COHORT}: mean over orders [95 % of the orders]", columns, rows)


def _ways_section(table: CompleteTable, results: Sequence[RuleResult]) -> Section:
    rows = []
    for result in results:
        least = np.maximum(0.0, 1 - result.kept * table.num_trials / len(table.front)).mean()
        unmatched = [100 * result.samples(way, "unmatched").mean() for way in WAYS]
        volumes = [100 * result.samples(way, "hypervolume").mean() for way in WAYS]
        cells = [f"{100 * least:.0f}", *(f"{share:.0f}" for share in unmatched), *(f"{share:.1f}" for share in volumes)]
        rows.append((_name(result.halving), *cells))
    columns = (
        "goes on",
        "least possible",
        "unmatched",
        "at random",
        "unpruned",
        "hypervolume",
        "hv at random",
        "hv unpruned",
    )
    title = (
        "Against as many trials at random, and unpruned trials of equal epochs: unmatched front points, hypervolume; %"
    )
    return Section(title, columns, rows)


def _rungs_section(table: CompleteTable) -> Section:
    """Section on how well the results at a rung predict those at the end."""
    columns = (
        "epoch",
        "top-1 from the end's, points",
        "MAdds from the end's, %",
        "of the end's front on the front here %",
    )
    rows = []
    for epoch in table.epochs[:-1]:
        now = table.at(epoch)
        change = np.abs(now - table.final).mean(axis=0)
        found = front_mask(now, GOALS)[table.is_front].mean()
        relative = change[1] / table.final[:, 1].mean()
        rows.append((str(epoch), f"{100 * change[0]:.2f}", f"{100 * relative:.2f}", f"{100 * found:.0f}"))
    return Section("Results at each rung against those at the end (mean absolute differences)", columns, rows)


def _facts_section(table: CompleteTable, asked: int, table_s: float) -> Section:
    num_images = len(table.trials[0].correct)
    num_tied = len(frozenset().union(*table.tied))
    epoch_ms = 1e3 * NUM_PROCESSES * table_s / (table.num_trials * table.epochs[-1])
    rows = [
        ("trials trained in full", f"{table.num_trials} of {asked}"),
        ("points on the complete front", str(len(table.front))),
        ("trials on it or tied with one of its points", str(num_tied)),
        ("images of val; one is", f"{num_images}; {100 / num_images:.2f} points"),
        ("top-1 of the complete table, %", _range(100 * table.final[:, 0])),
        ("M MAdds", _range(table.final[:, 1])),
        ("an epoch of one trial, start-up included", f"{epoch_ms:.0f} ms"),
    ]
    return Section("The complete table", ("", ""), rows)


def _range(values: NDArray[np.float64]) -> str:
    return f"{values.min():.3g} to {values.max():.3g}"


def _figures(table: CompleteTable, results: Sequence[RuleResult]) -> dict[str, Any]:
    rules = [
        {
            "factor": result.halving.factor,
            "rungs": list(result.halving.rungs),
            "keeps_front": result.halving.keeps_front,
            "kept": asdict(over_orders(result.kept)),
            "epochs": asdict(over_orders(result.epochs)),
            **{
                way: {field: asdict(over_orders(result.samples(way, field))) for field in asdict(result.losses[way][0])}
                for way in WAYS
            },
        }
        for result in results
    ]
    return {
        "rules": rules,
        "num_orders": len(results[0].kept),
        "epochs": list(table.epochs),
        "values": table.values.tolist(),
        "front": [sorted(own) for own in table.front],
        "tied": [sorted(own) for own in table.tied],
    }


if __name__ == "__main__":
    run_benchmark(
        BENCHMARK,
        measure,
        threads=1,
        params=[
            click.Option(
                ["--run"],
                type=click.Path(exists=True, path_type=Path),
                help="Folder of a run whose supernet and tables are taken; without it one is trained on digits.",
            ),
            click.Option(["--trials"], type=click.IntRange(8), help="Trials; 64, or 16 with --quick."),
            click.Option(["--epochs"], type=click.IntRange(2), help="A trial's full length; 27, or 9 with --quick."),
            click.Option(["--batch-size"], default=32, show_default=True, type=click.IntRange(1), help="Of the gates."),
            click.Option(
                ["--orders"],
                default=100,
                show_default=True,
                type=click.IntRange(1),
                help="Orders of the trials; 20 with --quick.",
            ),
            click.Option(["--markdown"], type=click.Path(path_type=Path), help="Write the tables to this file."),
        ],
    )
