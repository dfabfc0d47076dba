"""Methods that are settings of our own decode loop, under the names of their papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from eval.timing import Method, Outcome
from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.lm import EarlyExitLM
from hispec.utils.settings import check


def ladder_text(ladder: Sequence[int]) -> str:
    """A ladder as the tables show it, such as `(6, 12, 30)`."""
    return f"({', '.join(map(str, ladder))})"


def label(setting: Mapping[str, Any]) -> str:
    """What a setting says, its ladder left out: `exit draft_length=4 draft_width=3`."""
    rest = {key: value for key, value in setting.items() if key not in ("ladder", "drafter")}
    words = [setting.get("drafter", "exit"), *(f"{key}={value}" for key, value in rest.items())]
    return " ".join(words)


def preset(lm: EarlyExitLM, name: str, setting: Mapping[str, Any]) -> Method:
    """A method of our own decode loop; its ladder is shown behind `name`.

    Args:
        setting: fields of `DecodeConfig`, `ladder` among them.

    Raises:
        ValueError: an unknown key, or a setting that this model cannot decode with.
    """
    known = {f.name for f in fields(DecodeConfig)}
    for key in setting:
        check(key in known, key, setting[key], f"known settings: {', '.join(sorted(known))}")
    check("ladder" in setting, "ladder", None, "a setting names the depths")
    config = DecodeConfig(**setting)
    config.validate(lm.model.num_layers)

    def decode(prompt: list[int]) -> Outcome:
        run = Decode(lm.model, [prompt], config)
        return Outcome.of(run.finish()[0], run.stats)

    return Method(f"{name} {ladder_text(config.ladder)}", decode)


def presets(lm: EarlyExitLM, common: Mapping[str, Any]) -> list[Method]:
    """Plain decoding, and LayerSkip, EAGLE (an exit at depth 0), HiSpec, prompt lookup, token
    recycling and ECHO as far as the checkpoint has the exits for them.

    Args:
        common: fields of `DecodeConfig` that all of them share.
    """
    full, exits = lm.model.num_layers, lm.model.exits.depths
    found = [preset(lm, "plain", {**common, "ladder": [full]})]

    def add(name: str, ladder: list[int], drafter: str = "exit", **keys: Any) -> None:
        found.append(preset(lm, name, {**common, "ladder": ladder, "drafter": drafter, **keys}))

    for depth in exits:
        add("LayerSkip" if depth else "EAGLE", [depth, full])
    if lm.model.draft_tokens is not None:
        for depth in exits:
            if lm.model.head(depth).lm_head is None:
                name = "LayerSkip" if depth else "EAGLE"
                add(f"{name}, whole vocabulary", [depth, full], draft_vocab=False)
    if len(exits) > 1:
        add("HiSpec", [*exits, full])
    add("prompt lookup", [full], "lookup")
    add("token recycling", [full], "recycle")
    for depth in [depth for depth in exits if depth][-1:]:
        add("ECHO", [depth, full], "recycle")
    return found
