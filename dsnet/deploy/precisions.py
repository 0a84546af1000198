"""Precisions in which a bundle runs in an inference engine, and the accuracy that was measured in
each.

`float32` is that of training. Every other precision has its graphs, and `accuracy.json`, in a
folder of the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from dsnet.deploy import onnx_files
from dsnet.deploy.layout import FLOAT32, INT8, ORIGIN_CLAIM
from dsnet.deploy.operating_points import SHARED_CLAIM, OperatingPoint
from dsnet.errors import CheckpointError, ConfigError, VerificationError
from dsnet.files import atomic_write_json, file_sha256, read_object
from dsnet.stored.checkpoint import load_tensors, save_tensors
from dsnet.wording import way_out

ACCURACY = "accuracy.json"
"""The file with the accuracy of a precision, in its folder."""
ANSWERS = "answers.safetensors"
"""The file with the routes and logits of the bundle's examples in a precision, in its folder."""
LOGIT_TOLERANCE = 0.05
"""Largest accepted difference to a logit of `ANSWERS`, relative to the largest one. Sums of
integers are exact, but a float32 value between them (attention, additions) may differ in its last
bit with the processor, engine or batch, and be rounded to the next of the 256 steps of an
activation, which changes what follows."""
MAX_OTHER_ROUTES = 1 / 8
"""Share of the examples that may take another route than in `ANSWERS`, for the same reason: a
decision near its threshold changes."""
_FOLDERS = {FLOAT32: onnx_files.FOLDER, INT8: "onnx_int8"}


def precision_names() -> tuple[str, ...]:
    """All precisions."""
    return tuple(_FOLDERS)


def graphs_folder(precision: str) -> str:
    """The name of the folder, and of the format, with the graphs of a precision.

    Raises:
        ConfigError: there is no such precision.
    """
    if precision not in _FOLDERS:
        raise ConfigError(f"unknown precision {precision!r}{way_out(precision, precision_names())}")
    return _FOLDERS[precision]


def store_accuracy(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `accuracy.json` beside the graphs that it is of.

    Args:
        folder: with the graphs.
        content: `points`, the claims of each operating point by split, and facts about them.
    """
    atomic_write_json(folder / ACCURACY, {**content, "graphs_sha256": file_sha256(folder / onnx_files.LISTING)})


def read_accuracy(folder: Path) -> Mapping[str, Any]:
    """The content of `accuracy.json`; without `points` if the accuracy was not measured.

    Raises:
        CheckpointError: it is of other graphs.
    """
    if not (folder / ACCURACY).is_file():
        return {}
    content: Mapping[str, Any] = read_object(folder / ACCURACY)
    if content.get("graphs_sha256") != file_sha256(folder / onnx_files.LISTING):
        raise CheckpointError(f"{folder / ACCURACY}: was measured with other graphs than those beside it; export again")
    return content


def store_answers(folder: Path, answers: Mapping[str, Shaped[Tensor, "*_"]]) -> None:
    """Store the answers to the bundle's examples beside the graphs that gave them, and their hash
    in the list of graphs.

    Args:
        folder: with the graphs.
        answers: `routes` and `logits` of each operating point, with its prefix.
    """
    listing = read_object(folder / onnx_files.LISTING)
    atomic_write_json(folder / onnx_files.LISTING, {**listing, "answers": save_tensors(folder / ANSWERS, answers)})


def read_answers(folder: Path) -> Mapping[str, Shaped[Tensor, "*_"]]:
    """The result of `store_answers`.

    Raises:
        CheckpointError: the file is missing, or is not the one that was exported.
    """
    return load_tensors(folder / ANSWERS, read_object(folder / onnx_files.LISTING)["answers"])


def compare_rounded(
    where: str,
    routes: Int64[Tensor, " examples"],
    logits: Float[Tensor, "examples classes"],
    wanted: Int64[Tensor, " examples"],
    wanted_logits: Float[Tensor, "examples classes"],
) -> None:
    """Compare answers in a precision that rounds with stored ones: at most `MAX_OTHER_ROUTES` of
    the examples may take another route, and the logits of the others may differ by
    `LOGIT_TOLERANCE`.

    Args:
        where: begins the messages.
        routes: the routes taken.
        logits: the logits given.
        wanted: the stored routes.
        wanted_logits: the stored logits.

    Raises:
        VerificationError: they differ by more.
    """
    same = routes == wanted
    num_other = int((~same).sum())
    if num_other > MAX_OTHER_ROUTES * len(same):
        raise VerificationError(
            f"{where}: {num_other} of {len(same)} examples took another route than was recorded; at most "
            f"{100 * MAX_OTHER_ROUTES:g} % may"
        )
    scale = float(wanted_logits.abs().max()) or 1.0
    away = float((logits - wanted_logits)[same].abs().max()) / scale if bool(same.any()) else 0.0
    if not away <= LOGIT_TOLERANCE:
        raise VerificationError(
            f"{where}: the logits of an example differ by {away:.2g} (relative), more than {LOGIT_TOLERANCE:g}"
        )


def claims_of_point(accuracy: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The claims of an operating point by split; empty if its accuracy was not measured.

    The only point of a bundle has the name of its folder, which may have been renamed.

    Args:
        accuracy: result of `read_accuracy`.
        name: name of the point.
    """
    points: Mapping[str, Mapping[str, Any]] = accuracy.get("points", {})
    return next(iter(points.values())) if len(points) == 1 else points.get(name, {})


def with_own_claims(point: OperatingPoint, accuracy: Mapping[str, Any]) -> OperatingPoint:
    """The point with the claims of a precision in place of those of float32: latencies, which were
    not measured in it, are left out."""
    kept = {name: point.claims[name] for name in (SHARED_CLAIM, ORIGIN_CLAIM) if name in point.claims}
    return replace(point, claims={**kept, **claims_of_point(accuracy, point.name)})


def accuracy_sentence(precision: str, claims: Mapping[str, Any]) -> str:
    """The accuracy of a point beside that of float32 and of the static sub-networks, in one
    sentence without the full stop; on `test` if recorded, else on `val`.

    Args:
        precision: its name.
        claims: the claims of the point in `accuracy.json`.
    """
    split = next((split for split in ("test", "val") if split in claims), None)
    if split is None:
        return f"{precision}: its accuracy was not measured"
    own = claims[split]
    low, high = own["difference_interval"]
    found = f"top-1 {100 * own['top1']:.1f} % on {split} at {own['madds_m']:.4g} M MAdds"
    change = f"{100 * own['difference']:+.1f} points [95 %: {100 * low:+.1f}, {100 * high:+.1f}]"
    beside = f"float32: {100 * own['float32_top1']:.1f} %, difference {change}"
    verdict = f"{precision} loses accuracy: {found}" if high < 0 else f"{precision}: {found}"
    routes = f"{100 * own['same_route_share']:.1f} % of the images take the same route"
    return f"{verdict} ({beside}); {routes}; {_beside_static(precision, own)}"


def _beside_static(precision: str, own: Mapping[str, Any]) -> str:
    gain = own["gain_over_static"]
    where = f"the static {precision} sub-networks at equal MAdds"
    if gain is None:
        return f"cheaper than {where.removesuffix(' at equal MAdds')}"
    low, high = own["gain_over_static_interval"]
    interval = f"{100 * gain:+.1f} points [95 %: {100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{interval} over {where}" if gain > 0 else f"no better than {where} ({interval})"
