"""File formats in which a gate can be exported, by name. Needs no torch.

The bundle is always written, and every other format is made from it. A new format is one call of
`register`, from inside or outside of this package (`dsnet.plugins`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dsnet.errors import ConfigError
from dsnet.plugins import load_plugins
from dsnet.wording import way_out

if TYPE_CHECKING:
    from dsnet.data.tensors import TensorData

BUNDLE = "bundle"
"""The format that `dsnet.load_bundle` reads."""


class Exporter(Protocol):
    """Writes a gate in one format."""

    @property
    def name(self) -> str:
        """Its name in `export.formats`, and the folder in the bundle that it fills."""
        ...

    def write(self, bundle: Path, folder: Path) -> None:
        """Write a bundle in this format.

        Args:
            bundle: the bundle's folder, complete.
            folder: empty, in the bundle's folder; receives the files.
        """
        ...


@runtime_checkable
class CheckedExporter(Exporter, Protocol):
    """An exporter that can check what it has written."""

    def check(self, bundle: Path, folder: Path) -> int:
        """Run the bundle's examples with the files in `folder`; returns their number.

        Raises:
            VerificationError: the files do not give what the bundle gives.
        """
        ...


@runtime_checkable
class DataExporter(Exporter, Protocol):
    """An exporter that needs images of the run, such as for calibration; `write_with` is called in
    place of `write`."""

    def write_with(self, bundle: Path, folder: Path, data: TensorData) -> None:
        """Write a bundle in this format.

        Args:
            bundle: the bundle's folder, complete.
            folder: empty, in the bundle's folder; receives the files.
            data: the run's images without the test split.
        """
        ...


_EXPORTERS: dict[str, Exporter] = {}


def register(exporter: Exporter) -> Exporter:
    """Register an exporter under its name; returns it.

    Raises:
        ValueError: the name is taken.
    """
    if exporter.name == BUNDLE or _EXPORTERS.setdefault(exporter.name, exporter) is not exporter:
        raise ValueError(f"there is an exporter {exporter.name!r} already; choose another name")
    return exporter


@dataclass(frozen=True)
class BuiltIn:
    """A format of ours, whose functions are imported when they are needed."""

    name: str
    functions: str
    """`write` and `check` are the functions `write_NAME` and `check_NAME` of a module, written
    `module:NAME`."""

    def write(self, bundle: Path, folder: Path) -> None:
        """See `Exporter.write`."""
        self._function("write")(bundle, folder)

    def check(self, bundle: Path, folder: Path) -> int:
        """See `CheckedExporter.check`."""
        count: int = self._function("check")(bundle, folder)
        return count

    def _function(self, kind: str) -> Callable[..., Any]:
        module, _, name = self.functions.partition(":")
        function: Callable[..., Any] = getattr(import_module(module), f"{kind}_{name}")
        return function


@dataclass(frozen=True)
class BuiltInWithData(BuiltIn):
    """A format of ours that needs images of the run; `write_NAME` takes them as its third
    argument."""

    def write(self, bundle: Path, folder: Path) -> None:
        """Refuse: the images are missing.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"format {self.name} needs images of the run: write it with dsnet-orch export RUN --format {self.name}"
        )

    def write_with(self, bundle: Path, folder: Path, data: TensorData) -> None:
        """See `DataExporter.write_with`."""
        self._function("write")(bundle, folder, data)


for _format, _functions in (
    ("onnx", "dsnet.deploy.bundle:onnx"),
    ("onnx_single", "dsnet.deploy.further_formats:single"),
    ("onnx_photo", "dsnet.deploy.further_formats:photo"),
    ("torch_export", "dsnet.deploy.further_formats:program"),
    ("static", "dsnet.deploy.further_formats:static"),
):
    register(BuiltIn(_format, _functions))
register(BuiltInWithData("onnx_int8", "dsnet.deploy.int8:int8"))


def exporters() -> Mapping[str, Exporter]:
    """All exporters by name; the bundle itself needs none."""
    load_plugins()
    return _EXPORTERS


def format_names() -> tuple[str, ...]:
    """Names that `export.formats` accepts: the bundle and every exporter."""
    return (BUNDLE, *exporters())


def check_format(name: str) -> str:
    """The name, if there is such a format.

    Raises:
        ConfigError: there is none.
    """
    if name not in format_names():
        raise ConfigError(f"unknown format {name!r}{way_out(name, format_names())}")
    return name
