"""The supernet stage: train on Ray, follow the loss curves, keep the recalibrated checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsnet.environment import resolve_device
from dsnet.wording import duration, subnet_phrase
from orchestration.pipeline.context import Launch
from orchestration.pipeline.placement import artifacts_url, training_threads
from orchestration.prepare.preparation import StartPoint
from orchestration.progress import Task
from orchestration.results.supernet_facts import SupernetFacts
from orchestration.runs.curves import CurvePoint
from orchestration.runs.folder import CURVES
from orchestration.runs.stages import StagePlan
from orchestration.tracking.rows import supernet_row, write_supernet
from orchestration.workers.nodes import cluster_nodes
from orchestration.workers.runtime import LOCAL
from orchestration.workers.supernet import SupernetJob, train_on_ray


def supernet_stage(work: Launch, plan: StagePlan) -> None:
    """Train the supernet unless that is done; Ray must be initialised if it is not."""
    config, run = work.config, work.run
    if plan.is_done:
        work.progress.say(f"supernet: already done ({plan.key[:12]})")
    training = work.prepared.supernet_run
    device = resolve_device(config.supernet.device)
    subnets, start = work.prepared.subnets, work.prepared.start
    shown = (subnets.largest.name, subnets[subnets.by_madds()[0]].name)

    def train(folder: Path) -> Sequence[Path]:
        manifest = work.manifest.read()
        work.tracker.supernet(supernet_row(manifest, run, config, is_done=False))
        job = SupernetJob(
            subnets=subnets,
            run=training,
            folder=folder,
            stop_file=run.stop_path,
            device=device,
            threads=training_threads(config, cluster_nodes()),
            workers=config.supernet.workers,
            is_local=config.ray.address == LOCAL,
            init_from=None if start is None else start.path,
            artifacts=artifacts_url(config, folder),
            data_path=config.data.path,
        )
        if start is not None:
            work.progress.say(_start_sentence(start))
        epochs = training.train.epochs
        with work.progress.bar(Task("supernet", epochs, "epoch", line_every=1)) as bar:

            def on_points(points: list[CurvePoint]) -> None:
                if points:
                    bar.update(points[-1].metrics["epoch"] or 0.0, _losses(points[-1], shown))

            data = work.prepared.training_images()
            stem = train_on_ray(
                job,
                data,
                on_points=on_points,
                should_stop=work.stop,
                stalls=work.stall_rules("supernet"),
                on_counted=work.tracker.curve,
            )
        return supernet_outputs(stem)

    was_done = plan.is_done
    folder = work.run_stage(plan, train)
    # All of it, also if the stage was done before: the store may be a new one, or have missed rows.
    write_supernet(work.tracker, work.results)
    if not was_done:
        facts = SupernetFacts.of_prepared(work.prepared)
        work.progress.say(f"supernet: {done_sentence(facts, folder.seconds() or 0.0)}")


def supernet_outputs(stem: Path) -> list[Path]:
    """The outputs of a supernet's stage: the checkpoint with this stem, and the loss curves, if it
    was trained here."""
    curves = stem.with_name(CURVES)
    return [
        *(stem.with_name(stem.name + end) for end in (".safetensors", ".json")),
        *([curves] if curves.is_file() else []),
    ]


def done_sentence(facts: SupernetFacts, seconds: float) -> str:
    """A phrase that says how the supernet was made."""
    if facts.run.train.epochs > 0:
        return f"trained in {duration(seconds)}"
    return "used unchanged" if facts.keeps_statistics() else f"not trained; recalibrated in {duration(seconds)}"


def _start_sentence(start: StartPoint) -> str:
    fresh = f"; newly initialised: {', '.join(start.fresh)}" if start.fresh else ""
    return f"supernet: starts from {start.path} ({start.sha256[:12]}){fresh}"


def _losses(point: CurvePoint, names: Sequence[str]) -> str:
    """The newest losses of the named sub-networks as text; empty if none is known."""
    losses = {name: point.metrics.get(f"loss/{name}") for name in names}
    known = [f"{loss:.3f} ({subnet_phrase(name)})" for name, loss in losses.items() if loss is not None]
    return f"loss {', '.join(known)}" if known else ""
