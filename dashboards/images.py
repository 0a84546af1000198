"""Writing of figures to files: HTML and JSON, and with kaleido and Chromium also PNG and SVG."""

from __future__ import annotations

import html
import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Final

import plotly.graph_objects as go

from dashboards.page import figure_json, figure_page
from dsnet.errors import ConfigError, PreflightError

SUFFIXES: Final = (".html", ".json", ".png", ".svg")
MINUS_SIGN: Final = "\N{MINUS SIGN}".encode()
"""The minus of Plotly's axes; texts have the plain hyphen-minus everywhere."""
WAY_OUT: Final = "install kaleido (pip install kaleido) and Chromium or Chrome, or write .html or .json"


def write_figure(figure: go.Figure, path: str | Path, width_px: int = 1100) -> Path:
    """Write a figure atomically, in the format given by the suffix of `path`.

    Args:
        figure: a Plotly figure.
        path: file name with the suffix .html (offline, includes plotly.js), .json, .png (two pixels
            per unit) or .svg.
        width_px: width of .png and .svg; the height is the figure's own.

    Raises:
        ConfigError: the suffix is another one.
        PreflightError: kaleido or Chromium is missing for .png or .svg, or the folder cannot be
            written.
    """
    path = Path(path)
    content = _content(figure, path, width_px)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise PreflightError(f"cannot write the figure {path}: {error.strerror}; choose a writable folder") from error
    return path


def _content(figure: go.Figure, path: Path, width_px: int) -> bytes:
    suffix = path.suffix.lower()
    if suffix == ".html":
        return figure_page(figure, html.unescape(figure.layout.title.text or path.stem)).encode("utf-8")
    if suffix == ".json":
        return figure_json(figure).encode("utf-8")
    if suffix in SUFFIXES:
        return _image(figure, suffix.removeprefix("."), width_px)
    raise _unknown_suffix(path)


def check_suffix(path: Path) -> None:
    """Check the suffix of a file name before anything is drawn.

    Raises:
        ConfigError: no format has this suffix.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise _unknown_suffix(path)


def _unknown_suffix(path: Path) -> ConfigError:
    return ConfigError(f"cannot write the figure {path.name!r}: its suffix must be one of {', '.join(SUFFIXES)}")


def _image(figure: go.Figure, kind: str, width_px: int) -> bytes:
    try:
        kaleido_error = import_module("kaleido.errors").KaleidoError
    except (ImportError, AttributeError) as error:
        raise PreflightError(f"a figure as .{kind} needs the package kaleido >= 1; {WAY_OUT}") from error
    try:
        content = bytes(figure.to_image(format=kind, width=width_px, scale=2 if kind == "png" else 1))
    except (RuntimeError, ValueError, OSError, kaleido_error) as error:
        reason = next((line.strip(" .") for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PreflightError(f"kaleido could not draw the figure as .{kind}: {reason}; {WAY_OUT}") from error
    return content.replace(MINUS_SIGN, b"-") if kind == "svg" else content
