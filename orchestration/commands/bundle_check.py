"""Checks of the claims of a bundle: its files, its stored examples, and its accuracy on its
data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsnet.data.settings import FileOptions, SplitSizes
from dsnet.data.sources import load_source
from dsnet.data.splits import splits_of
from dsnet.data.tensors import TensorData
from dsnet.deploy.bundle import Bundle, check_bundle_examples, check_bundle_files, load_bundle, score_bundle
from dsnet.deploy.engines import TORCH
from dsnet.deploy.exporters import CheckedExporter, exporters
from dsnet.deploy.layout import FLOAT32, INT8
from dsnet.deploy.onnx_files import FOLDER as ONNX
from dsnet.deploy.precisions import graphs_folder
from dsnet.errors import DataError, NotFoundError, VerificationError
from dsnet.image_size import image_size_of
from dsnet.space.cost import subnet_cost
from orchestration.config.command_lines import command_line, has_own_code
from orchestration.results.exported import outdated_part
from orchestration.runs.folder import RunDir
from orchestration.supernets.results import results_at

TIED_IMAGES = 2
"""Number of images that another processor may classify differently, because their two best scores
are equal up to rounding."""
ROUNDED_IMAGES = 0.005
"""Share of the images that another processor or engine may classify or route differently in another
precision than float32 (`dsnet.deploy.precisions.LOGIT_TOLERANCE`)."""
ROUNDING = 1e-9


@dataclass(frozen=True)
class Check:
    """One claim of a bundle that was checked and holds, or a warning about the bundle."""

    name: str
    finding: str
    is_warning: bool = False


def check_bundle(path: Path, data_path: str | None) -> list[Check]:
    """Check a bundle.

    Args:
        path: folder of the bundle.
        data_path: None checks files and examples only; "" uses embedded data; else the folder of
            the images.

    Raises:
        NotFoundError: no bundle there.
        CheckpointError: it cannot be read.
        DataError: the data is not what the claims were measured on.
        VerificationError: something differs from what was claimed.
    """
    if not path.exists():
        raise NotFoundError(f"{path}: no such bundle; make one with: dsnet-orch export RUN --pick knee")
    bundle = load_bundle(path)
    check_bundle_files(bundle)
    checks = [Check("files", f"{len(bundle.manifest['files'])} files match their hashes")]
    by_torch = [] if bundle.engine == TORCH else [load_bundle(path, engine=TORCH)]
    loaded = [*by_torch, bundle]
    num_examples = max([check_bundle_examples(each) for each in loaded])
    engines = [each.engine for each in loaded]
    checks.append(Check("examples", _examples_finding(num_examples, len(bundle.operating_points), engines)))
    checks += _check_formats(path)
    checks += _check_origin(bundle)
    if data_path is not None:
        data = _claimed_data(bundle.claims["data"], data_path or _folder_of_the_run(bundle.path))
        checks += _check_claims(bundle, data)
        if (path / graphs_folder(INT8)).is_dir():
            checks += _check_claims(load_bundle(path, precision=INT8), data)
    return checks


def _check_formats(path: Path) -> list[Check]:
    """Run the examples with the files of every other format that the bundle has; `onnx` is among
    the engines."""
    checks = []
    for name, exporter in exporters().items():
        if name != ONNX and isinstance(exporter, CheckedExporter) and (path / name).is_dir():
            number = exporter.check(path, path / name)
            checks.append(Check(name, f"{number} stored images give the recorded routes and logits"))
    return checks


def _examples_finding(num_examples: int, num_points: int, engines: Sequence[str]) -> str:
    if num_examples == 0:
        return "0 images are stored, so routes and logits were not checked; export it again, or check its accuracy with --data"
    where = f" at each of {num_points} operating points" if num_points > 1 else ""
    run_by = f", by {' and by '.join(engines)}" if len(engines) > 1 else ""
    return f"{num_examples} stored images give the recorded routes and logits{where}{run_by}"


def _check_claims(bundle: Bundle, data: TensorData) -> list[Check]:
    return [
        _check_split(bundle.at(point.name), data, split)
        for point in bundle.operating_points
        for split in ("val", "test")
        if split in point.claims
    ]


def _folder_of_the_run(bundle: Path) -> str:
    """The image folder of the sweep, if the bundle is still in the folder of the run that made it;
    else empty."""
    folder = _run_around(bundle)
    return "" if folder is None else results_at(RunDir(folder.parent, folder.name)).config.data.path or ""


def _run_around(bundle: Path) -> Path | None:
    """The folder of the run in which the bundle lies; None if it lies in none."""
    parents = bundle.resolve().parents
    return next((at for at in parents if (at / "sweep.yaml").is_file() and (at / "manifest.json").is_file()), None)


def _check_origin(bundle: Bundle) -> list[Check]:
    """A warning if the bundle lies in a run that has another supernet or search now."""
    folder = _run_around(bundle.path)
    if folder is None:
        return []
    results = results_at(RunDir(folder.parent, folder.name))
    part = outdated_part(results, bundle.manifest)
    if part is None:
        return []
    again = command_line("export", folder, "--pick", "...", own_code=has_own_code(results.config))
    text = (
        f"{folder} has another {part} now; the bundle was made before the run was launched with other settings, and is not "
        f"among its present results. Export again with: {again}"
    )
    return [Check("run", text, is_warning=True)]


def _claimed_data(facts: Mapping[str, Any], data_path: str) -> TensorData:
    """Load the data and the splits on which the claims were measured."""
    image_set = load_source(
        facts["name"],
        data_path or None,
        facts["image_size"],
        stream=facts.get("stream", False),  # bundles of earlier releases have neither fact
        crop_fraction=facts.get("crop_fraction", 1.0),
        options=FileOptions.from_written(facts.get("files", {})),
    )
    splits = splits_of(image_set, SplitSizes(**facts["sizes"]), facts["seed"], facts["limit"])
    if image_set.fingerprint != facts["fingerprint"] or splits.hash != facts["splits"]:
        raise DataError(
            f"the images of {facts['name']}{f' in {data_path}' if data_path else ''} are not those the bundle's claims were measured on "
            "(their fingerprint differs); give the original files with --data"
        )
    return image_set.tensor_data(splits, open_test=True)


def _check_split(bundle: Bundle, data: TensorData, split: str) -> Check:
    """Check the claims of the present operating point on a split."""
    claimed = bundle.claims[split]
    point = f"operating point {bundle.operating_point.name}, " if len(bundle.operating_points) > 1 else ""
    num_images = data.num_images(split)
    with torch.inference_mode():
        found = score_bundle(bundle, data.images(split), data.labels(split))
    allowed = TIED_IMAGES / num_images if bundle.precision == FLOAT32 else max(TIED_IMAGES / num_images, ROUNDED_IMAGES)
    spec, size = bundle.net.subnets.spec, image_size_of(bundle.image_shape)
    # One undecided image exchanges one tail for another; with a router that may run several, it
    # adds or drops one.
    costs = [subnet_cost(spec, subnet, size) for subnet in bundle.net.subnets]
    tail_m = max(cost.madds - cost.trunk_madds for cost in costs) / 1e6
    is_equal = abs(found["top1"] - claimed["top1"]) <= allowed + ROUNDING
    is_equal &= abs(found["madds_m"] - claimed["madds_m"]) <= allowed * tail_m + ROUNDING
    if not is_equal:
        raise VerificationError(
            f"{bundle.path}: {point}on {split} ({num_images} images) it reaches {_scores(found)}, but claims {_scores(claimed)}"
        )
    return Check(
        split if bundle.precision == FLOAT32 else f"{split} in {bundle.precision}",
        f"{point}{_scores(found)} on {num_images} images, as claimed",
    )


def _scores(values: Mapping[str, Any]) -> str:
    return f"top-1 {100 * values['top1']:.2f} % at {values['madds_m']:.5g} M MAdds"
