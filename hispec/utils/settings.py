"""Settings: dataclass defaults <- YAML <- `key=value`, strict on every level."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def check(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise the one kind of error that a wrong setting gets: key, value, what is allowed."""
    if not condition:
        raise ValueError(f"{key}={value!r} is not possible: {allowed}")


def differences(then: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """What is not as it was, key by key."""
    return [
        f"{key}: {then.get(key)!r} there, {now.get(key)!r} now"
        for key in keys
        if then.get(key) != now.get(key)
    ]


def resolve(schema: type[T], *, yaml: Path | None = None, overrides: Iterable[str] = ()) -> T:
    """Merge the defaults of a dataclass, a YAML file and `key=value` words, in that order.

    Raises:
        ValueError: an unknown key, a value of the wrong type, a missing value or a word that is
            not `key=value`; the message names it and lists the keys that exist.
    """
    known = [f.name for f in fields(schema)]  # type: ignore[arg-type]
    merged = OmegaConf.structured(schema)
    layers: list[tuple[str, Any]] = []
    if yaml is not None:
        layers.append((str(yaml), _load_yaml(yaml)))
    for word in overrides:
        if "=" not in word:
            raise ValueError(f"{word!r} is not a setting: write key=value, e.g. {known[0]}=...")
        try:
            layers.append(("command line", OmegaConf.from_dotlist([word])))
        except Exception as error:  # PyYAML and OmegaConf raise several unrelated types
            reason = str(error).splitlines()[0]
            raise ValueError(f"{word!r} is not a setting that can be read: {reason}") from error
    for source, layer in layers:
        for key in layer:
            if key not in known:
                raise ValueError(
                    f"unknown key {key!r} ({source}); known keys: {', '.join(sorted(known))}"
                )
            try:
                merged = OmegaConf.merge(merged, {key: layer[key]})
            except (OmegaConfBaseException, TypeError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"{key}={layer[key]!r} ({source}): {reason}") from error
    for key in known:
        if OmegaConf.is_missing(merged, key):
            raise ValueError(f"{key} has no value: set it in the YAML file or as {key}=...")
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def _load_yaml(path: Path) -> Any:
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # PyYAML and OmegaConf raise several unrelated types
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not OmegaConf.is_dict(loaded):
        raise ValueError(f"{path} must hold keys and values")
    return loaded
