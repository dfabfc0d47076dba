"""Is the decoded text exactly that of plain decoding? `python eval/lossless.py checkpoint=DIR`.

`against=generate` compares own plain decoding and every ladder with transformers' greedy text,
`against=plain` compares every ladder with own plain decoding, at any temperature and seed. Prints
every difference with its position, the gap between the two highest scores, and its class: `tie`,
`processor` or `bug` (see `hispec.metrics.equivalence.Difference`). Ends with one JSON line.

Exit code 0: no difference, or with `allow_ties=true` nothing but ties. 1: any other difference.
2: a setting that is not possible.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

from eval.prompts import load_prompts
from eval.settings import BatchRows, Name, PromptSource
from hispec.config import DRAFTERS
from hispec.utils.command_line import parse_depths, parse_device, parse_dtype, run_cleanly
from hispec.utils.console import Output, bar, quiet_transformers
from hispec.utils.limits import Seed, Temperature, one_of
from hispec.utils.settings import check, resolve


@dataclass
class Settings(PromptSource):
    """The model, the decode settings to compare, and the prompts."""

    checkpoint: Name = MISSING
    """EE checkpoint, or a base model: every depth is then read through the final norm."""
    ladders: list[str] = field(default_factory=list)
    """Such as ["6,30","6,12,30"]; default: every exit with the full model, and all together."""
    drafters: list[Annotated[str, one_of(*DRAFTERS)]] = field(default_factory=lambda: ["exit"])
    """Such as ["exit","lookup","recycle","lookup+exit","recycle+exit"]; each with each ladder."""
    rows: BatchRows = 1
    """Prompts decoded together."""
    against: Annotated[str, one_of("generate", "plain")] = "generate"
    """`generate`: transformers' `generate`, greedy only; `plain`: own plain decoding."""
    temperature: Temperature = 0.0
    seed: Seed = 0
    draft_length: int = 2
    draft_width: int = 1
    """Tokens that an exit drafts per step; above 1 its draft is a tree of `tree_tokens`."""
    tree_tokens: int = 15
    join_drafts: bool = True
    """Whether such a tree and a lookup become one; else the exit drafts where no lookup does."""
    adaptive: bool = False
    """Whether an exit drafts by as many steps, up to `draft_length`, as pay."""
    buffer: int = 4
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    allow_ties: bool = False
    """Whether texts may differ where rounding alone decides between two tokens."""
    dtype: str = "float32"
    device: str | None = "cpu"
    backend: str = "auto"
    """What runs our passes: "eager", "openvino", or "auto"."""
    weights: str = "full"
    """"full", or "int8": all methods then decode the rounded model."""


def main(words: Sequence[str]) -> int:
    from hispec.config import DecodeConfig
    from hispec.decoding.decoder import Decode
    from hispec.lm import load
    from hispec.metrics.equivalence import TIE, first_difference, hf_generate

    settings = resolve(Settings, overrides=words)
    check(
        settings.temperature == 0 or settings.against == "plain",
        *(
            "against",
            settings.against,
            "plain: at temperatures above 0 transformers draws otherwise",
        ),
    )
    quiet_transformers()
    lm = load(
        settings.checkpoint,
        dtype=parse_dtype(settings.dtype),
        device=parse_device(settings.device),
        backend=settings.backend,
        weights=settings.weights,
    )
    full, exits = lm.model.num_layers, lm.model.exits.depths
    ladders = [parse_depths("ladders", text) or [] for text in settings.ladders] or [
        *([e, full] for e in exits),
        *([[*exits, full]] if len(exits) > 1 else []),
    ]

    penalties = {
        "repetition_penalty": settings.repetition_penalty,
        "no_repeat_ngram_size": settings.no_repeat_ngram_size,
    }

    def config(ladder: list[int], drafter: str) -> DecodeConfig:
        return DecodeConfig(
            ladder,
            drafter=drafter,
            draft_length=settings.draft_length,
            draft_width=settings.draft_width,
            tree_tokens=settings.tree_tokens,
            join_drafts=settings.join_drafts,
            adaptive=settings.adaptive,
            buffer=settings.buffer,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            eos=lm.eos(),
            **penalties,
        )

    def decode(rows: list[list[int]], ladder: list[int], drafter: str) -> list[list[int]]:
        return Decode(lm.model, rows, config(ladder, drafter)).finish()

    compared = [(ladder, drafter) for drafter in settings.drafters for ladder in ladders]
    by_generate = settings.against == "generate"
    if by_generate:
        compared.insert(0, ([full], "exit"))
    check(bool(compared), "ladders", settings.ladders, "name some: nothing would be compared")
    for ladder, drafter in compared:  # all are checked before the first one runs
        config(ladder, drafter).validate(full)
    prompts = load_prompts(lm, settings, settings.checkpoint)
    reference = "transformers' generate" if by_generate else "own plain decoding"
    differences: list[dict[str, Any]] = []
    tokens = 0
    by_length = sorted(enumerate(prompts), key=lambda n: len(n[1].tokens))  # little padding
    groups = [by_length[i : i + settings.rows] for i in range(0, len(prompts), settings.rows)]
    most = settings.max_new_tokens
    for group in bar(groups, "comparing"):
        rows = [prompt.tokens for _, prompt in group]
        if by_generate:
            wanted = [hf_generate(lm.model.hf, row, most, lm.eos(), **penalties) for row in rows]
        else:
            wanted = decode(rows, [full], "exit")
        tokens += sum(map(len, wanted))
        for ladder, drafter in compared:
            setting = config(ladder, drafter)
            texts = zip(group, decode(rows, ladder, drafter), wanted, strict=True)
            for (number, prompt), ours, theirs in texts:
                found = first_difference(lm.model.hf, prompt.tokens, ours, theirs, setting)
                if found is not None:
                    where = {"prompt": number, "task": prompt.task}
                    how = {"ladder": ladder, "drafter": drafter}
                    differences.append({**where, **how, **asdict(found)})

    out = Output()
    for d in differences:
        out.say(
            f"{d['kind']}: prompt {d['prompt']}, ladder {tuple(d['ladder'])}, {d['drafter']}: "
            f"differs at new token {d['position']} ({d['ours']} instead of {d['theirs']}), gap of "
            f"the two highest scores {d['gap']:.5f}, rounding {d['rounding']:.5f}"
        )
    shown = ", ".join(f"{tuple(ladder)} {drafter}" for ladder, drafter in compared)
    kinds = Counter(d["kind"] for d in differences)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    out.say(
        f"{len(differences)} differences from {reference}{f' ({counted})' if counted else ''}: "
        f"{len(prompts)} prompts, {tokens} tokens, {shown}, {settings.dtype}, "
        f"{settings.weights} weights, {lm.model.backend}, "
        f"temperature {settings.temperature}"
    )
    line = {"settings": asdict(settings), "tokens": tokens, "kinds": kinds}
    print(json.dumps({**line, "differences": differences}))
    allowed_kinds = {TIE} if settings.allow_ties else set()
    return 1 if kinds.keys() - allowed_kinds else 0


if __name__ == "__main__":
    sys.exit(run_cleanly(lambda: main(sys.argv[1:])))
