"""The section `measure`: on which devices and batches latency is measured."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from dsnet.deploy.engines import engine_names
from dsnet.measure.settings import (
    DeviceSettings,
    EngineName,
    LatencySettings,
    Sizes,
    device_name_problem,
    engine_problem,
    sizes_problem,
)
from dsnet.settings import Device, NonNegativeInt, NumThreads, PositiveInt
from orchestration.config.section import FROM_LIST, BrokenRule, Known, Section, refuse

Engine = Annotated[EngineName, Known(engine_names)]


class DeviceConfig(Section):
    """An additional device on which latency is measured."""

    device: Device = DeviceSettings.device
    """auto | cpu | cuda; auto = cuda if available and the engine is torch."""
    threads: NumThreads = DeviceSettings.threads
    """Threads during the measurement."""
    engine: Engine = DeviceSettings.engine
    """Inference engine, as measure.engine."""

    @model_validator(mode="after")
    def _engine_runs_there(self) -> DeviceConfig:
        refuse(*_engine_problems(self.engine, self.device))
        return self


class MeasureConfig(Section):
    """Measurement of the latency of all sub-networks."""

    device: Device = LatencySettings.device
    """auto | cpu | cuda; auto = cuda if available and the engine is torch."""
    threads: NumThreads = LatencySettings.threads
    """Threads during the measurement."""
    engine: Engine = LatencySettings.engine
    """Inference engine: torch, or onnxruntime, which times ONNX graphs on the CPU."""
    batch_sizes: Annotated[Sizes, FROM_LIST] = LatencySettings.batch_sizes
    """Images per call, increasing."""
    group_sizes: Annotated[Sizes, FROM_LIST] = LatencySettings.group_sizes
    """Group sizes at which trunk, decision and tails are timed, increasing from 1."""
    repeats: PositiveInt = LatencySettings.repeats
    """Timed repetitions, interleaved over the sub-networks; the median is used."""
    warmup: NonNegativeInt = LatencySettings.warmup
    """Untimed repetitions before the timed ones."""
    devices: dict[str, DeviceConfig] = Field(default_factory=dict)
    """NAME -> additional device, which gives the metrics latency_ms.NAME and
    latency_ms_batchN.NAME."""

    @model_validator(mode="after")
    def _sizes_increase_and_devices_have_names(self) -> MeasureConfig:
        names = ((name, device_name_problem(name)) for name in self.devices)
        problems = [BrokenRule(("devices", name), problem) for name, problem in names if problem is not None]
        problems += _engine_problems(self.engine, self.device)
        for name in ("batch_sizes", "group_sizes"):
            problem = sizes_problem(name, getattr(self, name))
            if problem is not None:
                problems.append(BrokenRule((name,), problem))
        refuse(*problems)
        return self


def _engine_problems(engine: str, device: Device) -> list[BrokenRule]:
    problem = engine_problem(engine, device)
    return [] if problem is None else [BrokenRule(("engine",), problem, others=(("device",),))]
