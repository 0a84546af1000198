"""The sections of sweep.yaml and the core's settings: every setting has one type, one range and one
default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from dsnet.measure.settings import DeviceSettings
from dsnet.settings import OneOf, Settings, alternatives, dotted_keys, split_bounds, types_of
from dsnet.standalone.resolved import StandaloneConfig
from dsnet.training.data_defaults import DERIVED_KEYS
from dsnet.training.supernet_run import SupernetRun
from orchestration.config.measure import DeviceConfig
from orchestration.config.resolve import known_fields
from orchestration.config.section import annotated_type, section_class
from orchestration.config.supernet import FROM_DATA

SHARED = ("seed", "data.", "supernet.", "gate.", "measure.")
"""The parts of sweep.yaml that the core has settings for."""
BOUNDS = (Ge, Gt, Le, Lt, MinLen, MaxLen)
OPEN = {
    *DERIVED_KEYS,
    *(f"supernet.train.{name}" for name in ("widths", "num_random", "teacher", "views")),
    "data.augment.crop_padding",
    "data.augment.flip",
}
"""Settings that sweep.yaml may leave open (null or auto, their default); the core gets values."""
PLATFORM_ONLY = {
    *(f"supernet.{name}" for name in ("workers", "threads", "device", "structure.concurrent")),
    *(f"supernet.bootstrapping.{name}" for name in ("mode", "num_random")),
    *(f"gate.routing.{name}" for name in ("first", "last", "stride", "beam")),
    *(f"gate.{name}" for name in ("trainer", "end_to_end.augment", "end_to_end.threads")),
}
"""Settings of sweep.yaml that the core does not have, or has in another form."""
CORE_ONLY = {
    *("gate.routes", "gate.seed", "gate.end_to_end.augmentation"),
    *(f"supernet.{name}" for name in ("augmentation", "normalization", "origin", "width_space")),
    *(f"data.normalization.{name}" for name in ("mean", "std")),
}
"""Fields of the core's settings that have another form in sweep.yaml, or none."""
BY_NAME = {"data.name", "supernet.regime"}
"""Settings that sweep.yaml gives by one of a few names; the core takes any registered name, or the
object of that name."""


@dataclass(frozen=True)
class CoreField:
    """A field of the core's settings."""

    key: str
    """Its dotted key in sweep.yaml."""
    owner: type
    name: str
    wanted: Any
    default: Any

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


def core_fields(owner: type, keys: dict[str, str]) -> Iterator[CoreField]:
    for field in fields(owner):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        yield CoreField(keys[field.name], owner, field.name, types_of(owner)[field.name], default)


def subclasses(base: type) -> Iterator[type]:
    for found in base.__subclasses__():
        yield found
        yield from subclasses(found)


def every_core_field() -> list[CoreField]:
    """The fields of every class of settings in the core."""
    classes = [found for found in subclasses(Settings) if found.__module__.startswith("dsnet.")]
    assert {StandaloneConfig, SupernetRun} <= set(classes)
    assert len(classes) >= 13
    return [field for found in classes for field in core_fields(found, dict(dotted_keys(found)))]


def is_single(key: str) -> bool:
    return key in known_fields() and section_class(known_fields()[key].annotation) is None


COMPARED = [
    field
    for field in every_core_field()
    if field.key.startswith(SHARED) and is_single(field.key) and field.key not in BY_NAME
]


def normal(wanted: Any) -> frozenset[Any]:
    """A type as a set of its alternatives with their bounds, without null; texts without bounds
    beside registered names, since a section only adds that they are not empty."""
    found = set()
    for each in alternatives(wanted):
        base, bounds = split_bounds(each)
        if any(part is not base for part in alternatives(base)):  # bounds around a union: a validator of pydantic
            found |= normal(base)
            continue
        if get_origin(base) is tuple:
            base = ("tuple", normal(get_args(base)[0]))
        elif get_origin(base) is not Literal and not isinstance(base, type):
            base = "mapping"
        kept = (bound for bound in bounds if isinstance(bound, OneOf if base is str else BOUNDS))
        found.add((base, frozenset(kept)))
    return frozenset(found - {(type(None), frozenset())})


def is_nullable(wanted: Any) -> bool:
    return any(type(None) in alternatives(split_bounds(each)[0]) for each in alternatives(wanted))


def differences(section: FieldInfo, core: CoreField) -> list[str]:
    """Differences between a setting in sweep.yaml and in the core."""
    written = annotated_type(section)
    is_open = core.key in OPEN and section.default in (None, FROM_DATA)
    found = []
    if normal(written) - {(Literal[FROM_DATA], frozenset())} != normal(core.wanted):
        found.append(f"type {written}, not {core.wanted}")
    if is_nullable(written) != is_nullable(core.wanted) and not (is_nullable(written) and is_open):
        found.append("null")
    default = section.get_default(call_default_factory=True)
    has_default = not section.is_required() and core.default is not MISSING
    if has_default and not is_open and (default, type(default)) != (core.default, type(core.default)):
        found.append(f"default {default!r}, not {core.default!r}")
    return found


@pytest.mark.parametrize("core", COMPARED, ids=str)
def test_a_setting_has_the_same_type_range_and_default_in_sweep_yaml_and_in_the_core(core: CoreField) -> None:
    assert differences(known_fields()[core.key], core) == []


def test_a_further_device_has_the_same_settings_in_both() -> None:
    keys = {field.name: field.name for field in fields(DeviceSettings)}
    assert keys.keys() == DeviceConfig.model_fields.keys()
    for core in core_fields(DeviceSettings, keys):
        assert differences(DeviceConfig.model_fields[core.name], core) == []


def test_every_setting_is_compared_or_known_to_be_of_one_side() -> None:
    single = {key for key in known_fields() if key.startswith(SHARED) and is_single(key)}
    assert single - {core.key for core in COMPARED} == PLATFORM_ONLY | BY_NAME
    assert {core.key for core in every_core_field()} - known_fields().keys() == CORE_ONLY


def test_only_what_is_open_by_default_differs_from_the_core() -> None:
    default_of = {core.key: core.default for core in COMPARED}
    left_open = {key for key in OPEN if known_fields()[key].default in (None, FROM_DATA) and key in default_of}
    assert left_open == OPEN


@pytest.mark.parametrize(
    ("annotation", "default", "found"),
    [
        (Annotated[float, Ge(0), Le(1)], 0.5, []),
        (Annotated[float, Ge(0), Lt(1)], 0.5, ["type"]),
        (Annotated[float, Ge(0)], 0.5, ["type"]),
        (Annotated[int, Ge(0), Le(1)], 0.5, ["type"]),
        (Annotated[float, Ge(0), Le(1)] | None, 0.5, ["null"]),
        (Annotated[float, Ge(0), Le(1)], 0.25, ["default"]),
        (Literal["a", "b"], 0.5, ["type"]),
    ],
)
def test_a_difference_is_noticed(annotation: Any, default: Any, found: list[str]) -> None:
    core = next(core for core in COMPARED if str(core) == "GateSettings.target")
    section = FieldInfo.from_annotated_attribute(annotation, default)
    assert [text.split()[0] for text in differences(section, core)] == found
