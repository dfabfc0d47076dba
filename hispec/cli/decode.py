"""Commands that decode: generate, and plan, which looks for the fastest way to do it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hispec.cli.options import Backend, Base, Data, Device, Dtype, Exits, Weights, load_model, out
from hispec.utils.command_line import parse_depths, read_prompt
from hispec.utils.console import bar, quiet_transformers
from hispec.utils.settings import check


def generate(
    checkpoint: Annotated[str, typer.Argument(help="EE checkpoint, or a base with --exits")],
    prompt: Annotated[str, typer.Argument(help="the prompt; - reads it from standard input")],
    ladder: Annotated[
        str,
        typer.Option(
            help="depths such as 6,12,30, 'plain', or 'auto': as planned, else prompt lookup"
        ),
    ] = "auto",
    drafter: Annotated[
        str | None, typer.Option(help="exit, lookup, recycle, lookup+exit, recycle+exit")
    ] = None,
    draft_length: Annotated[
        int | None, typer.Option(help="tokens an exit drafts per round (2)")
    ] = None,
    max_draft_length: Annotated[
        int | None, typer.Option(help="let the draft length follow acceptance, up to this")
    ] = None,
    adaptive: Annotated[
        bool | None,
        typer.Option(help="draft 0 to draft-length tokens, as acceptance and time suggest"),
    ] = None,
    draft_threshold: Annotated[
        float | None, typer.Option(help="an exit's draft ends below this top probability")
    ] = None,
    draft_width: Annotated[
        int | None, typer.Option(help="tokens an exit drafts per step; above 1 a tree (1)")
    ] = None,
    join_drafts: Annotated[
        bool | None, typer.Option(help="a tree and a lookup become one tree, else one or the other")
    ] = None,
    lookup_length: Annotated[int | None, typer.Option(help="tokens a lookup proposes (8)")] = None,
    max_lookup_length: Annotated[
        int | None, typer.Option(help="and after one that was accepted whole")
    ] = None,
    tree_tokens: Annotated[int | None, typer.Option(help="tokens of a draft tree (15)")] = None,
    buffer: Annotated[
        int | None, typer.Option(help="pending tokens that start the next deeper rung (4)")
    ] = None,
    buffer_threshold: Annotated[
        float | None, typer.Option(help="a verifier's top probability that starts it too")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="longest continuation")] = 128,
    max_time: Annotated[float | None, typer.Option(help="seconds")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="a string that ends the text")] = None,
    verification: Annotated[
        str, typer.Option(help="match: one text per seed; rejection: same distribution only")
    ] = "match",
    law: Annotated[str | None, typer.Option(hidden=True)] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off")] = 1.0,
    no_repeat_ngram_size: Annotated[int, typer.Option(help="0 is off")] = 0,
    seed: Annotated[int, typer.Option(help="fixes the text at any temperature")] = 0,
    exits: Exits = None,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = None,
    backend: Backend = "auto",
    weights: Weights = "full",
    raw: Annotated[bool, typer.Option(help="continue the prompt as it is: no chat template")] = (
        False
    ),
    stats: Annotated[bool, typer.Option(help="print counts, acceptance and time per rung")] = (
        False
    ),
    show_rungs: Annotated[bool, typer.Option(help="colour each token by its rung")] = False,
    compare: Annotated[bool, typer.Option(help="decode plainly as well, and compare")] = False,
) -> None:
    """Decode a prompt and stream the text."""
    from hispec.cli import display
    from hispec.lm import AUTO, PLAIN

    quiet_transformers()
    depths = ladder if ladder in (AUTO, PLAIN) else parse_depths("ladder", ladder)
    named = {
        "drafter": drafter,
        "draft_length": draft_length,
        "max_draft_length": max_draft_length,
        "adaptive": adaptive,
        "draft_threshold": draft_threshold,
        "draft_width": draft_width,
        "join_drafts": join_drafts,
        "lookup_length": lookup_length,
        "max_lookup_length": max_lookup_length,
        "tree_tokens": tree_tokens,
        "buffer": buffer,
        "buffer_threshold": buffer_threshold,
        "max_time": max_time,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
    }
    settings: dict[str, Any] = {
        **{key: value for key, value in named.items() if value is not None},
        "max_new_tokens": max_new_tokens,
        "verification": verification if law is None else law,
        "temperature": temperature,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "seed": seed,
    }
    text = read_prompt(prompt)
    lm = load_model(
        checkpoint,
        dtype=dtype,
        device=device,
        exits=exits,
        base=base,
        backend=backend,
        weights=weights,
    )
    chosen, source = lm.choose(depths, settings)
    run = lm.decode([text], **chosen, stop_strings=stop or (), chat=False if raw else None)
    if lm.model.engine is not None:
        lm.model.engine.load(bar)  # before the clock runs
    tokens = display.stream(out, lm, run, show_rungs)
    if stats:
        display.stats_table(out, run.stats)
        if source:
            out.say(source)
    if compare:
        display.comparison(out, lm, run, tokens)


def plan(
    checkpoint: Annotated[str, typer.Argument(help="EE checkpoint, or a plain model's folder")],
    data: Data = None,
    prompts: Annotated[
        int | None,
        typer.Option(help="how many of them, evenly over their tasks; default: 6, or the rows"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="new tokens per prompt")] = 32,
    rows: Annotated[
        int, typer.Option(help="prompts decoded together, 1 to 16; each number has its plan")
    ] = 1,
    exits: Annotated[
        str | None, typer.Option(help="depths to try, e.g. 4,8,12; default: the trained exits")
    ] = None,
    confirm: Annotated[int, typer.Option(help="settings that are really decoded")] = 4,
    repeats: Annotated[int, typer.Option(help="how often; the median counts")] = 2,
    device_model: Annotated[
        Path | None,
        typer.Option(
            help="simulate other hardware or another model's shape, no plan: a YAML file such as "
            "those in recipes/devices"
        ),
    ] = None,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = None,
    backend: Backend = "auto",
    weights: Weights = "full",
    output: Annotated[
        Path | None,
        typer.Option(
            help="folder of plan.json and plan.png, default: CHECKPOINT; or of simulated.json, "
            "default: none is written"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON line at the end")] = False,
) -> None:
    """Find the fastest setting for this model, machine and kind of text."""
    import json

    from hispec.cli import planning
    from hispec.data.prompts import some
    from hispec.planner.device_model import read_device_model
    from hispec.planner.planner import MOST_ROWS

    quiet_transformers()
    folder = output or Path(checkpoint)
    simulated = None if device_model is None else read_device_model(device_model)
    if simulated is None:
        allowed = (
            "an existing folder" if output else "no folder of that name: name one with --output"
        )
        check(folder.is_dir(), "output", str(folder), allowed)
        planning.check_output(folder)
    elif output is not None:
        planning.check_simulation_output(output)
    check(max_new_tokens >= 2, "max_new_tokens", max_new_tokens, "2 or more")
    check(1 <= rows <= MOST_ROWS, "rows", rows, f"1 to {MOST_ROWS}")
    check(confirm >= 1, "confirm", confirm, "1 or more")
    check(repeats >= 1, "repeats", repeats, "1 or more")
    depths = parse_depths("exits", exits)
    chosen, source = some(data, max(6, rows) if prompts is None else prompts)
    lm = load_model(
        checkpoint, dtype=dtype, device=device, base=base, backend=backend, weights=weights
    )
    if simulated is not None:
        simulation = planning.simulate_checkpoint(
            out,
            lm,
            simulated,
            chosen,
            source,
            exits=depths,
            new_tokens=max_new_tokens,
            rows=rows,
            folder=output,
        )
        if as_json:
            print(json.dumps(simulation.as_dict()))
        return
    found = planning.plan_checkpoint(
        out,
        lm,
        folder,
        chosen,
        source,
        exits=depths,
        new_tokens=max_new_tokens,
        confirm=confirm,
        repeats=repeats,
        rows=rows,
    )
    if as_json:
        print(planning.json_line(found))
