"""Run folders of the first release: settings that their sweep.yaml left to defaults whose values
have changed.

A run's sweep.yaml has every setting of its release. With today's defaults it would describe another
sweep, and `extend`, or a launch that continues the run, would train the supernet anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsnet.training.settings import PUBLISHED
from orchestration.config.presets import BUILT_IN_PRESETS
from orchestration.config.supernet import BootstrappingConfig

_CHANGED_REGIMES = (None, "ib", "ieb")
"""Values of supernet.regime whose number of random sub-networks has changed."""


def first_release_settings(written: Mapping[str, Any]) -> dict[str, Any]:
    """Settings to lay over a file so that it keeps its meaning; empty unless the first release
    wrote it out in full.

    Args:
        written: the file, as YAML gives it.
    """
    supernet = _section(written, "supernet")
    bootstrapping, train = _section(supernet, "bootstrapping"), _section(supernet, "train")
    if bootstrapping.keys() != BootstrappingConfig.model_fields.keys() - PUBLISHED.keys():
        return {}
    paper = BUILT_IN_PRESETS["paper"]["supernet"]
    settings: dict[str, Any] = {"bootstrapping": dict(PUBLISHED)}
    is_open = train.get("num_random") is None and bootstrapping["num_random"] is None
    if is_open and train.get("widths") != "all" and supernet.get("regime") in _CHANGED_REGIMES:
        settings["train"] = {"num_random": paper["train"]["num_random"]}
    return {"supernet": settings}


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = settings.get(name)
    return found if isinstance(found, Mapping) else {}
