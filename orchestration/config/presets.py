"""Presets that are available to every sweep file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

_PAPER: Mapping[str, Any] = {
    "data": {"augment": {"randaugment_ops": 2, "randaugment_magnitude": 9.0}},
    "supernet": {
        "regime": "ib",
        "train": {
            "widths": None,
            "num_random": 2,
            "teacher": None,
            "epochs": 150,
            "batch_size": 512,
            "optimizer": "sgd",
            "lr": 0.08,
            "schedule": "cosine",
            "momentum": 0.9,
            "weight_decay": 1.0e-4,
            "warmup_epochs": 5.0,
            "label_smoothing": 0.1,
        },
        "bootstrapping": {
            "mode": None,
            "num_random": None,
            "ema_decay": 0.997,
            "ema_warmup": False,
            "soft_ramp_epochs": 0.0,
            "trust": "full",
            "largest_first": 0.0,
        },
        "recalibration": {"images": None},
    },
    "gate": {
        "router": "gate",
        "trainer": "end_to_end",
        "routing": {"first": 0, "last": -1, "stride": 1, "beam": 4},
        "sgs": {"t_easy": 0.0, "t_hard": 0.0, "target": "extremes"},
        "losses": {"cls": 1.0, "sgs": 1.0, "complexity": 0.5, "form": "paper", "quality": 0.0},
        "optimizer": {"name": "sgd", "lr": 0.08, "weight_decay": 0.01, "batch_size": 512},
        "temperature": {"start": 1.0, "end": 1.0},
        "end_to_end": {"epochs": 30},
    },
}

BUILT_IN_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType({"paper": _PAPER})
"""`paper`: Stage I and Stage II as published (arXiv 2103.13258; docs/methods.md, sections 3 to 5).
The published augmentation is RandAugment; its 2 operations of magnitude 9 are ours. The learning
rates are those of batch 512 and are not scaled to another batch. The published gate picks among
four sub-networks; that a beam chooses these four is ours. Try Best and Give Up are both published:
the strategy stays as the file has it."""


def built_in_settings(name: str, swept: Iterable[str]) -> dict[str, Any]:
    """The settings of a built-in preset; keys of supernet and gate that `space` would sweep are
    fixed there too.

    Args:
        name: a key of `BUILT_IN_PRESETS`.
        swept: the dotted keys of the file's space.
    """
    preset = BUILT_IN_PRESETS[name]
    sections = {section: preset.get(section, {}) for section in ("gate", "supernet")}
    fixed = {key: value for section in sections for key, value in _leaves(sections[section], section)}
    return {**preset, "space": {key: fixed[key] for key in swept if fixed.get(key) is not None}}


def _leaves(settings: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value
