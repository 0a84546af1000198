"""Export: from points of a front, or from the static sub-networks, to bundles that run."""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ruamel.yaml import YAML

from dsnet.data.normalization import Normalization
from dsnet.data.photos import PhotoDecoder
from dsnet.deploy.bundle import NUM_EXAMPLES, BundleContents, format_folders, save_bundle
from dsnet.deploy.engines import can_write_graphs
from dsnet.deploy.exporters import BUNDLE, CheckedExporter, DataExporter, exporters
from dsnet.deploy.layout import INT8
from dsnet.deploy.onnx_files import FOLDER as ONNX
from dsnet.deploy.operating_points import OperatingPoint, OperatingPoints
from dsnet.deploy.precisions import graphs_folder
from dsnet.dotted import nest
from dsnet.errors import CheckpointError, DsnetError, NotFoundError, StorageError, VerificationError
from dsnet.files import replace_link, writing
from dsnet.routers.base import Router
from dsnet.routers.fixed import FixedRouter
from dsnet.routing.routing_table import RoutingTable
from dsnet.routing.table_routing import run_on_table
from dsnet.stored.checkpoint import load_supernet
from dsnet.stored.names import FINAL
from dsnet.wording import first_line
from orchestration.config.export import MEMBERS, gate_picks, point_sets
from orchestration.pipeline.claims import bundle_claims, gate_point_claims, member_claims
from orchestration.pipeline.int8_accuracy import BundleSource, measure_int8
from orchestration.prepare.preparation import Prepared
from orchestration.results.run import RunResults, picked_slots
from orchestration.runs.folder import KNEE
from search.front.points import trial_name

_log = logging.getLogger(__name__)
CLEAR_LEAD = 100.0
"""Smallest margin of a clear decision, in units of the router's `tie`; examples are chosen among
images with clear decisions first."""
EXAMPLE_SEED = 0
"""Seed of the draw of the examples."""


@dataclass(frozen=True)
class Formats:
    """The formats in which bundles are written."""

    chosen: Sequence[str] | None
    """As in `export.formats`; None: the graphs for inference engines, if the packages are
    installed and the graphs can be written."""
    further: Sequence[str] = ()
    """Names of exporters beside those."""
    say: Callable[[str], None] = _log.info
    """Called with one sentence about each accuracy that is measured in int8."""


def export_picks(
    prepared: Prepared, results: RunResults, picks: Sequence[str], folder: Path, formats: Formats
) -> list[Path]:
    """Write a bundle for each picked trial and each picked set of operating points, and the link
    `knee` to the bundle of the front's knee; returns the bundles' folders.

    A link to an earlier knee is removed if the folder holds no bundle of the knee.

    Args:
        prepared: see `export_bundles`.
        results: the run.
        picks: as of `orchestration.results.run.picked_slots`; also `members` and `front`.
        folder: receives one folder per trial or set.
        formats: the formats of each bundle.

    Raises:
        ConfigError, NotFoundError, CheckpointError: as `picked_slots` and `export_bundles`.
    """
    slots = picked_slots(results, gate_picks(picks))
    paths = export_bundles(prepared, results, slots, folder, formats) if slots else []
    paths += export_point_sets(prepared, results, point_sets(picks), results.front, folder, formats)
    if results.knee is not None:
        link_knee(folder, folder / trial_name(results.knee))
    return paths


def link_knee(folder: Path, bundle: Path) -> None:
    """Make `folder`/knee a relative link to a bundle below `folder`; remove the link if there is no
    such bundle.

    A file or folder of that name is left unchanged. On a file system without links the bundle has
    its own name only.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    link = folder / KNEE
    if link.exists() and not link.is_symlink():
        return
    if bundle.is_dir():
        replace_link(link, bundle.relative_to(folder))
        return
    with writing(link):
        link.unlink(missing_ok=True)


def export_bundles(
    prepared: Prepared, results: RunResults, slots: Sequence[int], folder: Path, formats: Formats
) -> list[Path]:
    """Write one bundle per trial.

    Args:
        prepared: the run's data (for class names and examples from `val`).
        results: the run.
        slots: the trials.
        folder: receives one folder per trial.
        formats: the formats of each bundle.

    Returns:
        the bundles' folders.

    Raises:
        NotFoundError: the run has no trained supernet yet.
        CheckpointError: a file of the run is damaged.
    """
    source = _Source(prepared, results)
    paths = []
    for slot in slots:
        claims = bundle_claims(prepared, results, slot)
        path = folder / trial_name(slot)
        router = results.router(slot)
        description = source.description(path.name, [router]) | source.facts(router, claims, slot)
        gate_yaml = _to_yaml("A gate configuration", description)
        with _keeping_formats(path, formats):
            save_bundle(path, source.contents(router), claims=claims, gate_yaml=gate_yaml)
        write_chosen_formats(path, formats, source.of_run({path.name: router}))
        paths.append(path)
    return paths


def export_point_sets(
    prepared: Prepared,
    results: RunResults,
    sets: Sequence[str],
    front: Sequence[int],
    folder: Path,
    formats: Formats,
) -> list[Path]:
    """Write one bundle with several operating points for each of `sets`; returns their folders.

    Each bundle begins at the point with the highest top-1 on `val`.

    Args:
        prepared: the run's data.
        results: the run.
        sets: `members`, all static sub-networks without the teacher; `front`, the gates of a front.
        front: slots of the gates of this front.
        folder: receives one folder for each set, of its name.
        formats: the formats of each bundle.

    Raises:
        NotFoundError: a stage has not finished, or the front is empty.
        CheckpointError: a file of the run is damaged.
    """
    if not sets:
        return []
    source = _Source(prepared, results)
    slot_of = {trial_name(slot): slot for slot in front}
    paths = []
    for name in sets:
        points = source.members() if name == MEMBERS else source.gates(front)
        path = folder / name
        contents, claims = source.contents_at(points)
        description = source.description(name, [point.router for point in points])
        description["points"] = [
            {"name": point.name, **source.facts(point.router, point.claims, slot_of.get(point.name))}
            for point in points
        ]
        gate_yaml = _to_yaml("Operating points", description)
        with _keeping_formats(path, formats):
            save_bundle(path, contents, claims=claims, gate_yaml=gate_yaml)
        write_chosen_formats(path, formats, source.of_run({point.name: point.router for point in points}))
        paths.append(path)
    return paths


class _Source:
    """The parts of a run of which bundles are made.

    Raises:
        NotFoundError: the run has no supernet or table yet.
        CheckpointError: a file of the run is damaged.
    """

    def __init__(self, prepared: Prepared, results: RunResults) -> None:
        self.prepared = prepared
        self.results = results
        self.supernet, meta = load_supernet(results.run.stage_dir("supernet", results.done_key("supernet")) / FINAL)
        self.normalization = Normalization.from_json(meta["run"]["normalization"])
        self.val = RoutingTable.load(results.run.table(results.done_key("table"), "val"))

    def of_run(self, routers: Mapping[str, Router]) -> BundleSource:
        """The source of a bundle with these routers, by the names of its operating points."""
        return BundleSource(self.prepared, self.results, self.supernet, routers)

    def contents(
        self, router: Router, name: str | None = None, further: Sequence[OperatingPoint] = ()
    ) -> BundleContents:
        """Contents of a bundle; `name` and `further` are for several operating points."""
        return BundleContents(
            supernet=self.supernet,
            router=router,
            normalization=self.normalization,
            class_names=self.prepared.image_set.class_names,
            examples=_examples(self.prepared, self.val, [router, *(point.router for point in further)]),
            photos=_photo_decoder(self.prepared),
            point_name=name,
            further_points=further,
        )

    def contents_at(self, points: OperatingPoints) -> tuple[BundleContents, Mapping[str, Any]]:
        """Contents and claims of a bundle with these points that begins at the best one."""
        first = points.best
        further = [point for point in points if point is not first]
        return self.contents(first.router, first.name, further), first.claims

    def members(self) -> OperatingPoints:
        """All static sub-networks of the run, without the teacher."""
        route_of = {subnet.name: route for route, subnet in enumerate(self.supernet.subnets)}
        return OperatingPoints(
            [
                OperatingPoint(
                    subnet.name,
                    FixedRouter(route_of[subnet.name]),
                    member_claims(self.prepared, self.results, subnet),
                )
                for subnet in self.results.members
            ]
        )

    def gates(self, slots: Sequence[int]) -> OperatingPoints:
        """The gates of a front.

        Raises:
            NotFoundError: there are none.
        """
        if not slots:
            raise NotFoundError(f"pick 'front': run {self.results.run.name!r} has no gate on a front to export")
        return OperatingPoints(
            [
                OperatingPoint(
                    trial_name(slot),
                    self.results.router(slot),
                    gate_point_claims(self.prepared, self.results, slot, self.val),
                )
                for slot in slots
            ]
        )

    def description(self, name: str, routers: Sequence[Router]) -> dict[str, Any]:
        """Content of gate.yaml for any bundle: name, run, model and routes."""
        subnets = self.prepared.subnets
        routes = sorted({route for router in routers for route in router.routes})
        return {
            "name": name,
            "run": self.results.run.name,
            "model": {"family": subnets.spec.family, "options": dict(self.results.config.supernet.options)},
            "routes": [{"name": subnets[k].name, "widths": list(subnets[k].widths)} for k in routes],
        }

    def facts(self, router: Router, claims: Mapping[str, Any], slot: int | None) -> dict[str, Any]:
        """Content of gate.yaml for a router: how it decides, the settings of its trial if it is of
        one, and its claims."""
        names = [subnet.name for subnet in self.prepared.subnets]
        facts: dict[str, Any] = {"router": router_facts(router, names)}
        if slot is not None:
            params = self.results.record(slot).params
            facts["gate"] = nest({key.removeprefix("gate."): value for key, value in params.items()})
        facts["claims"] = {
            name: dict(values) if isinstance(values, Mapping) else values for name, values in claims.items()
        }
        return facts


@contextmanager
def _keeping_formats(bundle: Path, formats: Formats) -> Iterator[None]:
    """Context manager in which a bundle is written again. `save_bundle` keeps the formats of an
    equal bundle; here those that are not written again are checked, and a damaged one is removed.
    A warning names each format that is lost.

    Args:
        bundle: folder of the bundle, which need not exist before.
        formats: those that are written afterwards.
    """
    written = (*((ONNX,) if formats.chosen is None else formats.chosen), *formats.further)
    earlier = [name for name in format_folders(bundle) if name not in written]
    yield
    kept = format_folders(bundle)
    for name in earlier:
        if name not in kept:
            reason = "was made from another content of the bundle, or from one whose manifest is lost,"
        elif (problem := _problem_of_format(bundle, name)) is not None:
            shutil.rmtree(bundle / name)
            reason = f"is damaged ({problem})"
        else:
            continue
        _log.warning(
            "%s: the folder %s of an earlier export %s and was removed; write it again with --format %s",
            bundle.name,
            name,
            reason,
            name,
        )


def _problem_of_format(bundle: Path, name: str) -> str | None:
    """Why the files of a format do not give the answers of the bundle; None if they do, or if they
    cannot be checked here."""
    exporter = exporters().get(name)
    if not isinstance(exporter, CheckedExporter):
        return None
    try:
        exporter.check(bundle, bundle / name)
    except (VerificationError, CheckpointError) as error:
        return first_line(error)
    except DsnetError:  # a package or an engine is missing
        return None
    except Exception as error:  # noqa: BLE001 - engines have errors of their own for files that they cannot read
        return first_line(error)
    return None


def write_chosen_formats(bundle: Path, formats: Formats, source: BundleSource) -> None:
    """Write the formats of a bundle.

    Args:
        bundle: folder of the bundle.
        formats: without a choice, where the graphs for inference engines cannot be written, a
            warning says why, and the bundle runs in torch.
        source: the run.
    """
    if formats.chosen is not None:
        write_formats(bundle, formats.chosen, source, formats.say)
    elif can_write_graphs():
        try:
            write_formats(bundle, [ONNX], source, formats.say)
        except StorageError:
            raise
        except DsnetError as error:
            _log.warning("%s has no ONNX files, so that it runs in torch alone: %s", bundle.name, error)
    further = [name for name in formats.further if name not in (formats.chosen or ())]
    write_formats(bundle, further, source, formats.say)


def write_formats(
    bundle: Path,
    names: Sequence[str],
    source: BundleSource | None = None,
    say: Callable[[str], None] = _log.info,
) -> None:
    """Write further formats of a bundle, each into a folder of its name inside it; an existing one
    is replaced. The accuracy in int8 is measured.

    Args:
        bundle: folder of the bundle.
        names: names of exporters; the bundle itself is left out.
        source: the run; None for formats that need no images of it.
        say: called with a sentence about each accuracy that is measured.

    Raises:
        ConfigError: a format needs images of the run.
    """
    for name in names:
        if name == BUNDLE:
            continue
        new, final = bundle / f".{name}.{os.getpid()}", bundle / name
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            exporter = exporters()[name]
            if source is not None and isinstance(exporter, DataExporter):
                exporter.write_with(bundle, new, source.prepared.data)
            else:
                exporter.write(bundle, new)
            if isinstance(exporter, CheckedExporter):
                exporter.check(bundle, new)
            if source is not None and name == graphs_folder(INT8):
                measure_int8(bundle, new, source, say)
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


def _examples(prepared: Prepared, val: RoutingTable, routers: Sequence[Router]) -> torch.Tensor:
    """Example images, from `val`, because the sealed split must not be published."""
    return prepared.data.images("val")[torch.from_numpy(example_rows(routers, val))]


def example_rows(routers: Sequence[Router], table: RoutingTable) -> NDArray[np.int64]:
    """Choose the images that a bundle stores as examples: `NUM_EXAMPLES` rows of the table, or all
    if it has fewer, ascending.

    They are taken in turn from the routes that answer (with several routers, from the combinations
    of their routes), among images with clear decisions of all routers. If there are too few, the
    clearest of the others follow; for these another processor may take another route because of
    rounding, which `check_bundle_examples` allows.

    Args:
        routers: the routers of the bundle, at least one.
        table: a routing table of the split.
    """
    runs = [run_on_table(router, table) for router in routers]
    lead = np.min([run.lead for run in runs], axis=0)
    is_clear = lead >= CLEAR_LEAD
    _, group = np.unique(np.stack([run.routes for run in runs]), axis=1, return_inverse=True)
    shuffled = np.random.default_rng(EXAMPLE_SEED).permutation(table.num_images)
    turn = np.zeros(table.num_images)
    for number in range(group.max() + 1):
        own = shuffled[(is_clear & (group == number))[shuffled]]
        turn[own] = np.arange(len(own))
    order = np.lexsort((np.where(is_clear, turn, -lead), ~is_clear))
    return np.sort(order[:NUM_EXAMPLES])


def _to_yaml(title: str, content: Mapping[str, Any]) -> str:
    """YAML for people, with a comment that begins with `title`."""
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    writer.dump(dict(content), stream)
    return (
        f"# {title} exported by dsnet-orch. dsnet reads bundle.json beside it; this file is for people.\n"
        + stream.getvalue()
    )


def router_facts(router: Router, names: Sequence[str]) -> dict[str, Any]:
    """Description of a router: its kind, the evidence that it reads, and further facts of its
    kind."""
    return {"kind": router.kind, "reads": list(router.needs), **router.facts(names)}
