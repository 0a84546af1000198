"""The search space: from the configuration's plain form to Optuna distributions. All ranges include both ends."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from dsnet.errors import ConfigError
from search.runner import Scalar


@dataclass(frozen=True)
class Space:
    """What a sweep varies, in the order in which the file lists it.

    Attributes:
        written: the configuration's own form, e.g. {"gate.target": {"uniform": [0.05, 0.9]}}; JSON-able.
        distributions: the same as Optuna distributions. A fixed value is a choice of one, so that the study shows it.
    """

    written: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]

    @property
    def hash(self) -> str:
        """Hex digest of names, distributions and their order: two spaces with one hash give the same suggestions."""
        canonical = json.dumps(list(self.written.items()), separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def parse_space(written: Mapping[str, Any]) -> Space:
    """Read the `space` section.

    Args:
        written: dotted name -> {kind: arguments} or a bare value that stays fixed. Kinds: uniform [low, high],
            loguniform [low, high] (low > 0), int [low, high] or [low, high, step], step [low, high, step],
            choice [a, b, ...], fixed value.

    Raises:
        ConfigError: an entry cannot be read; the message names it.
    """
    if not written:
        raise ConfigError(
            "space: nothing to search over; name at least one setting, e.g. gate.target: {uniform: [0.05, 0.9]}"
        )
    return Space(dict(written), {name: _parse_entry(name, entry) for name, entry in written.items()})


def suggest(trial: Trial, space: Space) -> dict[str, Scalar]:
    """Draw every dimension for `trial`, in the order of the space.

    The order matters: a sampler that draws one dimension at a time spends its random stream in this order.
    """
    return {name: _suggest_one(trial, name, distribution) for name, distribution in space.distributions.items()}


def _suggest_one(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case FloatDistribution(low=low, high=high, log=log, step=step):
            return trial.suggest_float(name, low, high, log=log, step=step)
        case IntDistribution(low=low, high=high, step=step):
            return trial.suggest_int(name, low, high, step=step)
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(name, choices)
    raise TypeError(f"no way to suggest from {distribution!r}")


def _parse_entry(name: str, entry: Any) -> BaseDistribution:
    if _is_scalar(entry):
        return _fixed(name, entry)
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ConfigError(
            f"space.{name}: expected one distribution such as {{uniform: [0.1, 0.9]}}, or a value; got {entry!r}"
        )
    kind, arguments = next(iter(entry.items()))
    parse = _KINDS.get(kind)
    if parse is None:
        near = get_close_matches(str(kind), _KINDS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ";"
        raise ConfigError(f"space.{name}: unknown distribution '{kind}'{hint} known: {', '.join(_KINDS)}")
    return parse(name, arguments)


def _uniform(name: str, arguments: Any) -> BaseDistribution:
    low, high = _range(name, "uniform", arguments, form="[low, high]", lengths=(2,))
    return FloatDistribution(float(low), float(high))


def _loguniform(name: str, arguments: Any) -> BaseDistribution:
    low, high = _range(name, "loguniform", arguments, form="[low, high]", lengths=(2,))
    if low <= 0:
        raise ConfigError(f"space.{name}: loguniform must start above 0; got {arguments!r}")
    return FloatDistribution(float(low), float(high), log=True)


def _int(name: str, arguments: Any) -> BaseDistribution:
    low, high, *step = _range(name, "int", arguments, form="[low, high] or [low, high, step]", lengths=(2, 3))
    if not all(isinstance(value, int) for value in arguments):
        raise ConfigError(f"space.{name}: int takes whole numbers; got {arguments!r}")
    return IntDistribution(int(low), int(high), step=int(step[0]) if step else 1)


def _step(name: str, arguments: Any) -> BaseDistribution:
    low, high, step = _range(name, "step", arguments, form="[low, high, step]", lengths=(3,))
    return FloatDistribution(float(low), float(high), step=float(step))


def _choice(name: str, arguments: Any) -> BaseDistribution:
    if not isinstance(arguments, Sequence) or isinstance(arguments, str) or not arguments:
        raise ConfigError(f"space.{name}: choice takes a list such as [a, b]; got {arguments!r}")
    for index, value in enumerate(arguments):
        if not _is_scalar(value):
            raise ConfigError(f"space.{name}: a choice must be a number, text, true or false; got {value!r}")
        if value in arguments[:index]:  # 1 == 1.0 == True: the study could not tell them apart either
            raise ConfigError(f"space.{name}: choice holds {value!r} twice in {arguments!r}")
    return CategoricalDistribution(tuple(arguments))


def _fixed(name: str, argument: Any) -> BaseDistribution:
    if not _is_scalar(argument):
        raise ConfigError(f"space.{name}: a fixed value must be a number, text, true or false; got {argument!r}")
    return CategoricalDistribution((argument,))


_KINDS: Mapping[str, Callable[[str, Any], BaseDistribution]] = {
    "uniform": _uniform,
    "loguniform": _loguniform,
    "int": _int,
    "step": _step,
    "choice": _choice,
    "fixed": _fixed,
}


def _range(name: str, kind: str, arguments: Any, *, form: str, lengths: tuple[int, ...]) -> list[float]:
    """Numbers low <= high and, where there is one, a step that leads from low exactly to high."""
    if not isinstance(arguments, Sequence) or len(arguments) not in lengths or not all(map(_is_finite, arguments)):
        raise ConfigError(f"space.{name}: {kind} is written {kind}: {form} with finite numbers; got {arguments!r}")
    low, high, *step = arguments
    if low > high:
        raise ConfigError(f"space.{name}: {kind} {list(arguments)} is the wrong way round; write {[high, low, *step]}")
    if step:
        _check_step(name, kind, low, high, step[0])
    return list(arguments)


def _check_step(name: str, kind: str, low: float, high: float, step: float) -> None:
    if step <= 0:
        raise ConfigError(f"space.{name}: {kind} needs a step above 0; got {step}")
    low_, high_, step_ = (
        Decimal(str(value)) for value in (low, high, step)
    )  # 0.3 is 3 x 0.1 as written, not as floats
    if (high_ - low_) % step_ != 0:
        last = high_ - (high_ - low_) % step_
        raise ConfigError(
            f"space.{name}: {kind} [{low}, {high}, {step}] does not reach its end {high}; "
            f"end it at {last} or {last + step_}"
        )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
