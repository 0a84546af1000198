"""Strict reading of JSON into frozen dataclasses, without unknown keys or silent conversions. Needs
no torch or pydantic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from dsnet.errors import ConfigError
from dsnet.settings import alternatives, described, fits_type
from dsnet.wording import way_out

T = TypeVar("T")


def read_strictly(cls: type[T], data: object, where: str = "") -> T:
    """Build a dataclass, including nested ones, from the result of `json.loads`.

    A list is converted to a tuple and an integer to a float where the field requires it; nothing
    else is converted.

    Args:
        cls: the dataclass; its own checks run when it is built.
        data: a JSON object; missing keys take their defaults.
        where: the dotted key of `data`, for messages.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type; the message names
            the dotted key.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'the configuration'} is {data!r}, but must be a JSON object")
    settings = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type] # a dataclass
    check_known(data, settings, where)
    missing = [
        _dotted(where, name)
        for name, field in settings.items()
        if name not in data and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: missing; a setting without a default must be given")
    hints = get_type_hints(cls)
    return cls(**{name: _read(hints[name], value, _dotted(where, name)) for name, value in data.items()})


def check_known(data: Iterable[str], known: Iterable[str], where: str) -> None:
    """Check that all keys are known.

    Raises:
        ConfigError: a key is unknown; the message names it, the nearest known one, and all known
            ones.
    """
    names = list(known)
    for key in data:
        if key not in names:
            raise ConfigError(f"{_dotted(where, key)}: unknown setting{way_out(str(key), names)}")


def _dotted(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _read(wanted: Any, value: object, where: str) -> Any:
    if is_dataclass(wanted):
        assert isinstance(wanted, type)
        return read_strictly(wanted, value, where)
    if not fits_type(value, wanted):
        raise ConfigError(f"{where} is {value!r}, but must be {described(wanted)}")
    members = sorted(alternatives(wanted), key=lambda each: each is float)
    if len(members) > 1:  # an integer stays an integer if the union has int
        return _read(next(each for each in members if fits_type(value, each)), value, where)
    if get_origin(wanted) is tuple:
        assert isinstance(value, list | tuple)
        return _read_tuple(wanted, value, where)
    if get_origin(wanted) is Mapping and is_dataclass(get_args(wanted)[1]):
        return {name: _read(get_args(wanted)[1], each, _dotted(where, name)) for name, each in value.items()}  # type: ignore[attr-defined] # it fits
    return float(value) if wanted is float and isinstance(value, int) else value


def _read_tuple(wanted: Any, value: list[Any] | tuple[Any, ...], where: str) -> tuple[Any, ...]:
    items = get_args(wanted)
    items = (items[0],) * len(value) if items[-1] is Ellipsis else items
    if len(items) != len(value):
        raise ConfigError(f"{where} has {len(value)} values, but must have {len(items)}")
    return tuple(_read(item, each, f"{where}[{number}]") for number, (item, each) in enumerate(zip(items, value)))  # noqa: B905
