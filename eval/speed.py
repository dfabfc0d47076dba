"""Tokens per second of many methods, side by side: `python eval/speed.py checkpoint=DIR`.

Every prompt is decoded by transformers' `generate`, by the settings of our own loop that papers
have named, by the ladders given, and by the decoders of other packages (baselines), in turn, so
that a slow spell of the machine affects all of them. Losslessness is measured on the texts that are
timed. Prints tables, writes `speed.json` and `speed.png` (bars per task) to `output`, and ends with
one JSON line.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from omegaconf import MISSING
from pydantic import Field

from eval.prompts import load_prompts
from eval.settings import Name, PromptSource
from hispec.config import DRAFTERS
from hispec.utils.command_line import parse_depths, parse_device, parse_dtype, run_cleanly
from hispec.utils.console import Output, bar, quiet_transformers
from hispec.utils.limits import at_most, one_of
from hispec.utils.settings import resolve

_OLD_NAMES = {"rivals": "baselines", "rival_exits": "baseline_exits"}
"""Former names of settings, which still work."""


@dataclass
class Settings(PromptSource):
    """The model, the methods to time, and the prompts."""

    checkpoint: Name = MISSING
    """EE checkpoint, or a base model: every depth is then read through the final norm."""
    output: Name | None = None
    """Folder of the results; default: the checkpoint's own, `runs/speed` for a base model."""
    ladders: list[str] = field(default_factory=list)
    """Ladders besides the presets, such as ["4,30","4,10,30"]."""
    drafters: list[Annotated[str, one_of(*DRAFTERS)]] = field(default_factory=lambda: ["exit"])
    """Their drafters, each with each ladder: "exit", "lookup", "recycle", "lookup+exit", ..."""
    presets: bool = True
    """Whether the settings that papers have named are measured, see `eval/presets.py`; plain
    decoding always is."""
    settings: list[dict[str, Any]] = field(default_factory=list)
    """More settings, each with fields of `DecodeConfig`, such as
    [{ladder: [0,30], draft_length: 4, draft_width: 3, tree_tokens: 12}]."""
    draft_length: int = 2
    lookup_length: int = 8
    buffer: int = 4
    baselines: list[str] | None = None
    """Decoders of other packages, see `eval/baselines.py`; default: all that are installed.
    (Formerly `rivals`.)"""
    baseline_exits: list[int] | None = None
    """Exits that baselines draft with; default: the shallowest. (Formerly `rival_exits`.)"""
    engines: list[dict[str, Any]] = field(default_factory=list)
    """Other engines in environments of their own, see `eval/engines.py`, such as
    [{engine: llama.cpp, python: ENV/bin/python, model: model.gguf, lookup: true}]."""
    stop_at_eos: bool = True
    """Whether EOS ends a text; otherwise all texts have `max_new_tokens` tokens."""
    repeats: Annotated[
        int, Field(ge=1), at_most(1000, "each repeat decodes all prompts with all methods again")
    ] = 3
    dtype: str = "auto"
    device: str | None = "cpu"
    backend: str = "auto"
    """What runs our passes: "eager", "openvino", or "auto"."""
    weights: str = "full"
    """"full", or "int8": all methods then decode the rounded model."""


def current_names(words: Sequence[str]) -> list[str]:
    """`key=value` words with the present name of every setting that had another one."""
    parts = (word.partition("=") for word in words)
    return [_OLD_NAMES.get(key, key) + equals + value for key, equals, value in parts]


def main(words: Sequence[str]) -> None:
    from eval.baselines import Limits, baselines, by_generate, installed
    from eval.engines import running
    from eval.presets import label, preset, presets
    from eval.speed_plot import draw
    from eval.speed_results import report, summary
    from eval.timing import machine_of, measure
    from hispec.checkpoint.format import is_checkpoint
    from hispec.lm import load
    from hispec.utils.files import output_path, write_json

    settings = resolve(Settings, overrides=current_names(words))
    quiet_transformers()
    out = Output()
    folder = Path(settings.checkpoint)
    target = Path(settings.output or (folder if is_checkpoint(folder) else "runs/speed"))
    output_path(target / "speed.json")
    lm = load(
        settings.checkpoint,
        dtype=parse_dtype(settings.dtype),
        device=parse_device(settings.device),
        backend=settings.backend,
        weights=settings.weights,
    )
    if lm.model.engine is not None:
        lm.model.engine.load(bar)  # before any clock runs
    eos = lm.eos() if settings.stop_at_eos else ()
    common = {
        "draft_length": settings.draft_length,
        "lookup_length": settings.lookup_length,
        "buffer": settings.buffer,
        "max_new_tokens": settings.max_new_tokens,
        "eos": eos,
    }
    limits = Limits(settings.max_new_tokens, eos, settings.draft_length, settings.lookup_length)
    given = [
        preset(lm, drafter, {**common, "ladder": parse_depths("ladders", text), "drafter": drafter})
        for text in settings.ladders
        for drafter in settings.drafters
    ]
    given += [preset(lm, label(more), {**common, **more}) for more in settings.settings]
    exits = settings.baseline_exits
    others, left_out = baselines(
        lm,
        limits,
        installed() if settings.baselines is None else settings.baselines,
        [depth for depth in lm.model.exits.depths if depth][:1] if exits is None else exits,
    )
    for line in left_out:
        out.say(line)
    planned, why = lm.planned()
    out.say(why)
    plan = [] if planned is None else [preset(lm, "the plan:", {**common, **planned})]
    named = presets(lm, common) if settings.presets else presets(lm, common)[:1]
    methods = [by_generate(lm, limits), *named, *plan, *given, *others]
    prompts = load_prompts(lm, settings, settings.checkpoint)
    with running(settings.engines, limits) as engines:
        timings = measure([*methods, *engines], prompts, settings.repeats, bar)
    rows = summary(lm.model.hf, timings, prompts)
    report(out, rows, prompts)

    machine = machine_of(lm)
    result = {
        "settings": {**asdict(settings), "checkpoint": folder.name},
        "machine": machine,
        "prompts": Counter(prompt.task for prompt in prompts),
        "results": rows,
    }
    write_json(target / "speed.json", result)
    text = f"{len(prompts)} prompts of {settings.max_new_tokens} new tokens or fewer"
    times = "once" if settings.repeats == 1 else f"{settings.repeats} times"
    draw(target / "speed.png", rows, f"{folder.name}, {machine['dtype']}: {text}, {times}")
    out.say(f"picture: {target / 'speed.png'}")
    in_short = [{key: row[key] for key in row if key not in ("tasks", "rungs")} for row in rows]
    print(json.dumps({**result, "results": in_short}))


if __name__ == "__main__":
    sys.exit(run_cleanly(lambda: main(sys.argv[1:])))
