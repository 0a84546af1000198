"""Checks of tensor shapes and types in the test process: public functions, methods and dataclasses
of dsnet refuse tensors and arrays that differ from their annotations.

`jaxtyping.install_import_hook` would wrap every function, those without tensors too, and check
every annotation. Here only the annotations that name shapes are checked, in the first calls of each
test.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import inspect
import sys
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import FunctionType, ModuleType
from typing import Any

import jaxtyping
import torch
from beartype import beartype

CALLS_PER_TEST = 1
"""Number of calls of a function that are checked in each test; all of them would cost tests that
run many layers half of their time."""
CHECKED: set[str] = set()
"""Names of the functions that are checked, with their modules."""
_CALLS: Counter[str] = Counter()
"""Checked calls of each function in the current test."""


def check_shapes_of(package: str) -> None:
    """Check the modules of a package that are imported from now on."""
    sys.meta_path.insert(0, _Finder(package))


def next_test() -> None:
    """Check the first calls of every function again."""
    _CALLS.clear()


class _Finder(importlib.machinery.PathFinder):
    """Finds the modules of one package, and adds the checks of shapes to them."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(  # type: ignore[override]  # the base class has it as a class method
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != self._package:
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs a module, then wraps what it defines."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for name, owner, attribute, value in list(public(module)):
            checked = _checked(name, value, module)
            if checked is not value:
                setattr(owner, attribute, checked)


def public(owner: Any, home: str | None = None, prefix: str = "") -> Iterator[tuple[str, Any, str, Any]]:
    """The public functions and classes of a module, and those of its public classes, as (name
    with its module, owner, attribute, value)."""
    home, prefix = home or owner.__name__, prefix or owner.__name__
    for attribute, value in list(vars(owner).items()):
        is_special = attribute.startswith("__") and isinstance(owner, type)
        if attribute.startswith("_") and not is_special:
            continue
        name = f"{prefix}.{attribute}"
        if isinstance(value, type):
            if value.__module__ == home and value.__qualname__.rpartition(".")[2] == attribute:
                yield name, owner, attribute, value
                yield from public(value, home, name)
        elif any(function.__module__ == home for function in functions_of(value)):
            yield name, owner, attribute, value


def functions_of(value: Any) -> list[FunctionType]:
    """The functions behind an attribute, below their decorators."""
    if isinstance(value, property):
        found = [value.fget, value.fset]
    elif isinstance(value, cached_property):
        found = [value.func]
    else:
        found = [getattr(value, "__func__", value)]
    inner = [inspect.unwrap(function) for function in found if callable(function)]
    return [function for function in inner if isinstance(function, FunctionType)]


def evaluated(annotation: Any, module: ModuleType) -> Any:
    """An annotation as an object; a string is evaluated in the names of its module, and in torch's
    where the module imports them for type checkers alone."""
    names = {"torch": torch, "Tensor": torch.Tensor, **vars(module)}
    return eval(annotation, names) if isinstance(annotation, str) else annotation  # noqa: S307 - our source


def names_shape(annotation: Any) -> bool:
    """Whether an evaluated annotation, or a part of it, is a type of jaxtyping."""
    if isinstance(annotation, list):  # the arguments of a callable
        return any(map(names_shape, annotation))
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(names_shape, typing.get_args(annotation)))


def _shapes(annotations: dict[str, Any], module: ModuleType) -> dict[str, Any]:
    """The annotations that name shapes, evaluated; others may use names of type checkers alone."""
    found = {}
    for name, annotation in annotations.items():
        try:
            value = evaluated(annotation, module)
        except NameError:
            continue
        if names_shape(value):
            found[name] = value
    return found


def _checked(name: str, value: Any, module: ModuleType) -> Any:
    """A replacement of `value` that checks shapes; `value` itself where it names none."""
    if isinstance(value, type):
        if dataclasses.is_dataclass(value) and "__init__" in vars(value):
            value.__init__ = _wrapped(f"{name}.__init__", value.__init__, module)  # type: ignore[misc]
        return value
    wrap = functools.partial(_wrapped, name, module=module)
    if isinstance(value, property):
        return property(wrap(value.fget), value.fset, value.fdel, value.__doc__) if value.fget else value
    if isinstance(value, cached_property):
        value.func = wrap(value.func)
        return value
    if isinstance(value, classmethod | staticmethod):
        return type(value)(wrap(value.__func__))
    return wrap(value)


def _wrapped(name: str, function: Callable[..., Any], module: ModuleType) -> Callable[..., Any]:
    """The function with a check of its arguments and its result."""
    inner = inspect.unwrap(function)
    if not isinstance(inner, FunctionType) or hasattr(function, "__checks_shapes__"):
        return function
    shapes = _shapes(inspect.get_annotations(inner), module)
    if not shapes:
        return function
    # Not in a variable of the function below, because a trace would have to wrap that.
    key = len(_CHECKS)
    _CHECKS.append(_Checks(name, function, inner, shapes))

    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or _CALLS[name] >= CALLS_PER_TEST:  # a trace is of the product alone
            return function(*arguments, **options)
        _CALLS[name] += 1
        return _CHECKS[key].function(*arguments, **options)

    CHECKED.add(name)
    checked.__checks_shapes__ = True  # type: ignore[attr-defined]
    return checked


_CHECKS: list[_Checks] = []


@dataclasses.dataclass(frozen=True)
class _Checks:
    """A function with its shapes; the check is made at the first call, because making it is
    slow."""

    name: str
    unchecked: Callable[..., Any]
    inner: FunctionType
    """The function that has the annotations, below the decorators."""
    shapes: dict[str, Any]

    @cached_property
    def function(self) -> Callable[..., Any]:
        self.inner.__annotations__ = self.shapes  # the others are not read in this process
        return jaxtyping.jaxtyped(self.unchecked, typechecker=beartype)


@contextmanager
def unchecked_shapes() -> Iterator[None]:
    """Context without these checks, for tests of what the product itself says about a wrong
    shape."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
