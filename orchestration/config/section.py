"""Building blocks of the sections of sweep.yaml: strict models, the types of their values, and
broken rules.

The types of single values, with their bounds and choices, are those of `dsnet.settings` and of the
core's settings, which give the defaults too.

Strict means: no unknown key, no silent conversion ("3" is not 3, 1 is not true), and every range is
checked when an object is built. The only exception: a whole number is accepted for a real one.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from dsnet.wording import shown

KeyPath = tuple[str | int, ...]
NAME_PATTERN = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$"


@dataclass(frozen=True)
class BrokenRule:
    """A rule between settings that does not hold; `path` is relative to the section that checks
    it."""

    path: KeyPath
    message: str
    others: tuple[KeyPath, ...] = ()
    """Paths of further settings in the rule; the message is placed at the one that the topmost
    layer wrote."""

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.path))}: {self.message}" if self.path else self.message


def refuse(*rules: BrokenRule) -> None:
    """Report all broken rules of a section at once; `orchestration.config.loading` finds the place
    of each in the file."""
    if rules:
        raise PydanticCustomError("broken_rules", "{text}", {"text": "; ".join(map(str, rules)), "rules": rules})


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text!r} holds characters that cannot be printed")
    return text


Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(_printable)]


@dataclass(frozen=True)
class Known:
    """Addition to the type of a text: it must be one of some names that are known at run time,
    such as registered ones."""

    names: Callable[[], Sequence[str]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, core_schema.str_schema(strict=True))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": list(self.names()), "type": "string"}

    def _check(self, name: str) -> str:
        known = self.names()
        if name not in known:
            expected = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
            raise PydanticKnownError("literal_error", {"expected": expected})
        return name


FROM_LIST = Field(strict=False)
"""Addition to the type of a tuple: YAML and JSON have lists only; the list becomes a tuple, its
items stay strict."""


class Section(BaseModel):
    """Base of every section: frozen, strict, no unknown key, no NaN; docstrings under fields are
    their descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


def _scalar(value: object) -> object:
    if isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"expected a number, text, true or false; got {shown(value)}")


PointValue = Annotated[
    bool | int | float | str,
    PlainValidator(_scalar),
    WithJsonSchema({"type": ["number", "string", "boolean"]}),
]


def section_class(annotation: object) -> type[Section] | None:
    """The annotation itself if it is a section, else None."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def walk_fields(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key below a section, sections included, with its field."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        inner = section_class(field.annotation)
        if inner is not None:
            yield from walk_fields(inner, f"{prefix}{name}.")


def is_nullable(field: FieldInfo) -> bool:
    """Whether a field may be null."""
    return get_origin(field.annotation) in (Union, types.UnionType) and type(None) in get_args(field.annotation)


def annotated_type(field: FieldInfo) -> Any:
    """The type of a field with its bounds, for a separate validator."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


_REQUIREMENTS: Mapping[str, str] = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "literal_error": "must be one of {expected}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "string_too_short": "must not be empty",
}


def requirement(error_type: str, context: Mapping[str, Any]) -> str:
    """A plain description of the rule that a pydantic error type stands for."""
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in context.items()}
    return _REQUIREMENTS.get(error_type, "does not take this value").format(**limits)
