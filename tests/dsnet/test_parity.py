"""Agreement with what the method's published code computes (shared/parity/README.md)."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsnet.cost import subnet_cost
from dsnet.families import Task, create
from dsnet.materialize import materialize
from dsnet.supernet import Supernet

FOLDER = Path(__file__).parents[2].parent / "shared" / "parity"
pytestmark = pytest.mark.skipif(
    not (FOLDER / "dsnet_mbnet_v1.json").is_file(), reason="the parity fixture is not beside this repository"
)


def recipe(salt: str, name: str, shape: list[int]) -> NDArray[np.float64]:
    """The fixture's random numbers: seeded by the tensor's name."""
    return np.random.default_rng(zlib.crc32(f"{salt}/{name}".encode())).standard_normal(shape)


def released_value(salt: str, name: str, shape: list[int]) -> Tensor:
    """A released weight, rebuilt by the recipe."""
    z = recipe(salt, name, shape)
    if len(shape) > 1:
        z = z * np.sqrt(2.0 / np.prod(shape[1:]))
    elif name.endswith("weight"):
        z = 1.0 + 0.1 * z
    else:
        z = 0.1 * z
    return torch.from_numpy(z.astype(np.float32))


def released_block(number: int) -> str:
    """The published name of our block `number`."""
    for stage, num_blocks in enumerate((1, 2, 2, 6, 2)):
        if number < num_blocks:
            return f"blocks.{stage}." + ("first_block" if number == 0 else f"residual_blocks.{number - 1}")
        number -= num_blocks
    raise AssertionError(f"DS-MBNet has 13 blocks; asked {number} beyond them")


PARTS = {
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


class Released:
    """The released checkpoint, read by our names."""

    def __init__(self) -> None:
        self.fixture: dict[str, Any] = json.loads((FOLDER / "dsnet_mbnet_v1.json").read_text())
        self.salt: str = self.fixture["recipe"]["salt"]
        self.shapes: Mapping[str, list[int]] = self.fixture["state_dict_shapes"]
        with np.load(FOLDER / "dsnet_mbnet_v1.npz") as stored:
            self.statistics = {name: stored[name] for name in stored.files}

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """The value of our parameter or buffer `name`."""
        module, _, leaf = name.rpartition(".")
        if leaf.startswith("updates_"):
            return like
        if module.endswith("norm"):
            return self._norm(self._published(module), leaf)
        published = self._published(name)
        return released_value(self.salt, published, self.shapes[published]).reshape(like.shape)

    def _published(self, name: str) -> str:
        if name.startswith("blocks."):
            _, number, part = name.split(".", 2)
            return f"{released_block(int(number))}.{PARTS[part]}"
        return {"stem.weight": "conv_stem.weight", "stem_norm": "bn1"}.get(name, name)

    def _norm(self, bank: str, leaf: str) -> Tensor:
        """The published bank is keyed by the layer's width; its last member holds the affine pair, of full length."""
        numbers = {
            int(name.split(".aux_bn.")[1].split(".")[0]) for name in self.shapes if name.startswith(f"{bank}.aux_bn.")
        }
        if leaf in ("weight", "bias"):
            name = f"{bank}.aux_bn.{max(numbers)}.{leaf}"
            return released_value(self.salt, name, self.shapes[name])
        kind = "running_mean" if leaf.startswith("mean_") else "running_var"
        width = int(leaf.rpartition("_")[2])
        fits = [name for n in sorted(numbers) if self.shapes[name := f"{bank}.aux_bn.{n}.{kind}"] == [width]]
        assert len(fits) == 1
        return torch.from_numpy(self.statistics[fits[0]])


@pytest.fixture(scope="module")
def released() -> Released:
    return Released()


@pytest.fixture(scope="module")
def supernet(released: Released) -> Supernet:
    net = create("ds_mbnet", Task(released.fixture["num_classes"], 3, 64))
    net.load_state_dict({name: released.tensor(name, value) for name, value in net.state_dict().items()})
    return net.eval()


@pytest.fixture(scope="module")
def images(released: Released) -> Tensor:
    return torch.from_numpy(recipe(released.salt, "input", released.fixture["input_shape"]).astype(np.float32))


def relative_difference(met: Tensor, expected: Any) -> float:
    wanted = torch.tensor(expected)
    return float((met - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("route", range(14))
def test_logits_of_every_sub_network_agree(supernet: Supernet, images: Tensor, released: Released, route: int) -> None:
    choice = released.fixture["choices"][route]
    assert choice["choice"] == route
    subnet = supernet.subnets[route]
    assert relative_difference(supernet(images, subnet), choice["logits"]) < 1e-3
    assert relative_difference(materialize(supernet, subnet, fold_bn=True)(images), choice["logits"]) < 1e-3
    assert subnet_cost(supernet.spec, subnet, 64).madds == choice["madds"]


@torch.no_grad()
def test_logits_of_the_largest_agree(supernet: Supernet, images: Tensor, released: Released) -> None:
    largest = released.fixture["largest"]
    assert relative_difference(supernet(images, supernet.subnets.largest), largest["logits"]) < 1e-3
    assert subnet_cost(supernet.spec, supernet.subnets.largest, 64).madds == largest["madds"]


@torch.no_grad()
def test_gate_hidden_vector_and_logits_agree(supernet: Supernet, images: Tensor, released: Released) -> None:
    hidden = supernet.trunk(images, supernet.subnets[0]).hidden
    assert relative_difference(hidden, released.fixture["gate_hidden_after_relu"]) < 1e-4
    name = "blocks.3.first_block.gate.gate.0.weight"
    head = released_value(released.salt, name, released.shapes[name]).flatten(1)
    assert relative_difference(hidden @ head.T, released.fixture["gate_logits"]) < 1e-4


@torch.no_grad()
def test_slicing_equals_the_published_masked_dynamic_forward(
    supernet: Supernet, images: Tensor, released: Released
) -> None:
    for route, logits in released.fixture["dynamic_mode_forced_to_choice"].items():
        assert relative_difference(supernet(images, supernet.subnets[int(route)]), logits) < 1e-3


def test_every_released_tensor_is_used(supernet: Supernet, released: Released) -> None:
    num_values = sum(p.numel() for p in supernet.parameters())
    num_released = sum(
        int(np.prod(shape)) for name, shape in released.shapes.items() if name.endswith(("weight", "bias"))
    )
    assert num_released == num_values + 264  # the slimming head of 4 routes
