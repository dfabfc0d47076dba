"""`hispec plan`: run the planner on some prompts, write its plan, print a table; or simulate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from hispec.checkpoint.format import is_checkpoint
from hispec.data.prompts import Prompt
from hispec.lm import EarlyExitLM
from hispec.planner.device_model import DeviceModel
from hispec.planner.heatmap import draw
from hispec.planner.plan_file import PICTURE, PLAN, Plan, Tried, is_plain, read_plan, shown
from hispec.planner.planner import WORTH_IT, Planner
from hispec.planner.what_if import SIMULATED, Simulation, simulate
from hispec.utils.console import Output, bar
from hispec.utils.files import output_path
from hispec.utils.settings import check

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


def check_simulation_output(folder: Path) -> None:
    """Check before the work that a simulation can be written to `folder`.

    Raises:
        ValueError: no such folder, or one that holds a checkpoint or a plan: a simulation is no
            plan, and nobody should take it for one.
        DiskFullError: too little space.
    """
    check(folder.is_dir(), "output", str(folder), "an existing folder")
    taken = is_checkpoint(folder) or (folder / PLAN).exists()
    allowed = "a folder without a checkpoint or a plan, as a simulation is none"
    check(not taken, "output", str(folder), allowed)
    output_path(folder / SIMULATED, _SPACE)


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
    rows: int = 1,
) -> Plan:
    """Plan, write `plan.json` and its picture to `folder`, and print the result.

    The file keeps the plans for other numbers of rows, see `Plan.beside`. The picture is that of
    this plan.

    Args:
        source: where the chosen prompts come from, for the plan.

    Raises:
        ValueError: depths that the model does not have, or prompts that it cannot encode.
    """
    planner = _planner(lm, chosen, exits=exits, new_tokens=new_tokens, rows=rows)
    plan = planner.run(_text(chosen, source), confirm=confirm, repeats=repeats, progress=bar)
    report(out, plan)  # first, so that it is not lost if the disk has become full meanwhile
    path = plan.beside(_older(folder, lm.model.num_layers)).save(folder)
    draw(plan, folder / PICTURE, f"{folder.name}: {plan.machine}{plan.together}")
    if planner.decoded:
        out.say(
            f"{planner.decoded} settings in which a deeper exit reads the token before were "
            "decoded, not replayed"
        )
    out.say(f"plan: {path}, picture: {folder / PICTURE}")
    return plan


def _planner(
    lm: EarlyExitLM,
    chosen: Sequence[Prompt],
    *,
    exits: list[int] | None,
    new_tokens: int,
    rows: int,
) -> Planner:
    prompts = [prompt.encode(lm.tokenizer) for prompt in chosen]
    return Planner(lm.model, prompts, exits=exits, new_tokens=new_tokens, eos=lm.eos(), rows=rows)


def _text(chosen: Sequence[Prompt], source: str) -> dict[str, Any]:
    return {"source": source, "tasks": sorted({prompt.task for prompt in chosen})}


def _older(folder: Path, num_layers: int) -> Plan | None:
    """The plan that is there; None if it is none of this version and model: it is replaced."""
    try:
        return read_plan(folder, num_layers)
    except ValueError:
        return None


def simulate_checkpoint(
    out: Output,
    lm: EarlyExitLM,
    device: DeviceModel,
    chosen: Sequence[Prompt],
    source: str,
    *,
    exits: list[int] | None,
    new_tokens: int,
    rows: int,
    folder: Path | None,
) -> Simulation:
    """Simulate all settings by a device model, print the best, and write `simulated.json` to
    `folder`, if there is one.

    Args:
        source: where the chosen prompts come from.

    Raises:
        ValueError: depths that the model does not have or that fall together in the other model,
            or prompts that it cannot encode.
    """
    planner = _planner(lm, chosen, exits=exits, new_tokens=new_tokens, rows=rows)
    found = simulate(planner, device, _text(chosen, source), bar)
    report_simulation(out, found)
    if folder is not None:
        out.say(f"simulation: {found.save(folder)}")
    return found


def report_simulation(out: Output, found: Simulation, most: int = 8) -> None:
    """Print the best simulated settings, and the best with each number of rungs."""
    table = Table(title=f"simulated: {found.device_model.name}, rows: {found.rows}")
    table.add_column("setting", overflow="fold")
    for title in ("simulated tokens/s", "against plain", "tokens per row and target pass"):
        table.add_column(title, justify="right", overflow="fold")
    plain = found.plain
    firsts = [best for rungs in (1, 2, 3) if (best := found.best_of(rungs)) is not None]
    listed: list[Tried] = found.settings[:most]
    listed = listed + [entry for entry in (*firsts, plain) if entry not in listed]
    for tried in listed:
        table.add_row(
            shown(tried.setting),
            f"{tried.predicted:.1f}",
            f"{tried.predicted / plain.predicted:.2f}x",
            f"{tried.tokens_per_target_pass:.2f}",
        )
    out.print(table)
    text = found.text
    stands = ", ".join(f"{depth} as {of}" for depth, of in found.depths.items())
    out.say(
        f"a simulation, no plan: acceptance measured on this checkpoint ({text['prompts']} "
        f"prompts, {text['new_tokens']} new tokens of each), costs by the device model; its depths "
        f"are {stands}"
    )
    if found.left_out:
        out.say(
            f"{found.left_out} settings in which a deeper exit reads the token before are left out"
        )
    two, three = found.best_of(2), found.best_of(3)
    if two is not None and three is not None:
        out.say(
            f"simulated: the best three rungs reach {three.predicted / two.predicted:.2f} times "
            "the best two"
        )


def json_line(plan: Plan) -> str:
    """The plan as one line of JSON, without its two long tables."""
    found = asdict(plan)
    del found["settings"], found["latency"], found["other_rows"]
    return json.dumps({**found, "tried": len(plan.settings), "speedup": plan.speedup})


def report(out: Output, plan: Plan) -> None:
    """Print the confirmed settings and the choice, and warn if timings disagree or none gains."""
    text = plan.text
    title = f"{text['prompts']} prompts{plan.together}, {text['new_tokens']} new tokens of each"
    table = Table(title=title)
    per_pass = "tokens per target pass" if plan.rows == 1 else "tokens per row and target pass"
    for title in (
        *("setting", "predicted", "measured tokens/s", "against plain"),
        *(per_pass, "text of plain"),
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
        f"{plan.seconds:.0f} s; {plan.machine}{plan.together}"
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
