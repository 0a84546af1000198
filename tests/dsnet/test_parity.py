"""Agreement with the results of the method's published code (docs/methods.md, section 2)."""

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

from dsnet.deploy.materialize import materialize
from dsnet.network.supernet import Supernet
from dsnet.routers.base import Evidence
from dsnet.space.cost import subnet_cost
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.compat import load_dsnet_checkpoint, load_dsnet_gate
from dsnet.stored.compat.dsnet_release import HEAD, published_names

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


class Released:
    """The released checkpoint, rebuilt from the fixture under its published names."""

    def __init__(self) -> None:
        self.fixture: dict[str, Any] = json.loads((FOLDER / "dsnet_mbnet_v1.json").read_text())
        self.salt: str = self.fixture["recipe"]["salt"]
        self.shapes: Mapping[str, list[int]] = self.fixture["state_dict_shapes"]
        with np.load(FOLDER / "dsnet_mbnet_v1.npz") as stored:
            self.statistics = {name: stored[name] for name in stored.files}
        self.state_dict = {name: self._value(name) for name in self.shapes}

    def _value(self, name: str) -> Tensor:
        if name in self.statistics:
            return torch.from_numpy(self.statistics[name])
        if name.endswith("num_batches_tracked"):
            return torch.tensor(zlib.crc32(name.encode()) % 1000)
        return released_value(self.salt, name, self.shapes[name])


@pytest.fixture(scope="module")
def released() -> Released:
    return Released()


@pytest.fixture(scope="module")
def loaded(released: Released) -> tuple[Supernet, SubnetSet]:
    return load_dsnet_checkpoint(released.state_dict, released.fixture["num_classes"], image_size=64)


@pytest.fixture(scope="module")
def supernet(loaded: tuple[Supernet, SubnetSet]) -> Supernet:
    return loaded[0]


@pytest.fixture(scope="module")
def subnets(loaded: tuple[Supernet, SubnetSet]) -> SubnetSet:
    return loaded[1]


@pytest.fixture(scope="module")
def images(released: Released) -> Tensor:
    return torch.from_numpy(recipe(released.salt, "input", released.fixture["input_shape"]).astype(np.float32))


def relative_difference(met: Tensor, expected: Any) -> float:
    wanted = torch.tensor(expected)
    return float((met - wanted).abs().max() / wanted.abs().max())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("route", range(14))
def test_logits_of_every_sub_network_agree(
    supernet: Supernet, subnets: SubnetSet, images: Tensor, released: Released, route: int
) -> None:
    choice = released.fixture["choices"][route]
    assert choice["choice"] == route
    subnet = subnets[route]
    assert relative_difference(supernet(images, subnet), choice["logits"]) < 1e-3
    assert relative_difference(materialize(supernet, subnet, fold_bn=True)(images), choice["logits"]) < 1e-3
    assert subnet_cost(supernet.spec, subnet, 64).madds == choice["madds"]


@torch.no_grad()
def test_logits_of_the_largest_agree(
    supernet: Supernet, subnets: SubnetSet, images: Tensor, released: Released
) -> None:
    largest = released.fixture["largest"]
    assert relative_difference(supernet(images, subnets.largest), largest["logits"]) < 1e-3
    assert subnet_cost(supernet.spec, subnets.largest, 64).madds == largest["madds"]


@torch.no_grad()
def test_gate_hidden_vector_and_logits_agree(
    supernet: Supernet, subnets: SubnetSet, images: Tensor, released: Released
) -> None:
    hidden = supernet.trunk(images, subnets[0]).hidden
    assert relative_difference(hidden, released.fixture["gate_hidden_after_relu"]) < 1e-4
    gate = load_dsnet_gate(released.state_dict)
    assert gate.routes == (0, 1, 2, 3)
    assert relative_difference(gate.scores(hidden), released.fixture["gate_logits"]) < 1e-4
    wanted = torch.tensor(released.fixture["gate_logits"])
    assert torch.equal(gate.step(Evidence({"hidden": hidden}, len(hidden)), ()), wanted.argmax(1))


@torch.no_grad()
def test_slicing_equals_the_published_masked_dynamic_forward(
    supernet: Supernet, subnets: SubnetSet, images: Tensor, released: Released
) -> None:
    for route, logits in released.fixture["dynamic_mode_forced_to_choice"].items():
        assert relative_difference(supernet(images, subnets[int(route)]), logits) < 1e-3


def test_every_released_tensor_is_used(supernet: Supernet, released: Released) -> None:
    num_values = sum(p.numel() for p in supernet.parameters())
    num_released = sum(
        int(np.prod(shape)) for name, shape in released.shapes.items() if name.endswith(("weight", "bias"))
    )
    assert num_released == num_values + 264  # the slimming head of 4 routes
    assert {*published_names(supernet).values(), HEAD} == set(released.shapes)
