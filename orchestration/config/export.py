"""The section `export`: which gates and static sub-networks become bundles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import (
    AfterValidator,
    Field,
    StringConstraints,
)

from dsnet.deploy.exporters import BUNDLE, check_format
from dsnet.errors import ConfigError
from dsnet.wording import did_you_mean
from orchestration.config.section import NAME_PATTERN, Section, Text
from search.front.pareto import parse_pick

MEMBERS, FRONT = "members", "front"
"""Picks of one bundle with several operating points: all static sub-networks, or all gates of the
front."""


def gate_picks(picks: Sequence[str]) -> tuple[str, ...]:
    """The picks that select gates, for a bundle each."""
    return tuple(text for text in picks if text.strip() not in (MEMBERS, FRONT))


def point_sets(picks: Sequence[str]) -> tuple[str, ...]:
    """The picks of bundles with several operating points, each once."""
    return tuple(dict.fromkeys(text.strip() for text in picks if text.strip() in (MEMBERS, FRONT)))


def check_pick(text: str) -> str:
    """A pick as it was written.

    Raises:
        ValueError: it cannot be read.
    """
    if point_sets([text]):
        return text
    try:
        pick = parse_pick(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    if pick.kind == "name" and not re.fullmatch(r"trial-\d{4,}", text.strip()):
        hint = did_you_mean(text.strip(), ["knee", "all", MEMBERS, FRONT]) or ";"
        raise ValueError(
            f'pick {text!r}: neither a keyword nor trial-NNNN{hint} e.g. knee, all, members, front, trial-0042, "max:top1"'
        )
    return text


def _format(name: str) -> str:
    try:
        return check_format(name)
    except ConfigError as error:
        raise ValueError(str(error)) from error


def registered_name(text: str) -> str:
    """The name, if MLflow's registry and our searches in it take it.

    Raises:
        ConfigError: they do not.
    """
    if not re.fullmatch(NAME_PATTERN, text):
        raise ConfigError(
            f"{text!r} cannot name a registered model; use 1 to 64 letters, digits, '.', '_' or '-', not starting with '.'"
        )
    return text


class ExportConfig(Section):
    """Bundles that are exported at the end of a launch."""

    picks: Annotated[tuple[Annotated[Text, AfterValidator(check_pick)], ...], Field(strict=False, min_length=1)] = (
        "knee",
    )
    """Gates to export, a bundle each: knee, all, trial-0042, "max:top1 where madds_m<=200", ... One
    bundle of several operating points: members (all static sub-networks), front (all its gates)."""
    formats: Annotated[tuple[Annotated[Text, AfterValidator(_format)], ...], Field(strict=False, min_length=1)] = (
        BUNDLE,
    )
    """Formats of each gate. The bundle is always written; every other format is a folder of its
    name inside the bundle."""
    register_as: Annotated[str, StringConstraints(pattern=NAME_PATTERN)] | None = None
    """Name of a registered model of MLflow; every exported bundle becomes a version of it. null =
    bundles are logged models of the run, but are not registered."""
