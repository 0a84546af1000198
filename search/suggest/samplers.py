"""Samplers by name, and the seeds of all randomness in a sweep.

Every slot has its own sampler. Its suggestion depends only on the finished trials, the running
trials of its cohort, the sweep's seed and the slot: no sampler keeps state from one slot to the
next, so that an interrupted sweep continues as if it had not been interrupted.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from dsnet.errors import ConfigError
from dsnet.import_path import import_object
from dsnet.seeds import derive_seed
from dsnet.wording import did_you_mean, way_out
from search.suggest.genetic import ReplayableNSGAII, ReplayableNSGAIII
from search.suggest.grid import DEFAULT_POINTS, Grid
from search.suggest.qmc import sobol_point
from search.suggest.space import Scalar, Space, nth_value, parse_space, suggest

KNOWN_SAMPLERS = ("random", "grid", "qmc", "tpe", "nsga2", "nsga3", "gp")
POINT_LISTS = ("grid", "qmc")
"""Samplers with a fixed list of points; slot k tries the k-th point."""
MAX_DIVISIONS = 100
"""Largest `dividing_parameter` of NSGA-III; with three objectives it gives 5,151 reference
lines."""


@contextmanager
def quiet_optuna(level: int = optuna.logging.WARNING) -> Iterator[None]:
    """Context manager that silences Optuna's log below `level` and its warnings about experimental
    features."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, level))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of a sampler.

    Attributes:
        name: one of `KNOWN_SAMPLERS`, or the import path of a subclass of Optuna's `BaseSampler`.
        options: keyword arguments of its constructor; `grid` has `points`, the number of values of
            a dimension without steps.
        startup: number of random trials before `tpe` and `gp` use their models; for `nsga2` and
            `nsga3` the size of a generation (at least 2), of which the first is random. The other
            samplers ignore it.
    """

    name: str = "tpe"
    options: Mapping[str, Any] = field(default_factory=dict)
    startup: int = 16


def slot_seed(base_seed: int, slot: int, stream: Literal["sampler", "trial"]) -> int:
    """The seed of one random stream of one slot.

    It depends on our slot index and not on Optuna's trial number, which may change after a restart.

    Returns:
        0 <= seed < 2**32, which random, numpy and torch all accept.
    """
    return derive_seed(base_seed, stream, slot) % 2**32


def is_foreign(name: str) -> bool:
    """Whether a sampler is foreign: given by its import path. It may keep state of its own."""
    return name not in KNOWN_SAMPLERS


def check_sampler(settings: SamplerSettings, num_objectives: int = 2) -> None:
    """Check in advance that a sampler can be created and used.

    Args:
        settings: the sampler's settings.
        num_objectives: number of the sweep's objectives, 2 or 3.

    Raises:
        ConfigError: the sampler is unknown; an option is unknown, cannot be set in a file, or has a
            value that the sampler refuses; or a foreign sampler cannot be imported, is not a
            sampler, takes no seed, or cannot suggest for several objectives.
    """
    signature = inspect.signature(_constructor(settings.name))
    for name, value in settings.options.items():
        _check_option(settings.name, name, value, signature)
    if is_foreign(settings.name) and not _takes(signature, "seed"):
        raise ConfigError(
            f"sampler.name {settings.name}: its constructor takes no `seed`, so that a sweep with it could not be repeated; "
            f"known: {', '.join(KNOWN_SAMPLERS)}"
        )
    try:
        with quiet_optuna():
            _try_out(settings, num_objectives)
    except ConfigError:
        raise
    except Exception as error:  # whatever a constructor or a foreign sampler raises
        options = f" with the options {dict(settings.options)}" if settings.options else ""
        raise ConfigError(f"sampler.name {settings.name}{options}: {type(error).__name__}: {error}") from error


def make_sampler(settings: SamplerSettings, *, space: Space, base_seed: int, slot: int) -> BaseSampler:
    """Create the sampler of one slot.

    Args:
        settings: settings that have passed `check_sampler`.
        space: the search space.
        base_seed: seed of the sweep.
        slot: index of the slot in the sweep, from 0; for `POINT_LISTS` the index in their list, in
            which slots with enqueued points are not counted.

    Raises:
        ConfigError: as `check_sampler`; or the space has too many points for a grid.
    """
    seed = slot_seed(base_seed, slot, "sampler")
    with quiet_optuna():
        match settings.name:
            case "random":
                return RandomSampler(seed=seed)
            case "grid":
                grid = Grid(space, settings.options.get("points", DEFAULT_POINTS))
                return PointSampler(grid.shuffled(base_seed)[slot % len(grid)], space, seed)
            case "qmc":
                return PointSampler(sobol_point(space, base_seed, slot), space, seed)
            case "tpe":
                return GroupedTPE(space, seed=seed, n_startup_trials=settings.startup, **settings.options)
            case "nsga2":
                return ReplayableNSGAII(space, _population(settings), seed, dict(settings.options))
            case "nsga3":
                return ReplayableNSGAIII(
                    space, _population(settings), seed, dict(settings.options), base_seed=base_seed
                )
            case "gp":
                return QuietGP(space, seed=seed, n_startup_trials=max(1, settings.startup), **settings.options)
        sampler: BaseSampler = _constructor(settings.name)(seed=seed, **settings.options)
        return sampler


def num_points(settings: SamplerSettings, space: Space) -> int | None:
    """Number of points of a grid; None for samplers with unlimited points.

    Raises:
        ConfigError: the grid has too many points.
    """
    if settings.name != "grid":
        return None
    return len(Grid(space, settings.options.get("points", DEFAULT_POINTS)))


def lasting_notes(notes: Mapping[str, Any]) -> dict[str, Any]:
    """A sampler's attributes of a trial that are needed after it has finished; those only for its
    cohort are left out."""
    return {name: value for name, value in notes.items() if ":relative_params:" not in name}


class PointSampler(BaseSampler):
    """Sampler that suggests one given point."""

    def __init__(self, point: Mapping[str, Scalar], space: Space, seed: int) -> None:
        """Create the sampler; `seed` is for dimensions that the point lacks and that exist because
        of enqueued values."""
        self._point = dict(point)
        self._space = space
        self._rest = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: self._space.distributions[name] for name in self._point}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._point

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._rest.sample_independent(study, trial, param_name, param_distribution)


class GroupedTPE(TPESampler):
    """TPE with a joint model for each group of dimensions that exist together.

    Optuna's `group` derives these groups from the trials, again in every slot; here they follow
    from the space. Groups whose conditions do not hold for the values drawn so far are skipped.
    """

    def __init__(self, space: Space, *, multivariate: bool = True, group: bool = True, **options: Any) -> None:
        """Create the sampler; with `group` False conditional dimensions are modelled separately."""
        # All trials of a cohort are asked before any is told: without Optuna's constant liar their
        # suggestions would be too similar.
        super().__init__(multivariate=multivariate, **{"constant_liar": True, **options})
        self._space = space
        groups = space.groups if group else (_unconditional(space),)
        wanted = [names for names in groups if names] if multivariate else []
        self._groups = [{name: space.distributions[name] for name in names} for names in wanted]

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: distribution for group in self._groups for name, distribution in group.items()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        known = _given_values(self._space, trial)
        drawn: dict[str, Any] = {}
        for group in self._groups:
            if self._space.has(next(iter(group)), {**drawn, **known}):
                drawn |= super().sample_relative(study, trial, group)
        return drawn


class QuietGP(GPSampler):
    """Gaussian-process sampler over the unconditional dimensions; conditional dimensions are drawn
    at random.

    It runs on one thread, so that suggestions do not depend on the number of cores, and without
    numerical warnings.
    """

    def __init__(self, space: Space, **options: Any) -> None:
        super().__init__(**{"warn_independent_sampling": False, **options})
        self._modelled = {name: space.distributions[name] for name in _unconditional(space)}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._modelled

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        with _one_thread(), quiet_optuna(optuna.logging.ERROR), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().sample_relative(study, trial, search_space)


def _unconditional(space: Space) -> tuple[str, ...]:
    return tuple(name for name in space.free if name not in space.conditions)


def _given_values(space: Space, trial: FrozenTrial) -> dict[str, Scalar]:
    """The values that do not come from a sampler: fixed and enqueued ones."""
    fixed = {
        name: nth_value(distribution, 0) for name, distribution in space.distributions.items() if distribution.single()
    }
    return {**fixed, **trial.system_attrs.get("fixed_params", {})}


def _population(settings: SamplerSettings) -> int:
    # With Optuna's default of 50 a typical sweep would have only one or two generations.
    return max(2, settings.startup)


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch
    from threadpoolctl import threadpool_limits

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(num_threads)


def _grid_options(*, points: int = DEFAULT_POINTS) -> None:
    """The signature of `grid`."""


def _no_options() -> None:
    """The signature of `qmc`."""


_CONSTRUCTORS: Mapping[str, Callable[..., Any]] = {
    "random": RandomSampler,
    "grid": _grid_options,
    "qmc": _no_options,
    "tpe": TPESampler,
    "nsga2": NSGAIISampler,
    "nsga3": NSGAIIISampler,
    "gp": GPSampler,
}
"""Callables whose signatures define the options of the samplers."""
_SET_ELSEWHERE: Mapping[str, str] = {
    "seed": "every slot derives its own from the sweep's `seed`",
    "constraints_func": "write `constraints` in the sweep's file",
}
_SET_BY_STARTUP: Mapping[str, str] = {
    "n_startup_trials": "set sampler.startup",
    "population_size": "set sampler.startup, which is the size of a generation",
}
_OBJECT_OPTIONS = (
    "independent_sampler",
    "base_sampler",
    "gamma",
    "weights",
    "mutation",
    "crossover",
    "elite_population_selection_strategy",
    "child_generation_strategy",
    "after_trial_strategy",
)
_UNUSABLE: Mapping[str, str] = {
    "GridSampler": "stores its position in the study, so that a resumed sweep would start over; use grid instead",
    "QMCSampler": "stores its position in the study, so that a resumed sweep would start over; use qmc instead",
    "BruteForceSampler": "ends a sweep by stopping Optuna's own loop, which is not used here; use grid, which also tries each point once",
}
"""Samplers of Optuna that cannot be used here, with the reason."""


def _constructor(name: str) -> Callable[..., Any]:
    known = _CONSTRUCTORS.get(name)
    if known is not None:
        return known
    _, dot, class_name = name.rpartition(".")
    if not dot:
        raise ConfigError(
            f"sampler.name: unknown sampler '{name}'{way_out(name, KNOWN_SAMPLERS)}, or an import path such as my_package.MySampler"
        )
    try:
        found = import_object(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"sampler.name: cannot import '{name}': {error}") from error
    if not (isinstance(found, type) and issubclass(found, BaseSampler)):
        raise ConfigError(f"sampler.name: '{name}' must be a subclass of optuna.samplers.BaseSampler, but is {found!r}")
    if found.__module__.startswith("optuna.") and class_name in _UNUSABLE:
        raise ConfigError(f"sampler.name: '{name}' {_UNUSABLE[class_name]}")
    return found


def _takes(signature: inspect.Signature, name: str) -> bool:
    parameters = signature.parameters
    return name in parameters or any(item.kind is item.VAR_KEYWORD for item in parameters.values())


def _check_option(sampler: str, name: str, value: Any, signature: inspect.Signature) -> None:
    path = f"sampler.options.{name}"
    reason = _SET_ELSEWHERE.get(name) or (None if is_foreign(sampler) else _SET_BY_STARTUP.get(name))
    if reason is not None:
        raise ConfigError(f"{path}: cannot be set here; {reason}")
    if not _takes(signature, name):
        offered = [
            known
            for known in signature.parameters
            if known not in (*_SET_ELSEWHERE, *_SET_BY_STARTUP, *_OBJECT_OPTIONS)
        ]
        hint = did_you_mean(name, offered) or ";"
        raise ConfigError(f"{path}: {sampler} has no such option{hint} it has {', '.join(offered) or 'none'}")
    if name in _OBJECT_OPTIONS:
        raise ConfigError(f"{path}: takes a Python object, which a file cannot hold; leave it out")
    default = signature.parameters[name].default if name in signature.parameters else None
    if not _is_like(value, default):
        raise ConfigError(f"{path}: {sampler} takes a value like {default!r}; got {value!r}")
    if (sampler, name) == ("grid", "points") and value < 1:
        raise ConfigError(f"{path} is {value}, but must be 1 or more")
    if (sampler, name) == ("nsga3", "dividing_parameter") and not (type(value) is int and 1 <= value <= MAX_DIVISIONS):
        raise ConfigError(f"{path} is {value!r}, but must be a whole number in 1..{MAX_DIVISIONS}")


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value has the type of a default; always True for defaults other than booleans and
    numbers."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return True


def _try_out(settings: SamplerSettings, num_objectives: int) -> None:
    """Create the sampler; if it is foreign or has options, also ask and tell a few trials, since
    many values are checked late."""
    space = parse_space({"a": {"int": [0, 3]}, "b": {"choice": ["x", "y"]}})
    make_sampler(settings, space=space, base_seed=0, slot=0)
    if settings.name in POINT_LISTS or not (settings.options or is_foreign(settings.name)):
        return
    settings = replace(settings, startup=2)
    study = optuna.create_study(directions=["minimize"] * num_objectives)
    for slot in range(6):
        study.sampler = make_sampler(settings, space=space, base_seed=0, slot=slot)
        trial = study.ask()
        suggest(trial, space)
        study.tell(trial, [float(slot)] * num_objectives)
