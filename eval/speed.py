"""Tokens per second of many ways to decode, side by side: `python eval/speed.py checkpoint=DIR`.

Every prompt is decoded by transformers' `generate`, by the settings of our own loop that papers
have names for, by any ladder given, and by other packages' decoders, in turn, so that a slow spell
of the machine meets all of them. Losslessness is judged by the very texts that are timed. Prints
tables, writes `speed.json` and `speed.png` (bars per task) to `output`, and ends with one JSON
line.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.table import Table

from eval.prompts import Asked, PromptSource, load_prompts
from hispec.config import DRAFTERS
from hispec.utils.command_line import parse_depths, parse_device, parse_dtype, run_cleanly
from hispec.utils.console import Output, bar, quiet_transformers
from hispec.utils.settings import check, resolve

ALL = "all"
"""Name of all tasks together."""


@dataclass
class Settings(PromptSource):
    """What is timed, and on what."""

    checkpoint: str = MISSING
    """EE checkpoint, or a base model: every depth is then read through the final norm."""
    output: str | None = None
    """Folder of the results; default: the checkpoint's own, `runs/speed` for a base model."""
    ladders: list[str] = field(default_factory=list)
    """More ladders than the presets, such as ["4,30","4,10,30"]."""
    drafters: list[str] = field(default_factory=lambda: ["exit"])
    """What drafts on them, each with each: "exit", "lookup", "recycle", "lookup+exit", ..."""
    draft_length: int = 2
    lookup_length: int = 8
    buffer: int = 4
    rivals: list[str] | None = None
    """Other packages' decoders, see `eval/rivals.py`; default: all that are installed."""
    rival_exits: list[int] | None = None
    """Exits that they draft with; default: the shallowest."""
    stop_at_eos: bool = True
    """Otherwise all texts are `max_new_tokens` long, whatever the model says."""
    repeats: int = 3
    dtype: str = "auto"
    device: str | None = "cpu"


def main(words: Sequence[str]) -> None:
    import torch

    from eval.baselines import Limits, by_generate, installed, rivals
    from eval.presets import preset, presets
    from eval.speed_plot import draw
    from eval.timing import measure
    from hispec.checkpoint.format import is_checkpoint
    from hispec.lm import load
    from hispec.utils.files import write_json

    settings = resolve(Settings, overrides=words)
    check(settings.repeats >= 1, "repeats", settings.repeats, "1 or more")
    for drafter in settings.drafters:
        check(drafter in DRAFTERS, "drafters", drafter, f"of {', '.join(DRAFTERS)}")
    quiet_transformers()
    out = Output()
    lm = load(
        settings.checkpoint, dtype=parse_dtype(settings.dtype), device=parse_device(settings.device)
    )
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
    exits = settings.rival_exits
    others, left_out = rivals(
        lm,
        limits,
        installed() if settings.rivals is None else settings.rivals,
        lm.model.exits.depths[:1] if exits is None else exits,
    )
    for line in left_out:
        out.say(line)
    planned, words = lm.planned()
    out.say(words)
    plan = [] if planned is None else [preset(lm, "the plan:", {**common, **planned})]
    contestants = [by_generate(lm, limits), *presets(lm, common), *plan, *given, *others]
    prompts = load_prompts(lm, settings, settings.checkpoint)

    measured = measure(contestants, prompts, settings.repeats, bar)
    rows = summary(lm.model.hf, measured, prompts)
    report(out, rows, prompts)

    folder = Path(settings.checkpoint)
    target = Path(settings.output or (folder if is_checkpoint(folder) else "runs/speed"))
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__,
               "device": str(lm.model.device),
               "dtype": str(lm.model.hf.dtype).removeprefix("torch.")}  # fmt: skip
    result = {
        "settings": {**asdict(settings), "checkpoint": folder.name},
        "machine": machine,
        "prompts": Counter(asked.task for asked in prompts),
        "results": rows,
    }
    write_json(target / "speed.json", result)
    text = f"{len(prompts)} prompts of {settings.max_new_tokens} new tokens or fewer"
    times = "once" if settings.repeats == 1 else f"{settings.repeats} times"
    draw(target / "speed.png", rows, f"{folder.name}, {machine['dtype']}: {text}, {times}")
    out.say(f"picture: {target / 'speed.png'}")
    in_short = [{key: row[key] for key in row if key not in ("tasks", "rungs")} for row in rows]
    print(json.dumps({**result, "results": in_short}))


def summary(hf: Any, measured: Sequence[Any], prompts: Sequence[Asked]) -> list[dict[str, Any]]:
    """One row per contestant; the first two are `generate` and own plain decoding."""
    from eval.timing import Rate
    from hispec.metrics.equivalence import first_difference

    by_task: dict[str, list[int]] = {ALL: list(range(len(prompts)))}
    for p, asked in enumerate(prompts):
        by_task.setdefault(asked.task, []).append(p)
    reference, plain = measured[:2]
    rows = []
    for found in measured:
        tasks = {}
        for task, numbers in by_task.items():
            rates = found.rates(numbers)
            tasks[task] = {"tokens_per_second": asdict(Rate.over(rates))}
            for key, other in (("over_generate", reference), ("over_plain", plain)):
                ratios = [a / b for a, b in zip(rates, other.rates(numbers), strict=True)]
                tasks[task][key] = asdict(Rate.over(ratios))
        triples = zip(prompts, found.texts[0], reference.texts[0], strict=True)
        compared = [first_difference(hf, asked.tokens, a, b) for asked, a, b in triples]
        differences = [d for d in compared if d is not None]
        rows.append(
            {
                "setting": found.name,
                "outside": found.outside,
                **tasks.pop(ALL),
                "tasks": tasks,
                "tokens_per_target_pass": found.new_tokens / found.target_passes,
                "acceptance": {name: d.acceptance for name, d in found.drafts.items()},
                "rungs": {
                    depth: {
                        "passes": spent.passes,
                        "ms_per_token": 1000 * spent.seconds / found.new_tokens,
                        "share_of_time": spent.seconds / found.total_seconds,
                    }
                    for depth, spent in found.rungs.items()
                },
                "same_as_generate": found.same(reference),
                "same_as_plain": found.same(plain),
                "differences": Counter(d.kind for d in differences),
                "largest_gap": max((d.gap for d in differences), default=None),
            }
        )
    return rows


def report(out: Output, rows: Sequence[dict[str, Any]], prompts: Sequence[Asked]) -> None:
    """The tables, and what they say."""
    out.print(_overall(rows, len(prompts)))
    if len(rows[0]["tasks"]) > 1:
        out.print(_per_task(rows))
    out.print(_per_rung(rows))
    rate = rows[1]["tokens_per_second"]["median"]
    for row in rows[2:]:
        ratio = row["tokens_per_second"]["median"] / rate
        verdict = "faster" if ratio > 1 else "slower"
        out.say(f"{row['setting']} is {verdict} than own plain decoding: {ratio:.2f}x")
    kinds = sum((Counter(row["differences"]) for row in rows), Counter())
    if kinds:
        gap = max(row["largest_gap"] for row in rows if row["largest_gap"] is not None)
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        out.say(
            f"texts that differ from HF's, by the class of their first difference: {counted}; the "
            f"two top logits were at most {gap:.3f} apart there (a tie: rounding decides; compare "
            "with dtype=float32)"
        )


def _overall(rows: Sequence[dict[str, Any]], prompts: int) -> Table:
    table = Table(title=f"greedy, {prompts} prompts: median (lowest to highest of the repeats)")
    table.add_column("setting")
    for title in ("tokens/s", "against HF", "against plain", "tokens per target pass",
                  "text of HF", "of own plain"):  # fmt: skip
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row["setting"],
            _spread(row["tokens_per_second"], ".1f"),
            _spread(row["over_generate"], ".2f"),
            _spread(row["over_plain"], ".2f"),
            f"{row['tokens_per_target_pass']:.2f}",
            _same(row["same_as_generate"], prompts, row["differences"]),
            _same(row["same_as_plain"], prompts),
        )
    return table


def _same(count: int, prompts: int, kinds: dict[str, int] | None = None) -> str:
    """How many texts are the same, and the classes of the others' first differences."""
    if count == prompts:
        return "same"
    classes = [f"{number} {kind}" for kind, number in (kinds or {}).items()]
    return ", ".join([f"{count} of {prompts}", *classes])


def _spread(rate: dict[str, float], form: str) -> str:
    low, high = (format(rate[key], form) for key in ("lowest", "highest"))
    return format(rate["median"], form) + (f" ({low} to {high})" if low != high else "")


def _per_task(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="tokens/s per task, and how many times HF's")
    table.add_column("setting")
    for task in rows[0]["tasks"]:
        table.add_column(task, justify="right")
    for row in rows:
        cells = [
            f"{task['tokens_per_second']['median']:.1f} ({task['over_generate']['median']:.2f}x)"
            for task in row["tasks"].values()
        ]
        table.add_row(row["setting"], *cells)
    return table


def _per_rung(rows: Sequence[dict[str, Any]]) -> Table:
    """Where the time goes; what no rung led is prefill, free drafting and Python."""
    table = Table(title="rungs: how much of their drafts is accepted, and their time")
    table.add_column("setting")
    for title in ("rung", "accepted", "passes", "ms per token", "share of time"):
        table.add_column(title, justify="right")
    for row in rows:
        acceptance = row["acceptance"]
        for rung in dict.fromkeys([*acceptance, *row["rungs"]]):
            accepted, spent = acceptance.get(rung), row["rungs"].get(rung)
            times = ["", "", ""]
            if spent is not None:
                times = [f"{spent['passes']}", f"{spent['ms_per_token']:.1f}",
                         f"{spent['share_of_time']:.0%}"]  # fmt: skip
            shown = "" if accepted is None else f"{accepted:.0%}"
            table.add_row(row["setting"], rung, shown, *times)
    return table


if __name__ == "__main__":
    sys.exit(run_cleanly(lambda: main(sys.argv[1:])))
