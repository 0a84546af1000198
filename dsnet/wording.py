"""Formatting of values, counts and times for messages, and suggestions for unknown words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise


def shown(value: object) -> str:
    """A value for a message: quoted text, YAML's null and booleans, long values shortened."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return _cut(repr(value))
    if isinstance(value, Mapping):
        return f"a mapping with {_cut(', '.join(map(str, value)))}" if value else "an empty mapping"
    if isinstance(value, Sequence):
        return _cut(f"[{', '.join(shown(item) for item in value)}]")
    return _cut(repr(value))


def _cut(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error's message, or the name of its class; a line over `limit`
    characters ends after a whole word, with `...`."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= limit else f"{line[: limit - 4].rpartition(' ')[0] or line[: limit - 4]} ..."


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The clause `; did you mean 'x'?` if a known word is similar, else an empty string."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def way_out(word: str, known: Sequence[str], label: str = "known", *, hint: str = "") -> str:
    """The end of a message about an unknown word: the `hint` or a suggestion if there is one, and
    all known words."""
    return f"{hint or did_you_mean(word, known) or ';'} {label}: {', '.join(known)}"


def plural(number: int, singular: str, many: str | None = None) -> str:
    """A number with its noun, e.g. `5,000 supernets`; `many` is an irregular plural."""
    return f"{number:,} {singular if number == 1 else many or singular + 's'}"


def subnet_phrase(name: str) -> str:
    """A sub-network in a sentence: `sub-network 0.5`; names that say so themselves stay, such as
    `subnet-05`."""
    return name if name.startswith("subnet") else f"sub-network {name}"


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign: 0.74 -> '+0.7', -0.74 -> '-0.7', and without one where it rounds
    to zero, '0.0'.

    The minus is the plain hyphen-minus, so that a number reads the same in tables, reports, figures
    and JSON, and can be searched and copied.
    """
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


_PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6))


def prefixed(value: float) -> str:
    """A large number with three significant digits and an SI prefix: 39,500,000,000 -> '39.5 G'."""
    prefix, size = next((pair for pair in _PREFIXES if abs(value) >= pair[1]), _PREFIXES[-1])
    return f"{value / size:.3g} {prefix}"


_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def duration(seconds: float) -> str:
    """A duration in words, with at most two units: `0.4 s`, `42 s`, `3 min 20 s`, `2 h 5 min`, `3 d
    4 h`.

    Args:
        seconds: >= 0.
    """
    if seconds < 0.95:
        return f"{seconds:.1f} s"
    for (unit, name), (part, part_name) in pairwise(_UNITS):
        if seconds >= unit - part / 2:
            whole, rest = divmod(round(seconds / part), unit // part)
            return f"{whole} {name}" + (f" {rest} {part_name}" if rest else "")
    return f"{seconds:.0f} s"


def size(num_bytes: int) -> str:
    """A number of bytes in words: `3 KiB`, `1.5 MiB`, `12 GiB`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}" if num_bytes < 10 * scale else f"{num_bytes / scale:.0f} {unit}"
    return f"{max(1, num_bytes // 1024)} KiB"
