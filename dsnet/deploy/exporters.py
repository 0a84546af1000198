"""File formats in which a gate can be exported, by name. Needs no torch.

The bundle is always written, and every other format is made from it. A new format is one call of
`register`, from inside or outside of this package (`dsnet.plugins`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from dsnet.errors import ConfigError
from dsnet.plugins import load_plugins
from dsnet.wording import way_out

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


_EXPORTERS: dict[str, Exporter] = {}


def register(exporter: Exporter) -> Exporter:
    """Register an exporter under its name; returns it.

    Raises:
        ValueError: the name is taken.
    """
    if exporter.name == BUNDLE or _EXPORTERS.setdefault(exporter.name, exporter) is not exporter:
        raise ValueError(f"there is an exporter {exporter.name!r} already; choose another name")
    return exporter


class _Onnx:
    """ONNX graphs of all segments, for other engines than torch (`dsnet.deploy.onnx_files`)."""

    name = "onnx"

    def write(self, bundle: Path, folder: Path) -> None:
        """See `Exporter.write`."""
        from dsnet.deploy.bundle import write_onnx

        write_onnx(bundle, folder)


register(_Onnx())


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
