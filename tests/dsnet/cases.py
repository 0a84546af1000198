"""Test cases of every family: its options, ways to normalise, and sets of sub-networks that it does
not make itself.

Every registered family is tested with its small (or default) options; `FURTHER_OPTIONS` holds
further ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsnet.families import family_names, layout, rebuild
from dsnet.image_size import ImageSize, height_and_width, normal_size
from dsnet.network.layers import BatchNormBank
from dsnet.network.supernet import Supernet
from dsnet.space.entry_gate import with_entry_gate
from dsnet.space.spec import NORMS, Subnet
from dsnet.space.subnet_set import SubnetSet
from dsnet.zoo import ZOO
from tests.dsnet.samples import SMALL_OPTIONS, shaken, task

FURTHER_OPTIONS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "ds_mbnet": {
        "own widths": {"width": 0.25, "gated_widths": [[37, 50], [41, 90]]},
        "kernels": {"width": 0.25, "num_routes": 2, "kernels": [3, 5], "combine": "all"},
    },
    "ds_tiny": {
        "own widths": {"gated_widths": [[7, 11, 30], [5, 6, 64]]},
        "kernels": {"num_routes": 3, "kernels": [1, 3, 5]},
    },
    "ds_resnet": {
        "padded": {"depth": 14, "width": 0.5, "ratios": [0.5, 1.0], "streams": "padded"},
        "bottleneck": {
            "depth": 50,
            "width": 0.125,
            "ratios": [0.5, 1.0],
            "paths": [[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 0]],
        },
        "plain": {"depth": 8, "width": 0.5, "ratios": [0.5, 1.0], "projection": "needed", "attention": False},
        "all paths": {"depth": 8, "width": 0.5, "ratios": [0.5, 1.0], "paths": "all", "stem": "large"},
    },
    "ds_vit": {
        "all paths": {
            "patch": 4,
            "dim": 16,
            "heads": 4,
            "depth": 5,
            "gates": [1, 3],
            "ratios": [0.5, 1.0],
            "paths": "all",
        },
        "narrow trunk": {
            "patch": 4,
            "dim": 24,
            "heads": 2,
            "depth": 3,
            "gates": [1],
            "ratios": [0.5, 1.0],
            "trunk": 0.5,
            "slices": ["embed", "mlp"],
            "route_embed": [5, 17],
        },
    },
    "tests.dsnet.nets:Residual": {
        "inner gate": {"step": 2, "gates": ["pool"]},
        "two gates": {"step": 2, "ratios": [0.5, 1.0], "gates": ["pool", "entry"], "paths": "all"},
    },
}


HAND_WRITTEN = tuple(name for name in family_names() if name not in ZOO)
"""The families that are not traced; one that registers is tested without further ado."""
TRACED = ("tests.dsnet.nets:Residual", "tests.dsnet.nets:Dense", "tests.dsnet.nets:Pinned")
"""Small networks of family `traced`; those of the zoo have tests of their own."""
NEXT = "tests.dsnet.nets:ConvNext"
"""A traced network with norms over its channels, and without BatchNorm."""

KERNELS = "tests.dsnet.nets:Kernels"
"""A traced network with depthwise kernels that can be sliced."""
KERNEL_OPTIONS: Mapping[str, Any] = {"step": 2, "ratios": [0.5, 1.0], "kernels": [1, 3, 5], "combine": "all"}
"""Options for it."""

FAMILIES = (*HAND_WRITTEN, TRACED[0])
"""Families where one traced network stands for all."""
TRANSFORMER = "ds_vit"
"""A family without BatchNorm, whose networks have positions for images of one size."""
BANKED_FAMILIES = tuple(family for family in FAMILIES if family != TRANSFORMER)
"""The families whose networks have BatchNorm."""


OBLONG = (13, 18)
"""Height and width of images that are no squares."""


@dataclass(frozen=True)
class Case:
    """One supernet to test."""

    name: str
    family: str
    options: Mapping[str, Any]
    norm: str | None
    """None: the family's choice."""
    is_handmade: bool = False
    """Members as a search might leave them, instead of the family's own."""
    is_early: bool = False
    """Members that differ before the first gate of the family."""

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"

    def runs_at(self, size: ImageSize, built_for: ImageSize = 16) -> ImageSize:
        """`size`, or the size for which the network was built where it runs on no other."""
        return built_for if self.family == TRANSFORMER else size

    def takes(self, size: ImageSize) -> ImageSize:
        """`size`, or the next one for which the network can be built: its patches have 4 pixels."""
        if self.family != TRANSFORMER:
            return size
        height, width = (-(-side // 4) * 4 for side in height_and_width(size))
        return normal_size((height, width))

    def subnets(self, num_classes: int = 10, image_size: ImageSize = 16) -> SubnetSet:
        """Its sub-networks."""
        own = layout(self.family, task(num_classes, image_size), self.options, self.norm)
        own = neighbours(own) if self.is_handmade else own
        return with_entry_gate(early(own)) if self.is_early else own

    def supernet(self, seed: int = 0, num_classes: int = 10, image_size: ImageSize = 16) -> Supernet:
        """Its supernet in eval mode, with every parameter and statistic away from its initial
        value."""
        generator = torch.Generator().manual_seed(seed)
        supernet = shaken(rebuild(self.subnets(num_classes, image_size), generator), seed)
        with torch.no_grad():
            for parameter in supernet.parameters():
                if not parameter.any():
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return supernet.eval()


def neighbours(own: SubnetSet) -> SubnetSet:
    """A member of odd widths, and others that differ from it in a single group: prefixes are shared
    up to anywhere. In it all blocks run, so that each group matters.

    Streams that several layers write get writers of different widths, and widths that a family ties
    become untied.
    """
    spec = own.spec
    shared = spec.num_prefix_groups(0)
    free = [group for group in range(shared, len(spec.groups)) if not spec.groups[group].is_fixed]
    depths = [group for group in free if spec.groups[group].kind == "depth"]
    base = tuple(
        (own.prefix_upto(0) + spec.max_widths[shared:])[number]
        if number not in free or number in depths
        else next(choice for choice in group.choices if choice >= group.max_width // 2)
        if group.kind == "kernel"
        else group.max_width // 2 + 1
        for number, group in enumerate(spec.groups)
    )
    members = [Subnet("base", base)]
    for group in sorted({*free[:3], *free[-2:]}):
        widths = list(base)
        widths[group] = 1 if group in depths else spec.groups[group].max_width
        members.append(Subnet(f"wide-{group}", tuple(widths)))
    return SubnetSet(spec, tuple(members), Subnet("largest", spec.max_widths))


def early(own: SubnetSet) -> SubnetSet:
    """The members, and the first of them with fewer channels before the first gate."""
    first = own[0]
    return SubnetSet(own.spec, (Subnet("early", (first.widths[0] - 2, *first.widths[1:])), *own.members), own.teacher)


_NORMS_OF = {
    "ds_mbnet": ("private_stats", "private_affine"),
    TRANSFORMER: ("private_stats",),
    TRACED[1]: ("private_stats", "group_norm"),
    TRACED[2]: (),
}
"""Norms of the networks that differ from another one in their channels, not in their norms, and of
those without BatchNorm."""


def _cases() -> list[Case]:
    cases = []
    for family in (*HAND_WRITTEN, *TRACED):
        small = SMALL_OPTIONS.get(family, {})
        cases += [Case(norm, family, small, norm) for norm in _NORMS_OF.get(family, NORMS)]
        cases.append(Case("handmade private_affine", family, small, "private_affine", is_handmade=True))
        for name, options in FURTHER_OPTIONS.get(family, {}).items():
            cases.append(Case(name, family, options, None))
    kernels = FURTHER_OPTIONS["ds_tiny"]["kernels"]
    cases.append(Case("kernels handmade private_affine", "ds_tiny", kernels, "private_affine", is_handmade=True))
    cases.append(Case("kernels", KERNELS, KERNEL_OPTIONS, None))
    inner = {**KERNEL_OPTIONS, "kernels": [3, 5], "combine": "tied", "gates": ["stem"]}
    cases.append(Case("kernels behind a gate", KERNELS, inner, "recalibrate"))
    cases.append(Case("kernels handmade private_affine", KERNELS, KERNEL_OPTIONS, "private_affine", is_handmade=True))
    ids = {"step": 2, "streams": "ids"}
    cases.append(
        Case("ids handmade private_affine", "tests.dsnet.nets:Stream", ids, "private_affine", is_handmade=True)
    )
    cases.append(Case("inner gate", NEXT, {"step": 2, "ratios": [0.5, 1.0], "gates": ["features.1"]}, None))
    cases.append(Case("ids handmade", NEXT, ids, None, is_handmade=True))
    cases.append(Case("early", "ds_resnet", SMALL_OPTIONS["ds_resnet"], None, is_early=True))
    for name, bottleneck in (("padded", {}), ("padded bottleneck", FURTHER_OPTIONS["ds_resnet"]["bottleneck"])):
        options = {**FURTHER_OPTIONS["ds_resnet"]["padded"], **bottleneck}
        cases.append(Case(f"{name} handmade private_affine", "ds_resnet", options, "private_affine", is_handmade=True))
    return cases


CASES = _cases()
ONE_NORM_CASES = list({(case.family, str(case.options), case.is_handmade): case for case in CASES}.values())
"""One case for each network and set of sub-networks, for properties that no norm changes, such as
MAdds."""
BANKED_CASES = [
    case for case in CASES if case.family not in (NEXT, TRANSFORMER) and case.subnets().spec.norm != "group_norm"
]
"""The cases whose norm keeps statistics."""


class NormKeys:
    """Context that records which sets of statistics, of which banks, the supernet's calls read."""

    def __init__(self, supernet: Supernet) -> None:
        self.used: dict[str, set[tuple[int, ...]]] = {}
        self._banks = {name: part for name, part in supernet.named_modules() if isinstance(part, BatchNormBank)}
        self._handles: list[Any] = []

    def __enter__(self) -> NormKeys:
        for name, bank in self._banks.items():
            self._handles.append(bank.register_forward_pre_hook(self._note(name, bank)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str, bank: BatchNormBank) -> Any:
        def note(_: nn.Module, args: tuple[Tensor, tuple[int, ...]]) -> None:
            self.used.setdefault(name, set()).add(bank.key_of(args[1]))

        return note

    def buffers(self) -> set[str]:
        """The names of the buffers of the recorded sets."""
        return {
            f"{bank}.{part}_{'_'.join(map(str, key))}"
            for bank, keys in self.used.items()
            for key in keys
            for part in ("mean", "var", "updates")
        }
