"""Samplers by name, and the seeds of everything random in a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Literal

from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from dsnet.errors import ConfigError
from dsnet.seeds import derive_seed


def slot_seed(base_seed: int, slot: int, stream: Literal["sampler", "trial"]) -> int:
    """The seed of one random stream of one slot.

    It depends on our own slot index and not on Optuna's trial number, which a restart may shift.

    Returns:
        0 <= seed < 2**32, which random, numpy and torch all accept.
    """
    return derive_seed(base_seed, stream, slot) % 2**32


def make_sampler(name: str, *, seed: int, startup: int = 16) -> BaseSampler:
    """A fresh sampler.

    Args:
        name: one of `KNOWN_SAMPLERS`.
        seed: of its random stream; see `derive_seed`.
        startup: random trials at the start. `tpe` models from then on; for `nsga2` they are the first generation, and
            the size of every other (at least 2). `random` ignores it.

    Raises:
        ConfigError: no such sampler.
    """
    check_sampler(name)
    return _FACTORIES[name](seed, startup)


def check_sampler(name: str) -> None:
    """Raise ConfigError where `name` is no sampler."""
    if name not in _FACTORIES:
        near = get_close_matches(name, KNOWN_SAMPLERS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ";"
        raise ConfigError(f"sampler.name: unknown sampler '{name}'{hint} known: {', '.join(KNOWN_SAMPLERS)}")


class ReplayableNSGAII(NSGAIISampler):
    """NSGA-II whose suggestions depend on the finished trials only, and not on who selected the parents.

    Optuna returns the parents of a generation in the order of selection when it selects them, and in the order of their
    numbers when it reads them back from the study; crossover draws parents by position, so that a resumed sweep would
    mate others.
    """

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().get_parent_population(study, generation), key=lambda trial: trial.number)


def _random(seed: int, startup: int) -> BaseSampler:
    return RandomSampler(seed=seed)


def _tpe(seed: int, startup: int) -> BaseSampler:
    # A cohort is asked before any of it is told: the constant liar keeps its members apart from each other.
    return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)


def _nsga2(seed: int, startup: int) -> BaseSampler:
    # Optuna's default of 50 would spend a sweep of this size on one or two generations.
    return ReplayableNSGAII(seed=seed, population_size=max(2, startup))


_FACTORIES: Mapping[str, Callable[[int, int], BaseSampler]] = {"random": _random, "tpe": _tpe, "nsga2": _nsga2}
KNOWN_SAMPLERS = tuple(_FACTORIES)
