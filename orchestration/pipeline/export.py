"""Export of gates: from points of a front to bundles that run."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ruamel.yaml import YAML

from dsnet.data.normalization import Normalization
from dsnet.data.photos import PhotoDecoder
from dsnet.deploy.bundle import NUM_EXAMPLES, BundleContents, save_bundle
from dsnet.deploy.exporters import BUNDLE, exporters
from dsnet.dotted import nest
from dsnet.measure.settings import MAIN_DEVICE
from dsnet.routers.base import Router
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from dsnet.stored.checkpoint import load_supernet
from dsnet.training.supernet import FINAL
from orchestration.prepare.preparation import Prepared
from orchestration.results.run import RunResults, picked_slots
from orchestration.results.verified import DynamicLatency
from search.front.analysis import PointAnalysis
from search.front.points import trial_name

CLEAR_LEAD = 100.0
"""Smallest margin of a clear decision, in units of the router's `tie`; examples are chosen among
images with clear decisions first."""
EXAMPLE_SEED = 0
"""Seed of the draw of the examples."""
KNEE = "knee"
"""Name of the link to the bundle of the front's knee, beside the bundles: a path that is known
before the run."""


def export_picks(prepared: Prepared, results: RunResults, picks: Sequence[str], folder: Path) -> list[Path]:
    """Write a bundle for each picked trial, and the link `knee` to the bundle of the front's knee;
    returns the bundles' folders.

    A link to an earlier knee is removed if the folder holds no bundle of the knee.

    Args:
        prepared: see `export_bundles`.
        results: the run.
        picks: see `orchestration.results.run.picked_slots`.
        folder: receives one folder per trial.

    Raises:
        ConfigError, NotFoundError, CheckpointError: as `picked_slots` and `export_bundles`.
    """
    slots = picked_slots(results, picks)
    paths = export_bundles(prepared, results, slots, folder)
    if results.knee is not None:
        link_knee(folder, folder / trial_name(results.knee))
    return paths


def link_knee(folder: Path, bundle: Path) -> None:
    """Make `folder`/knee a relative link to a bundle below `folder`; remove the link if there is no
    such bundle.

    A file or folder of that name is left unchanged.
    """
    link, new = folder / KNEE, folder / f".{KNEE}.{os.getpid()}"
    if link.exists() and not link.is_symlink():
        return
    if not bundle.is_dir():
        link.unlink(missing_ok=True)
        return
    with suppress(OSError):  # a file system without links: the bundle has its own name
        new.symlink_to(bundle.relative_to(folder))
        new.replace(link)


def export_bundles(prepared: Prepared, results: RunResults, slots: Sequence[int], folder: Path) -> list[Path]:
    """Write one bundle per trial.

    Args:
        prepared: the run's data (for class names and examples from `val`).
        results: the run.
        slots: the trials.
        folder: receives one folder per trial.

    Returns:
        the bundles' folders.

    Raises:
        NotFoundError: the run has no trained supernet yet.
        CheckpointError: a file of the run is damaged.
    """
    supernet, meta = load_supernet(results.run.stage_dir("supernet", results.done_key("supernet")) / FINAL)
    val = RoutingTable.load(results.run.table(results.done_key("table"), "val"))
    paths = []
    for slot in slots:
        router = results.router(slot)
        claims = bundle_claims(prepared, results, slot)
        path = folder / trial_name(slot)
        contents = BundleContents(
            supernet=supernet,
            router=router,
            normalization=Normalization.from_json(meta["run"]["normalization"]),
            class_names=prepared.image_set.class_names,
            examples=_examples(prepared, val, router),
            photos=_photo_decoder(prepared),
        )
        save_bundle(path, contents, claims=claims, gate_yaml=_gate_yaml(prepared, results, slot, claims))
        write_formats(path, prepared.config.export.formats)
        paths.append(path)
    return paths


def write_formats(bundle: Path, formats: Sequence[str]) -> None:
    """Write further formats of a bundle, each into a folder of its name inside it; an existing one
    is replaced.

    Args:
        bundle: folder of the bundle.
        formats: names of exporters; the bundle itself is left out.
    """
    for name in formats:
        if name == BUNDLE:
            continue
        new, final = bundle / f".{name}.{os.getpid()}", bundle / name
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            exporters()[name].write(bundle, new)
            shutil.rmtree(final, ignore_errors=True)
            new.replace(final)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _photo_decoder(prepared: Prepared) -> PhotoDecoder | None:
    """The decoder of photos for the bundle; None if the images do not have 1 or 3 channels."""
    images = prepared.image_set
    if images.image_shape[0] not in (1, 3):
        return None
    return PhotoDecoder.of_data(images.name, images.image_shape, prepared.config.data.crop_fraction)


def _examples(prepared: Prepared, val: RoutingTable, router: Router) -> torch.Tensor:
    """Example images, from `val`, because the sealed split must not be published."""
    return prepared.data.images("val")[torch.from_numpy(example_rows(router, val))]


def example_rows(router: Router, table: RoutingTable) -> NDArray[np.int64]:
    """Choose the images that a bundle stores as examples: `NUM_EXAMPLES` rows of the table, or all
    if it has fewer, ascending.

    They are taken in turn from the routes that answer, among images with clear decisions. If there
    are too few, the clearest of the others follow; for these another processor may take another
    route because of rounding, which `check_bundle_examples` allows.
    """
    run = run_on_table(router, table)
    is_clear = run.lead >= CLEAR_LEAD
    shuffled = np.random.default_rng(EXAMPLE_SEED).permutation(table.num_images)
    turn = np.zeros(table.num_images)
    for route in np.unique(run.routes):
        own = shuffled[(is_clear & (run.routes == route))[shuffled]]
        turn[own] = np.arange(len(own))
    order = np.lexsort((np.where(is_clear, turn, -run.lead), ~is_clear))
    return np.sort(order[:NUM_EXAMPLES])


def bundle_claims(prepared: Prepared, results: RunResults, slot: int) -> dict[str, Any]:
    """The claims of a bundle: its results on `val`, and on `test` if the trial was verified."""
    config = prepared.config
    record = results.record(slot)
    names = ("top1", "top5", "madds_m", "p95_madds_m", "params_m", "latency_ms")
    claims: dict[str, Any] = {
        "data": {
            "name": prepared.image_set.name,
            "image_size": config.data.image_size,
            "stream": config.data.stream,
            "crop_fraction": config.data.crop_fraction,
            "sizes": config.data.splits.model_dump(mode="json"),
            "seed": config.seed,
            "limit": config.data.limit,
            "fingerprint": prepared.image_set.fingerprint,
            "splits": prepared.splits.hash,
        },
        "val": {"num_images": len(prepared.splits.val), **{name: record.metrics[name] for name in names}},
    }
    verified = results.verified
    if verified is None:
        return claims
    point = next((point for point in verified.test.points if point.slot == slot), None)
    if point is not None:
        claims["test"] = _test_claims(point, verified.test.num_images)
        claims["latency"] = _latency_claims(verified.latency, slot)
        further = {name: own for name, own in verified.latencies.items() if name != MAIN_DEVICE}
        if further:
            claims["device_latency"] = {name: _latency_claims(own, slot) for name, own in further.items()}
    return claims


def _latency_claims(latency: DynamicLatency, slot: int) -> dict[str, Any]:
    """Measured latency of a batch on one device, beside that of the static extremes and the sum of
    the measured parts (`ideal_ms`)."""
    return {
        "device": latency.device,
        "threads": latency.threads,
        "batches": {
            str(size): {
                "gate_ms": asdict(row[slot]),
                "ideal_ms": latency.ideal[size][slot],
                "widest_ms": asdict(latency.widest[size]),
                "cheapest_ms": asdict(latency.cheapest[size]),
            }
            for size, row in latency.gates.items()
        },
    }


def _test_claims(point: PointAnalysis, num_images: int) -> dict[str, Any]:
    gain = point.gain
    return {
        "num_images": num_images,
        "top1": point.top1.value,
        "top1_interval": [point.top1.low, point.top1.high],
        "top5": point.metrics["top5"],
        "madds_m": point.metrics["madds_m"],
        "gain_over_static": None if gain is None else gain.value,
        "gain_over_static_interval": None if gain is None else [gain.low, gain.high],
        "random_routing_top1": point.random_top1,
        "is_collapsed": point.is_collapsed,
    }


def _gate_yaml(prepared: Prepared, results: RunResults, slot: int, claims: Mapping[str, Any]) -> str:
    """YAML for people: the gate's settings and its results."""
    record = results.record(slot)
    router = results.router(slot)
    content = {
        "name": trial_name(slot),
        "run": results.run.name,
        "model": {"family": prepared.subnets.spec.family, "options": dict(results.config.supernet.options)},
        "routes": [
            {"name": prepared.subnets[k].name, "widths": list(prepared.subnets[k].widths)} for k in router.routes
        ],
        "router": router_facts(router, [subnet.name for subnet in prepared.subnets]),
        "gate": nest({key.removeprefix("gate."): value for key, value in record.params.items()}),
        "claims": {name: dict(values) if isinstance(values, Mapping) else values for name, values in claims.items()},
    }
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    writer.dump(content, stream)
    return (
        "# A gate configuration exported by dsnet-orch. dsnet reads bundle.json beside it; this file is for people.\n"
        + stream.getvalue()
    )


def router_facts(router: Router, names: Sequence[str]) -> dict[str, Any]:
    """Description of a router: its kind, the evidence that it reads, and further facts of its
    kind."""
    return {"kind": router.kind, "reads": list(router.needs), **router.facts(names)}
