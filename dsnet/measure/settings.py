"""The settings of the measurement of latency. They need no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from annotated_types import MinLen

from dsnet.deploy.engines import TORCH, engine_names, timing_engine
from dsnet.metrics import DEVICE_NAME_PATTERN
from dsnet.settings import Device, NonNegativeInt, NumThreads, OneOf, PositiveInt, SettingError, Settings, check_fields
from dsnet.wording import shown

MAIN_DEVICE = ""
"""The name of the device of `measure.device`, beside the names in `measure.devices`."""
Sizes = Annotated[tuple[PositiveInt, ...], MinLen(1)]
"""Numbers of images per call, increasing."""
EngineName = Annotated[str, OneOf(engine_names)]
"""Name of what runs the networks: torch, or an engine for ONNX graphs (`dsnet.deploy.engines`)."""
TRAIN_SAMPLE_FILE = "train_sample.json"
"""File of this accuracy in the folder of the measure stage; runs of earlier releases have none."""


def device_name_problem(name: str) -> str | None:
    """The problem with the name of a further device, as a phrase for a message; None if there is
    none."""
    if re.fullmatch(DEVICE_NAME_PATTERN, name):
        return None
    return f"'{name}' is not a valid device name; use 1 to 32 letters, digits or '_', and no digit at the start"


def sizes_problem(name: str, sizes: Sequence[int]) -> str | None:
    """The problem with the `batch_sizes` or `group_sizes` of a measurement, as a phrase for a
    message; None if there is none."""
    ordered = sorted(set(sizes))
    if list(sizes) != ordered:
        return f"sizes must increase; got {shown(sizes)}, write {shown(ordered)}"
    if name == "group_sizes" and sizes[0] != 1:
        return f"must start at 1; got {shown(sizes)}"
    return None


def engine_problem(engine: str, device: Device) -> str | None:
    """The problem with an engine on a device, as a phrase for a message; None if there is none."""
    if engine == TORCH or device != "cuda":
        return None
    return f"engine {engine} runs on the CPU only, but device is cuda; write device: cpu, or engine: {TORCH}"


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """Settings of a further device on which everything is timed."""

    device: Device = "cpu"
    """`auto` is the CPU with every engine but torch."""
    threads: NumThreads = 1
    engine: EngineName = TORCH


@dataclass(frozen=True, kw_only=True)
class LatencySettings(Settings):
    """Devices, sizes and repeats of the measurement of latency."""

    SECTION = "measure"

    device: Device = "cpu"
    threads: NumThreads = 1
    engine: EngineName = TORCH
    devices: Mapping[str, DeviceSettings] = field(default_factory=dict)
    """Name -> further device; everything is timed on each of them as on the main one."""
    batch_sizes: Sizes = (1, 64)
    """Batch sizes of whole sub-networks; increasing."""
    group_sizes: Sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Numbers of images for trunk, decisions and tails; increasing from 1."""
    repeats: PositiveInt = 15
    warmup: NonNegativeInt = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        own_problem = engine_problem(self.engine, self.device)
        if own_problem is not None:
            raise SettingError(f"measure.engine: {own_problem}")
        for name, further in self.devices.items():
            problem = device_name_problem(name)
            if problem is not None:
                raise SettingError(f"measure.devices: {problem}")
            check_fields(further, f"measure.devices.{name}.{{}}".format)
            problem = engine_problem(further.engine, further.device)
            if problem is not None:
                raise SettingError(f"measure.devices.{name}.engine: {problem}")
        for name in ("batch_sizes", "group_sizes"):
            problem = sizes_problem(name, getattr(self, name))
            if problem is not None:
                raise SettingError(f"measure.{name}: {problem}")

    @property
    def num_rounds(self) -> int:
        """Number of batch and group sizes that are timed on each device."""
        return len(self.batch_sizes) + len(self.group_sizes)

    def by_device(self, resolve: Callable[[Device], Device] = lambda device: device) -> dict[str, LatencySettings]:
        """Settings for each single device, by its name, the main one first.

        Args:
            resolve: maps a device setting to `cpu` or `cuda`.

        Raises:
            ConfigError: the package of an engine is not installed.
        """

        def alone(own: LatencySettings | DeviceSettings) -> LatencySettings:
            device: Device = resolve(own.device) if timing_engine(own.engine) is None else "cpu"
            return replace(self, device=device, threads=own.threads, engine=own.engine, devices={})

        return {MAIN_DEVICE: alone(self), **{name: alone(own) for name, own in self.devices.items()}}


def without_default_engines(measure: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a section `measure` without every `engine` that is torch, as before there was
    this setting; `devices` stay."""
    devices = {name: _without_torch(own) for name, own in measure["devices"].items()}
    return _without_torch({**measure, "devices": devices})


def _without_torch(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if (key, value) != ("engine", TORCH)}
