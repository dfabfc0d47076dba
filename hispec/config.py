"""Configuration: dataclass defaults <- YAML <- `key=value`, strict on every level."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")

HEAD_KINDS = ("shared", "block")


def check(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise the one kind of error that a wrong setting gets: key, value, what is allowed."""
    if not condition:
        raise ValueError(f"{key}={value!r} is not possible: {allowed}")


@dataclass
class ExitConfig:
    """Which depths of a model are exits, and what reads them."""

    depths: list[int] = field(default_factory=list)
    """Depths of the exits, increasing, each from 1 to L - 1."""
    head: str = "block"
    """`shared`: final norm and LM head as they are (LayerSkip). `block`: own transformer blocks
    and own norm before the shared LM head."""
    blocks: int = 2
    """Transformer blocks of a `block` head."""

    def validate(self, num_layers: int) -> None:
        """Raises ValueError if this cannot describe exits of a model of `num_layers` layers."""
        check_depths("exits", self.depths, num_layers)
        check(self.head in HEAD_KINDS, "head", self.head, f"one of {', '.join(HEAD_KINDS)}")
        if self.head == "block":
            check(
                1 <= self.blocks <= num_layers,
                "blocks",
                self.blocks,
                f"from 1 to {num_layers}, the layers of the model",
            )


@dataclass
class DecodeConfig:
    """One decode: who drafts, who verifies, and by which law tokens are chosen."""

    ladder: list[int]
    """Increasing depths ending at L: the first one drafts, the others verify. `[L]` alone is plain
    decoding."""
    draft_length: int = 2
    """Tokens drafted before the first verifying rung runs (N_d of HiSpec)."""
    buffer: int = 4
    """Tokens that a verifying rung collects before the next deeper one runs (N_i of HiSpec)."""
    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy: the argmax of the target, first index wins a tie."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    """Fixes the noise of every position; the same seed gives the same text on any ladder."""
    eos: tuple[int, ...] = ()
    """Token ids that end a text; the one that ended it is part of the output."""

    def validate(self, num_layers: int) -> None:
        """Raises ValueError naming the key, the value and what is allowed."""
        check_depths("ladder", self.ladder[:-1], num_layers, at_least=0)
        check(
            bool(self.ladder) and self.ladder[-1] == num_layers,
            "ladder",
            tuple(self.ladder),
            f"it must end at {num_layers}, the depth of the full model",
        )
        check(self.draft_length >= 1, "draft_length", self.draft_length, "1 or more tokens")
        check(self.buffer >= 1, "buffer", self.buffer, "1 or more tokens")
        check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more tokens")
        check(
            self.temperature == 0 or self.temperature >= 1e-3,
            "temperature",
            self.temperature,
            "0 (greedy), or 0.001 and more",
        )
        check(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "1 or more tokens")
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1")
        check(self.min_p is None or 0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")


def check_depths(key: str, depths: Sequence[int], num_layers: int, at_least: int = 1) -> None:
    """Raise ValueError unless `depths` increase inside the model and are `at_least` so many."""
    shown = tuple(depths)
    check(len(depths) >= at_least, key, shown, f"name {at_least} or more depths")
    check(
        all(1 <= depth < num_layers for depth in depths),
        key,
        shown,
        f"depths from 1 to {num_layers - 1} (the model has {num_layers} layers; "
        f"depth {num_layers} is the full model, not an exit)",
    )
    check(list(depths) == sorted(set(depths)), key, shown, "increasing depths, none twice")


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
