"""Settings: dataclass defaults <- YAML <- `key=value`, strict on every level."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import MISSING, OmegaConf
from yaml import SafeLoader
from yaml import parse as parse_events
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from hispec.utils.schema import in_full, validate

T = TypeVar("T")

_SHOWN = 80  # characters of a refused word in a message
_DEEPEST = 20  # levels of lists in a setting


def check(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise the one kind of error that a wrong setting gets: key, value, what is allowed."""
    if not condition:
        raise ValueError(f"{key}={in_full(value)} is not possible: {allowed}")


def differences(then: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """One sentence for each of `keys` whose value has changed."""
    return [
        f"{key}: {then.get(key)!r} there, {now.get(key)!r} now"
        for key in keys
        if then.get(key) != now.get(key)
    ]


def resolve(schema: type[T], *, yaml: Path | None = None, overrides: Iterable[str] = ()) -> T:
    """Merge the defaults of a dataclass, a YAML file and `key=value` words, in that order.

    Args:
        schema: a dataclass whose annotations hold types and limits, see `hispec.utils.schema`.

    Raises:
        ValueError: an unknown key, a value of the wrong type or outside its limits, a missing
            value or a word that is not `key=value`; the message names the key, the value and what
            is allowed, and the file if the value comes from one.
    """
    texts = {key for key, hint in get_type_hints(schema).items() if _is_text(hint)}
    known = [f.name for f in fields(schema)]  # type: ignore[arg-type]
    merged: dict[str, Any] = {}
    files: dict[str, Path] = {}
    layers: list[tuple[Path | None, dict[str, Any]]] = []
    if yaml is not None:
        layers.append((yaml, _load_yaml(yaml)))
    layers += [(None, _parse_word(word, known, texts)) for word in overrides]
    for file, layer in layers:
        for key, value in layer.items():
            if key not in known:
                raise ValueError(
                    f"unknown key {key!r} ({file or 'command line'}); known keys: "
                    f"{', '.join(sorted(known))}"
                )
            merged[key] = _as_text(value) if key in texts else value
            files.pop(key, None)
            if file is not None:
                files[key] = file
    for f in fields(schema):  # type: ignore[arg-type]
        if merged.get(f.name, f.default) == MISSING:
            raise ValueError(f"{f.name} has no value: set it in the YAML file or as {f.name}=...")
    try:
        return validate(schema, merged)
    except ValueError as error:
        named = next((file for key, file in files.items() if _names(error, key)), None)
        raise ValueError(f"{named}: {error}" if named else str(error)) from None


def _names(error: ValueError, key: str) -> bool:
    """Whether a message of `validate` is about this key."""
    return re.match(rf"{re.escape(key)}\b", str(error)) is not None


def _is_text(hint: Any) -> bool:
    """Whether a setting is a text, or a list of texts, or null."""
    members = [member for member in get_args(hint) if member is not type(None)]
    return hint is str or (bool(members) and all(map(_is_text, members)))


def _as_text(value: Any) -> Any:
    """Numbers, and those in a list, as text: YAML reads `output=2024` as a number."""
    if isinstance(value, list):
        return [str(member) if _is_number(member) else member for member in value]
    return str(value) if _is_number(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse_word(word: str, known: Sequence[str], texts: set[str]) -> dict[str, Any]:
    """`key=value` from a command line; the value is YAML, unless it is a number for a text."""
    key, equals, text = word.partition("=")
    shown = repr(word) if len(word) <= _SHOWN else repr(word[:_SHOWN]) + "..."
    if not equals:
        raise ValueError(f"{shown} is not a setting: write key=value, e.g. {known[0]}=...")
    try:
        _refuse_hostile(text)
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=True)
    except Exception as error:  # PyYAML and OmegaConf raise several unrelated types
        raise ValueError(f"{shown} is not a setting that can be read: {_reason(error)}") from error
    found = value["value"]  # type: ignore[index, call-overload]
    return {key: text if _is_number(found) and key in texts else found}


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_hostile(text)
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except Exception as error:  # PyYAML and OmegaConf raise several unrelated types
        raise ValueError(f"{path} cannot be read as YAML: {_reason(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values")
    return {str(key): value for key, value in values.items()}


def _refuse_hostile(text: str) -> None:
    """Refuse YAML that crashes its reader or fills the memory when it is read.

    Raises:
        ValueError: values nested too deep, or aliases, which may multiply what they stand for.
    """
    depth = 0
    for event in parse_events(text, Loader=SafeLoader):
        depth += isinstance(event, CollectionStartEvent)
        depth -= isinstance(event, CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} deep")
        if isinstance(event, AliasEvent):
            raise ValueError(f"aliases such as *{event.anchor} are not read")


def _reason(error: Exception) -> str:
    """What a library says, in one line, or the name of its error if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
