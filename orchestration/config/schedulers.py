"""Names and options of Ray Tune's schedulers, and the check of a sweep file's choice."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt

from dsnet.errors import ConfigError
from dsnet.import_path import import_object
from dsnet.settings import NonNegativeFloat, PositiveInt, check_value
from dsnet.wording import did_you_mean, way_out

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler


_ReductionFactor = Annotated[float, Gt(1)]
SCHEDULER_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "asha": {"grace_period": PositiveInt, "reduction_factor": _ReductionFactor, "brackets": PositiveInt},
    "median": {
        "grace_period": NonNegativeFloat,
        "min_samples_required": PositiveInt,
        "min_time_slice": NonNegativeFloat,
        "hard_stop": bool,
    },
    "hyperband": {"reduction_factor": _ReductionFactor},
}
_OURS = ("metric", "mode", "time_attr", "max_t", "stop_last_trials")
"""Options of a scheduler that the sweep sets."""


def check_scheduler(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a scheduler that cannot be made. Ray is imported only for an import path.

    Raises:
        ConfigError: an unknown name; a path that is not a scheduler, or that is one that changes
            settings; an option that the scheduler does not have, that is out of range, or that the
            sweep sets itself.
    """
    ours = [option for option in options if option in _OURS]
    if ours:
        raise ConfigError(
            f"supernets.options.{ours[0]} is set by the sweep: the metric is the static hypervolume on val, the time is in "
            "epochs, up to supernet.train.epochs; remove it"
        )
    if name in SCHEDULER_OPTIONS:
        _check_known_options(name, options)
    elif "." in name:
        from orchestration.environment import prepare_environment

        prepare_environment()
        scheduler_of_path(name, options, epochs=_epochs_to_try(options))
    else:
        raise ConfigError(
            f"supernets.scheduler is {name!r}{way_out(name, list(SCHEDULER_OPTIONS))}, or the import path of a Ray Tune scheduler"
        )


def _check_known_options(name: str, options: Mapping[str, Any]) -> None:
    allowed = SCHEDULER_OPTIONS[name]
    for option, value in options.items():
        where = f"supernets.options.{option}"
        if option not in allowed:
            hint = did_you_mean(option, list(allowed))
            has = f"has {', '.join(allowed)}" if allowed else "has none"
            raise ConfigError(f"{where}: no option of supernets.scheduler {name}, which {has}{hint}")
        check_value(where, value, allowed[option])


def _epochs_to_try(options: Mapping[str, Any]) -> int:
    """A number of epochs with which the options of a scheduler can be tried before the length of
    the training is known."""
    grace = options.get("grace_period", 1)
    return max(1000, math.ceil(grace)) if isinstance(grace, int | float) and math.isfinite(grace) else 1000


def scheduler_of_path(path: str, options: Mapping[str, Any], epochs: int) -> TrialScheduler:
    from ray.tune import schedulers

    try:
        found = import_object(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"supernets.scheduler {path!r} cannot be imported: {error}") from error
    if not isinstance(found, type) or not issubclass(found, schedulers.TrialScheduler):
        raise ConfigError(
            f"supernets.scheduler {path!r} is not a Ray Tune scheduler (a subclass of ray.tune.schedulers.TrialScheduler)"
        )
    if issubclass(found, tuple(getattr(schedulers, name) for name in _CHANGES_SETTINGS)):
        raise ConfigError(
            f"supernets.scheduler {path!r} changes the settings of running trials, but here each supernet has fixed settings; "
            f"choose one that only stops trials: {', '.join(SCHEDULER_OPTIONS)}"
        )
    if issubclass(found, schedulers.HyperBandForBOHB):
        raise ConfigError(
            f"supernets.scheduler {path!r} works only with its own search algorithm, TuneBOHB; choose hyperband"
        )
    parameters = inspect.signature(found).parameters
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [option for option in options if option not in parameters and not takes_all]
    if unknown:
        known = ", ".join(name for name in parameters if name not in _OURS)
        raise ConfigError(f"supernets.options.{unknown[0]}: no option of {path}, which has {known or 'none'}")
    made = {name: value for name, value in (("time_attr", TIME), ("max_t", epochs)) if name in parameters}
    return made_scheduler(path, found, {**made, **options})


def made_scheduler(name: str, kind: type[TrialScheduler], keywords: Mapping[str, Any]) -> TrialScheduler:
    try:
        return kind(**keywords)
    except Exception as error:
        shown = ", ".join(f"{option}={value!r}" for option, value in keywords.items())
        why = str(error) or type(error).__name__
        raise ConfigError(f"supernets.options: {name} cannot be made with {shown}: {why}") from error


TIME = "epoch"
"""Ray Tune's unit of time in a sweep of supernets."""
_CHANGES_SETTINGS = ("PopulationBasedTraining", "PopulationBasedTrainingReplay", "ResourceChangingScheduler")
"""Schedulers of Ray Tune that change the settings of a running trial."""
