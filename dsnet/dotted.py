"""Conversion between nested settings and dotted keys such as `gate.sgs.t_easy`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def flatten(settings: Mapping[str, Any], prefix: str = "", whole: Collection[str] = ()) -> dict[str, Any]:
    """Dotted key -> value, in the order of `settings`; an empty mapping counts as a value.

    Args:
        settings: nested mappings.
        prefix: prefix of every key, including its dot.
        whole: dotted keys of mappings whose entries are not flattened further.
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        dotted = f"{prefix}{key}"
        if not isinstance(value, Mapping) or not value:
            flat[dotted] = value
        elif dotted in whole:
            flat |= {f"{dotted}.{name}": item for name, item in value.items()}
        else:
            flat |= flatten(value, f"{dotted}.", whole)
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Rebuild the nested mapping from the result of `flatten`."""
    nested: dict[str, Any] = {}
    for dotted, value in flat.items():
        *sections, leaf = dotted.split(".")
        section = nested
        for name in sections:
            section = section.setdefault(name, {})
        section[leaf] = value
    return nested
