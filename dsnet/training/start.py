"""Start weights: initialisation of a supernet from a stored one, for the same or another task."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from dsnet.data.normalization import Normalization
from dsnet.errors import CheckpointError, ConfigError
from dsnet.families import Task, get_family, layout, rebuild
from dsnet.files import read_object
from dsnet.finite import check_finite
from dsnet.network.layers import BatchNormBank
from dsnet.network.supernet import Supernet
from dsnet.seeds import derive_seed
from dsnet.space.spec import SupernetSpec
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.checkpoint import load_checkpoint, tensors_below
from dsnet.stored.names import STRUCTURE
from dsnet.training.plain_start import SUFFIXES, PlainStart, is_plain, load_plain_start
from dsnet.training.supernet_run import SupernetRun

CHECKPOINT_MODEL = "checkpoint"
"""Value of `supernet.model` that takes the network and its sub-networks from the start weights."""
_FINAL = "final"
_MANIFEST = "manifest.json"
_NUM_LISTED = 2
"""Maximum number of tensors of each kind that a message about an unsuitable checkpoint names."""


@dataclass(frozen=True, eq=False)
class Start:
    """A stored supernet from which training starts."""

    stem: Path
    subnets: SubnetSet
    tensors: Mapping[str, Shaped[Tensor, "*_"]]
    """The supernet's state dict, on the CPU."""
    sha256: str
    """SHA-256 of the tensor file."""
    normalization: Normalization | None
    """The normalisation it was trained with; None if that was not recorded."""

    @property
    def num_classes(self) -> int:
        """Number of classes of its classifier."""
        return self.subnets.spec.num_classes

    def origin(self) -> dict[str, Any]:
        """The record for `SupernetRun.origin`, which identifies the file without its folder."""
        return {"file": f"{self.stem.name}.safetensors", "sha256": self.sha256}

    def check_channels(self, in_channels: int) -> None:
        """Raise ConfigError if the network reads images of another number of channels."""
        _check_channels(self.subnets.spec, in_channels)

    def apply(self, supernet: Supernet) -> list[str]:
        """Copy the weights; see `apply_start`."""
        return apply_start(supernet, self)


StartWeights = Start | PlainStart
"""Weights from which training starts: a stored supernet, or a plain network."""


def load_start(source: Path) -> StartWeights:
    """Read start weights.

    Args:
        source: a checkpoint (its stem or one of its two files; final or of an epoch), a folder that
            holds `final.*` or the `structure.*` of a structure search, the output folder of `python
            -m dsnet.training`, or a run folder of the pipeline; or a state dict of a plain network
            (see `dsnet.training.plain_start`). `~` and $VARIABLES are expanded. From an epoch's
            checkpoint the weights are taken that its run would keep (the EMA copy or the student).

    Raises:
        CheckpointError: there is no finished checkpoint (the message lists the places searched), it
            is damaged, or it holds NaN or infinity.
    """
    stem = find_checkpoint(source)
    if is_plain(stem):
        return load_plain_start(stem)
    tensors, meta = load_checkpoint(stem)
    if "spec" not in meta or "subnets" not in meta:
        raise CheckpointError(
            f"{stem}.json: holds no supernet (no 'spec' and 'subnets'), so that training cannot start from it"
        )
    run = meta.get("run", {})  # an imported checkpoint need not have been trained here
    if any(name.startswith("student.") for name in tensors):
        tensors = tensors_below(tensors, f"{run.get('weights', 'ema')}.")
    check_finite(f"supernet.init_from: {stem}", tensors)
    recorded = run.get("normalization")
    return Start(
        stem=stem,
        subnets=SubnetSet.from_json(SupernetSpec.from_json(meta["spec"]), meta["subnets"]),
        tensors=tensors,
        sha256=str(meta.get("sha256")),
        normalization=None if recorded is None else Normalization.from_json(recorded),
    )


def find_checkpoint(source: Path) -> Path:
    """The stem of the checkpoint that `source` denotes (see `load_start`); a state dict's whole
    path.

    Raises:
        CheckpointError: there is no finished checkpoint.
    """
    source = Path(os.path.expandvars(source)).expanduser()
    if is_plain(source):
        return source
    candidates = list(_candidates(source))
    for stem in candidates:
        if _json_of(stem).is_file():
            return stem
    looked = ", ".join(f"{_json_of(stem)}" for stem in candidates)
    raise CheckpointError(
        f"supernet.init_from: no finished checkpoint at {source} (looked for {looked}); name a checkpoint, "
        "a run folder whose supernet is trained, the output folder of `python -m dsnet.training`, or the state dict of a plain "
        f"network ({', '.join(SUFFIXES)})"
    )


def _candidates(source: Path) -> Iterator[Path]:
    """Stems that `source` may denote, in the order in which they are tried."""
    if not source.is_dir():
        yield source.with_suffix("") if source.suffix in (".json", ".safetensors") else source
        return
    yield source / _FINAL
    if _json_of(source / STRUCTURE).is_file():
        yield source / STRUCTURE
    recorded = _recorded_folder(source)
    if recorded is not None:
        yield source / recorded / _FINAL
    finished = sorted(source.glob(f"supernet/*/{_FINAL}.json"), key=_modified, reverse=True)
    yield from (path.with_suffix("") for path in finished)
    yield source / "supernet" / _FINAL


def _recorded_folder(folder: Path) -> str | None:
    """The supernet's folder according to the manifest in `folder`, or None."""
    if not (folder / _MANIFEST).is_file():
        return None
    try:
        recorded = read_object(folder / _MANIFEST)["stages"]["supernet"]["dir"]
    except (KeyError, TypeError):
        return None
    return recorded if isinstance(recorded, str) else None


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns


def _json_of(stem: Path) -> Path:
    return stem.with_name(stem.name + ".json")


@torch.no_grad()
def apply_start(supernet: Supernet, start: Start) -> list[str]:
    """Copy weights and BatchNorm statistics from start weights into a supernet.

    Two kinds of tensors may keep their fresh values and are returned: the classifier where the
    numbers of classes differ, and the tensors of BatchNorm banks for prefixes of widths that the
    checkpoint's set lacks. Tensors for prefixes that this supernet's set lacks are ignored. All
    others must fit exactly; otherwise nothing is copied.

    Returns:
        The names of the tensors that kept fresh values, in the supernet's order.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape, or the layers that
            write a stream have other channels of it; the message says how the two networks differ,
            and names some of the tensors or layers.
    """
    _check_ids(supernet.spec, start)
    given = supernet.fitted(start.tensors, start.subnets.spec)
    target = supernet.state_dict()
    fresh = _fresh(supernet, start)
    taken = [name for name in target if name not in fresh]
    banks = _of_banks(supernet)
    missing = [f"missing {name} {tuple(target[name].shape)}" for name in taken if name not in given]
    unexpected = [
        f"unexpected {name}"
        for name in given
        if name not in target and not name.startswith(banks)  # of sub-networks that this set leaves out
    ]
    misshapen = [
        f"{name} has shape {tuple(given[name].shape)}, expected {tuple(target[name].shape)}"
        for name in taken
        if name in given and given[name].shape != target[name].shape
    ]
    kinds = [kind for kind in (missing, unexpected, misshapen) if kind]
    if kinds:
        listed = [problem for kind in kinds for problem in kind[:_NUM_LISTED]]
        num_others = sum(map(len, kinds)) - len(listed)
        raise CheckpointError(
            f"supernet.init_from: {start.stem} holds {_in_words(start.subnets.spec)}, but the settings give {_in_words(supernet.spec)}. "
            "Use the model, options and regime (bn) that it was made with, or model: checkpoint. "
            f"What does not fit: {'; '.join(listed)}" + (f"; and {num_others} more tensors" if num_others else "")
        )
    for name in taken:
        target[name].copy_(given[name])
    return [name for name in target if name in fresh]


def _check_ids(spec: SupernetSpec, start: Start) -> None:
    """Check that the same channels of the groups are the same channels of their streams."""
    stored = {group.name: group.ids for group in start.subnets.spec.groups if group.ids}
    own = {group.name: group.ids for group in spec.groups if group.ids}
    differ = [group.name for group in spec.groups if own.get(group.name) != stored.get(group.name)]
    if differ:
        raise CheckpointError(
            f"supernet.init_from: in {start.stem} the channels of residual streams are in another order than in this network "
            f"({', '.join(differ[:_NUM_LISTED])}): take the network itself from there, with model: checkpoint"
        )


def _in_words(spec: SupernetSpec) -> str:
    """A phrase for messages with the properties on which a network's tensors depend."""
    widest = max(group.max_width for group in spec.groups)
    return f"{spec.family} with {len(spec.ops)} layers of up to {widest} channels, {spec.norm}"


def _fresh(supernet: Supernet, start: Start) -> set[str]:
    """Names of the tensors that may keep fresh values because `start` lacks them or has other
    classes."""
    other_classes = start.num_classes != supernet.spec.num_classes
    classifiers = set(supernet.class_tensors() if other_classes else ())
    unknown = set()
    for bank_name, bank in supernet.named_modules():
        if isinstance(bank, BatchNormBank):
            known = {bank.key_of(subnet.widths) for subnet in start.subnets.all}
            unknown |= {f"{bank_name}.{name}" for name, _ in bank.named_buffers() if _key(name) not in known}
    return classifiers | {name for name in unknown if name not in start.tensors}


def _key(name: str) -> tuple[int, ...]:
    """The key in the name of a bank's buffer."""
    return tuple(map(int, name.split("_")[1:]))


def _of_banks(supernet: Supernet) -> tuple[str, ...]:
    """Beginnings of the names of all tensors that BatchNorm banks hold per prefix of widths."""
    banks = [name for name, module in supernet.named_modules() if isinstance(module, BatchNormBank)]
    return tuple(f"{bank}.{kind}_" for bank in banks for kind in ("mean", "var", "updates", "weight", "bias"))


def check_start(run: SupernetRun, start: StartWeights | None, fresh: Sequence[str], num_classes: int) -> None:
    """Check that a run trains all fresh tensors and estimates all BatchNorm statistics.

    Args:
        run: the settings.
        start: the start weights; None for fresh weights.
        fresh: the result of `apply_start`.
        num_classes: number of classes of the task.

    Raises:
        ConfigError: 0 epochs with random weights, or 0 images of recalibration with statistics that
            do not fit the weights.
    """
    if run.train.epochs == 0 and start is None:
        raise ConfigError(
            "supernet.train.epochs is 0, but supernet.init_from names no weights to keep; name a checkpoint, or train 1 epoch or more"
        )
    statistics = [name for name in fresh if name.rpartition(".")[2].startswith(("mean_", "var_", "updates_"))]
    if run.train.epochs == 0 and len(statistics) < len(fresh):
        assert start is not None
        raise ConfigError(
            f"supernet.train.epochs is 0, but the classifier of {start.stem} does not have the {num_classes} classes of the data: "
            "a new classifier must be trained, for 1 epoch or more"
        )
    if run.recalibration_images == 0 and (run.train.epochs > 0 or statistics):
        outdated = (
            f"{run.train.epochs} epochs of training outdate" if run.train.epochs else "the checkpoint lacks some of"
        )
        raise ConfigError(
            f"supernet.recalibration.images is 0, but {outdated} the BatchNorm statistics; leave it null to estimate them again"
        )


def relayout(subnets: SubnetSet, task: Task) -> SubnetSet:
    """The same network and sub-networks, laid out for a task's image size and number of classes.

    Raises:
        ConfigError: the images have another number of channels.
    """
    _check_channels(subnets.spec, task.in_channels)
    spec = get_family(subnets.spec.family).for_task(subnets.spec, task)
    return replace(subnets, spec=replace(spec, norm=subnets.spec.norm))


def _check_channels(spec: SupernetSpec, in_channels: int) -> None:
    if spec.in_channels != in_channels:
        raise ConfigError(
            f"supernet.init_from: the network reads images of {spec.in_channels} channel(s), but the data has {in_channels}; "
            "choose another checkpoint or other data"
        )


def lay_out(
    model: str, task: Task, options: Mapping[str, Any], norm: str | None = None, start: StartWeights | None = None
) -> SubnetSet:
    """The sub-networks to train: those of a family, or with model `checkpoint` those of the start
    weights.

    Args:
        model: a family's registered name, or `checkpoint`.
        task: the task's classes and images.
        options: options of the family.
        norm: one of `dsnet.space.spec.NORMS`; None for the default of the family or the norm of the
            checkpoint.
        start: the start weights.

    Raises:
        ConfigError: the model or an option is unknown, the start weights are for images of another
            number of channels, or model `checkpoint` is used without a checkpoint, with options, or
            with a norm other than the checkpoint's.
    """
    if model != CHECKPOINT_MODEL:
        if start is not None:
            start.check_channels(task.in_channels)
        return layout(model, task, options, norm)
    if start is None:
        raise ConfigError("supernet.model is 'checkpoint', but supernet.init_from is not set; set it to a checkpoint")
    if not isinstance(start, Start):
        raise ConfigError(
            f"supernet.model is 'checkpoint', but {start.stem} holds the weights of a plain network; "
            "name the network itself, such as resnet50"
        )
    if options:
        raise ConfigError(
            f"supernet.options: model 'checkpoint' takes its network's options from the checkpoint; remove {', '.join(sorted(options))}"
        )
    subnets = relayout(start.subnets, task)
    if norm not in (None, subnets.spec.norm):
        raise ConfigError(
            f"supernet.train.bn is {norm!r}, but the network of {start.stem} was made with {subnets.spec.norm!r}; "
            "model 'checkpoint' cannot change that: choose a regime or bn with the same normalisation"
        )
    return subnets


def first_weights(subnets: SubnetSet, seed: int, start: StartWeights | None = None) -> tuple[Supernet, list[str]]:
    """The supernet with its initial weights, and the names of the tensors that do not come from
    `start`.

    Equal seeds and start weights give equal weights, on Ray workers and without Ray.

    Raises:
        CheckpointError: as `apply_start`.
    """
    supernet = rebuild(subnets, torch.Generator().manual_seed(derive_seed(seed, "weights")))
    return supernet, list(supernet.state_dict()) if start is None else start.apply(supernet)
