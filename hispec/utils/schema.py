"""Schemas: what comes in is checked by pydantic, strictly, and refused in one kind of message.

A file is described by a subclass of `Schema`, a group of settings by a dataclass whose fields are
annotated with `Field(...)` limits. Types are never converted (`2.9` is no depth, `"3"` no number),
unknown keys are refused, and no number is NaN or infinite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

T = TypeVar("T")

STRICT = ConfigDict(
    strict=True,
    extra="forbid",
    allow_inf_nan=False,
    arbitrary_types_allowed=True,
    revalidate_instances="always",
    use_attribute_docstrings=True,
)
"""For a dataclass: `__pydantic_config__ = STRICT`, so that `validate` is as strict with it."""
_SHOWN = 80  # characters of a refused value in a message

# JSON and YAML have lists only, Python callers write either: both are taken for these.
ListOf = Annotated[list[T], BeforeValidator(lambda v: list(v) if isinstance(v, tuple) else v)]
TupleOf = Annotated[
    tuple[T, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]


class Schema(BaseModel):
    """A JSON object that comes in: strict types, no unknown keys, finite numbers."""

    model_config = STRICT


def validate(kind: type[T], value: Any, source: str | Path = "") -> T:
    """Check `value` against a schema, a dataclass or any other type that pydantic knows.

    Args:
        kind: what the value must be.
        value: objects as `json.loads` gives them; for a dataclass a mapping of its fields, or an
            instance whose fields nobody has checked.
        source: the file, or the file and line, that the value comes from.

    Raises:
        ValueError: the message names the source, the key, the value and what is allowed.
    """
    if is_dataclass(kind) and isinstance(value, Mapping):
        value = filled(kind, value, source)
    try:
        found: T = _adapter(kind).validate_python(value)  # type: ignore[arg-type]
        return found
    except ValidationError as error:
        raise ValueError(in_words(error, source)) from None


def filled(kind: type[T], values: Mapping[Any, Any], source: str | Path) -> T:
    """An instance of a dataclass with these fields, none of them checked yet."""
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    where = f"{source}: " if str(source) else ""
    for key in values:
        if key not in known:
            raise ValueError(f"{where}unknown key {key!r}; known keys: {', '.join(sorted(known))}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where}{name} is missing")
    return kind(**values)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is not JSON, or not an object; the message names it.
    """
    value = parse_json(path.read_bytes(), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def parse_json(text: bytes | str, source: str | Path) -> Any:
    """Parse JSON of any depth and with numbers of any length without harm.

    Raises:
        ValueError: not JSON, nested too deep, or no valid UTF-8; the message names the source.
    """
    try:
        value = from_json(text, allow_inf_nan=True, cache_strings="none")
    except ValueError as error:  # also numbers of more digits than Python converts
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    return value


def in_words(error: ValidationError, source: str | Path = "") -> str:
    """A refused value in the project's form: `FILE: KEY=VALUE is not possible: WHAT IS ALLOWED`."""
    details = error.errors(include_url=False)
    first = _most_telling(details)
    words = _describe(first)
    # a union reports every member; the others say what else would have been allowed
    same_place = [d for d in details if d is not first and _place(d) == _place(first)]
    for other in same_place[:2]:
        if (allowed := _allowed(other)) not in words:
            words += f", or {allowed}"
    return f"{source}: {words}" if str(source) else words


def _most_telling(details: list[ErrorDetails]) -> ErrorDetails:
    """Unknown keys come first (a mistyped key also leaves the right one missing), then what lies
    deepest (of a union, the member that fits best)."""
    unknown = [detail for detail in details if detail["type"] == "extra_forbidden"]
    return unknown[0] if unknown else max(details, key=lambda detail: len(_steps(detail)))


_MEMBERS = {"str", "int", "float", "bool", "none", "dict", "list", "tuple"}


def _steps(detail: ErrorDetails) -> list[int | str]:
    """The keys and indices that lead to a value. The members of unions, which pydantic counts as
    steps, are left out."""
    return [
        step
        for step in detail["loc"]
        if isinstance(step, int) or not (step in _MEMBERS or "[" in step or "(" in step)
    ]


def _place(detail: ErrorDetails) -> str:
    """The key of a value in its file, e.g. `exits.depths[1]`."""
    place = ""
    for step in _steps(detail):
        place += f"[{step}]" if isinstance(step, int) else f".{step}" if place else step
    return place


def _describe(detail: ErrorDetails) -> str:
    place, kind = _place(detail), detail["type"]
    if kind == "missing":
        return f"{place} is missing"
    if kind == "extra_forbidden":
        return f"unknown key {place!r}"
    return f"{place or 'the value'}={_short(detail['input'])} is not possible: {_allowed(detail)}"


def in_full(value: Any) -> str:
    """A value as Python writes it, for a message."""
    try:
        return repr(value)
    except ValueError:  # Python prints no number of more than 4,300 digits
        return "a number of thousands of digits"


def _short(value: Any) -> str:
    shown = in_full(value)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."


_TYPES = {
    **dict.fromkeys(("int_type", "int_from_float", "int_parsing"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("string_type", "string_sub_type"), "a text"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "dataclass_type", "model_attributes_type",
                     "dataclass_exact_type"), "an object of keys and values"),
    "none_required": "null",
    "finite_number": "a finite number",
    "int_parsing_size": "a whole number of at most 64 bits",
    "string_unicode": "a text in valid UTF-8",
}  # fmt: skip


def _allowed(detail: ErrorDetails) -> str:
    """What is allowed in the place of a refused value."""
    kind, limits = detail["type"], detail.get("ctx", {})
    match kind:
        case "value_error":
            return str(limits["error"])
        case "literal_error" | "enum":
            return f"one of {limits['expected']}"
        case "greater_than_equal":
            return f"{_number(limits['ge'])} or more"
        case "greater_than":
            return f"more than {_number(limits['gt'])}"
        case "less_than_equal":
            return f"at most {_number(limits['le'])}"
        case "less_than":
            return f"less than {_number(limits['lt'])}"
        case "too_short":
            return f"at least {limits['min_length']} values"
        case "too_long":
            return f"at most {limits['max_length']} values"
        case "string_too_short":
            return "a text that is not empty"
    message = detail["msg"]
    return _TYPES.get(kind, message[:1].lower() + message[1:])


def _number(limit: float) -> str:
    return f"{limit:g}" if isinstance(limit, float) else str(limit)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
