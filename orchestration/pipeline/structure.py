"""The structure stage: which sub-networks the supernet has, and the order of its channels.

Networks that the method needs are trained on Ray, one after another or several at a time,
candidates are scored on Ray actors, and every score is kept in the stage's folder, so that a launch
continues where the one before it ended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

from dsnet.data.splits import Splits
from dsnet.data.training_images import TrainingImages
from dsnet.environment import resolve_device
from dsnet.files import read_stored
from dsnet.network.supernet import Supernet
from dsnet.stored.names import STRUCTURE
from dsnet.structure.method import Base, Candidate, Score
from dsnet.structure.methods import structure_method
from dsnet.structure.search import Scorer
from dsnet.structure.stage import HeldOut, StructureWork
from dsnet.wording import duration, plural
from orchestration.config.resolve import resolve_side_by_side
from orchestration.pipeline.context import Launch
from orchestration.pipeline.placement import artifacts_url, training_threads
from orchestration.prepare.preparation import with_found_structure
from orchestration.progress import Bar, Task
from orchestration.results.structure import summary_in
from orchestration.runs.curves import CurvePoint
from orchestration.runs.stages import StagePlan
from orchestration.tracking.rows import base_row, write_structure
from orchestration.workers.nodes import cluster_nodes
from orchestration.workers.runtime import LOCAL
from orchestration.workers.structure import ScoringJob, ray_scorer
from orchestration.workers.supernet import SupernetJob, train_on_ray

NUM_LINES = 40
"""Number of lines about all candidates on a pipe."""


def structure_stage(work: Launch, plan: StagePlan) -> Launch:
    """Choose the sub-networks unless that is done; Ray must be initialised if it is not.

    Returns:
        the launch with the sub-networks that were found.
    """
    work.check_stop()
    structure = work.prepared.structure
    assert structure is not None
    was_done = plan.is_done
    if was_done:
        work.progress.say(f"structure: already done ({plan.key[:12]})")

    def choose(folder: Path) -> Sequence[Path]:
        own = _OnRay(work, folder)
        return StructureWork(
            problem=structure.problem,
            source=work.prepared.image_set,
            splits=work.prepared.splits,
            start=None if structure.start is None else structure.start.path,
            folder=folder,
            train=own.train,
            scorer=own.scorer,
            should_stop=work.stop,
            concurrent=own.at_a_time,
        ).choose()

    folder = work.run_stage(plan, choose)
    found = replace(work, prepared=with_found_structure(work.prepared, work.run))
    write_structure(work.tracker, work.results)
    if not was_done:
        _say_result(found, folder.path)
    return found


class _OnRay:
    """The training of networks and the scoring of candidates on Ray, for one structure stage."""

    def __init__(self, work: Launch, folder: Path) -> None:
        self._work = work
        self._folder = folder
        self._device = resolve_device(work.config.supernet.device)
        structure = work.prepared.structure
        assert structure is not None
        bases = structure_method(structure.problem.settings.method).bases(structure.problem)
        self.at_a_time = resolve_side_by_side(work.config, bases)
        """Number of networks that are trained at a time."""
        self._one_row = threading.Lock()
        """Held while a row and its curves are written: curves belong to the last row."""
        self._numbers = count(1)
        """Counts the candidates, by whichever networks they are scored."""

    def train(self, base: Base, folder: Path, stem: Path | None, kept: Splits) -> None:
        """Train one network of the method; its progress is shown while it is the only one."""
        work, config = self._work, self._work.config
        job = SupernetJob(
            subnets=base.subnets,
            run=base.run,
            folder=folder,
            stop_file=work.run.stop_path,
            device=self._device,
            threads=training_threads(config, cluster_nodes(), self.at_a_time),
            workers=config.supernet.workers,
            is_local=config.ray.address == LOCAL,
            init_from=stem,
            artifacts=artifacts_url(config, folder),
            data_path=config.data.path,
        )
        images = work.prepared.image_set.training_images(kept, base.run.augmentation)
        if self.at_a_time > 1:
            self._train_beside(base, job, images)
            return
        work.tracker.supernet(base_row(work.manifest.read(), work.run, base.name, base.run))
        with work.progress.bar(Task(f"structure: {base.name}", base.run.train.epochs, "epoch", line_every=1)) as bar:

            def on_points(points: list[CurvePoint]) -> None:
                if points:
                    bar.update(points[-1].metrics["epoch"] or 0.0)

            train_on_ray(
                job,
                images,
                on_points=on_points,
                should_stop=work.stop,
                stalls=work.stall_rules(f"structure: {base.name}"),
                on_counted=work.tracker.curve,
            )

    def _train_beside(self, base: Base, job: SupernetJob, images: TrainingImages) -> None:
        """Train a network at the same time as others; its curves are written when it is trained."""
        work, epochs = self._work, plural(base.run.train.epochs, "epoch")
        work.progress.say(f"structure: {base.name}: {epochs}")
        started, points = time.monotonic(), list[CurvePoint]()
        train_on_ray(
            job,
            images,
            on_points=lambda _: None,
            should_stop=work.stop,
            stalls=work.stall_rules(f"structure: {base.name}"),
            on_counted=points.extend,
        )
        took = duration(time.monotonic() - started)
        loss = points[-1].metrics.get(f"loss/{base.subnets.largest.name}") if points else None
        told = "" if loss is None else f", loss {loss:.3g}"
        with self._one_row:
            work.tracker.supernet(base_row(work.manifest.read(), work.run, base.name, base.run))
            work.tracker.curve(points)
            work.progress.say(f"structure: {base.name}: trained{told}, {took}")

    @contextmanager
    def scorer(self, network: Supernet, held_out: HeldOut) -> Iterator[Scorer]:
        """Score candidates on Ray actors, and show how many have been scored."""
        work = self._work
        assert work.prepared.structure is not None
        problem = work.prepared.structure.problem
        job = ScoringJob(network, held_out[0], held_out[1], work.prepared.normalization, self._device)
        total = max(1, structure_method(problem.settings.method).num_candidates(problem))
        concurrent = work.config.supernet.structure.concurrent
        with (
            work.progress.bar(
                Task("structure: candidates", total, "candidate", line_every=max(1, total // NUM_LINES))
            ) as bar,
            ray_scorer(job, concurrent, should_stop=work.stop, stalls=work.stall_rules("structure")) as score,
        ):
            yield _Shown(bar, score, self._numbers).score


class _Shown:
    """A scorer that shows its scores on a bar."""

    def __init__(self, bar: Bar, score: Scorer, numbers: Iterator[int]) -> None:
        self._bar = bar
        self._score = score
        self._numbers = numbers

    def score(self, candidates: Sequence[Candidate]) -> Iterator[Score]:
        """Score candidates; the scores come in their order."""
        for candidate, score in zip(candidates, self._score(candidates), strict=True):
            told = f"{candidate.madds / 1e6:.3g} M MAdds  hold-out top-1 {100 * score.accuracy:.1f} %"
            self._bar.update(next(self._numbers), told)
            yield score


def _say_result(work: Launch, folder: Path) -> None:
    """Say which sub-networks there are, and what the method has to say about them."""
    summary = read_stored(folder / f"{STRUCTURE}.json", summary_in)
    for note in summary["notes"]:
        work.progress.warn(f"structure: {note}")
    shares = ", ".join(f"{item['name']} ({item['madds'] / 1e6:.3g} M)" for item in summary["subnets"])
    searched = f", {plural(summary['candidates'], 'candidate')} scored" if summary["candidates"] else ""
    work.progress.say(f"structure: {summary['method']}{searched}: {shares}")
