"""The section `measure`: on which devices and batches latency is measured."""

from __future__ import annotations

import re

from pydantic import (
    Field,
    model_validator,
)

from dsnet.metrics import DEVICE_NAME_PATTERN
from dsnet.wording import shown
from orchestration.config.section import (
    BrokenRule,
    Device,
    IncreasingSizes,
    NonNegativeInt,
    PositiveInt,
    Section,
    refuse,
)


class DeviceConfig(Section):
    """An additional device on which latency is measured."""

    device: Device = "cpu"
    """auto | cpu | cuda; auto = cuda if available."""
    threads: PositiveInt = 1
    """Torch threads during the measurement."""


class MeasureConfig(Section):
    """Measurement of the latency of all sub-networks."""

    device: Device = "cpu"
    """auto | cpu | cuda; auto = cuda if available."""
    threads: PositiveInt = 1
    """Torch threads during the measurement."""
    batch_sizes: IncreasingSizes = (1, 64)
    """Images per call, increasing."""
    group_sizes: IncreasingSizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Group sizes at which trunk, decision and tails are timed, increasing from 1."""
    repeats: PositiveInt = 15
    """Timed repetitions, interleaved over the sub-networks; the median is used."""
    warmup: NonNegativeInt = 3
    """Untimed repetitions before the timed ones."""
    devices: dict[str, DeviceConfig] = Field(default_factory=dict)
    """NAME -> additional device, which gives the metrics latency_ms.NAME and
    latency_ms_batchN.NAME."""

    @model_validator(mode="after")
    def _sizes_increase_and_devices_have_names(self) -> MeasureConfig:
        problems = [
            BrokenRule(
                ("devices", name),
                f"'{name}' is no name of a device; use 1 to 32 letters, digits or '_', no digit at the start",
            )
            for name in self.devices
            if not re.fullmatch(DEVICE_NAME_PATTERN, name)
        ]
        for name in ("batch_sizes", "group_sizes"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)):
                ordered = shown(sorted(set(sizes)))
                problems.append(BrokenRule((name,), f"sizes must increase; got {shown(sizes)}, write {ordered}"))
        if self.group_sizes[0] != 1:
            problems.append(BrokenRule(("group_sizes",), f"must start at 1; got {shown(self.group_sizes)}"))
        refuse(*problems)
        return self
