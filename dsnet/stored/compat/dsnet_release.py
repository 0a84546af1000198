"""Reader of the released checkpoint of DS-Net (arXiv 2103.13258), a DS-MBNet.

The format:

- The file is `torch.save` of a dict: "state_dict", mostly "state_dict_ema" (the weights' moving
  average), "epoch", the optimiser's state, and "args", the command line as an `argparse.Namespace`.
  Names may have the prefix `module.` of a data-parallel wrapper.
- Blocks are named by stage: `blocks.<stage>.first_block`, then
  `blocks.<stage>.residual_blocks.<n>`. The attention is called `gate`.
- A normalisation layer is a list `aux_bn.<i>` with one entry per width of that layer, narrowest
  first. Each entry has running statistics; scale and shift are stored in the last entry only, at
  full length, and every width uses a prefix of them.
- Sub-network 13 and the teacher have equal widths from the gated stage on, and therefore share
  their statistics there. Here statistics are keyed by all widths up to the layer (docs/methods.md,
  section 3): the two sets start with the same values, and differ after recalibration or training.
- The slimming head is stored in the gated block's attention, with one row per route. Here it is a
  router and not a part of the supernet; `load_dsnet_gate` reads it. The file always holds it, after
  any stage of training, so it is required.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from dsnet.errors import CheckpointError
from dsnet.families import Task, create, layout
from dsnet.finite import check_finite
from dsnet.image_size import ImageSize
from dsnet.network.layers import BatchNormBank
from dsnet.network.supernet import Supernet
from dsnet.routers.gate import GateRouter
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.checkpoint import load_exactly
from dsnet.stored.compat.torch_files import read_torch_file

FAMILY = "ds_mbnet"
NORM = "private_stats"
HEAD = "blocks.3.first_block.gate.gate.0.weight"
"""Name of the slimming head, [routes, hidden, 1, 1]; row r gives the logit of sub-network r."""
BLOCKS = tuple(
    f"blocks.{stage}." + ("first_block" if number == 0 else f"residual_blocks.{number - 1}")
    for stage, num_blocks in enumerate((1, 2, 2, 6, 2))
    for number in range(num_blocks)
)
"""The published name of every block, in our order."""
BLOCK_PARTS: Mapping[str, str] = {
    "depthwise.weight": "conv_dw.weight",
    "depthwise_norm": "bn1",
    "attention.reduce_weight": "gate.conv_reduce.weight",
    "attention.reduce_bias": "gate.conv_reduce.bias",
    "attention.expand_weight": "gate.conv_expand.weight",
    "attention.expand_bias": "gate.conv_expand.bias",
    "pointwise.weight": "conv_pw.weight",
    "pointwise_norm": "bn2",
}
"""Our names within a block -> the published ones."""
OUTER_PARTS: Mapping[str, str] = {
    "stem.weight": "conv_stem.weight",
    "stem_norm": "bn1",
    "classifier.weight": "classifier.weight",
    "classifier.bias": "classifier.bias",
}
"""Our names outside the blocks -> the published ones."""
NORM_PARTS: Mapping[str, str] = {
    "weight": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "updates": "num_batches_tracked",
}
"""Our names within a normalisation layer -> the published ones."""

Source = str | Path | Mapping[str, Any]
_USUAL_CLASSES = 1000
"""Number of classes of ImageNet, used in messages about a missing classifier."""


def load_dsnet_checkpoint(
    source: Source, num_classes: int | None = None, *, ema: bool = False, image_size: ImageSize = 224
) -> tuple[Supernet, SubnetSet]:
    """Load a released checkpoint as a supernet in eval mode, with its sub-networks.

    `subnets[k]` is sub-network k = 0..13, `subnets.largest` the teacher outside the routing space;
    `supernet(images, subnets[k])` gives logits [B, classes]. The counts of BatchNorm updates are
    those of the checkpoint. The weights are copies.

    Args:
        source: a file of `torch.save` (read without running code from it), its content, or the
            state dict alone.
        num_classes: expected number of classes of the classifier; None takes the checkpoint's.
        ema: whether to take the moving average of the weights.
        image_size: size of the images for which the supernet is laid out; the weights do
            not depend on it.

    Raises:
        CheckpointError: the file cannot be read; it holds no (averaged) weights; weights are NaN or
            infinite; or tensors are missing, unexpected or misshapen, all of which are listed by
            their published names.
    """
    where, tensors, problems = _read(source, ema)
    if num_classes is None:
        num_classes = _num_rows(tensors.get("classifier.weight")) or _USUAL_CLASSES
    supernet = create(FAMILY, Task(num_classes, 3, image_size), norm=NORM)
    ours, names = supernet.state_dict(), published_names(supernet)
    expected = {published: published_shape(name, ours[name]) for name, published in names.items()}
    expected |= _classifier_shapes(tensors, expected) | _head_shape(tensors, supernet.subnets)
    problems += _class_problems(tensors, num_classes) + _head_problems(tensors, supernet.subnets)
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    problems += _misfits(tensors, expected)
    _raise_any(where, problems)
    check_finite(where, tensors)
    load_exactly(supernet, {name: tensors[names[name]].reshape(ours[name].shape) for name in ours}, where)
    return supernet.eval(), supernet.subnets


def load_dsnet_gate(source: Source, *, ema: bool = False) -> GateRouter:
    """Load the slimming head of a released checkpoint as a router over sub-networks 0..R-1, for a
    head of R rows.

    The router has no bias. The published gate applies no noise at inference: its scores are the
    logits of docs/methods.md, section 4.

    Args:
        source: as for `load_dsnet_checkpoint`, which also checks all other tensors.
        ema: whether to take the moving average of the weights.

    Raises:
        CheckpointError: the file cannot be read, it holds no (averaged) weights, or the head is
            missing, misshapen or not finite.
    """
    where, tensors, problems = _read(source, ema)
    subnets = layout(FAMILY, Task(_USUAL_CLASSES, 3, 224), norm=NORM)
    problems += _head_problems(tensors, subnets) + _misfits(tensors, _head_shape(tensors, subnets))
    _raise_any(where, problems)
    check_finite(where, {HEAD: tensors[HEAD]})
    weight = tensors[HEAD].detach().to("cpu", torch.float64).flatten(1)
    num_routes = len(weight)
    return GateRouter(weight.clone(), torch.zeros(num_routes, dtype=torch.float64), tuple(range(num_routes)))


def published_names(supernet: Supernet) -> dict[str, str]:
    """Name of each of our parameters and buffers -> its published name.

    Two of ours may have the same published name (see the module's docstring).
    """
    names: dict[str, str] = {}
    for path, module in supernet.named_modules():
        leaves = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        if isinstance(module, BatchNormBank):
            names |= {f"{path}.{leaf}": name for leaf, name in _bank_names(_published_path(path), leaves).items()}
        else:
            names |= {f"{path}.{leaf}": _published_path(f"{path}.{leaf}") for leaf in leaves}
    return names


def published_shape(name: str, ours: Shaped[Tensor, "*_"]) -> tuple[int, ...]:
    """The published shape of our tensor `name`; the attention's linear maps are published as 1x1
    convolutions."""
    is_map = name.endswith(("attention.reduce_weight", "attention.expand_weight"))
    return (*ours.shape, 1, 1) if is_map else tuple(ours.shape)


def _published_path(path: str) -> str:
    if not path.startswith("blocks."):
        return OUTER_PARTS[path]
    _, number, part = path.split(".", 2)
    return f"{BLOCKS[int(number)]}.{BLOCK_PARTS[part]}"


def _bank_names(bank: str, leaves: Iterable[str]) -> dict[str, str]:
    """Our names in one BatchNorm bank -> the published ones; our names end with the widths up to
    the layer."""
    parts = {leaf: leaf.split("_") for leaf in leaves}
    widths = sorted({int(prefix[-1]) for _, *prefix in parts.values() if prefix})
    return {
        leaf: f"{bank}.aux_bn.{widths.index(int(prefix[-1])) if prefix else len(widths) - 1}.{NORM_PARTS[kind]}"
        for leaf, (kind, *prefix) in parts.items()
    }


def _read(source: Source, ema: bool) -> tuple[str, dict[str, Any], list[str]]:
    """Read a source: (its place for messages, its state dict without the prefix `module.`, problems
    with its names)."""
    if isinstance(source, (str, Path)):
        where, content = str(source), read_torch_file(Path(source))
    else:
        where, content = "the given state dict", source
    stored = _state_dict(where, content, ema)
    tensors: dict[str, Any] = {}
    problems = []
    for key, value in stored.items():
        name = str(key).removeprefix("module.")
        if name in tensors:
            problems.append(f"{name} is there twice, with and without 'module.'")
        tensors[name] = value
    return where, tensors, problems


def _state_dict(where: str, content: Any, ema: bool) -> Mapping[Any, Any]:
    is_mapping = isinstance(content, Mapping)
    wanted = "state_dict_ema" if ema else "state_dict"
    if is_mapping and isinstance(content.get(wanted), Mapping):
        return content[wanted]
    is_whole_checkpoint = is_mapping and bool({"state_dict", "state_dict_ema"} & content.keys())
    if is_mapping and not is_whole_checkpoint and not ema:
        return content
    way_out = (
        "it has no averaged weights: leave out --ema (in Python: ema)"
        if ema
        else "give a released checkpoint or a state dict"
    )
    found = ", ".join(map(str, list(content)[:8])) if is_mapping else type(content).__name__
    raise CheckpointError(f"{where}: holds no {wanted!r} (but {found}); {way_out}")


def _num_rows(value: Any) -> int | None:
    return value.shape[0] if isinstance(value, Tensor) and value.ndim else None


def _classifier_shapes(
    tensors: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The expected shapes of the classifier for its own number of classes.

    A number of classes other than the requested one is thus reported once, by `_class_problems`.
    """
    num_found = _num_rows(tensors.get("classifier.weight"))
    names = ("classifier.weight", "classifier.bias")
    return {name: expected[name] if num_found is None else (num_found, *expected[name][1:]) for name in names}


def _class_problems(tensors: Mapping[str, Any], num_classes: int) -> list[str]:
    num_found = _num_rows(tensors.get("classifier.weight"))
    if num_found in (None, num_classes):
        return []
    return [
        f"its classifier has {num_found} classes, but {num_classes} were asked for: leave out --classes (in Python: num_classes)"
    ]


def _head_shape(tensors: Mapping[str, Any], subnets: SubnetSet) -> dict[str, tuple[int, ...]]:
    """The expected shape of the slimming head, for its own number of routes; if it is missing, for
    one per sub-network."""
    num_routes = _num_rows(tensors.get(HEAD))
    return {HEAD: (len(subnets) if num_routes is None else num_routes, subnets.spec.gates[0].hidden, 1, 1)}


def _head_problems(tensors: Mapping[str, Any], subnets: SubnetSet) -> list[str]:
    num_routes = _num_rows(tensors.get(HEAD))
    if num_routes is None or 1 <= num_routes <= len(subnets):
        return []
    return [f"{HEAD} has {num_routes} routes, but must have 1 to {len(subnets)}, one per sub-network"]


def _misfits(tensors: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    problems = []
    for name, shape in expected.items():
        value = tensors.get(name)
        if name not in tensors:
            problems.append(f"missing {name} {shape}")
        elif not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
            problems.append(f"{name} is not a dense tensor but {type(value).__name__}")
        elif tuple(value.shape) != shape:
            problems.append(f"{name} has shape {tuple(value.shape)}, expected {shape}")
        elif value.is_floating_point() == name.endswith("num_batches_tracked"):
            problems.append(f"{name} holds {value.dtype}: a count must be an integer, everything else floating")
    return problems


def _raise_any(where: str, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(f"{where}: the tensors do not fit the released DS-MBNet: " + "; ".join(problems))
