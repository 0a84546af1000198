"""Changes to a sweep that was launched already: a larger budget, and points to try."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution

from dsnet.errors import ConfigError, NotFoundError, PreflightError
from dsnet.families import family_names
from dsnet.wording import plural, shown
from orchestration.config.command_lines import command_line, has_own_code, launch_command
from orchestration.config.loading import load_config
from orchestration.config.resolve import resolve_trials
from orchestration.config.sweep import SweepConfig
from orchestration.config.trials import BudgetConfig
from orchestration.config.yaml_source import parse_yaml
from orchestration.pipeline.search import FOUND_ENOUGH, RULE_OFF, study_settings
from orchestration.results.protocol import Results
from orchestration.results.run import RunResults
from orchestration.results.stored_config import store_config
from orchestration.runs.lock import DriverLock, read_lock
from orchestration.runs.manifest import Manifest
from orchestration.runs.queue import append_points
from orchestration.supernets.results import results_at
from search.front.points import trial_name
from search.suggest.space import Scalar, Space, check_point

Point = dict[str, Scalar]
_NUMBER = re.compile(r"\+?[0-9]+")


def extended(results: Results, trials: str, overrides: Sequence[str] = ()) -> SweepConfig:
    """The configuration of a run with a larger budget, to be launched again.

    Args:
        results: the run.
        trials: `+20` for so many more than the budget, `300` for so many in all.
        overrides: further `--set KEY=VALUE`, of the budget only: another setting would be another
            sweep.

    Raises:
        ConfigError: not a number, or not above the budget; an override of another section.
    """
    run, budget = results.run, resolve_trials(results.config)
    if not _NUMBER.fullmatch(trials):
        raise ConfigError(
            f"--trials {trials}: expected +N (additional trials) or N (total number of trials), where N is a whole number"
        )
    wanted = budget + int(trials) if trials.startswith("+") else int(trials)
    if wanted <= budget:
        raise ConfigError(
            f"--trials {trials}: run {run.name!r} already has a budget of {plural(budget, 'trial')}, and extend only raises it; "
            f"write --trials +N, or continue without a change with: {launch_command(results.config, run.sweep_yaml)}"
        )
    for text in overrides:
        if text.partition("=")[0].strip() == "budget.trials":
            raise ConfigError(f"--set {text}: --trials already sets this; remove one of the two")
        if not text.startswith("budget."):
            raise ConfigError(
                f"--set {text}: extend only changes budget.* settings; to change others, launch {run.sweep_yaml} with "
                "--set under a new --name"
            )
    # The present place of the run: its folder may have been moved since it was launched.
    flags = {"budget.trials": wanted, "storage.runs": str(run.root), "name": run.name}
    return load_config(run.sweep_yaml, overrides=overrides, flags=flags, known_models=family_names()).config


@contextmanager
def budget_kept_on_failed_start(results: Results) -> Iterator[None]:
    """Restore the stored configuration of a run if the block, which extends it, fails for a missing
    or broken part of the machine before any further trial is done."""
    before, num_trials = results.config, results.num_trials
    try:
        yield
    except PreflightError as error:
        with DriverLock(results.run, f"dsnet-orch extend {results.run.name}"):
            if results_at(results.run).num_trials > num_trials:
                raise
            store_config(results.run, Manifest(results.run.manifest_path), before)
        raise PreflightError(
            f"{error}\nthe budget of run {results.run.name!r} stays {plural(resolve_trials(before), 'trial')}"
        ) from error


def extension_notes(results: Results, config: SweepConfig) -> list[str]:
    """Notes for the user before a run is extended."""
    before, now = resolve_trials(results.config), resolve_trials(config)
    notes = [f"{results.run.name}: budget raised from {before} to {plural(now, 'trial')}"]
    openings = results.manifest["test_openings"]
    if openings:
        times = "once" if openings == 1 else f"{openings} times"
        notes.append(
            f"test was already read {times}; the new front is scored on it again, so its results on test are optimistic"
        )
    end = results.search_end
    if end in FOUND_ENOUGH and _is_the_same_rule(end, config.budget, results.config.budget):
        notes.append(
            f"the search ended by its own rule ({end}), and more trials alone do not continue it: {_END_WAYS[end]}"
        )
    return notes


def _is_the_same_rule(end: str, budget: BudgetConfig, before: BudgetConfig) -> bool:
    """Whether the rule that ended a search is unchanged."""
    rules = {"plateau": (budget.plateau, before.plateau), "target": (budget.target, before.target)}
    now, then = rules.get(end, (None, None))
    return now == then


_END_WAYS = {
    "plateau": f"add {shlex.join(RULE_OFF['plateau'])}, or another rule",
    "target": f"add {shlex.join(RULE_OFF['target'])}, or another target",
    "space": "the sampler has no further points",
}


def read_points(path: Path) -> list[Point]:
    """Read points from a YAML or JSON file: a list of mappings {key: value}.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path)).data
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--from {path}: cannot be read ({error})") from error
    if not isinstance(content, list) or not content or not all(isinstance(item, Mapping) for item in content):
        raise ConfigError(
            f"--from {path}: expected a list of points such as - {{gate.target: 0.3}}; got {shown(content)}"
        )
    return [{str(key): value for key, value in item.items()} for item in content]


def set_values(texts: Sequence[str]) -> Point:
    """Parse `--set KEY=VALUE`; values are read as YAML.

    Raises:
        ConfigError: one has no `=`, or no value.
    """
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text}: expected KEY=VALUE, for example --set gate.target=0.3")
        values[key.strip()] = parse_yaml(value, f"--set {text}").data
    return values


def changed_point(params: Mapping[str, Scalar], changes: Point, space: Space) -> Point:
    """A trial's parameters with changes; parameters of the trial that do not exist under the
    changed values are left out."""
    point: Point = {}
    for key in space.distributions:  # parents before their children
        if key in changes:
            point[key] = changes[key]
        elif key in params and space.has(key, point):
            point[key] = params[key]
    return point | changes


def _params_of(results: RunResults, name: str) -> Mapping[str, Scalar]:
    slot = results.knee if name == "knee" else None
    for record in results.records:
        if record.slot == slot or trial_name(record.slot) == name:
            return record.params
    raise NotFoundError(
        f"--like {name}: run {results.run.name!r} has no such trial; `dsnet-orch trials {results.run.name}` lists them"
    )


def enqueue_points(results: RunResults, points: Sequence[Point], like: str | None = None) -> list[str]:
    """Check points against a run's space and put them in its queue.

    Args:
        results: a run whose search has begun.
        points: {key: value}; the sampler draws the keys that a point leaves out.
        like: a trial whose parameters the points change, or `knee`.

    Returns:
        what will happen, in sentences.

    Raises:
        ConfigError: a point does not fit the space.
        NotFoundError: the search has not begun, or there is no trial of that name.
    """
    run, config, key = results.run, results.config, results.stage_key("search")
    if key is None:
        raise NotFoundError(
            f"the search of run {run.name!r} has not begun; write the points into sampler.enqueue of its sweep file and launch it"
        )
    space = study_settings(config).space
    if like is not None:
        points = [changed_point(_params_of(results, like), changes, space) for changes in points]
    if not any(points):
        raise ConfigError(
            "nothing to enqueue; give values with --set KEY=VALUE, a file with --from, or a trial with --like"
        )
    checked = [
        _checked(space, point, f"point {number}: " if len(points) > 1 else "") for number, point in enumerate(points, 1)
    ]
    append_points(run.queue_jsonl(key), checked)
    return [
        *(f"enqueued {json.dumps(point)}" for point in checked),
        _what_happens(results, len(checked), results.num_waiting),
    ]


def _checked(space: Space, point: Point, which: str) -> Point:
    """The point as the sampler would write it: whole numbers of real-valued settings become
    floats."""
    for key, value in point.items():
        if not isinstance(value, bool | int | float | str):
            raise ConfigError(
                f"{which}{key} is {shown(value)}, but values of a point must be numbers, text, true or false"
            )
    try:
        check_point(space, point)
    except ConfigError as error:
        raise ConfigError(f"{which}{error}") from error
    for key in point:  # without the parent's value it would be random whether the value is tried
        for parent, values in space.conditions.get(key, ()):
            if parent not in point and parent in space.distributions:
                allowed = " or ".join(map(str, values))
                raise ConfigError(f"{which}{key} is only used when {parent} is {allowed}; add {parent} to the point")
    is_real = {key: isinstance(space.distributions[key], FloatDistribution) for key in point}
    return {key: float(value) if is_real[key] else value for key, value in point.items()}


def _what_happens(results: RunResults, number: int, num_waiting: int) -> str:
    """A sentence that says when `number` new points, of `num_waiting` enqueued ones, will be
    tried."""
    run, what = results.run, "it is" if number == 1 else "they are"
    budget = resolve_trials(results.config)
    left = budget - len(results.records)
    rule_off = RULE_OFF.get(results.search_end or "", ())
    own_code = has_own_code(results.config)
    extend = command_line("extend", run.path, "--trials", f"+{num_waiting}", *rule_off, own_code=own_code)
    holder = read_lock(run.lock_path)
    if left <= 0:
        return f"the budget of {plural(budget, 'trial')} is used up; {what} tried after: {extend}"
    short = f"; the budget has {plural(left, 'trial')} left; for more: {extend}" if left < num_waiting else ""
    if holder is not None and holder.is_running():
        return f"the sweep is running ({holder}); {what} tried in its next cohort{short}"
    if rule_off:
        return (
            f"the search ended by its own rule (budget.{results.search_end}); {what} tried after this command, which "
            f"removes the rule: {extend}"
        )
    return f"{what} tried in the next launch: {launch_command(results.config, run.sweep_yaml)}{short}"
