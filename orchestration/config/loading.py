"""Loading of a sweep: from file, preset and command line to one checked configuration that records
the origin of each value.

Settings are merged in this order, later ones win: default, environment (data.path only), file,
preset, `--set`, flag. Errors of pydantic are reported in plain words, with file, line and column.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dsnet.data.registry import data_set_names, find_data_set
from dsnet.errors import ConfigError
from dsnet.import_path import is_model_path
from dsnet.wording import plural, shown, way_out
from orchestration.config.default_space import default_space
from orchestration.config.first_release import first_release_settings
from orchestration.config.presets import BUILT_IN_PRESETS, built_in_settings
from orchestration.config.resolve import known_fields, supernet_space
from orchestration.config.section import Section, is_nullable, requirement, section_class
from orchestration.config.space import impossible_supernets
from orchestration.config.store_uri import shown_uri
from orchestration.config.supernet import CHECKPOINT_MODEL, SupernetConfig, resolve_regime
from orchestration.config.sweep import SweepConfig
from orchestration.config.warnings import config_warnings
from orchestration.config.yaml_source import KeyPath, YamlSource, parse_yaml, read_yaml_file

DATA_VARIABLE = "DSNET_DATA"
_USUAL_SIZES: Mapping[str, int] = {"digits": 8}
"""Image size, side in pixels, that is assumed if none is given; 32 for other data sets."""
_MAX_PROBLEMS = 20
"""Number of problems that a message lists."""
_MAX_EXPLAINED = 500
"""Number of errors of pydantic that are put into words, which takes a millisecond each."""
_NAMES_WITH_OPTIONS: Mapping[str, str] = {"supernet": "model", "sampler": "name", "supernets": "scheduler"}
"""Key of the name to which the `options` of a section belong, by section."""
_FIRST_RELEASE = "first release"
"""Origin of values that a file of the first release left to defaults that have changed since."""
_METHOD = "supernet.structure.method"
_NEEDED = "version, name, data.name and supernet.model"


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration with the origin of each setting."""

    config: SweepConfig
    """Resolved: presets are applied and removed, `~` and $VARIABLES expanded."""
    origins: dict[str, str]
    """Dotted key of every setting -> "flag", "--set", "preset NAME", "FILE:LINE", "$DSNET_DATA" or
    "default"."""
    presets: tuple[str, ...] = ()
    """Names of the presets that the file holds."""
    warnings: tuple[str, ...] = ()
    """Warnings about settings that are allowed, but probably not meant."""


def load_config(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
    preset: str | None = None,
    known_models: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Read sweep.yaml and apply preset, overrides and flags to it.

    Args:
        path: the file.
        overrides: texts `a.b=value` as given to --set; the value is YAML. Mappings are merged,
            anything else is replaced.
        flags: dotted key -> value from dedicated options; None means that the option was not given.
        preset: name of a preset in the file, or else of a built-in one.
        known_models: names of the architecture families; None leaves supernet.model and its options
            unchecked.
        environ: environment variables; None = those of this process.

    Raises:
        ConfigError: with one line for each error, in the order of the file.
    """
    source = read_yaml_file(Path(path))
    return load_source_text(
        source, overrides=overrides, flags=flags, preset=preset, known_models=known_models, environ=environ
    )


def load_source_text(
    source: YamlSource,
    *,
    overrides: Sequence[str] = (),
    flags: Mapping[str, object] | None = None,
    preset: str | None = None,
    known_models: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """The same as `load_config` for a text, which need not be in a file."""
    file_settings = _top_level_mapping(source)
    presets = _presets(source, file_settings)
    file_layer = _Layer({key: value for key, value in file_settings.items() if key != "presets"}, source)
    earlier = first_release_settings(file_settings)
    earlier_layers = [_Layer(earlier, label=_FIRST_RELEASE, origin_label=_FIRST_RELEASE)] if earlier else []
    top_layers = [_override_layer(text) for text in overrides]
    top_layers += [_flag_layer(key, value) for key, value in (flags or {}).items() if value is not None]
    preset_layers = [] if preset is None else [_preset_layer(source, presets, preset, file_settings)]

    environment = os.environ if environ is None else environ
    stack = _Stack.of([file_layer, *earlier_layers, *preset_layers, *top_layers])
    config, problems = _checked(stack, known_models, environment)
    others = [_preset_layer(source, presets, name, file_settings) for name in presets if name != preset]
    problems += _problems_of_presets(file_layer, others, known_models, environment)
    if problems or config is None:
        raise ConfigError(_listed(_in_file_order(problems)))
    origins = _origins(config, stack)
    warnings = [*stack.notices, *config_warnings(config), *_unused_settings(config, origins)]
    return LoadedConfig(config, origins, tuple(presets), tuple(warnings))


@dataclass(frozen=True)
class _Layer:
    """Settings from one source: the file, a preset or an option."""

    settings: Mapping[str, Any]
    source: YamlSource | None = None
    """The file that holds the settings; None if they come from elsewhere."""
    prefix: KeyPath = ()
    """Path of the settings in the file: ("presets", name) for a preset."""
    label: str = ""
    """Name of the source in messages, if it is not a file."""
    origin_label: str = ""
    """Origin to record for the settings; empty = file and line."""

    def origin(self, path: KeyPath) -> str:
        if self.origin_label or self.source is None:
            return self.origin_label
        return f"{Path(self.source.name).name}:{self.source.position(self.prefix + path, at_key=True).line}"

    def problem(self, path: KeyPath, message: str, *, at_key: bool) -> _Problem:
        rank, place = (2, 0, 0), self.label
        if self.source is not None:
            position = self.source.position(self.prefix + path, at_key=at_key)
            rank, place = (1, *position), self.source.place(self.prefix + path, at_key=at_key)
        key = _dotted(path)
        return _Problem(rank, f"{place}: {key}: {message}" if key else f"{place}: {message}")


@dataclass(frozen=True)
class _Problem:
    """One error in the configuration, as shown to the user."""

    rank: tuple[int, int, int]
    """Sort key: errors in the file come first, by line and column."""
    text: str

    def __str__(self) -> str:
        return self.text


def _listed(problems: Sequence[_Problem]) -> str:
    """The first problems, and how many more there are."""
    lines = [str(problem) for problem in problems[:_MAX_PROBLEMS]]
    num_more = len(problems) - len(lines)
    more = "many more problems" if len(problems) >= _MAX_EXPLAINED else plural(num_more, "more problem")
    return "\n".join([*lines, f"... and {more}"] if num_more else lines)


def _in_file_order(problems: Iterable[_Problem]) -> list[_Problem]:
    unique = {problem.text: problem for problem in problems}
    return sorted(unique.values(), key=lambda problem: problem.rank)


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _top_level_mapping(source: YamlSource) -> dict[str, Any]:
    if source.data is None:
        raise ConfigError(f"{source.name}: is empty; a sweep file needs at least {_NEEDED}")
    if not isinstance(source.data, dict):
        met = "a list" if isinstance(source.data, list) else shown(source.data)
        raise ConfigError(f"{source.place(())}: expected settings 'key: value', at least {_NEEDED}; got {met}")
    return source.data


def _presets(source: YamlSource, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The file's presets, each one a mapping of settings."""
    presets = settings.get("presets", {})
    at = ("presets",)
    if not isinstance(presets, dict):
        raise ConfigError(f"{source.place(at)}: presets: expected NAME: settings; got {shown(presets)}")
    for name, content in presets.items():
        if not isinstance(content, dict):
            raise ConfigError(f"{source.place((*at, name))}: presets.{name}: expected settings; got {shown(content)}")
        if "presets" in content:
            place = source.place((*at, name, "presets"), at_key=True)
            raise ConfigError(f"{place}: presets.{name}.presets: a preset cannot hold presets; remove it")
    return presets


def _preset_layer(source: YamlSource, presets: Mapping[str, Any], name: str, settings: Mapping[str, Any]) -> _Layer:
    """The file's preset of that name, or else the built-in one."""
    origin = f"preset {name}"
    if name in presets:
        return _Layer(presets[name], source, ("presets", name), origin_label=origin)
    if name in BUILT_IN_PRESETS:
        swept = _swept_keys(settings, BUILT_IN_PRESETS[name])
        return _Layer(built_in_settings(name, swept), label=origin, origin_label=origin)
    place = source.place(("presets",), at_key=True) if presets else source.name
    known = [*presets, *BUILT_IN_PRESETS]
    raise ConfigError(f"{place}: unknown preset '{name}'{way_out(name, known, 'known presets')}")


def _swept_keys(settings: Mapping[str, Any], preset: Mapping[str, Any]) -> list[str]:
    """The keys that the file's space sweeps, or those of the default space under the preset's
    settings."""
    space = settings.get("space", default_space([settings, preset]))
    return list(space) if isinstance(space, Mapping) else []


def _override_layer(text: str) -> _Layer:
    """The settings of one `--set a.b=value`."""
    label = f"--set {shown_uri(text)}"  # it may hold the password of a store
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{label}: expected KEY=VALUE, for example --set supernet.train.epochs=5")
    return _Layer(_nested(key.strip(), parse_yaml(value, label).data, label), label=label, origin_label="--set")


def _flag_layer(key: str, value: object) -> _Layer:
    written = os.fspath(value) if isinstance(value, os.PathLike) else value
    return _Layer(_nested(key, written, "command line"), label="command line", origin_label="flag")


def _nested(dotted: str, value: object, label: str) -> dict[str, Any]:
    head, _, tail = dotted.partition(".")
    # The keys of `space` contain dots themselves: space.gate.target is the entry "gate.target".
    keys = [head, tail] if head == "space" and tail else dotted.split(".")
    if not all(keys):
        raise ConfigError(f"{label}: '{dotted}' is not a dotted key such as supernet.train.epochs")
    if head == "presets":
        raise ConfigError(f"{label}: presets can be written in the file only; choose one with --preset NAME")
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)
    return value


@dataclass(frozen=True)
class _Stack:
    """Layers of settings, merged in order."""

    settings: dict[str, Any]
    owners: dict[KeyPath, _Layer]
    """The layer that wrote the value at each path; a section belongs to the first layer that has
    it."""
    layers: list[_Layer]
    """The layers in the order in which they were laid."""
    notices: list[str]
    """Warnings about settings of the file that a later layer has removed."""

    @classmethod
    def of(cls, layers: Sequence[_Layer]) -> _Stack:
        stack = cls({}, {(): layers[0]}, [], [])
        if "space" not in layers[0].settings:  # so that a preset or --set changes the default space, not replaces it
            stack.settings["space"] = default_space([layer.settings for layer in layers])
        for layer in layers:
            stack.lay(layer)
        return stack

    def lay(self, layer: _Layer) -> None:
        self._forget_other_options(layer)
        self.layers.append(layer)
        self._merge(self.settings, layer.settings, (), layer)

    def _forget_other_options(self, layer: _Layer) -> None:
        """Drop options of another name: a layer that changes the name (of the model, sampler or
        scheduler) begins without the options of the layers below it."""
        for section, name in _NAMES_WITH_OPTIONS.items():
            below, above = self.settings.get(section), layer.settings.get(section)
            if not isinstance(below, dict) or not isinstance(above, Mapping):
                continue
            if "options" in below and name in above and above[name] != below.get(name):
                self._disown((section, "options"))
                options = below.pop("options")
                if isinstance(options, Mapping) and options and "options" not in above:
                    dropped = ", ".join(f"{section}.options.{key}" for key in options)
                    self.notices.append(
                        f"{layer.origin_label} sets {section}.{name} to {above[name]}; the options of {below.get(name)} are "
                        f"left out: {dropped}"
                    )

    def _merge(self, below: dict[str, Any], above: Mapping[str, Any], path: KeyPath, layer: _Layer) -> None:
        for key, value in above.items():
            here = (*path, key)
            is_distribution = len(here) == 2 and here[0] == "space"
            if not isinstance(value, Mapping) or is_distribution:
                if key in below:  # else nothing in it has an owner
                    self._disown(here)
                self.owners[here] = layer
                below[key] = value
                continue
            if not isinstance(below.get(key), dict):
                self._disown(here)
                below[key] = {}
            self.owners.setdefault(here, layer)
            self._merge(below[key], value, here, layer)

    def _disown(self, path: KeyPath) -> None:
        for owned in [owned for owned in self.owners if owned[: len(path)] == path]:
            del self.owners[owned]

    def owner(self, path: KeyPath) -> _Layer:
        """The layer that wrote the value at `path`, or the nearest section around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.owners:
                return self.owners[path[:end]]
        raise AssertionError("the root always has an owner")

    def last_written(self, paths: Sequence[KeyPath]) -> KeyPath:
        """The setting, among several, that the topmost layer wrote; the first if no layer wrote
        any."""

        def height(path: KeyPath) -> int:
            written = self.owners.get(path)
            return max((number for number, layer in enumerate(self.layers) if layer is written), default=-1)

        return max(paths, key=height)

    def problem(self, path: KeyPath, message: str, *, at_key: bool = False) -> _Problem:
        return self.owner(path).problem(path, message, at_key=at_key)


def _checked(
    stack: _Stack, known_models: Sequence[str] | None, environ: Mapping[str, str]
) -> tuple[SweepConfig | None, list[_Problem]]:
    """The configuration, or None, and the errors found."""
    _fill_method(stack)
    problems = [*_fill_paths(stack, environ), *_model_problems(stack, known_models)]
    try:
        config = SweepConfig.model_validate(stack.settings)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True)
        for each in _first_causes(details[:_MAX_EXPLAINED]):
            problems.extend(_explained(each, stack))
        return None, problems
    if not problems and known_models is not None:
        problems += _option_problems(config, stack, known_models)
    return config, problems


def _first_causes(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """The errors, without those of lists that are too short only because their items are
    refused."""
    places = [error["loc"] for error in errors]
    return [
        error
        for error in errors
        if error["type"] != "too_short"
        or not any(place[: len(error["loc"])] == error["loc"] and place != error["loc"] for place in places)
    ]


def _problems_of_presets(
    file_layer: _Layer, presets: Sequence[_Layer], known_models: Sequence[str] | None, environ: Mapping[str, str]
) -> Iterator[_Problem]:
    """Errors that occur only if a preset that was not chosen is applied to the file."""
    _, of_the_file = _checked(_Stack.of([file_layer]), known_models, environ) if presets else (None, [])
    known = {problem.text for problem in of_the_file}
    for preset in presets:
        _, problems = _checked(_Stack.of([file_layer, preset]), known_models, environ)
        for problem in problems:
            if problem.text not in known:
                yield replace(problem, text=f"{problem.text} (with --preset {preset.prefix[-1]})")


def _has_folder(name: object) -> bool:
    """Whether a data set lies in a folder that the user names; False for unknown names."""
    return name in data_set_names() and find_data_set(str(name)).has_folder


def _fill_paths(stack: _Stack, environ: Mapping[str, str]) -> Iterator[_Problem]:
    """Take data.path from the environment if it is not given, and expand `~` and $VARIABLES in
    paths."""
    data = stack.settings.get("data")
    if isinstance(data, dict) and _has_folder(data.get("name")) and data.get("path") is None:
        folder = environ.get(DATA_VARIABLE)
        if folder:
            label = f"environment variable {DATA_VARIABLE}"
            stack.lay(_Layer({"data": {"path": folder}}, label=label, origin_label=f"${DATA_VARIABLE}"))
    for section, key in (("data", "path"), ("supernet", "init_from"), ("storage", "runs")):
        settings = stack.settings.get(section)
        if isinstance(settings, dict) and isinstance(settings.get(key), str):
            settings[key], missing = _expanded(settings[key], environ)
            for name in missing:
                message = f"the environment variable {name} is not set; set it or write the path out"
                yield stack.problem((section, key), message)


def _fill_method(stack: _Stack) -> None:
    """If `space` chooses the method of the structure and its section names none, take the first
    choice: the other settings of the section belong to some method."""
    space, supernet = stack.settings.get("space"), stack.settings.get("supernet")
    distribution = space.get(_METHOD) if isinstance(space, dict) else None
    choices = distribution.get("choice") if isinstance(distribution, Mapping) else None
    structure = supernet.get("structure", {}) if isinstance(supernet, dict) else None
    if isinstance(choices, list) and choices and isinstance(structure, dict) and "method" not in structure:
        path = ("space", _METHOD)
        owner = next(stack.owners[part] for part in (path, path[:1], ()) if part in stack.owners)
        place = owner.label if owner.source is None else owner.source.place(owner.prefix + path, at_key=True)
        origin, written = f"first choice of space.{_METHOD}", {"supernet": {"structure": {"method": choices[0]}}}
        stack.lay(_Layer(written, label=f"{place}: {origin}", origin_label=origin))


def _expanded(text: str, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """The path with `~`, $NAME and ${NAME} replaced, and the names that are not set."""
    pattern = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
    missing = [name for match in pattern.finditer(text) if (name := match[1] or match[2]) not in environ]
    replaced = pattern.sub(lambda match: environ.get(match[1] or match[2], match[0]), text)
    return os.path.expanduser(replaced), missing


def _model_problems(stack: _Stack, known_models: Sequence[str] | None) -> Iterator[_Problem]:
    written = stack.settings.get("supernet")
    supernet: Mapping[str, Any] = written if isinstance(written, dict) else {}
    model = supernet.get("model")
    if known_models is None or not isinstance(model, str) or not model:
        return
    known = [*known_models, CHECKPOINT_MODEL]
    if model not in known and not is_model_path(model):
        message = f"unknown model '{model}'{way_out(model, known, 'known models')}"
        yield stack.problem(("supernet", "model"), message)
    elif model != CHECKPOINT_MODEL and isinstance(supernet.get("options"), dict):
        yield from _unknown_options(stack, model, supernet["options"])


def _unknown_options(stack: _Stack, model: str, options: Mapping[str, Any]) -> Iterator[_Problem]:
    # Imported here: families need torch, which a check without known models does without.
    from dsnet.families import unknown_options

    for key, message in unknown_options(model, options).items():
        yield stack.problem(("supernet", "options", key), message, at_key=True)


def _option_problems(config: SweepConfig, stack: _Stack, known_models: Sequence[str]) -> Iterator[_Problem]:
    """Errors that the family finds in its options, at the image size that the file gives."""
    supernet = config.supernet
    swept = supernet_space(config)
    if "supernet.model" in swept:
        for model in swept["supernet.model"].edge_values():
            if model not in known_models and not is_model_path(str(model)):
                message = f"unknown model '{model}'{way_out(str(model), known_models, 'known models')}"
                yield stack.problem(("space", "supernet.model"), message)
                return
    if any(key == "supernet.model" or key.startswith("supernet.options.") for key in swept):
        for rule in impossible_supernets(supernet, config.space, partial(_check_options, config)):
            yield stack.problem(rule.path, rule.message)
        return
    if supernet.model == CHECKPOINT_MODEL:
        return
    try:
        _check_options(config, supernet)
    except ConfigError as error:
        where, message = _parted(error)
        yield stack.problem(
            _blamed(where, message, list(supernet.options)), message, at_key="unknown option" in message
        )


def _parted(error: ConfigError) -> tuple[str, str]:
    """The setting that a family's error message begins with, and the rest; the model, where the
    network itself cannot be used."""
    where, _, message = str(error).partition(": ")
    return (where, message) if where.startswith("supernet.") else ("supernet.model", str(error))


def _blamed(where: str, message: str, options: list[str]) -> KeyPath:
    """The setting to which a family's error message belongs: the model, an option, or all
    options."""
    if where == "supernet.model":
        return ("supernet", "model")
    named = [key for key in options if re.search(rf"\b{re.escape(key)}\b", where)]
    named = named or [key for key in options if re.match(rf"{re.escape(key)}\b", message)]
    return ("supernet", "options", *named[:1])


def _check_options(config: SweepConfig, supernet: SupernetConfig) -> None:
    """Lay out the network, to check the options of its family.

    Raises:
        ConfigError: the family refuses its options.
    """
    # Imported here: families need torch, which a check without known models does without.
    from dsnet.families import Task, layout, unknown_options
    from dsnet.network.plain import make_plain

    if is_model_path(supernet.model):  # it may be made for these images alone, which are not known yet
        for name, message in unknown_options(supernet.model, supernet.options).items():
            raise ConfigError(f"supernet.options.{name}: {message}")
        make_plain(supernet.model, 10, 3, 0)
        return
    usual_size = _USUAL_SIZES.get(config.data.name, 32)
    task = Task(num_classes=10, in_channels=3, image_size=config.data.image_size or usual_size)
    layout(supernet.model, task, supernet.options, resolve_regime(supernet).norm)


def _explained(details: ErrorDetails, stack: _Stack) -> Iterator[_Problem]:
    """One error of pydantic in plain words."""
    path: KeyPath = tuple(details["loc"])
    kind = details["type"]
    if kind == "broken_rules":
        for rule in details["ctx"]["rules"]:
            place = stack.last_written([path + each for each in (rule.path, *rule.others)])
            yield stack.problem(place, rule.message)
    elif kind == "extra_forbidden":
        yield stack.problem(path, _unknown_key(path), at_key=True)
    elif kind == "missing":
        yield stack.problem(path, _missing_key(path), at_key=True)
    else:
        yield stack.problem(path, _wrong_value(path, details))


def _unknown_key(path: KeyPath) -> str:
    word = str(path[-1])
    section = _section_at(path[:-1])
    known = [*section.model_fields] if section else []
    return f"unknown key '{word}'{way_out(word, known, 'known keys', hint=_key_elsewhere(path))}"


def _key_elsewhere(path: KeyPath) -> str:
    """A hint for a key that belongs to another section; places below the same top-level section are
    preferred."""
    places = [dotted for dotted in known_fields() if dotted.endswith(f".{path[-1]}")]
    places = [dotted for dotted in places if dotted.startswith(f"{path[0]}.")] or places
    return f"; did you mean {' or '.join(map(repr, places))}?" if 1 <= len(places) <= 3 else ""


def _section_at(path: KeyPath) -> type[BaseModel] | None:
    if not path:
        return SweepConfig
    field = known_fields().get(_dotted(path))
    if field is not None:
        return section_class(field.annotation) or _section_inside(field.annotation)
    around = known_fields().get(_dotted(path[:-1]))  # an item of a list or mapping, such as metrics.0
    return _section_inside(around.annotation) if around is not None else None


def _section_inside(annotation: object) -> type[Section] | None:
    """The section class inside an optional, a list or a mapping of sections; None if there is
    none."""
    found = (section_class(argument) for argument in get_args(annotation))
    return next((section for section in found if section is not None), None)


def _missing_key(path: KeyPath) -> str:
    section = _section_at(path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    meaning = field.description if field is not None else None
    return (
        f"is required and missing ({' '.join(meaning.split()).rstrip('.')})" if meaning else "is required and missing"
    )


_EXPECTED: Mapping[str, str] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "model_type": "a section of settings",
    "model_attributes_type": "a section of settings",
    "dict_type": "a section of settings",
    "tuple_type": "a list",
    "list_type": "a list",
    "literal_error": "one of {expected}",
}


def _wrong_value(path: KeyPath, details: ErrorDetails) -> str:
    kind, context, met = details["type"], details.get("ctx", {}), details["input"]
    if path[:1] == ("tracking",) and isinstance(met, str):
        met = shown_uri(met)  # it may hold the password of a store
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return _not_a_choice(path, met, context["expected"])
    if kind == "string_pattern_mismatch":
        return (
            f"{shown(met)} is not a valid name; use 1 to 64 letters, digits, '.', '_' or '-', and no '.' at the start"
        )
    if kind in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        direction = "at least" if kind == "too_short" else "at most"
        return f"must hold {direction} {bound} entries; got {context['actual_length']}"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}{_or_null(path)}; got {shown(met)}{_spelling_hint(kind, met)}"
    return f"{requirement(kind, context)}; got {shown(met)}"


def _or_null(path: KeyPath) -> str:
    field = known_fields().get(_dotted(path))
    return " or null" if field is not None and is_nullable(field) else ""


def _spelling_hint(kind: str, met: object) -> str:
    """A hint for the commonest wrong types: missing or needless quotes, or yes and no of YAML
    1.1."""
    if kind == "string_type" and isinstance(met, bool | int | float):
        return f"; to mean text, quote it: '{shown(met)}'"
    is_quoted_number = isinstance(met, str) and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", met, re.IGNORECASE)
    if kind in ("int_type", "float_type") and is_quoted_number:
        return "; remove the quotes"
    if kind == "bool_type" and isinstance(met, str):
        return {"yes": "; write true", "on": "; write true", "no": "; write false", "off": "; write false"}.get(met, "")
    return ""


_ALIASES: Mapping[str, str] = {
    "bfloat16": "bf16",
    "amp": "bf16",
    "fp32": "float32",
    "gpu": "cuda",
    "inplace_bootstrapping": "ib",
    "batchnorm": "private_stats",
    "groupnorm": "group_norm",
}
"""Correct values for common other spellings, by spelling, where similarity of letters would suggest
a wrong value."""


def _not_a_choice(path: KeyPath, met: object, expected: str) -> str:
    known = re.findall(r"'([^']*)'", expected) or [expected]
    what = path[-2] if path[-1] == "name" else path[-1]
    if not isinstance(met, str):
        return f"expected one of {', '.join(known)}; got {shown(met)}"
    meant = _ALIASES.get(met.lower())
    hint = f"; did you mean '{meant}'?" if meant in known else ""
    return f"unknown {what} '{met}'{way_out(met, known, hint=hint)}"


def _origins(config: SweepConfig, stack: _Stack) -> dict[str, str]:
    return {
        _dotted(path): stack.owners[path].origin(path) if path in stack.owners else "default"
        for path in _setting_paths(config.model_dump(exclude={"presets"}), ())
    }


def _unused_settings(config: SweepConfig, origins: Mapping[str, str]) -> Iterator[str]:
    """Warnings about settings of the command line that the space overrides in every trial or
    supernet."""
    for key in config.space:
        if origins.get(key) == "--set":
            yield f"--set {key} is not used: space sweeps it; to set a fixed value, write --set space.{key}=VALUE"


def _setting_paths(settings: Mapping[str, Any], path: KeyPath) -> Iterator[KeyPath]:
    """Paths of all single settings; a list or a distribution counts as one setting."""
    for key, value in settings.items():
        here = (*path, key)
        if isinstance(value, Mapping) and value and path != ("space",):
            yield from _setting_paths(value, here)
        else:
            yield here
