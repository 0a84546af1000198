"""YAML 1.2 as plain data, with the line and column of every key and value.

The node tree is walked here, and the library does not construct objects. Thus no tag can build a
Python object, duplicate keys are reported with both places, and later errors about a value can name
its place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from dsnet.errors import ConfigError
from dsnet.wording import did_you_mean, first_line

KeyPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_MAX_VALUES = 10_000  # a sweep has hundreds; aliases of aliases could ask for billions
_MAX_DEPTH = 30  # of brackets and of values; a sweep has about six
_MAX_CHARACTERS = 250_000
_MAX_DIGITS = 18  # of a whole number, which then fits into 64 bits
_BRACKETS = re.compile(r"[\[\]{}]")
_NO_YAML_1_1 = re.compile(r"^%YAML\s+1\.[01]\b", re.MULTILINE)


class Position(NamedTuple):
    """A place in a text; line and column are counted from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class YamlSource:
    """The content of a YAML text, and the position of each part."""

    name: str
    """The file as the user named it."""
    data: object
    """dict, list, str, int, float, bool or None, nested."""
    keys: Mapping[KeyPath, Position]
    """Position of each key (for items of a list: of the item)."""
    values: Mapping[KeyPath, Position]
    """Position of the start of each value; () is the whole text."""

    def position(self, path: KeyPath, *, at_key: bool = False) -> Position:
        """The position of a key or value, or of the nearest enclosing one in the text."""
        for end in range(len(path), -1, -1):
            table = self.keys if (at_key or end < len(path)) and end else self.values
            if path[:end] in table:
                return table[path[:end]]
        return Position(1, 1)

    def place(self, path: KeyPath, *, at_key: bool = False) -> str:
        """`position` as text, `file:line:column`."""
        line, column = self.position(path, at_key=at_key)
        return f"{self.name}:{line}:{column}"


def read_yaml_file(path: Path) -> YamlSource:
    """Read a YAML file.

    Raises:
        ConfigError: the file is missing, is a folder, cannot be read, is not UTF-8, or is not YAML.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file{_sibling_hint(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name the sweep file in it{_content_hint(path)}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    return parse_yaml(_decoded(raw, str(path)), str(path))


def _sibling_hint(path: Path) -> str:
    names = _yaml_names(path.parent)
    hint = did_you_mean(path.name, names)
    return hint or (f"; beside it: {', '.join(names[:5])}" if names else "")


def _content_hint(folder: Path) -> str:
    names = _yaml_names(folder)
    return f": {', '.join(names[:5])}" if names else ""


def _yaml_names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))
    except OSError:
        return []


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        byte = raw[error.start]
        message = f"byte 0x{byte:02x} is not UTF-8; save the file with UTF-8 encoding"
        raise ConfigError(f"{name}:{line}:{column}: {message}") from None


def parse_yaml(text: str, name: str) -> YamlSource:
    """Read one YAML 1.2 document; an empty text gives None.

    Args:
        text: the document.
        name: shown in front of line and column in every message.

    Raises:
        ConfigError: the text is not YAML, holds a key twice, or a tag that asks for more than plain
            data.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(f"{name}: has {len(text):,} characters; a sweep file has at most {_MAX_CHARACTERS:,}")
    _check_depth(text, name)  # the library takes seconds for thousands of levels
    directive = _NO_YAML_1_1.search(text)
    if directive:
        line = text.count("\n", 0, directive.start()) + 1
        raise ConfigError(f"{name}:{line}:1: this is read as YAML 1.2; remove the line '{directive.group()}'")
    try:
        root = YAML(typ="rt", pure=True).compose(text)
        return _Walk(name).source(root)
    except RecursionError:
        raise ConfigError(f"{name}: is nested too deeply") from None
    except YAMLError as error:
        raise ConfigError(_broken(error, text, name)) from None


def _check_depth(text: str, name: str) -> None:
    """Refuse brackets in brackets, wherever they stand.

    Raises:
        ConfigError: there are more than `_MAX_DEPTH` levels.
    """
    depth = 0
    for match in _BRACKETS.finditer(text):
        depth += 1 if match[0] in "[{" else -1
        if depth > _MAX_DEPTH:
            line = text.count("\n", 0, match.start()) + 1
            raise ConfigError(f"{name}:{line}: is nested too deeply: {_MAX_DEPTH} brackets are open; settings need few")


def _broken(error: YAMLError, text: str, name: str) -> str:
    """The library's error message on one line with its place."""
    if isinstance(error, ReaderError):
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        return f"{name}:{line}:{column}: holds a character that YAML does not allow: {text[error.position]!r}"
    if not isinstance(error, MarkedYAMLError):
        return f"{name}: is not YAML: {first_line(error)}"
    mark = error.problem_mark or error.context_mark
    where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    if mark and "\t" in _indentation(text, mark.line):
        return f"{where}: the indentation has a tab; YAML is indented with spaces"
    clauses = [clause for clause in (error.context, error.problem) if clause]
    if "another document" in str(error.problem):
        return f"{where}: a second document starts here ('---'); a sweep file holds one"
    return f"{where}: is not YAML: {', '.join(clauses)}"


def _indentation(text: str, line: int) -> str:
    lines = text.splitlines()
    found = lines[line] if line < len(lines) else ""
    return found[: len(found) - len(found.lstrip())]


@dataclass
class _Walk:
    """State of one pass over a node tree."""

    name: str
    keys: dict[KeyPath, Position] = field(default_factory=dict)
    values: dict[KeyPath, Position] = field(default_factory=dict)
    num_values: int = 0
    open_nodes: set[int] = field(default_factory=set)
    """Ids of the nodes being walked, to detect an anchor that contains itself."""

    def source(self, root: Node | None) -> YamlSource:
        data = None if root is None else self.value(root, ())
        return YamlSource(self.name, data, self.keys, self.values)

    def fail(self, node: Node, message: str) -> ConfigError:
        line, column = _position(node)
        return ConfigError(f"{self.name}:{line}:{column}: {message}")

    def value(self, node: Node, path: KeyPath) -> object:
        self.values[path] = _position(node)
        self.num_values += 1
        if len(path) > _MAX_DEPTH:
            raise self.fail(node, f"is nested too deeply: below {_MAX_DEPTH} others; settings need few levels")
        if self.num_values > _MAX_VALUES:
            raise self.fail(node, f"holds more than {_MAX_VALUES:,} values once its aliases are written out")
        if isinstance(node, ScalarNode):
            return self.scalar(node)
        if id(node) in self.open_nodes:
            raise self.fail(node, "an alias stands inside the value that it names")
        self.open_nodes.add(id(node))
        try:
            return self.mapping(node, path) if isinstance(node, MappingNode) else self.sequence(node, path)
        finally:
            self.open_nodes.remove(id(node))

    def scalar(self, node: ScalarNode) -> object:
        convert = _SCALARS.get(str(node.tag))
        if convert is None:
            raise self.fail(node, f"the tag '{_short(node)}' is not accepted; write plain text, numbers, true or false")
        try:
            return convert(node.value)
        except ValueError as error:
            raise self.fail(node, str(error)) from None

    def sequence(self, node: Node, path: KeyPath) -> list[object]:
        if str(node.tag) != f"{_TAG}seq":
            raise self.fail(node, f"the tag '{_short(node)}' is not accepted on a list")
        items = []
        for index, item in enumerate(node.value):
            self.keys[*path, index] = _position(item)
            items.append(self.value(item, (*path, index)))
        return items

    def mapping(self, node: MappingNode, path: KeyPath) -> dict[str, object]:
        if str(node.tag) != f"{_TAG}map":
            raise self.fail(node, f"the tag '{_short(node)}' is not accepted on a mapping")
        found: dict[str, object] = {}
        first_seen: dict[str, Position] = {}
        for key_node, value_node in node.value:
            if str(key_node.tag) == _MERGE:
                continue
            key = self.key(key_node)
            if key in first_seen:
                raise self.fail(key_node, f"the key '{key}' was given before, in line {first_seen[key].line}; keep one")
            first_seen[key] = self.keys[*path, key] = _position(key_node)
            found[key] = self.value(value_node, (*path, key))
            if found[key] is None and value_node.value == "":  # nothing is written, and so has no place of its own
                self.values[*path, key] = first_seen[key]
        for merged in self.merged_mappings(node):
            self.take_over(merged, path, found)
        return found

    def key(self, node: Node) -> str:
        if not isinstance(node, ScalarNode):
            raise self.fail(node, "a key must be one word, not a list or a mapping")
        return str(node.value)

    def merged_mappings(self, node: MappingNode) -> Iterator[MappingNode]:
        """The mappings that `<<: *name` or `<<: [*a, *b]` merges, in order of precedence."""
        for key_node, value_node in node.value:
            if str(key_node.tag) != _MERGE:
                continue
            for merged in value_node.value if isinstance(value_node, SequenceNode) else [value_node]:
                if not isinstance(merged, MappingNode):
                    raise self.fail(merged, "'<<' merges a mapping, or a list of mappings; this is neither")
                yield merged

    def take_over(self, merged: MappingNode, path: KeyPath, found: dict[str, object]) -> None:
        """Add the keys of `merged` that `found` does not have; their positions are those of the
        anchored text."""
        inner = _Walk(self.name, num_values=self.num_values, open_nodes=self.open_nodes)
        if id(merged) in self.open_nodes:
            raise self.fail(merged, "an alias stands inside the value that it names")
        taken = inner.value(merged, path)
        self.num_values = inner.num_values
        assert isinstance(taken, dict)
        new = {key for key in taken if key not in found}
        depth = len(path)
        for mine, theirs in ((self.keys, inner.keys), (self.values, inner.values)):
            mine.update({place: at for place, at in theirs.items() if len(place) > depth and place[depth] in new})
        found.update({key: taken[key] for key in new})


def _position(node: Node) -> Position:
    return Position(node.start_mark.line + 1, node.start_mark.column + 1)


def _short(node: Node) -> str:
    tag = str(node.tag)
    return f"!!{tag.removeprefix(_TAG)}" if tag.startswith(_TAG) else tag


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"'{text}' is not true or false")
    return text.lower() == "true"


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"the number {text[:12]}... has more than {_MAX_DIGITS} digits; no setting needs so many")
    try:
        return int(digits, 0 if digits.lstrip("+-")[:2].lower() in ("0x", "0o", "0b") else 10)
    except ValueError:
        raise ValueError(f"'{text[:40]}' is not a whole number that can be read") from None


def _real(text: str) -> float:
    try:
        number = float(text.replace("_", ""))
    except ValueError:
        number = math.nan  # .nan and .inf in YAML's spelling end here too
    if not math.isfinite(number):
        raise ValueError(f"'{text[:40]}' is not a finite number")
    return number


# Dates stay text: no setting is one.
_SCALARS: Mapping[str, Callable[[str], object]] = {
    f"{_TAG}str": str,
    f"{_TAG}value": str,
    f"{_TAG}timestamp": str,
    f"{_TAG}merge": str,
    f"{_TAG}null": lambda _: None,
    f"{_TAG}bool": _boolean,
    f"{_TAG}int": _integer,
    f"{_TAG}float": _real,
}
