"""The section `export`: which gates of the front become bundles."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import (
    AfterValidator,
    Field,
)

from dsnet.deploy.exporters import BUNDLE, check_format
from dsnet.errors import ConfigError
from dsnet.wording import did_you_mean
from orchestration.config.section import Section, Text
from search.front.pareto import parse_pick


def _pick(text: str) -> str:
    try:
        pick = parse_pick(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    if pick.kind == "name" and not re.fullmatch(r"trial-\d{4,}", text.strip()):
        hint = did_you_mean(text, ["knee", "all"])
        raise ValueError(
            f'pick {text!r}: neither a keyword nor trial-NNNN{hint}; e.g. knee, all, trial-0042, "max:top1"'
        )
    return text


def _format(name: str) -> str:
    try:
        return check_format(name)
    except ConfigError as error:
        raise ValueError(str(error)) from error


class ExportConfig(Section):
    """Bundles that are exported at the end of a launch."""

    picks: Annotated[tuple[Annotated[Text, AfterValidator(_pick)], ...], Field(strict=False, min_length=1)] = ("knee",)
    """Gates to export: knee, all, trial-0042, "max:top1 where madds_m<=200", ...; each gate once.
    """
    """Points of the front, as --pick of `dsnet-orch export` takes them."""
    formats: Annotated[tuple[Annotated[Text, AfterValidator(_format)], ...], Field(strict=False, min_length=1)] = (
        BUNDLE,
    )
    """Formats of each gate. The bundle is always written; every other format is a folder of its
    name inside the bundle."""
