"""Shapes in the signatures of dsnet: every public tensor and array has one, and wrong ones are
refused where shapes are checked."""

from __future__ import annotations

import ast
import builtins
import copy
import importlib
import pickle
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

import dsnet
from dsnet.deploy.materialize import materialize
from dsnet.families import create
from dsnet.network.layers import SlicedLinear
from dsnet.routing.calibration import calibrate
from dsnet.training.losses import soft_cross_entropy
from tests.dsnet.cases import task
from tests.dsnet.samples import random_table
from tests.shapes import CHECKED, names_shape, next_test, public, unchecked_shapes

WITHOUT_SHAPE = {
    "dsnet.routers.cascade.CascadeRouter.goes_on": "takes a tensor or an array, and returns the same kind",
    **{
        f"dsnet.training.workers.{workers}.average_gradients": "takes all parameters of a network"
        for workers in ("Workers", "SingleWorker", "DistributedWorkers")
    },
}
"""Public functions with a tensor or array of no named shape, with the reason."""

UNCHECKED = {"dsnet.routers.kinds.router_from_arrays": "its module needs no torch, so that it has no tensors to name"}
"""Public functions with shapes that the checks leave out, with the reason."""


def test_another_shape_number_of_axes_or_type_is_refused() -> None:
    logits, target = torch.zeros(4, 3), torch.full((4, 3), 1 / 3)
    assert soft_cross_entropy(logits, target) > 0
    for wrong in (target[:, :2], target[0], target.long(), target.numpy()):
        next_test()  # the number of checked calls is limited
        with pytest.raises(jaxtyping.TypeCheckError, match="'target'"):
            soft_cross_entropy(logits, wrong)  # type: ignore[arg-type]
    with pytest.raises(jaxtyping.TypeCheckError, match="'madds'"):
        calibrate(np.zeros((5, 3)), np.ones(2), 1.0)


def test_a_method_is_checked_behind_torchs_call_and_a_result_is_too(monkeypatch: pytest.MonkeyPatch) -> None:
    supernet = create("ds_tiny", task(image_size=8), {"num_routes": 3}, seed=0).eval()
    with pytest.raises(jaxtyping.TypeCheckError, match="'images'"):
        supernet(torch.zeros(3, 8, 8), supernet.subnets[0])
    layer = next(module for module in supernet.modules() if isinstance(module, SlicedLinear))
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: torch.zeros(2))
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        layer(torch.zeros(2, 4))


def test_checked_modules_are_copied_pickled_and_exported_as_before() -> None:
    supernet = create("ds_tiny", task(image_size=8), {"num_routes": 3}, seed=0).eval()
    images = torch.rand(4, 3, 8, 8)
    plain = materialize(supernet, supernet.subnets[1])
    expected = supernet(images, supernet.subnets[1])
    torch.testing.assert_close(copy.deepcopy(supernet)(images, supernet.subnets[1]), expected)
    program = torch.export.export(plain, (images,)).module()
    torch.testing.assert_close(program(images), expected)
    table = random_table()
    again = pickle.loads(pickle.dumps(table))  # noqa: S301 - our own
    assert np.array_equal(again.ce, table.ce)
    assert pickle.loads(pickle.dumps(soft_cross_entropy)) is soft_cross_entropy  # noqa: S301 - our own


def test_nothing_is_checked_where_the_product_shall_answer_itself() -> None:
    with unchecked_shapes(), pytest.raises(RuntimeError, match="size"):
        soft_cross_entropy(torch.zeros(4, 3), torch.zeros(4, 2))


class Names(dict[str, Any]):
    """The names of a module, and stand-ins for those that only type checkers see."""

    def __missing__(self, name: str) -> Any:
        if name == "Tensor":
            return torch.Tensor
        return next((getattr(module, name) for module in (jaxtyping, builtins) if hasattr(module, name)), object)


def annotations(module: Any) -> Iterator[tuple[str, Any]]:
    """(name, annotation) of all that public functions of a module take and return, and of the
    fields of its public classes; from its source, since the checks drop annotations without
    shapes."""
    names = Names(vars(module))
    for name, written in written_annotations(
        ast.parse(Path(module.__file__).read_text(encoding="utf-8")), module.__name__
    ):
        yield name, eval(ast.unparse(written), {}, names)  # noqa: S307 - our source


def written_annotations(owner: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, ast.expr]]:
    for node in owner.body:
        name = getattr(node, "name", "")
        if name.startswith("_") and not name.startswith("__"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from written_annotations(node, f"{prefix}.{name}")
        elif isinstance(node, ast.FunctionDef):
            arguments = [
                *node.args.posonlyargs,
                *node.args.args,
                *node.args.kwonlyargs,
                node.args.vararg,
                node.args.kwarg,
            ]
            written = [argument.annotation for argument in arguments if argument is not None] + [node.returns]
            yield from ((f"{prefix}.{name}", annotation) for annotation in written if annotation is not None)
        elif isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_"):
            yield f"{prefix}.{ast.unparse(node.target)}", node.annotation


PUBLIC = [
    found.name
    for found in pkgutil.walk_packages(dsnet.__path__, "dsnet.")
    if not any(part.startswith("_") for part in found.name.split(".")) and not found.name.startswith("dsnet.zoo.")
]
"""Public modules, but for the plain networks: their values are no tensors while they are traced."""


def bare(annotation: Any) -> bool:
    """Whether an annotation contains a tensor or an array without a shape."""
    if isinstance(annotation, list):
        return any(map(bare, annotation))
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return False
    origin = typing.get_origin(annotation) or annotation
    if isinstance(origin, type) and issubclass(origin, torch.Tensor | np.ndarray):
        return True
    if isinstance(annotation, typing.TypeVar):
        return any(map(bare, annotation.__constraints__))
    return any(map(bare, typing.get_args(annotation)))


def test_no_public_function_or_field_has_a_tensor_or_an_array_without_a_shape() -> None:
    found = [
        (name, annotation) for module in PUBLIC for name, annotation in annotations(importlib.import_module(module))
    ]
    assert {name for name, annotation in found if bare(annotation)} == WITHOUT_SHAPE.keys()
    assert sum(names_shape(annotation) for _, annotation in found) > 300, "the walk has found the signatures"


def test_every_public_function_with_a_shape_is_checked() -> None:
    expected = set()
    for module in map(importlib.import_module, PUBLIC):
        with_shape = {name for name, annotation in annotations(module) if names_shape(annotation)}
        functions = {name for name, _, _, value in public(module) if not isinstance(value, type)}
        expected |= with_shape & functions
    assert expected - CHECKED == UNCHECKED.keys()
    assert len(expected) > 150, "the walk has found the functions"
