"""Bundles: exported routers with their supernet, which run and can be verified without YAML and
pickle (docs/definitions.md, Bundle).

A bundle is a folder with `bundle.json` (description, claims, hashes), `weights.safetensors`
(supernet cut to the routes in use, and routers), `examples.safetensors` (inputs with the routes and
logits that they must give) and `gate.yaml` (a description for people). Most bundles hold one
router; one with several operating points holds the weights once, and a router for each point.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from dsnet.data.normalization import Normalization
from dsnet.data.photos import PhotoDecoder, photo_files
from dsnet.deploy import onnx_files
from dsnet.deploy.dynamic import DynamicNet
from dsnet.deploy.engines import AUTO, TORCH, Engine, chosen_engine, graph_engines
from dsnet.deploy.layout import FLOAT32, INT8, MANIFEST
from dsnet.deploy.operating_points import OperatingPoint, OperatingPoints, prefix_of, read_points, store_points
from dsnet.deploy.precisions import (
    accuracy_sentence,
    claims_of_point,
    compare_rounded,
    graphs_folder,
    read_accuracy,
    read_answers,
    with_own_claims,
)
from dsnet.deploy.prediction import BATCH_SIZE, Classifier, PhotoPrediction, Predictions, predict_photos
from dsnet.errors import CheckpointError, ConfigError, DataError, DsnetError, PreflightError, VerificationError
from dsnet.families import rebuild
from dsnet.files import atomic_write_json, file_sha256, own_digest, read_object, understood, writing
from dsnet.image_size import image_size_of
from dsnet.network.precision import exact_float32, own_defaults
from dsnet.network.supernet import Supernet, restrict, state_for_saving
from dsnet.routers.base import Router
from dsnet.routers.kinds import router_from_arrays
from dsnet.routing.retrace import Retrace
from dsnet.space.cost import subnet_cost
from dsnet.space.route_tree import RouteTree
from dsnet.space.spec import SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.checkpoint import load_exactly, load_tensors, save_tensors, tensors_below
from dsnet.wording import first_line, plural, shown

SCHEMA_VERSION = 1
WEIGHTS, EXAMPLES, GATE_YAML = "weights.safetensors", "examples.safetensors", "gate.yaml"
"""Names of the files beside the manifest."""
NUM_EXAMPLES = 16
MAX_SIDE = 16_384
"""Largest height and width of a bundle's images in pixels."""
LOGIT_TOLERANCE = 1e-4
"""Largest accepted difference to a stored logit, relative to the largest stored one: processors
differ in the order of sums."""


class _Setting(NamedTuple):
    """An operating point and the network with its router, which are exchanged together."""

    point: OperatingPoint
    net: DynamicNet


@dataclass(eq=False, repr=False)
class Bundle:
    """A dynamic classifier read from a folder.

    It works at one of its operating points; only `set_budget` changes it.
    """

    path: Path
    manifest: Mapping[str, Any]
    normalization: Normalization
    class_names: tuple[str, ...]
    route_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """(channels, height, width) of its input images."""
    operating_points: OperatingPoints
    """All operating points by increasing MAdds; a bundle of one gate has one."""
    device: torch.device
    """The device on which it runs."""
    engine: str
    """Name of the inference engine (`dsnet.deploy.engines`)."""
    graphs: Path
    """The folder of the ONNX graphs of its precision, if the engine runs them."""
    precision: str
    """`float32`, or `int8` (`dsnet.deploy.precisions`); the claims are those of this precision."""
    _settings: Mapping[str, _Setting]
    """By the name of the point; the networks share all weights."""
    _setting: _Setting

    @property
    def net(self) -> DynamicNet:
        """The network with the router of the present operating point."""
        return self._setting.net

    @property
    def operating_point(self) -> OperatingPoint:
        """The present operating point."""
        return self._setting.point

    def at(
        self,
        name: str | None = None,
        /,
        *,
        madds_m: float | None = None,
        latency_ms: float | None = None,
        top1: float | None = None,
        batch_size: int = 1,
        device: str = "",
    ) -> Bundle:
        """The same bundle at the best operating point within a budget, or at a named one.

        This bundle stays as it is; both share all weights.

        Args:
            name: name of a point; else one of the budgets of `OperatingPoints.choose`.
            madds_m: see `OperatingPoints.choose`, as for all other arguments.
            latency_ms: largest latency, ms.
            top1: smallest top-1 on `val`, 0..1.
            batch_size: number of images to which `latency_ms` refers.
            device: device on which it was measured.

        Raises:
            ConfigError: not exactly one of name, madds_m, latency_ms and top1 is given, or a value
                is out of range.
            NotFoundError: no point has this name or fulfils this budget.
        """
        budgets = {"madds_m": madds_m, "latency_ms": latency_ms, "top1": top1}
        if name is None:
            point = self.operating_points.choose(**budgets, batch_size=batch_size, device=device)
        elif any(value is not None for value in budgets.values()):
            raise ConfigError(
                f"give the name of an operating point or a budget, but not both; got {name!r} and a budget"
            )
        else:
            point = self.operating_points.named(name)
        twin = copy.copy(self)
        twin._setting = self._settings[point.name]
        return twin

    def set_budget(
        self,
        *,
        madds_m: float | None = None,
        latency_ms: float | None = None,
        top1: float | None = None,
        batch_size: int = 1,
        device: str = "",
    ) -> OperatingPoint:
        """Move this bundle to the best operating point within a budget; returns the point.

        It takes microseconds: only the router is exchanged, in one assignment, so that other
        threads may classify meanwhile. A batch runs at one point; `predict` runs each batch at the
        point of that moment. If no point fulfils the budget, the bundle stays at its present one.

        Args and errors: as `OperatingPoints.choose`.
        """
        point = self.operating_points.choose(
            madds_m=madds_m, latency_ms=latency_ms, top1=top1, batch_size=batch_size, device=device
        )
        self._setting = self._settings[point.name]
        return point

    def __call__(self, images: UInt8[Tensor, "batch channels height width"]) -> Predictions:
        """Classify a batch of images.

        Args:
            images: uint8 [B, C, H, W] pixels in 0..255, of `image_shape`; B may be 0.

        Raises:
            DsnetError: the images have another type or shape.
        """
        if not isinstance(images, Tensor):
            way_out = (
                "bundle(torch.from_numpy(array))"
                if isinstance(images, np.ndarray)
                else "for files: bundle.predict(...)"
            )
            raise DsnetError(f"the bundle takes a tensor of pixels, but got {type(images).__name__}; {way_out}")
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise DsnetError(
                f"the bundle takes uint8 images [B, {', '.join(map(str, self.image_shape))}], "
                f"but got {str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            )
        if images.device.type != self.device.type:
            raise DsnetError(
                f"the bundle runs on {self.device}, but the images are on {images.device}; move them with "
                f"images.to({str(self.device)!r}), or load the bundle with device={str(images.device)!r}"
            )
        if torch.is_autocast_enabled(images.device.type):  # a setting of the program around
            with torch.autocast(images.device.type, enabled=False):
                return self._classified(images)
        return self._classified(images)

    def _classified(self, images: Tensor) -> Predictions:
        output = self.net(self.normalization.apply(images))
        probabilities = output.logits.softmax(1)
        return Predictions(output.logits.argmax(1), probabilities, output.routes, output.madds)

    @overload
    def predict(self, photos: str | Path) -> PhotoPrediction: ...  # type: ignore[overload-overlap]  # a str is a sequence of str

    @overload
    def predict(
        self,
        photos: Sequence[str | Path],
        *,
        on_error: Callable[[Path, DataError], None] | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[PhotoPrediction]: ...

    def predict(
        self,
        photos: str | Path | Sequence[str | Path],
        *,
        on_error: Callable[[Path, DataError], None] | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> PhotoPrediction | list[PhotoPrediction]:
        """Classify photos: image files of any size that Pillow reads, decoded and resized like the
        training data.

        Args:
            photos: one file, or a list of files and folders; a folder stands for all images in it
                and below it.
            on_error: called with each file that cannot be read and its error, while the others are
                classified; None: the first such error is raised.
            batch_size: photos per batch.

        Returns:
            The prediction for one file; for a list, the predictions for all photos that could be
            read, in order.

        Raises:
            DataError: a photo cannot be read, or a folder holds none.
            DsnetError: the bundle has no record of how photos are decoded, or `photos` are not
                files.
        """
        if isinstance(photos, str | Path):
            if Path(photos).is_dir():
                raise DataError(
                    f"{photos}: is a folder; for the photos in it give a list: bundle.predict([{str(photos)!r}])"
                )
            return self.predict([photos])[0]
        if not isinstance(photos, Iterable) or isinstance(photos, Tensor | np.ndarray | bytes):
            raise _no_photo(photos)
        photos = list(photos)
        for photo in photos:
            if not isinstance(photo, str | os.PathLike):
                raise _no_photo(photo)
        if on_error is not None and not callable(on_error):
            raise ConfigError(f"on_error must be a function of a file and its error, or None, but is {shown(on_error)}")
        files = photo_files(map(Path, photos))
        return list(predict_photos(files, self.photo_decoder, self._classifier, on_error or _raise_error, batch_size))

    @property
    def _classifier(self) -> Classifier:
        return Classifier(lambda images: self(images.to(self.device)), self.class_names, self.route_names)

    @property
    def photo_decoder(self) -> PhotoDecoder:
        """The decoder that turns photo files into inputs of this bundle.

        For a bundle of an earlier release, which has no record of it, it follows from the
        description of the data.

        Raises:
            DsnetError: the bundle has neither.
        """
        if self.manifest.get("photos") is not None:
            return PhotoDecoder.from_json(self.manifest["photos"])
        data = self.claims.get("data")
        if not data:
            raise DsnetError(
                f"{self.path}: the bundle has no record of how photos are decoded and resized; export it again with this release, "
                "or call it with a tensor of pixels: bundle(images)"
            )
        return PhotoDecoder.of_data(data["name"], self.image_shape, data.get("crop_fraction", 1.0))

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r})"

    def __str__(self) -> str:
        """A summary in five lines: classes, router and routes, input, claims, and how to call it;
        with several operating points, two more about them, and with int8 graphs, one about
        those."""
        lines = [
            f"{self.path.name}: a {self.net.subnets.spec.family} classifier of {len(self.class_names)} classes: "
            f"{_listed(self.class_names)}",
            f"router  {self._router_sentence()}",
            f"input   a photo, or uint8 [B, {', '.join(map(str, self.image_shape))}] with pixels in 0..255",
            f"claims  {_claims_sentence(self.claims)}",
            *self._precision_lines(),
            'use     bundle.predict("photo.jpg"), bundle.predict([files and folders]), or bundle(images)',
        ]
        if len(self.operating_points) > 1:
            points = _listed([str(point) for point in self.operating_points])
            lines.insert(1, f"points  {len(self.operating_points)}: {points}; present one: {self.operating_point.name}")
            lines.append(
                "budget  bundle.set_budget(madds_m=...), latency_ms=... or top1=...; print(bundle.operating_points)"
            )
        return "\n".join(lines)

    def _precision_lines(self) -> Iterator[str]:
        """A line about the accuracy in int8, if the bundle has int8 graphs."""
        folder = self.path / graphs_folder(INT8)
        if (folder / onnx_files.LISTING).is_file():
            claims = claims_of_point(read_accuracy(folder), self.operating_point.name)
            sentence = accuracy_sentence(INT8, claims).removeprefix(f"{INT8}: ").removeprefix(f"{INT8} ")
            own = "this precision" if self.precision == INT8 else f'dsnet.load_bundle(path, precision="{INT8}")'
            yield f"{INT8}    {sentence}; {own}"

    def _router_sentence(self) -> str:
        subnets, size, router = self.net.subnets, image_size_of(self.image_shape), self.net.router
        routes = [
            f"{subnets[k].name} ({subnet_cost(subnets.spec, subnets[k], size).madds / 1e6:.3g} M MAdds)"
            for k in router.routes
        ]
        if len(routes) == 1:
            return f"{router.kind}, which always takes {routes[0]}"
        return f"{router.kind}, which chooses among {len(routes)} routes: {_listed(routes)}"

    @property
    def claims(self) -> Mapping[str, Any]:
        """The numbers with which its present operating point was exported: accuracies, MAdds,
        latency."""
        return self.operating_point.claims


_NUM_LISTED = 6
"""Maximum number of names in a line of `print(bundle)`."""


def _listed(names: Sequence[str]) -> str:
    if len(names) <= _NUM_LISTED:
        return ", ".join(names)
    return f"{', '.join(names[: _NUM_LISTED - 1])}, ... {names[-1]}"


def _claims_sentence(claims: Mapping[str, Any]) -> str:
    """Accuracy with its interval and mean MAdds in words, on `test` if recorded, else on `val`."""
    split = next((split for split in ("test", "val") if split in claims), None)
    if split is None:
        return "none"
    own = claims[split]
    low, high = own.get("top1_interval", (None, None))
    interval = "" if low is None else f" [95 %: {100 * low:.1f}, {100 * high:.1f}]"
    size = f" ({own['num_images']} images)" if "num_images" in own else ""
    chosen = ", on which it was also chosen" if split == "val" else ""
    return (
        f"top-1 {100 * own['top1']:.1f} %{interval} at {own['madds_m']:.4g} M MAdds a photo, on {split}{size}{chosen}"
    )


def _no_photo(value: object) -> DsnetError:
    return DsnetError(
        f"bundle.predict takes files, but got {type(value).__name__}; for a PIL image: "
        "bundle(bundle.photo_decoder.of_photo(image.convert('RGB'))[None]), and for pixels: bundle(images)"
    )


def _raise_error(_file: Path, error: DataError) -> None:
    raise error


@dataclass(frozen=True, kw_only=True, eq=False)
class BundleContents:
    """The classifier that a bundle stores, from photos to class names."""

    supernet: Supernet
    """Trained and recalibrated."""
    router: Router
    """The router; only the routes that it, or the router of another point, may run are stored."""
    normalization: Normalization
    """The normalisation with which the supernet was trained."""
    class_names: Sequence[str]
    """Class names in label order."""
    examples: UInt8[Tensor, "images channels height width"]
    """uint8 [n, C, H, W], images whose routes and logits are stored for verification."""
    photos: PhotoDecoder | None = None
    """Decoder of photo files; None stores none, so that `predict` relies on the description of the
    data in the claims."""
    point_name: str | None = None
    """Name of the operating point that `router` is; needed if there are further ones."""
    further_points: Sequence[OperatingPoint] = ()
    """Further operating points, with routers over the same supernet; they need no description of
    the data, which is the bundle's."""

    def __post_init__(self) -> None:
        if self.further_points and self.point_name is None:
            raise ValueError("a bundle with several operating points needs point_name, the name of its own router's")

    @property
    def routes(self) -> tuple[int, ...]:
        """All routes that any of the routers may run, in increasing order."""
        routers = (self.router, *(point.router for point in self.further_points))
        return tuple(sorted({route for router in routers for route in router.routes}))


@exact_float32()
def save_bundle(folder: Path, contents: BundleContents, *, claims: Mapping[str, Any], gate_yaml: str) -> None:
    """Write a bundle atomically: it is built beside `folder` and then renamed, replacing an older
    bundle. If the older one has the same digest, the folders of its further formats are kept.

    Args:
        folder: the bundle's folder.
        contents: the classifier.
        claims: JSON values: accuracies, MAdds, latency, and the data on which they were measured;
            with several operating points, those of `contents.router`.
        gate_yaml: the text of gate.yaml, a description for people.

    Raises:
        PreflightError: `folder` holds something other than a bundle, which would be lost.
        ValueError: two operating points have the same name.
    """
    if folder.exists() and not _is_replaceable(folder):
        raise PreflightError(f"{folder}: exists already and is not a bundle; remove it, or export to another folder")
    small = restrict(contents.supernet, contents.routes).cpu().eval()
    position = {route: index for index, route in enumerate(contents.routes)}
    local = contents.router.over(position)
    further = [replace(point, router=point.router.over(position)) for point in contents.further_points]
    tensors, values = local.to_arrays()
    weights = {f"supernet.{name}": value for name, value in state_for_saving(small).items()}
    weights |= {f"router.{name}": value.contiguous() for name, value in tensors.items()}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": "dsnet-bundle",
        "spec": small.spec.to_json(),
        "subnets": small.subnets.to_json(),
        "router": values,
        "normalization": contents.normalization.to_json(),
        "class_names": list(contents.class_names),
        "image_shape": list(contents.examples.shape[1:]),
        "claims": dict(claims),
    }
    if contents.photos is not None:
        manifest["photos"] = contents.photos.to_json()
    if contents.point_name is not None:
        OperatingPoints([OperatingPoint(contents.point_name, local, claims), *further])  # checks the names
        manifest["points"], point_tensors = store_points(contents.point_name, further)
        weights |= point_tensors
    stored = _answered(small, [local, *(point.router for point in further)], contents)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    with writing(folder):
        try:
            draft.mkdir(parents=True)
            _write_files(draft, manifest, weights, stored, gate_yaml)
            _swap(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _answered(supernet: Supernet, routers: Sequence[Router], contents: BundleContents) -> dict[str, Tensor]:
    """The tensors of the examples: images, and the routes and logits that each router gives
    them."""
    images = contents.normalization.apply(contents.examples)
    net = DynamicNet(supernet, routers[0], image_size=image_size_of(contents.examples.shape))
    stored = {"images": contents.examples.contiguous()}
    for number, router in enumerate(routers):
        output = net.with_router(router)(images)
        prefix = prefix_of(number)
        stored |= {f"{prefix}routes": output.routes.clone(), f"{prefix}logits": output.logits.clone()}
    return stored


def _write_files(
    draft: Path,
    manifest: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    examples: Mapping[str, Tensor],
    gate_yaml: str,
) -> None:
    files = {
        WEIGHTS: save_tensors(draft / WEIGHTS, weights),
        EXAMPLES: save_tensors(draft / EXAMPLES, examples),
    }
    (draft / GATE_YAML).write_text(gate_yaml, encoding="utf-8")
    files[GATE_YAML] = file_sha256(draft / GATE_YAML)
    manifest = {**manifest, "files": files}
    atomic_write_json(draft / MANIFEST, {**manifest, "sha256": own_digest(manifest)})


def _is_replaceable(folder: Path) -> bool:
    """Whether a folder is empty or a bundle, also one that has lost its manifest."""
    if not folder.is_dir():
        return False
    is_bundle = (folder / MANIFEST).is_file() or all(
        (folder / name).is_file() for name in (WEIGHTS, EXAMPLES, GATE_YAML)
    )
    return is_bundle or not any(folder.iterdir())


def _swap(draft: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        kept = format_folders(folder) if _digest(folder) == _digest(draft) else []
        folder.rename(old)
        for name in kept:
            (old / name).rename(draft / name)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _digest(folder: Path) -> str | None:
    """The digest in the manifest of a bundle; None without a readable manifest."""
    try:
        return read_object(folder / MANIFEST).get("sha256")
    except CheckpointError:
        return None


def format_folders(folder: Path) -> list[str]:
    """Names of the folders of further formats in a bundle, sorted; empty if there is no bundle."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


@own_defaults()
def load_bundle(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    engine: str = AUTO,
    precision: str = FLOAT32,
    threads: int | None = None,
    cut_weights: bool = True,
    fold_bn: bool = True,
) -> Bundle:
    """Read a bundle; manifest and weights are checked against their hashes, and no code or pickle
    is loaded.

    The examples and gate.yaml, which are not needed to run it, are checked by `check_bundle_files`.

    Args:
        path: the bundle's folder.
        device: the device on which it runs; images must be there too.
        engine: what runs the network: `torch`; `onnxruntime`, which is usually faster on a CPU, and
            needs a bundle with ONNX files; or `auto`, the latter where it is possible.
        precision: `float32`, or `int8`, for which the bundle needs int8 graphs, and an engine other
            than torch; its claims are then those that were measured in int8.
        threads: threads of one call of another engine than torch; None: those of torch.
        cut_weights: for torch, keep contiguous weights per route (fastest); False slices shared
            weights in every call (least memory).
        fold_bn: with `cut_weights`, fold BatchNorm into the convolutions.

    Raises:
        CheckpointError: a file is missing or damaged, or the bundle is of another version.
        ConfigError: the engine, the precision or the device is unknown, or cannot run this bundle
            here; or `threads` is no number of threads.
        PreflightError: the device is a GPU that torch does not see.
    """
    path, device = Path(path), _usable_device(device)
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ConfigError(f"threads must be a whole number from 1, or None, but is {shown(threads)}")
    graphs, on_cpu = path / graphs_folder(precision), device.type == "cpu"
    has_graphs = (graphs / onnx_files.LISTING).is_file()
    if precision != FLOAT32 and (path / MANIFEST).is_file() and not has_graphs:
        raise ConfigError(
            f"precision {precision}: {path} has no folder {graphs.name}; export it with dsnet-orch export RUN --format {graphs.name}"
        )
    chosen = chosen_engine(engine, has_graphs, on_cpu)
    if precision != FLOAT32 and chosen is None and has_graphs:
        raise ConfigError(
            f"precision {precision} needs an inference engine on the CPU, such as engine='{graph_engines()[0].name}' "
            f"({graph_engines()[0].install}); torch runs {FLOAT32} alone"
        )
    manifest = _read_manifest(path)
    with understood(path / MANIFEST, "export it again"):
        return _assemble(path, manifest, _Loading(graphs, chosen, precision, device, threads, cut_weights, fold_bn))


def _usable_device(device: torch.device | str) -> torch.device:
    """The device of a name.

    Raises:
        ConfigError: torch knows no such device.
        PreflightError: it is a GPU that torch does not see.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device is {shown(device)}, but must be cpu, cuda or cuda:NUMBER, or a torch.device ({first_line(error, 80)})"
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise PreflightError(f"device is {found}, but torch sees no GPU here; load the bundle with device='cpu'")
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise PreflightError(f"device is {found}, but torch sees {plural(count, 'GPU')} here, numbered from 0")
    return found


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a bundle.

    Raises:
        CheckpointError: it is missing, damaged or of another version.
    """
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path}: no bundle here (no {MANIFEST}); make one with `dsnet-orch export RUN --pick knee`"
        )
    manifest = read_object(path / MANIFEST)
    if manifest.get("kind") != "dsnet-bundle" or manifest.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path / MANIFEST}: kind {manifest.get('kind')!r}, schema version {manifest.get('schema_version')!r}; "
            f"this release reads 'dsnet-bundle' {SCHEMA_VERSION}"
        )
    if manifest.get("sha256") != own_digest(manifest):
        raise CheckpointError(f"{path / MANIFEST}: was edited or damaged (its own SHA-256 differs); export it again")
    return manifest


def _image_shape(path: Path, manifest: Mapping[str, Any]) -> tuple[int, int, int]:
    """(channels, height, width) of the images, at most `MAX_SIDE` high and wide.

    Raises:
        CheckpointError: the manifest has another shape than its network can take.
    """
    shape = manifest["image_shape"]
    is_possible = (
        len(shape) == 3
        and all(type(number) is int for number in shape)
        and shape[0] == manifest["spec"]["in_channels"]
        and all(1 <= side <= MAX_SIDE for side in shape[1:])
    )
    if not is_possible:
        raise CheckpointError(
            f"{path / MANIFEST}: image_shape is {str(shape)[:100]}, but must be the {manifest['spec']['in_channels']} channels of "
            f"the network, height and width, each in 1..{MAX_SIDE}; export the bundle again"
        )
    channels, height, width = shape
    return channels, height, width


class _Loading(NamedTuple):
    """The arguments of `load_bundle` with the engine found and the folder of the graphs."""

    graphs: Path
    """The folder of the ONNX graphs."""
    engine: Engine | None
    precision: str = FLOAT32
    device: torch.device | str = "cpu"
    threads: int | None = None
    cut_weights: bool = True
    fold_bn: bool = True


def _assemble(path: Path, manifest: Mapping[str, Any], loading: _Loading) -> Bundle:
    supernet, weights = _stored_supernet(path, manifest)
    subnets = supernet.subnets
    points = _points(path, manifest, weights)
    if loading.precision != FLOAT32:
        accuracy = read_accuracy(loading.graphs)
        points = tuple(with_own_claims(point, accuracy) for point in points)
    channels, height, width = _image_shape(path, manifest)
    segments = None
    if loading.engine is not None:
        threads = loading.threads or torch.get_num_threads()
        tree = RouteTree.of(subnets)
        routers = [point.router for point in points]
        segments = onnx_files.GraphSegments(loading.graphs, tree, routers, loading.engine, threads)
    net = DynamicNet(
        supernet,
        points[0].router,
        cut_weights=loading.cut_weights,
        fold_bn=loading.fold_bn,
        image_size=image_size_of((height, width)),
        segments=segments,
    ).to(loading.device)
    settings = {point.name: _Setting(point, net.with_router(point.router)) for point in points}
    return Bundle(
        path=path,
        manifest=manifest,
        normalization=Normalization.from_json(manifest["normalization"]),
        class_names=tuple(manifest["class_names"]),
        route_names=tuple(subnet.name for subnet in subnets),
        image_shape=(channels, height, width),
        operating_points=OperatingPoints(points),
        device=torch.device(loading.device),
        engine=TORCH if loading.engine is None else loading.engine.name,
        graphs=loading.graphs,
        precision=loading.precision,
        _settings=settings,
        _setting=settings[points[0].name],
    )


def _stored_supernet(path: Path, manifest: Mapping[str, Any]) -> tuple[Supernet, Mapping[str, Tensor]]:
    """The supernet in eval mode on the CPU, and all tensors of the bundle."""
    weights = _tensors_of(path, manifest, WEIGHTS)
    supernet = rebuild(SubnetSet.from_json(SupernetSpec.from_json(manifest["spec"]), manifest["subnets"]))
    load_exactly(supernet, tensors_below(weights, "supernet."), str(path))
    return supernet.eval(), weights


def _tensors_of(path: Path, manifest: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The tensors of a file of a bundle.

    Raises:
        CheckpointError: it is not the file that was exported.
    """
    try:
        return load_tensors(path / name, manifest["files"][name])
    except CheckpointError as error:
        raise CheckpointError(f"{error}; export the bundle again") from error


def _points(path: Path, manifest: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[OperatingPoint, ...]:
    """The operating points in the order of the manifest, the bundle's own first."""
    try:
        router = router_from_arrays(tensors_below(weights, "router."), manifest["router"])
        own = OperatingPoint(path.absolute().name, router, manifest["claims"])
        return read_points(own, manifest.get("points"), weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path / MANIFEST}: {error}; export it again") from error


class StoredParts(NamedTuple):
    """Supernet, routers and pre-processing of a bundle, from which other formats are written."""

    supernet: Supernet
    """In eval mode on the CPU; every member is a route."""
    points: tuple[OperatingPoint, ...]
    """In the order in which they are stored."""
    normalization: Normalization
    image_shape: tuple[int, int, int]
    """(channels, height, width)."""
    photos: PhotoDecoder | None
    """The decoder of photo files; None if the network does not take RGB or grey photos."""


def stored_parts(path: Path) -> StoredParts:
    """Read the parts of a bundle.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    manifest = _read_manifest(path)
    with understood(path / MANIFEST, "export it again"):
        supernet, weights = _stored_supernet(path, manifest)
        return StoredParts(
            supernet,
            _points(path, manifest, weights),
            Normalization.from_json(manifest["normalization"]),
            _image_shape(path, manifest),
            PhotoDecoder.from_json(manifest["photos"]) if "photos" in manifest else None,
        )


def write_onnx(path: Path, folder: Path) -> None:
    """Write the ONNX graphs of a bundle's segments and decisions.

    Args:
        path: the bundle's folder.
        folder: receives the files.

    Raises:
        DsnetError: the packages are missing, or the network cannot be exported.
    """
    parts = stored_parts(path)
    routers = [point.router for point in parts.points]
    onnx_files.write_graphs(parts.supernet, routers, image_size_of(parts.image_shape), folder)


def check_onnx(path: Path, folder: Path) -> int:
    """Run the examples of a bundle with its graphs in every engine that is installed; returns their
    number.

    Raises:
        VerificationError: a route or a logit differs.
    """
    return check_graphs(path, folder, FLOAT32)


def check_graphs(path: Path, folder: Path, precision: str) -> int:
    """The same for the graphs of any precision; see `check_bundle_examples`.

    Args:
        path: the bundle's folder.
        folder: with the graphs.
        precision: their precision.
    """
    engines = [engine for engine in graph_engines() if engine.is_installed]
    found = [check_bundle_examples(bundle_with_graphs(path, folder, engine, precision)) for engine in engines]
    return max(found, default=0)


def bundle_with_graphs(
    path: Path, graphs: Path, engine: Engine, precision: str = FLOAT32, threads: int | None = None
) -> Bundle:
    """A bundle that runs in an engine with the graphs of any folder, such as one that is still
    being exported.

    Args:
        path: the bundle's folder.
        graphs: the folder with the graphs.
        engine: the engine, which is installed.
        precision: the precision of the graphs.
        threads: threads of one call; None: those of torch.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    return _assemble(path, _read_manifest(path), _Loading(graphs, engine, precision, threads=threads))


def check_bundle_files(bundle: Bundle) -> None:
    """Check every file of a bundle against its recorded hash.

    Raises:
        VerificationError: a file is missing or differs.
    """
    for name, expected in bundle.manifest["files"].items():
        file = bundle.path / name
        if not file.is_file() or file_sha256(file) != expected:
            raise VerificationError(
                f"{file}: missing, or not the file that was exported (its SHA-256 differs); export the bundle again"
            )


class Examples(NamedTuple):
    """The stored examples of an operating point, with the answers of the bundle's precision."""

    point: str
    """Its name."""
    images: UInt8[Tensor, "examples channels height width"]
    """Pixels."""
    routes: Int64[Tensor, " examples"]
    """The routes that they must take."""
    logits: Float[Tensor, "examples classes"]
    """The logits that they must get."""


def stored_examples(bundle: Bundle) -> Iterator[Examples]:
    """The examples of every operating point; without images where none are stored.

    Raises:
        VerificationError: those of a point are not stored.
    """
    stored = _tensors_of(bundle.path, bundle.manifest, EXAMPLES)
    if bundle.precision != FLOAT32:
        stored = {**stored, **read_answers(bundle.graphs)}
    points = bundle.manifest.get("points")
    names = [bundle.operating_points[0].name] if points is None else [entry["name"] for entry in points]
    images = stored.get("images")
    if images is None or tuple(images.shape[1:]) != bundle.image_shape:
        held = "no images" if images is None else f"images of the shape {list(images.shape[1:])}"
        raise VerificationError(
            f"{bundle.path / EXAMPLES}: holds {held}, but the bundle takes {list(bundle.image_shape)}; export the bundle again"
        )
    for number, name in enumerate(names):
        prefix = "" if points is None else prefix_of(number)
        if f"{prefix}routes" not in stored or f"{prefix}logits" not in stored:
            raise VerificationError(
                f"{bundle.path}: operating point {name}: no routes and logits of the examples are stored; export the "
                "bundle again"
            )
        yield Examples(name, images, stored[f"{prefix}routes"], stored[f"{prefix}logits"])


@exact_float32()
def check_bundle_examples(bundle: Bundle) -> int:
    """Run the stored examples at every operating point, and compare their routes and logits with
    the exported ones.

    Where the router's decision is a numerical tie, the recorded route is taken; its logits must
    still agree. In another precision than float32 they are compared by `compare_rounded`.

    Returns:
        The number of examples checked; 0 if none are stored.

    Raises:
        VerificationError: a route or a logit differs, or those of a point are not stored.
    """
    count = 0
    for examples in stored_examples(bundle):
        if (count := len(examples.images)) == 0:
            return 0
        where = str(bundle.path if bundle.precision == FLOAT32 else bundle.graphs)
        if len(bundle.operating_points) > 1:
            where += f": operating point {examples.point}"
        if bundle.precision != FLOAT32:
            output = bundle.at(examples.point).net(bundle.normalization.apply(examples.images))
            where += f", {bundle.engine}"
            compare_rounded(where, output.routes, output.logits, examples.routes, examples.logits)
            continue
        logits, routes = _retraced(bundle.at(examples.point), examples.images, examples.routes)
        compare_examples(where, bundle.route_names, examples, routes, logits)
    return count


def compare_examples(
    where: str,
    route_names: Sequence[str],
    expected: Examples,
    routes: Int64[Tensor, " examples"],
    logits: Float[Tensor, "examples classes"],
) -> None:
    """Compare answers to examples with the stored ones.

    Args:
        where: begins the messages.
        route_names: names of the bundle's routes.
        expected: the examples.
        routes: the routes taken.
        logits: the logits given.

    Raises:
        VerificationError: a route or a logit differs.
    """
    scale = float(expected.logits.abs().max()) or 1.0
    for index in range(len(expected.images)):
        route, wanted = int(routes[index]), int(expected.routes[index])
        if route != wanted:
            raise VerificationError(
                f"{where}: example {index} took route {route_names[route]}, but {route_names[wanted]} was recorded"
            )
        difference = float((logits[index] - expected.logits[index]).abs().max()) / scale
        if not difference <= LOGIT_TOLERANCE:
            raise VerificationError(
                f"{where}: the logits of example {index} differ by {difference:.2e} (relative), more than {LOGIT_TOLERANCE:.0e}"
            )


def _retraced(bundle: Bundle, pixels: Tensor, recorded: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and routes of images, on the CPU; recorded routes are taken where the router's
    decision is a tie."""
    output = bundle.net(bundle.normalization.apply(pixels.to(bundle.device)))
    logits, routes = output.logits.cpu(), output.routes.cpu()
    for route in recorded[routes != recorded].unique().tolist():
        again_logits, again_routes = follow(bundle, pixels, route)
        rows = (routes != recorded) & (recorded == route)
        logits = torch.where(rows[:, None], again_logits, logits)
        routes = torch.where(rows, again_routes, routes)
    return logits, routes


def follow(
    bundle: Bundle, pixels: UInt8[Tensor, "images channels height width"], route: int
) -> tuple[Float[Tensor, "images classes"], Int64[Tensor, " images"]]:
    """Logits and routes of images, on the CPU, where a route is taken as far as the router's
    decisions are ties (`dsnet.routing.retrace`)."""
    net = bundle.net
    output = net.with_router(Retrace(net.router, route, net.tree))(bundle.normalization.apply(pixels.to(bundle.device)))
    return output.logits.cpu(), output.routes.cpu()


@exact_float32()
def score_bundle(
    bundle: Bundle,
    images: UInt8[Tensor, "images channels height width"],
    labels: Int64[Tensor, " images"],
    batch_size: int = 256,
) -> dict[str, float]:
    """Accuracy and cost of a bundle on labelled images (uint8 [N, C, H, W], int64 [N]).

    Returns:
        `top1`, 0..1, and `madds_m`, the mean MAdds per image in millions.
    """
    right, madds = 0, 0
    for start in range(0, len(labels), batch_size):
        answer = bundle(images[start : start + batch_size].to(bundle.device))
        right += int((answer.classes.cpu() == labels[start : start + batch_size]).sum())
        madds += int(answer.madds.sum())
    return {"top1": right / len(labels), "madds_m": madds / len(labels) / 1e6}
