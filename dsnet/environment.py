"""Facts about the environment of a run: versions of packages, and the device to use."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

from dsnet.errors import PreflightError
from dsnet.settings import Device


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of the packages, without importing any of them."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def resolve_device(name: Device) -> Device:
    """The device `cpu` or `cuda` for a name; `auto` gives cuda if it is available.

    Raises:
        PreflightError: cuda is requested but not available.
    """
    import torch  # imported late: `installed_versions` does not need it

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise PreflightError("device is cuda, but torch sees no GPU here; use cpu or auto")
    return name
