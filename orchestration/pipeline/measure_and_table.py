"""The measure and table stages: numbers of every sub-network, and its answer to each held-out
image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsnet.data.tensors import TensorData
from dsnet.environment import resolve_device
from dsnet.files import atomic_write_json
from dsnet.measure.evaluate import build_routing_table, measure_subnets, sample_training_images
from dsnet.measure.latency import measure_latency
from dsnet.measure.latency_table import latency_file
from dsnet.measure.settings import TRAIN_SAMPLE_FILE
from dsnet.network.supernet import Supernet
from dsnet.wording import subnet_phrase
from orchestration.pipeline.context import Launch
from orchestration.prepare.preparation import latency_settings
from orchestration.progress import Task
from orchestration.results.training_review import review
from orchestration.runs.stages import StagePlan
from orchestration.tracking.rows import write_subnets


def measure_stage(work: Launch, plan: StagePlan, supernet: Supernet) -> None:
    """Measure accuracy on `val`, MAdds, parameters and latency of every sub-network."""
    work.check_stop()
    data, subnets, size = work.prepared.data, work.prepared.subnets, work.prepared.image_size

    def measure(folder: Path) -> Sequence[Path]:
        intact = plan.folder.intact_outputs()  # where others were damaged
        has_trials = plan.status == "resume" and bool(work.results.records)
        supernet.to(resolve_device(work.config.supernet.device))
        with work.progress.bar(Task("measure: accuracy", len(subnets.all), "sub-network")) as bar:

            def on_row(rows: Sequence[object]) -> None:
                bar.update(len(rows))
                work.check_stop()

            measured = measure_subnets(supernet, data, "val", work.prepared.normalization, on_row=on_row)
        outputs = [folder / "subnets.json"]
        atomic_write_json(outputs[0], measured)
        images = work.prepared.training_images()
        outputs.append(folder / TRAIN_SAMPLE_FILE)
        atomic_write_json(outputs[-1], sample_training_images(supernet, images, work.prepared.normalization))
        for name, settings in latency_settings(work.config).items():
            outputs.append(folder / latency_file(name))
            if latency_file(name) in intact:
                continue
            if has_trials:
                work.progress.warn(
                    f"measure: {latency_file(name)} was lost and is timed again; the latencies of the trials, and what the search "
                    "made of them, are of the first timing"
                )
            with work.progress.bar(Task(f"measure: latency {name}".rstrip(), settings.num_rounds, "round")) as bar:
                latency = measure_latency(
                    supernet,
                    size,
                    settings,
                    lambda done, total, bar=bar: bar.update(done),  # type: ignore[misc]
                    before_each=work.check_stop,
                )
            atomic_write_json(outputs[-1], latency.to_json())
        supernet.cpu()
        return outputs

    work.run_stage(plan, measure)
    results = work.results
    write_subnets(work.tracker, results)
    widest = results.widest
    found = f"{subnet_phrase(widest.name)} (widest) has top-1 {100 * widest.top1:.1f} % on val at {widest.madds / 1e6:.3g} M MAdds"
    work.progress.say(f"measure: {len(subnets)} sub-networks, {found}")


def table_stage(work: Launch, plan: StagePlan, supernet: Supernet) -> None:
    """Build the routing tables of `gate` and `val`; the verify stage builds that of `test` after
    the front is frozen."""
    work.check_stop()

    def tabulate(folder: Path) -> Sequence[Path]:
        return [
            build_table(work, supernet, work.prepared.data, split, work.run.table(plan.key, split))
            for split in ("gate", "val")
        ]

    work.run_stage(plan, tabulate)
    if not plan.is_done:  # said once, as soon as it is known; `status` and the report say it again
        for warning in review(work.results):
            work.progress.warn(str(warning))


def build_table(work: Launch, supernet: Supernet, data: TensorData, split: str, path: Path) -> Path:
    """Run every route over a split and store its table."""
    supernet = supernet.to(resolve_device(work.config.supernet.device))
    with work.progress.bar(Task(f"table: {split}", data.num_images(split), "image")) as bar:

        def on_progress(done: int, total: int) -> None:
            work.check_stop()
            bar.update(done)

        table = build_routing_table(
            supernet,
            data,
            split,
            work.prepared.normalization,
            on_progress=on_progress,
        )
    supernet.cpu()
    table.save(path)
    return path
