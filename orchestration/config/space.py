"""Rules about `space`: its keys, their conditions, and the points that are tried first.

A key with conditions (`when`) is drawn only in trials in which they hold. Conditions that follow
from what a kind of router reads need not be written: `resolve` adds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.config import ConfigDict
from pydantic.fields import FieldInfo

from dsnet.dotted import flatten
from dsnet.errors import ConfigError
from dsnet.routers.kinds import kind_names
from dsnet.structure.settings import without_unread
from dsnet.wording import shown, way_out
from orchestration.config.distribution import REAL_KINDS, Distribution, Scalar, is_same, thawed
from orchestration.config.gate import GateConfig, RoutingConfig
from orchestration.config.section import BrokenRule, KeyPath, annotated_type, requirement, section_class, walk_fields
from orchestration.config.supernet import CHECKPOINT_MODEL, SupernetConfig

Space = Mapping[str, Distribution]
Point = dict[str, Any]

ROUTER_KEY = "gate.router"
SUPERNET = "supernet."
OPTIONS = "supernet.options."
"""Prefix of a model's options; any name may be swept, because the model checks its options
itself."""
PARENT_KINDS = ("choice", "fixed", "int")
"""Kinds of distributions on which others may be conditional, because their values can be listed."""
MAX_BRANCHES = 10_000
MAX_COMBINATIONS = 256
"""Largest number of combinations of supernet settings that are tried out when the file is
checked."""

_HOW_TRIALS_RUN = "all trials run in the same way"
_WHERE_IT_TRAINS = "it has no influence on the trained supernet"
_EQUAL_TARGETS = "supernets are compared at equal targets"
_NOT_SWEPT: Mapping[str, str] = {
    "gate.trainer": _HOW_TRIALS_RUN,
    "gate.end_to_end": _HOW_TRIALS_RUN,
    "supernet.init_from": "start weights are the same for all supernets",
    "supernet.options": "options are swept one by one, as supernet.options.NAME",
    "supernet.workers": _WHERE_IT_TRAINS,
    "supernet.threads": _WHERE_IT_TRAINS,
    "supernet.device": _WHERE_IT_TRAINS,
    "supernet.keep_checkpoints": _WHERE_IT_TRAINS,
    "supernet.train.checkpoint_every": _WHERE_IT_TRAINS,
    "supernet.structure.concurrent": _WHERE_IT_TRAINS,
    "supernet.structure.targets": _EQUAL_TARGETS,
    "supernet.structure.targets_m": _EQUAL_TARGETS,
    "supernet.structure.widths": _EQUAL_TARGETS,
    "supernet.structure.bases.widths": "they belong to the targets, and supernets are compared at equal targets",
}
"""Keys, or sections, that no space may hold, with the reason."""

_TRAINED_SECTIONS = ("gate.sgs.", "gate.losses.", "gate.optimizer.", "gate.temperature.")
"""Prefixes of settings that only trained kinds of router read."""
_PERCEPTRON_SECTION = "gate.perceptron."

PUBLISHED: Mapping[str, Scalar] = {
    "gate.router": "gate",
    "gate.routing.first": 0,
    "gate.routing.last": -1,
    "gate.routing.stride": 1,
    "gate.routing.beam": 4,
    "gate.sgs.t_easy": 0.0,
    "gate.sgs.t_hard": 0.0,
    "gate.sgs.strategy": "try_best",
    "gate.sgs.target": "extremes",
    "gate.losses.cls": 1.0,
    "gate.losses.sgs": 1.0,
    "gate.losses.complexity": 0.5,
    "gate.losses.form": "paper",
    "gate.losses.quality": 0.0,
}
"""Stage II as published (docs/methods.md, sections 4 and 5), without the optimiser, because the
published one is for end-to-end training. That a beam chooses the four routes is ours."""
_STRATEGY_KEY = "gate.sgs.strategy"
"""Key of the strategy; Try Best and Give Up are both published."""


@cache
def _fields() -> Mapping[str, FieldInfo]:
    return dict(walk_fields(GateConfig, "gate.")) | dict(walk_fields(SupernetConfig, SUPERNET))


def _is_or_is_below(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


@cache
def sweepable_keys() -> tuple[str, ...]:
    """The dotted keys that `space` may hold; it may also hold `supernet.options.NAME`."""
    return tuple(
        key
        for key, field in _fields().items()
        if not section_class(field.annotation) and not any(_is_or_is_below(key, section) for section in _NOT_SWEPT)
    )


@cache
def _adapter(key: str) -> TypeAdapter[Any]:
    return TypeAdapter(annotated_type(_fields()[key]), config=ConfigDict(strict=True, allow_inf_nan=False))


def is_of_supernet(key: str) -> bool:
    """Whether a key of the space is a setting of the supernet, not of the gate."""
    return key.startswith(SUPERNET)


# ---- single entries


def entry_problems(space: Space) -> Iterator[BrokenRule]:
    """Errors: keys that cannot be swept, values outside their field's range, and conditions without
    a meaning."""
    for key, distribution in space.items():
        for message in _entry_messages(key, distribution):
            yield BrokenRule(("space", key), message)
        for parent, values in distribution.when:
            message = _condition_message(space, key, parent, values)
            if message:
                yield BrokenRule(("space", key, "when", parent), message)


def _entry_messages(key: str, distribution: Distribution) -> Iterator[str]:
    reason = next((why for section, why in _NOT_SWEPT.items() if _is_or_is_below(key, section)), "")
    if key.startswith(OPTIONS) and key != OPTIONS:
        return
    if reason:
        yield f"cannot be swept: {reason}; set it outside space"
        return
    known = sweepable_keys()
    if key not in known:
        nested = [name for name in known if name.endswith(f".{key.rpartition('.')[2]}")]
        hint = f"; did you mean '{nested[0]}'?" if len(nested) == 1 or (nested and key.startswith("gate.")) else ""
        yield f"cannot be swept{way_out(key, known, 'keys that can', hint=hint)}"
        return
    for value in distribution.edge_values():
        try:
            _adapter(key).validate_python(value)
        except ValidationError as error:
            yield _edge_message(key, distribution, value, error)


def _edge_message(key: str, distribution: Distribution, value: Any, error: ValidationError) -> str:
    details = error.errors(include_url=False)[0]
    if details["type"] in ("int_type", "int_from_float") and distribution.kind in REAL_KINDS:
        return f"{key} takes whole numbers; write {{int: [low, high]}} in place of {distribution.kind}"
    return f"{distribution.kind} holds {shown(value)}, but {key} {requirement(details['type'], details.get('ctx', {}))}"


def _condition_message(space: Space, key: str, parent: str, values: Sequence[Scalar]) -> str:
    """Why a condition is refused; empty if it is valid."""
    if key == ROUTER_KEY:
        return "gate.router cannot be conditional, because every trial has a router; remove when"
    if parent not in space:
        hint = "" if parent in sweepable_keys() else way_out(parent, [name for name in space if name != key], "keys")
        swept = f"; write it there too, for example space.{parent}: {{choice: [...]}}, or remove the condition"
        return f"{parent} is not in space, so no key can depend on it{hint or swept}"
    if parent == key:
        return "a key cannot depend on itself; remove the condition"
    if is_of_supernet(parent) != is_of_supernet(key):
        return (
            f"{key} cannot depend on {parent}: supernets are drawn and trained first, and the same gates are searched under each; "
            "remove the condition"
        )
    if space[parent].kind not in PARENT_KINDS:
        return f"{parent} is drawn from {space[parent].kind}; keys can only depend on a choice, whole numbers or a fixed value"
    return _unknown_value_message(space[parent], parent, values)


def _unknown_value_message(distribution: Distribution, parent: str, values: Sequence[Scalar]) -> str:
    for value in values:
        if distribution.holds(value):
            continue
        if distribution.kind == "fixed":  # --set may fix what the file sweeps: conditions on it are then resolved
            try:
                if parent in _fields():
                    _adapter(parent).validate_python(value)
                continue
            except ValidationError as error:
                details = error.errors(include_url=False)[0]
                return f"{parent} {requirement(details['type'], details.get('ctx', {}))}; got {shown(value)}"
        offered = [str(each) for each in distribution.edge_values()]
        if distribution.kind == "int":
            return f"{parent} never is {shown(value)}; it is drawn from {' to '.join(offered)}"
        return f"{parent} never is {shown(value)}{way_out(str(value), offered, 'its choices')}"
    return ""


# ---- conditions


def parents_first(space: Space) -> list[str]:
    """The keys in the file's order, but each after those on which it depends; keys of a cycle are
    left out."""
    order: list[str] = []
    left = list(space)
    while left:
        ready = [key for key in left if all(parent in order for parent, _ in space[key].when)]
        if not ready:
            break
        order.append(ready[0])
        left.remove(ready[0])
    return order


def cycle_problems(space: Space) -> Iterator[BrokenRule]:
    """Errors: keys that depend on each other in a cycle, and keys whose conditions cannot hold
    together."""
    order = parents_first(space)
    circle = [key for key in space if key not in order]
    if circle:
        yield BrokenRule(
            ("space", circle[0], "when"), f"{' and '.join(circle)} depend on each other; remove a condition"
        )
        return
    for key in resolve_conditions(space):
        if space[key].when and not any(is_active(space[key], branch) for branch in branches(space, [key])):
            if any(space[parent].kind == "fixed" for parent in _ancestors(space, [key])):
                continue  # resolve drops it, with a warning
            spoken = " and ".join(f"{parent} {' or '.join(map(str, values))}" for parent, values in space[key].when)
            yield BrokenRule(
                ("space", key, "when"), f"the conditions never hold: {spoken} do not occur together; change them"
            )


def is_active(distribution: Distribution, branch: Mapping[str, Any]) -> bool:
    """Whether a dimension is drawn if its parents have the values of `branch`."""
    return all(
        parent in branch and any(is_same(branch[parent], value) for value in values)
        for parent, values in distribution.when
    )


def _ancestors(space: Space, keys: Iterable[str]) -> set[str]:
    found: set[str] = set()
    left = [key for key in keys if key in space]
    while left:
        parents = [parent for parent, _ in space[left.pop()].when if parent not in found]
        found |= set(parents)
        left += parents
    return found


def branches(space: Space, keys: Iterable[str]) -> Iterator[Point]:
    """The possible settings of everything on which `keys` depend (the first `MAX_BRANCHES`); one
    empty setting if they depend on nothing."""
    parents = _ancestors(space, keys)
    names = [key for key in parents_first(space) if key in parents]
    return islice(_settings(space, names, _named_values), MAX_BRANCHES)


def listed_settings(space: Space, keys: Iterable[str]) -> Iterator[Point]:
    """The possible settings of `keys`, whose values can be listed, and of everything on which they
    depend (the first `MAX_BRANCHES`); keys that are not searched are left out."""
    wanted = [key for key in keys if key in space and space[key].kind in PARENT_KINDS]
    parents = _ancestors(space, wanted)
    names = [key for key in parents_first(space) if key in parents or key in wanted]
    return islice(_settings(space, names, _named_values), MAX_BRANCHES)


def _named_values(distribution: Distribution) -> Sequence[Any]:
    if distribution.kind != "int":
        return distribution.values
    low, high, *step = distribution.values
    return range(low, high + 1, *step)


def _settings(space: Space, names: Sequence[str], values_of: Any) -> Iterator[Point]:
    """Every way to set `names` (parents first); a name whose conditions do not hold is left out."""
    if not names:
        yield {}
        return
    *before, last = names
    for point in _settings(space, before, values_of):
        if is_active(space[last], point):
            yield from ({**point, last: value} for value in values_of(space[last]))
        else:
            yield point


def values_in(space: Space, key: str, fixed: Any, branch: Point) -> tuple[Any, ...]:
    """The extreme values of a setting in one branch, if it is drawn there; else its fixed value
    outside of space."""
    return space[key].edge_values() if key in space and is_active(space[key], branch) else (fixed,)


# ---- the space as it is searched


def resolve_conditions(space: Space) -> dict[str, Distribution]:
    """The space with conditions on fixed keys resolved: conditions that always hold are removed,
    and so are keys whose conditions never hold."""
    found: dict[str, Distribution] = {}
    for key in parents_first(space):
        when = []
        for parent, values in space[key].when:
            if parent not in found or (found[parent].kind == "fixed" and not any(map(found[parent].holds, values))):
                break
            if found[parent].kind != "fixed" or found[parent].when:
                when.append((parent, values))
        else:
            found[key] = replace(space[key], when=tuple(when))
    return {key: found[key] for key in space if key in found}


def resolve(space: Space) -> dict[str, Distribution]:
    """The space that is searched: `resolve_conditions`, and if the router is swept, each key only
    for kinds of router that read it."""
    resolved = resolve_conditions(space)
    router = resolved.get(ROUTER_KEY)
    if router is None or router.kind == "fixed":
        return resolved
    return {key: _for_its_readers(key, distribution, router) for key, distribution in resolved.items()}


def gate_part(space: Space) -> dict[str, Distribution]:
    """The part of `resolve(space)` that is searched under each supernet."""
    return {key: distribution for key, distribution in resolve(space).items() if not is_of_supernet(key)}


def _for_its_readers(key: str, distribution: Distribution, router: Distribution) -> Distribution:
    reading = readers(key)
    allowed = dict(distribution.when).get(ROUTER_KEY, router.values)
    kinds = tuple(kind for kind in router.values if kind in allowed and (reading is None or kind in reading))
    if not kinds or reading is None or len(kinds) == len(allowed):
        return distribution  # read by all of them, or by none, which gives a warning
    others = tuple(condition for condition in distribution.when if condition[0] != ROUTER_KEY)
    return replace(distribution, when=((ROUTER_KEY, kinds), *others))


def readers(key: str) -> Sequence[str] | None:
    """The kinds of router that read a key; None if all do.

    A plain cascade is not trained: its pair of routes and its threshold follow from the target and
    the routing space.
    """
    if key.startswith(_PERCEPTRON_SECTION):
        return kind_names(lambda kind: kind.head in ("perceptron", "own"))
    return kind_names(lambda kind: kind.is_trained) if key.startswith(_TRAINED_SECTIONS) else None


def possible_routers(gate: GateConfig, space: Space) -> tuple[str, ...]:
    """The kinds of router that trials may have."""
    return tuple(map(str, space[ROUTER_KEY].edge_values())) if ROUTER_KEY in space else (gate.router,)


def absolute_targets(gate: GateConfig, space: Space) -> tuple[float, ...]:
    """`gate.target_madds_m`, fixed or at the ends of its range; empty if it is not used."""
    key = "gate.target_madds_m"
    found = [value for branch in branches(space, [key]) for value in values_in(space, key, gate.target_madds_m, branch)]
    return tuple(dict.fromkeys(float(value) for value in found if value is not None))


# ---- rules between gate settings


def gate_problems(gate: GateConfig, space: Space) -> Iterator[BrokenRule]:
    """Errors: trials that the space allows and that could not run."""
    yield from _empty_routing_problems(gate.routing, space)
    yield from _target_problems(gate, space)
    yield from _trainer_problems(gate, space)


def _empty_routing_problems(routing: RoutingConfig, space: Space) -> Iterator[BrokenRule]:
    """Refuse a space in which some trial's first route comes after its last one."""
    first_key, last_key = "gate.routing.first", "gate.routing.last"
    if first_key not in space and last_key not in space:
        return
    for branch in branches(space, [first_key, last_key]):
        first = max(values_in(space, first_key, routing.first, branch))
        counted_from_start = [last for last in values_in(space, last_key, routing.last, branch) if last >= 0]
        if counted_from_start and first > min(counted_from_start):
            key = first_key if first_key in space else last_key
            message = f"first may be {first} while last is {min(counted_from_start)}: no route would be left"
            yield BrokenRule(("space", key), message, others=(("space", last_key),) if last_key in space else ())
            return


def _target_problems(gate: GateConfig, space: Space) -> Iterator[BrokenRule]:
    """Refuse a target that is given both relative and absolute."""
    relative, absolute = "gate.target", "gate.target_madds_m"
    if relative not in space:
        return
    for branch in branches(space, [relative, absolute]):
        if not is_active(space[relative], branch) or values_in(space, absolute, gate.target_madds_m, branch) == (None,):
            continue
        path: KeyPath = ("space", absolute) if absolute in space else ("gate", "target_madds_m")
        message = (
            f"{absolute} would replace {relative}, which is in space too; set {absolute} to null, "
            f"or write a space without {relative}"
        )
        yield BrokenRule(path, message, others=(("space", relative),))
        return


def _trainer_problems(gate: GateConfig, space: Space) -> Iterator[BrokenRule]:
    """Refuse routers and losses that end-to-end training does not have."""
    if gate.trainer == "table":
        return
    key = "gate.losses.quality"
    qualities = [value for way in branches(space, [key]) for value in values_in(space, key, gate.losses.quality, way)]
    if any(qualities):
        path: KeyPath = ("space", key) if key in space else ("gate", "losses", "quality")
        message = "gate.trainer end_to_end has the published losses only; set gate.losses.quality to 0, or choose gate.trainer table"
        yield BrokenRule(path, message, others=(("gate", "trainer"),))
    able = kind_names(lambda kind: kind.trains_end_to_end)
    impossible = [router for router in possible_routers(gate, space) if router not in able]
    if impossible:
        path = ("space", ROUTER_KEY) if ROUTER_KEY in space else ("gate", "router")
        message = (
            f"gate.trainer end_to_end trains {' and '.join(able)} only, not {', '.join(impossible)}; "
            "choose gate.trainer table, or another router"
        )
        yield BrokenRule(path, message, others=(("gate", "trainer"),))


# ---- rules between settings of the supernet


def supernet_problems(supernet: SupernetConfig, space: Space) -> Iterator[BrokenRule]:
    """Errors of sweeps of supernets: of a network that exists already, with contradicting settings,
    or without gates."""
    keys = [key for key in space if is_of_supernet(key)]
    if not keys:
        return
    first: KeyPath = ("space", keys[0])
    if len(keys) == len(space):
        message = "space has supernet.* keys only, so no gate would be searched; add a gate setting, for example gate.target: 0.5"
        yield BrokenRule(first, message)
    if supernet.model == CHECKPOINT_MODEL and "supernet.model" not in space:
        message = "supernet.model checkpoint is one finished network, whose settings cannot be swept; name a model, or remove this key"
        yield BrokenRule(first, message, others=(("supernet", "model"),))
        return
    if "supernet.model" in space and not all(map(_is_built, space["supernet.model"].edge_values())):
        yield BrokenRule(
            ("space", "supernet.model"),
            "checkpoint is one finished network and cannot be swept; remove it from the models",
        )
        return
    shapes = [key for key in keys if key == "supernet.model" or key.startswith(OPTIONS)]
    if supernet.init_from is not None and any(space[key].kind != "fixed" for key in shapes):
        message = f"supernet.init_from has weights for one network, but sweeping {shapes[0]} gives others; remove one of the two"
        yield BrokenRule(("space", shapes[0]), message, others=(("supernet", "init_from"),))
        return
    yield from impossible_supernets(supernet, space)


def _is_built(model: object) -> bool:
    return model != CHECKPOINT_MODEL


def supernet_combinations(space: Space) -> list[Point]:
    """Combinations of supernet settings at the ends of their ranges; empty if there are none, or
    more than `MAX_COMBINATIONS`."""
    part = {key: distribution for key, distribution in resolve_conditions(space).items() if is_of_supernet(key)}
    if not part:
        return []
    found = list(islice(_settings(part, parents_first(part), Distribution.edge_values), MAX_COMBINATIONS + 1))
    return found if len(found) <= MAX_COMBINATIONS else []


def supernet_with(supernet: SupernetConfig, point: Mapping[str, Any]) -> SupernetConfig:
    """The section `supernet` with some settings of the space filled in. Settings of structure
    methods that the chosen one does not read have their defaults.

    Args:
        supernet: section `supernet` of the sweep.
        point: dotted key below `supernet.` -> value.

    Raises:
        ValidationError: they contradict each other.
    """
    plain = supernet.model_dump(mode="json")
    for key, value in point.items():
        _, *sections, leaf = (
            key.split(".") if not key.startswith(OPTIONS) else ["", "options", key.removeprefix(OPTIONS)]
        )
        section = plain
        for name in sections:
            section = section[name]
        section[leaf] = thawed(value)
    plain["structure"] = without_unread(plain["structure"])
    return SupernetConfig.model_validate(plain)


def _nothing_more(supernet: SupernetConfig) -> None:
    """Accept every supernet whose settings do not contradict each other."""


def _refusals(
    supernet: SupernetConfig, space: Space, check: Callable[[SupernetConfig], None] = _nothing_more
) -> list[tuple[Point, str]]:
    """Each combination with the reason why it is refused; an empty reason if it is not."""
    found = []
    for point in supernet_combinations(space):
        try:
            check(supernet_with(supernet, point))
            found.append((point, ""))
        except ValidationError as error:
            found.append((point, "; ".join(rule_texts(error))))
        except ConfigError as error:
            found.append((point, str(error)))
    return found


def rule_texts(error: ValidationError) -> Iterator[str]:
    """The errors of a `supernet` section, each with its dotted key."""
    for details in error.errors(include_url=False):
        context = details.get("ctx", {})
        message = requirement(details["type"], context)
        for rule in context.get("rules", [BrokenRule((), message)]):
            yield str(replace(rule, path=("supernet", *details["loc"], *rule.path)))


def impossible_supernets(
    supernet: SupernetConfig, space: Space, check: Callable[[SupernetConfig], None] = _nothing_more
) -> Iterator[BrokenRule]:
    """Errors: values with which no supernet can be trained, whatever the others are.

    Args:
        supernet: the section, which is as the sweep has it where space says nothing.
        space: space of the sweep.
        check: raises ConfigError for a supernet that is refused for more than contradictions.
    """
    refusals = _refusals(supernet, space, check)
    for key, distribution in space.items():
        for value in distribution.edge_values() if is_of_supernet(key) else ():
            own = [why for point, why in refusals if key in point and is_same(point[key], value)]
            if own and all(own):
                yield BrokenRule(("space", key), f"no supernet can be made with {shown(thawed(value))}: {own[0]}")
                return


def supernet_warnings(supernet: SupernetConfig, space: Space) -> Iterator[str]:
    """A warning about combinations of settings that make no supernet, although each of them makes
    one with others."""
    refused = [(point, why) for point, why in _refusals(supernet, space) if why]
    if refused:
        point, why = refused[0]
        spoken = ", ".join(f"{key} {shown(thawed(value))}" for key, value in point.items())
        yield f"space holds supernets that cannot be trained, and count as failed: with {spoken}: {why}"


# ---- points that are tried first


def point_problems(space: Space, points: Sequence[Mapping[str, Scalar]], path: KeyPath) -> Iterator[BrokenRule]:
    """Errors: points outside the space. `space` is resolved; a point need not name all of its
    keys."""
    for index, point in enumerate(points):
        if not point:
            yield BrokenRule((*path, index), "names no setting; write {KEY: value}, or [] for no points")
        for key, value in point.items():
            message = _point_message(space, point, key, value)
            if message:
                yield BrokenRule((*path, index, key), message)


def _point_message(space: Space, point: Mapping[str, Scalar], key: str, value: Scalar) -> str:
    if is_of_supernet(key):
        return "supernets are drawn before the search, not enqueued; remove it"
    if key not in space:
        return f"is not in space{way_out(key, [name for name in space if not is_of_supernet(name)], 'keys of space')}"
    if not space[key].holds(value):
        return f"{shown(value)} is not in {_spoken(space[key])}; choose a value that the search could draw"
    for parent, values in space[key].when:
        if parent not in point:
            return f"is drawn only where {parent} is {_either(values)}; name {parent} in the point too"
        if not any(is_same(point[parent], allowed) for allowed in values):
            return f"is drawn only where {parent} is {_either(values)}, and this point has {shown(point[parent])}; remove it"
    return ""


def _spoken(distribution: Distribution) -> str:
    if distribution.kind == "fixed":
        return f"the fixed value {shown(distribution.values[0])}"
    return f"{distribution.kind} {shown([thawed(value) for value in distribution.values])}"


def _either(values: Sequence[Scalar]) -> str:
    return " or ".join(map(str, values))


def published_points(gate: GateConfig, space: Space) -> tuple[Point, ...]:
    """The published settings as far as a resolved space holds them: with Try Best, and also with
    Give Up if the strategy is swept.

    Settings that were not published stay as in `gate`. Settings that the space does not hold, and
    those that depend on them, are left out, for the sampler to draw.
    """
    strategies = ("try_best", "give_up") if _STRATEGY_KEY in space else ("try_best",)
    points = [_published_point(gate, space, {**PUBLISHED, _STRATEGY_KEY: strategy}) for strategy in strategies]
    return tuple(point for index, point in enumerate(points) if point and point not in points[:index])


def _published_point(gate: GateConfig, space: Space, published: Mapping[str, Scalar]) -> Point:
    defaults = flat_gate(gate)
    point: Point = {}
    for key in parents_first(space):
        value = published.get(key, defaults.get(key))
        if (
            space[key].kind != "fixed"
            and value is not None
            and space[key].holds(value)
            and is_active(space[key], point)
        ):
            point[key] = value
    return {key: point[key] for key in space if key in point}


def flat_gate(gate: GateConfig) -> dict[str, Any]:
    """Every setting of the gate by its dotted key."""
    return flatten(gate.model_dump(mode="json"), "gate.")


# ---- what is allowed, but has no effect


def unread_warnings(gate: GateConfig, space: Space) -> Iterator[str]:
    """Warnings about dimensions that have no effect on any trial."""
    routers = possible_routers(gate, space)
    resolved = resolve(space)
    for key in space:
        if key not in resolved:
            yield f"space.{key} is never drawn: its conditions do not hold with the fixed values of space"
            continue
        reading, kinds = readers(key), dict(resolved[key].when).get(ROUTER_KEY, routers)
        if reading is not None and not set(reading) & set(map(str, kinds)) and resolved[key].kind != "fixed":
            yield f"space.{key} has no effect: {', '.join(map(str, kinds))} does not read it; remove it"
    yield from _unread_because(gate, resolved, "gate.sgs.target", "cheapest", ("gate.sgs.t_easy", "gate.sgs.t_hard"))
    yield from _unread_because(gate, resolved, "gate.sgs.strategy", "try_best", ("gate.sgs.t_hard",))
    sgs = ("gate.sgs.t_easy", "gate.sgs.t_hard", "gate.sgs.strategy", "gate.sgs.target")
    yield from _unread_because(gate, resolved, "gate.losses.sgs", 0.0, sgs)
    yield from _unread_because(gate, resolved, "gate.losses.quality", 0.0, ("gate.losses.quality_of",))
    yield from _unread_because(gate, resolved, "gate.losses.complexity", 0.0, ("gate.losses.form",))
    yield from _unread_because(gate, resolved, "gate.trainer", "end_to_end", ("gate.optimizer.steps",))


_CAUSES: Mapping[str, str] = {"gate.trainer": ": gate.end_to_end.epochs counts"}


def _unread_because(gate: GateConfig, space: Space, cause: str, value: object, keys: Sequence[str]) -> Iterator[str]:
    """Warnings about dimensions that have no effect because of a fixed setting."""
    held = space[cause].values[0] if cause in space and space[cause].kind == "fixed" else flat_gate(gate).get(cause)
    if (cause in space and space[cause].kind != "fixed") or held != value:
        return
    for key in keys:
        if key in space and space[key].kind != "fixed":
            yield f"space.{key} has no effect with {cause} {shown(held) if isinstance(held, float) else held}{_CAUSES.get(cause, '')}"
