"""Tokens per second of several ladders, side by side: `python eval/speed.py checkpoint=DIR`.

Every prompt is decoded by every setting in turn, so that a slow spell of the machine meets all of
them. Losslessness is checked on the same texts. Prints a table, then one JSON line.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.progress import track
from rich.table import Table

from eval.prompts import PromptSource, load_prompts
from hispec.cli import parse_device, parse_dtype, run_cleanly
from hispec.config import check, resolve
from hispec.console import Output, quiet_transformers


@dataclass
class Settings(PromptSource):
    """What is timed, and on what."""

    checkpoint: str = MISSING
    draft_length: int = 2
    buffer: int = 4
    repeats: int = 3
    dtype: str = "auto"
    device: str | None = "cpu"


@dataclass
class Timed:
    """One setting's measurements."""

    name: str
    decode: Callable[[list[int]], tuple[list[int], Any]]
    """Prompt to (new tokens, stats or None)."""
    rates: list[float] = field(default_factory=list)
    """Tokens per second, one figure per repeat over all prompts."""
    texts: list[list[int]] = field(default_factory=list)
    target_passes: int = 0
    new_tokens: int = 0


def main(words: Sequence[str]) -> None:
    import torch

    from hispec.compare import first_difference, hf_generate
    from hispec.config import DecodeConfig
    from hispec.decode import Decode
    from hispec.lm import load

    settings = resolve(Settings, overrides=words)
    check(settings.repeats >= 1, "repeats", settings.repeats, "1 or more")
    quiet_transformers()
    lm = load(
        settings.checkpoint, dtype=parse_dtype(settings.dtype), device=parse_device(settings.device)
    )
    full, exits = lm.model.num_layers, lm.model.exits.depths

    prompts = [asked.tokens for asked in load_prompts(lm, settings, settings.checkpoint)]

    def by_ladder(
        ladder: list[int], drafter: str = "exit", *, draft_vocab: bool = True
    ) -> Callable[[list[int]], tuple[list[int], Any]]:
        config = DecodeConfig(
            ladder,
            drafter=drafter,
            draft_length=settings.draft_length,
            buffer=settings.buffer,
            max_new_tokens=settings.max_new_tokens,
            draft_vocab=draft_vocab,
        )

        def decode(prompt: list[int]) -> tuple[list[int], Any]:
            run = Decode(lm.model, [prompt], config)
            return run.finish()[0], run.stats

        return decode

    def by_generate(prompt: list[int]) -> tuple[list[int], Any]:
        return hf_generate(lm.model.hf, prompt, settings.max_new_tokens), None

    timed = [
        Timed("HF generate", by_generate),
        Timed(f"plain ({full})", by_ladder([full])),
        *(Timed(f"LayerSkip ({e}, {full})", by_ladder([e, full])) for e in exits),
    ]
    if lm.model.draft_tokens is not None:
        timed += [
            Timed(
                f"the same, whole vocabulary ({e}, {full})", by_ladder([e, full], draft_vocab=False)
            )
            for e in exits
        ]
    if len(exits) > 1:
        shown = ", ".join(map(str, [*exits, full]))
        timed.append(Timed(f"HiSpec ({shown})", by_ladder([*exits, full])))

    timed += [
        Timed(f"prompt lookup ({full})", by_ladder([full], "lookup")),
        Timed(f"token recycling ({full})", by_ladder([full], "recycle")),
        *(Timed(f"ECHO ({e}, {full})", by_ladder([e, full], "recycle")) for e in exits[-1:]),
    ]

    for entry in timed:
        entry.decode(prompts[0])  # warm-up
    rounds = [(r, p) for r in range(settings.repeats) for p in range(len(prompts))]
    spent = {(entry.name, r): [0.0, 0] for entry in timed for r in range(settings.repeats)}
    for repeat, p in track(rounds, "timing", transient=True, console=Output(stderr=True)):
        for entry in timed:
            began = time.perf_counter()
            tokens, stats = entry.decode(prompts[p])
            spent[entry.name, repeat][0] += time.perf_counter() - began
            spent[entry.name, repeat][1] += len(tokens)
            if repeat == 0:
                entry.texts.append(tokens)
                entry.new_tokens += len(tokens)
                entry.target_passes += len(tokens) if stats is None else stats.rungs[-1].passes
    for entry in timed:
        entry.rates = [
            count / seconds
            for seconds, count in (spent[entry.name, r] for r in range(settings.repeats))
        ]

    reference, plain = timed[:2]
    rows = []
    for entry in timed:
        differences = [
            first_difference(lm.model.hf, prompt, ours, theirs)
            for prompt, ours, theirs in zip(prompts, entry.texts, reference.texts, strict=True)
        ]
        gaps = [d.gap for d in differences if d is not None]
        rows.append(
            {
                "setting": entry.name,
                "tokens_per_second": statistics.median(entry.rates),
                "slowest": min(entry.rates),
                "fastest": max(entry.rates),
                "speedup": statistics.median(
                    a / b for a, b in zip(entry.rates, reference.rates, strict=True)
                ),
                "tokens_per_target_pass": entry.new_tokens / entry.target_passes,
                "same_as_generate": len(prompts) - len(gaps),
                "same_as_plain": sum(map(list.__eq__, entry.texts, plain.texts)),
                "largest_gap": max(gaps, default=None),
            }
        )
    _report(rows, len(prompts))
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__,
               "dtype": str(lm.model.hf.dtype).removeprefix("torch.")}  # fmt: skip
    shown_settings = {**asdict(settings), "checkpoint": Path(settings.checkpoint).name}
    print(json.dumps({"settings": shown_settings, "machine": machine, "results": rows}))


def _report(rows: list[dict[str, Any]], prompts: int) -> None:
    out = Output()
    table = Table(title=f"greedy, {prompts} prompts")
    for title in (
        "setting",
        "tokens/s",
        "against HF",
        "tokens per target pass",
        "text of HF",
        "of own plain",
    ):
        table.add_column(title, justify="left" if title == "setting" else "right")
    for row in rows:
        same = [
            "same" if row[key] == prompts else f"{row[key]} of {prompts} same"
            for key in ("same_as_generate", "same_as_plain")
        ]
        table.add_row(
            row["setting"],
            f"{row['tokens_per_second']:.1f} ({row['slowest']:.1f} to {row['fastest']:.1f})",
            f"{row['speedup']:.2f}x",
            f"{row['tokens_per_target_pass']:.2f}",
            *same,
        )
    out.print(table)
    plain = rows[1]["tokens_per_second"]
    for row in rows[2:]:
        verdict = "faster" if row["tokens_per_second"] > plain else "slower"
        ratio = row["tokens_per_second"] / plain
        out.say(f"{row['setting']} is {verdict} than own plain decoding: {ratio:.2f}x")
    gaps = [row["largest_gap"] for row in rows if row["largest_gap"] is not None]
    if gaps:
        out.say(
            f"where texts differ from HF, the two top logits were at most {max(gaps):.3f} apart: "
            "near-ties, which its kernels round otherwise; compare with dtype=float32"
        )


if __name__ == "__main__":
    sys.exit(run_cleanly(lambda: main(sys.argv[1:])))
