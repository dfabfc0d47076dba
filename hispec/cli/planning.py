"""`hispec plan`: run the planner on some prompts, write its plan, print a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from hispec.data.prompts import Prompt
from hispec.lm import EarlyExitLM
from hispec.planner.heatmap import draw
from hispec.planner.plan_file import PICTURE, PLAN, Plan, is_plain, shown
from hispec.planner.planner import WORTH_IT, Planner
from hispec.utils.console import Output, bar
from hispec.utils.files import output_path

_SPACE = 1 << 20
"""Bytes that a plan and its picture need at most."""
_BUSY = 1.2
"""Largest error of the prediction for plain decoding on an idle machine."""


def check_output(folder: Path) -> None:
    """Check before the work that a plan and its picture can be written to `folder`.

    Raises:
        ValueError: one of them is a link that leads nowhere, or the folder is read-only.
        DiskFullError: too little space.
    """
    for name in (PLAN, PICTURE):
        output_path(folder / name, _SPACE)


def plan_checkpoint(
    out: Output,
    lm: EarlyExitLM,
    folder: Path,
    chosen: Sequence[Prompt],
    source: str,
    *,
    exits: list[int] | None,
    new_tokens: int,
    confirm: int,
    repeats: int,
) -> Plan:
    """Plan, write `plan.json` and its picture to `folder`, and print the result.

    Args:
        source: where the chosen prompts come from, for the plan.

    Raises:
        ValueError: depths that the model does not have, or prompts that it cannot encode.
    """
    prompts = [prompt.encode(lm.tokenizer) for prompt in chosen]
    planner = Planner(lm.model, prompts, exits=exits, new_tokens=new_tokens, eos=lm.eos())
    text = {"source": source, "tasks": sorted({prompt.task for prompt in chosen})}
    plan = planner.run(text, confirm=confirm, repeats=repeats, progress=bar)
    report(out, plan)  # first, so that it is not lost if the disk has become full meanwhile
    path = plan.save(folder)
    draw(plan, folder / PICTURE, f"{folder.name}: {plan.machine}")
    if planner.decoded:
        out.say(
            f"{planner.decoded} settings in which a deeper exit reads the token before were "
            "decoded, not replayed"
        )
    out.say(f"plan: {path}, picture: {folder / PICTURE}")
    return plan


def json_line(plan: Plan) -> str:
    """The plan as one line of JSON, without its two long tables."""
    found = asdict(plan)
    del found["settings"], found["latency"]
    return json.dumps({**found, "tried": len(plan.settings), "speedup": plan.speedup})


def report(out: Output, plan: Plan) -> None:
    """Print the confirmed settings and the choice, and warn if timings disagree or none gains."""
    text = plan.text
    table = Table(title=f"{text['prompts']} prompts, {text['new_tokens']} new tokens of each")
    for title in (
        *("setting", "predicted", "measured tokens/s", "against plain"),
        *("tokens per target pass", "text of plain"),
    ):
        first = title == "setting"
        table.add_column(title, justify="left" if first else "right", overflow="fold")
    for tried in plan.confirmed:
        assert tried.measured is not None
        assert tried.spread is not None
        same = tried.same_text == text["prompts"]
        table.add_row(
            shown(tried.setting),
            f"{tried.predicted:.1f}",
            f"{tried.measured:.1f} ({tried.spread[0]:.1f} to {tried.spread[1]:.1f})",
            f"{tried.measured / plan.plain_tokens_per_second:.2f}x",
            f"{tried.tokens_per_target_pass:.2f}",
            "same" if same else f"{tried.same_text} of {text['prompts']} same",
        )
    out.print(table)
    out.say(
        f"{len(plan.settings)} settings tried, {len(plan.confirmed)} decoded, "
        f"{plan.seconds:.0f} s; {plan.machine}"
    )
    plain = next(tried for tried in plan.confirmed if is_plain(tried.setting))
    if not 1 / _BUSY < plain.predicted / plan.plain_tokens_per_second < _BUSY:
        out.say(
            f"warning: plain decoding was predicted at {plain.predicted:.1f} tokens/s and measured "
            f"at {plan.plain_tokens_per_second:.1f}: the machine was busier at some times than at "
            "others, so another setting may be the fastest; plan again when it is idle"
        )
    if plan.plain:
        rates = [t.measured or 0.0 for t in plan.confirmed if not is_plain(t.setting)]
        best = max(rates) / plan.plain_tokens_per_second
        out.say(
            f"warning: nothing was {WORTH_IT} times as fast as plain decoding (the best reached "
            f"{best:.2f}x), so do not speculate here: `generate` will decode plainly"
        )
    else:
        out.say(f"fastest: {shown(plan.setting)}, {plan.speedup:.2f}x plain decoding")
