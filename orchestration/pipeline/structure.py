"""The structure stage: which sub-networks the supernet has, and the order of its channels.

Networks that the method needs are trained on Ray one after another, candidates are scored on Ray
actors, and every score is kept in the stage's folder, so that a launch continues where the one
before it ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from dsnet.data.splits import Splits
from dsnet.environment import resolve_device
from dsnet.errors import StoppedError
from dsnet.files import read_json
from dsnet.network.supernet import Supernet
from dsnet.stored.checkpoint import STRUCTURE, load_supernet, save_supernet
from dsnet.structure.data import held_out_images, order_batches
from dsnet.structure.method import Base, Candidate, Score, most_candidates
from dsnet.structure.methods import structure_method
from dsnet.structure.scoring import holdout_warning, split_holdout
from dsnet.structure.search import TRACE, Scorer, find_structure, save_structure, sorted_start
from dsnet.training.start import first_weights, load_start
from dsnet.training.supernet import FINAL
from dsnet.training.train_cost import training_madds
from dsnet.wording import plural
from orchestration.pipeline.context import Launch
from orchestration.prepare.preparation import StructurePlan, with_found_structure
from orchestration.progress import Bar, Task
from orchestration.runs.curves import CurvePoint
from orchestration.runs.stages import StagePlan
from orchestration.tracking.rows import base_row, holdout_curve
from orchestration.workers.runtime import LOCAL, cluster_cpus
from orchestration.workers.structure import ScoringJob, ray_scorer
from orchestration.workers.supernet import SupernetJob, train_on_ray

BASES = "bases"
"""Folder of the networks that a method trains, below the stage's own."""
SCORED = "scored"
"""Stem of the network whose sub-networks are scored."""


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
    folder = work.run_stage(plan, _Search(work, structure).find)
    write_structure(work, folder.path)
    found = replace(work, prepared=with_found_structure(work.prepared, work.run))
    if not was_done:
        _say_result(found, folder.path)
    return found


def write_structure(work: Launch, folder: Path) -> None:
    """Write the stage's rows to MLflow: each trained network, the trace, and accuracies on the
    hold-out over MAdds."""
    trace = folder / TRACE
    work.tracker.artifact(trace)
    work.tracker.series(holdout_curve(trace, work.manifest.read()))


class _Search:
    """The work of the stage in one launch."""

    def __init__(self, work: Launch, structure: StructurePlan) -> None:
        self._work = work
        self._problem = structure.problem
        self._start = structure.start
        config = work.config.supernet
        self._settings = config.structure
        self._device = resolve_device(config.device)

    def find(self, folder: Path) -> Sequence[Path]:
        """Train what the method needs, search, and write the result; returns the files."""
        work, problem = self._work, self._problem
        method = structure_method(problem.settings.method)
        bases = method.bases(problem)
        kept, held = self._divided()
        stem = None if self._start is None else self._start.path
        for base in bases:
            stem = self._train(base, folder / BASES / base.name, stem, kept)
        network = load_supernet(stem)[0] if bases and stem is not None else self._first()
        batches = order_batches(work.prepared.image_set, kept, problem.run) if self._settings.order == "taylor" else ()
        start = sorted_start(problem, network, batches)
        fresh = self._first() if bases and self._settings.start == "fresh" else None
        with self._scorer(folder, start.supernet, held) as score:
            found = find_structure(problem, start, score, folder=folder, should_stop=work.stop, fresh=fresh)
        if found is None:
            raise StoppedError("the search for sub-networks was stopped; its scores are kept")
        stem = save_structure(folder, replace(found, summary={**found.summary, **self._costs(bases, len(kept.train))}))
        (folder / f"{SCORED}.safetensors").unlink(missing_ok=True)
        (folder / f"{SCORED}.json").unlink(missing_ok=True)
        return [*(stem.with_name(stem.name + suffix) for suffix in (".safetensors", ".json")), folder / TRACE]

    def _costs(self, bases: Sequence[Base], num_images: int) -> Mapping[str, float]:
        """MAdds of training the method's networks."""
        size = self._problem.image_size
        return {"train_madds": sum(training_madds(base.run, base.subnets, num_images, size) for base in bases)}

    def _divided(self) -> tuple[Splits, np.ndarray]:
        """The splits with the images of `train` that are not held out, and the ids of those that
        are."""
        prepared, settings = self._work.prepared, self._problem.settings
        splits = prepared.splits
        labels = prepared.image_set.labels.numpy()[splits.train]
        kept, held = split_holdout(splits.train, labels, settings.holdout, self._problem.seed)
        return replace(splits, train=kept), held

    def _first(self) -> Supernet:
        """The network with the weights with which the sweep begins."""
        start = None if self._start is None else load_start(self._start.path)
        return first_weights(self._problem.subnets, self._problem.seed, start)[0]

    def _train(self, base: Base, folder: Path, stem: Path | None, kept: Splits) -> Path:
        """Train one network of the method, unless an earlier launch has; returns its stem."""
        work, config = self._work, self._work.config
        row = base_row(work.manifest.read(), work.run, base, is_done=False)
        work.tracker.supernet(row)
        if not (folder / f"{FINAL}.json").is_file():
            job = SupernetJob(
                subnets=base.subnets,
                run=base.run,
                folder=folder,
                stop_file=work.run.stop_path,
                device=self._device,
                threads=config.supernet.threads or max(1, cluster_cpus() // config.supernet.workers),
                workers=config.supernet.workers,
                is_local=config.ray.address == LOCAL,
                init_from=stem,
            )
            images = work.prepared.image_set.training_images(kept, base.run.augmentation)
            with work.progress.bar(
                Task(f"structure: {base.name}", base.run.train.epochs, "epoch", line_every=1)
            ) as bar:

                def on_points(points: list[CurvePoint]) -> None:
                    work.tracker.curve(points)
                    if points:
                        bar.update(points[-1].metrics["epoch"] or 0.0)

                train_on_ray(job, images, on_points=on_points, should_stop=work.stop)
        work.tracker.supernet(base_row(work.manifest.read(), work.run, base, is_done=True))
        return folder / FINAL

    @contextmanager
    def _scorer(self, folder: Path, network: Supernet, held: np.ndarray) -> Iterator[Scorer]:
        """Scores candidates on Ray actors, and shows how many have been scored."""
        work, prepared = self._work, self._work.prepared
        warned = False
        images, labels = held_out_images(prepared.image_set, prepared.splits, held)
        stem = folder / SCORED
        save_supernet(stem, network)
        job = ScoringJob(stem.absolute(), prepared.normalization, self._device)
        total = most_candidates(self._problem.options(self._problem.settings.levels))
        with (
            work.progress.bar(Task("structure: candidates", total, "candidate")) as bar,
            ray_scorer(job, images, labels, self._settings.concurrent) as score,
        ):
            counted = _Counted(bar)

            def shown(candidates: Sequence[Candidate]) -> Iterator[Score]:
                nonlocal warned
                warning = None if warned else holdout_warning(len(labels))
                if warning is not None:
                    work.progress.warn(warning)
                warned = True
                for candidate, result in zip(candidates, score(candidates), strict=True):
                    counted.add(candidate, result)
                    yield result

            yield shown


class _Counted:
    """The number of scored candidates on a bar."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._number = 0

    def add(self, candidate: Candidate, score: Score) -> None:
        """Show one more."""
        self._number += 1
        self._bar.update(
            self._number, f"{candidate.madds / 1e6:.3g} M MAdds  hold-out top-1 {100 * score.accuracy:.1f} %"
        )


def _say_result(work: Launch, folder: Path) -> None:
    """Say which sub-networks there are, and what the method has to say about them."""
    summary = read_json(folder / f"{STRUCTURE}.json")["structure"]["summary"]
    for note in summary["notes"]:
        work.progress.warn(f"structure: {note}")
    shares = ", ".join(f"{item['name']} ({item['madds'] / 1e6:.3g} M)" for item in summary["subnets"])
    searched = f", {plural(summary['candidates'], 'candidate')} scored" if summary["candidates"] else ""
    work.progress.say(f"structure: {summary['method']}{searched}: {shares}")
