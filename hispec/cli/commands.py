"""The `hispec` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hispec.utils.command_line import parse_depths, parse_device, parse_dtype, run_cleanly
from hispec.utils.console import Output, quiet_transformers

app = typer.Typer(
    help="Early-exit models and hierarchical speculative decoding.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out = Output()


@app.callback()
def _root() -> None:
    """Keeps subcommands subcommands, however many there are."""


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m, gemma3-270m, or a Hub id")],
    root: Annotated[Path, typer.Option(help="where base models are kept")] = Path(
        "checkpoints/base"
    ),
) -> None:
    """Put a base model on this machine as a plain transformers folder."""
    from hispec.base_models.fetch import fetch as fetch_base

    fetch_base(name, root, say=out.say)


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Argument(help="EE checkpoint, or a base with --exits")],
    prompt: Annotated[str, typer.Argument(help="the prompt; - reads it from standard input")],
    ladder: Annotated[
        str,
        typer.Option(help="depths such as 6,12,30, 'plain', or 'auto': as planned, else all exits"),
    ] = "auto",
    drafter: Annotated[
        str | None, typer.Option(help="exit (default), lookup, recycle, lookup+exit, recycle+exit")
    ] = None,
    draft_length: Annotated[
        int | None, typer.Option(help="tokens an exit drafts per round (2)")
    ] = None,
    max_draft_length: Annotated[
        int | None, typer.Option(help="let the draft length follow acceptance, up to this")
    ] = None,
    draft_threshold: Annotated[
        float | None, typer.Option(help="an exit's draft ends below this top probability")
    ] = None,
    lookup_length: Annotated[int | None, typer.Option(help="tokens a lookup proposes (8)")] = None,
    tree_tokens: Annotated[int | None, typer.Option(help="tokens of a recycled tree (15)")] = None,
    buffer: Annotated[
        int | None, typer.Option(help="tokens that start the next deeper rung (4)")
    ] = None,
    buffer_threshold: Annotated[
        float | None, typer.Option(help="a verifier's top probability that starts it too")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="longest continuation")] = 128,
    max_time: Annotated[float | None, typer.Option(help="seconds")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="a string that ends the text")] = None,
    verification: Annotated[
        str,
        typer.Option(help="match: one text per seed; rejection: the same distribution only"),
    ] = "match",
    law: Annotated[str | None, typer.Option(hidden=True)] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off")] = 1.0,
    no_repeat_ngram_size: Annotated[int, typer.Option(help="0 is off")] = 0,
    seed: Annotated[int, typer.Option(help="fixes the text at any temperature")] = 0,
    exits: Annotated[
        str | None, typer.Option(help="for a plain model: depths to read as exits, e.g. 6,12")
    ] = None,
    base: Annotated[str | None, typer.Option(help="where the checkpoint's base is")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
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
    from hispec.lm import AUTO, PLAIN, load

    quiet_transformers()
    lm = load(
        checkpoint,
        dtype=parse_dtype(dtype),
        device=parse_device(device),
        exits=parse_depths("exits", exits),
        base=base,
    )
    chosen: dict[str, Any] = {
        "drafter": drafter,
        "draft_length": draft_length,
        "max_draft_length": max_draft_length,
        "draft_threshold": draft_threshold,
        "lookup_length": lookup_length,
        "tree_tokens": tree_tokens,
        "buffer": buffer,
        "buffer_threshold": buffer_threshold,
    }
    chosen = {key: value for key, value in chosen.items() if value is not None}
    run = lm.decode(
        [sys.stdin.read() if prompt == "-" else prompt],
        ladder=ladder if ladder in (AUTO, PLAIN) else parse_depths("ladder", ladder),
        **chosen,
        max_new_tokens=max_new_tokens,
        max_time=max_time,
        stop_strings=stop or (),
        verification=verification if law is None else law,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        seed=seed,
        chat=False if raw else None,
    )
    tokens = display.stream(out, lm, run, show_rungs)
    if stats:
        display.stats_table(out, run.stats)
        if ladder == AUTO and not chosen:
            out.say(lm.planned()[1])
    if compare:
        display.comparison(out, lm, run, tokens)


@app.command()
def plan(
    checkpoint: Annotated[str, typer.Argument(help="EE checkpoint, or a plain model's folder")],
    data: Annotated[
        Path | None, typer.Option(help="JSONL of prompts like yours; default: our own small set")
    ] = None,
    prompts: Annotated[int, typer.Option(help="how many of them, evenly over their tasks")] = 6,
    max_new_tokens: Annotated[int, typer.Option(help="decoded of each prompt")] = 32,
    exits: Annotated[
        str | None, typer.Option(help="depths to try, e.g. 4,8,12; default: the trained exits")
    ] = None,
    confirm: Annotated[int, typer.Option(help="settings that are really decoded")] = 4,
    repeats: Annotated[int, typer.Option(help="how often; the median counts")] = 2,
    base: Annotated[str | None, typer.Option(help="where the checkpoint's base is")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder of plan.json and plan.png; default: CHECKPOINT")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON line at the end")] = False,
) -> None:
    """Find the fastest setting for this model, machine and kind of text."""
    from hispec.cli.plan import json_line, plan_checkpoint
    from hispec.lm import load

    quiet_transformers()
    lm = load(checkpoint, dtype=parse_dtype(dtype), device=parse_device(device), base=base)
    found = plan_checkpoint(
        out,
        lm,
        output or Path(checkpoint),
        data=data,
        count=prompts,
        exits=parse_depths("exits", exits),
        new_tokens=max_new_tokens,
        confirm=confirm,
        repeats=repeats,
    )
    if as_json:
        print(json_line(found))


@app.command()
def report(
    checkpoint: Annotated[Path, typer.Argument(help="folder of an EE checkpoint")],
    output: Annotated[
        Path | None, typer.Option(help="the HTML file; default: CHECKPOINT/report.html")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="JSONL of prompts like yours; default: our own small set")
    ] = None,
    prompts: Annotated[int, typer.Option(help="how many are decoded, evenly over their tasks")] = 6,
    max_new_tokens: Annotated[int, typer.Option(help="decoded of each prompt")] = 64,
    decode: Annotated[bool, typer.Option(help="decode prompts; otherwise nothing is loaded")] = (
        True
    ),
    base: Annotated[str | None, typer.Option(help="where the checkpoint's base is")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Put what is known of a checkpoint, with pictures, into one HTML file."""
    from hispec.lm import load
    from hispec.report import page

    quiet_transformers()
    found = page.gather(checkpoint)
    if decode:
        lm = load(checkpoint, dtype=parse_dtype(dtype), device=parse_device(device), base=base)
        page.add_texts(found, lm, data=data, count=prompts, new_tokens=max_new_tokens)
    page.write(out, found, output or checkpoint / page.REPORT)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="EE checkpoint, or a base with --exits")],
    target: Annotated[Path, typer.Argument(help="folder to write, or FILE.gguf for --as gguf")],
    full: Annotated[bool, typer.Option(help="include the base: plain transformers loads it")] = (
        False
    ),
    form: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="for other tools: draft-model (the exit as a causal LM of its own) or gguf "
            "(for llama.cpp: the full model, or with --exit the draft model)",
        ),
    ] = None,
    exit_depth: Annotated[
        int | None, typer.Option("--exit", help="with --as: the exit to write")
    ] = None,
    base: Annotated[str | None, typer.Option(help="where the checkpoint's base is")] = None,
    exits: Annotated[
        str | None, typer.Option(help="for a plain model: depths read through its final norm")
    ] = None,
) -> None:
    """Write an EE checkpoint anew, checked, with or without its base; or for other tools."""
    from hispec.checkpoint.model_card import accepted
    from hispec.export import exporter
    from hispec.utils.files import clear_leftovers
    from hispec.utils.settings import check

    quiet_transformers()
    if clear_leftovers(target):
        out.say(f"an earlier export to {target} was interrupted: cleaned up")
    if form is not None:
        check(not full, "full", full, "with --as something else than an EE checkpoint is written")
        check(exits is None, "exits", exits, "with --as one exit is written: --exit DEPTH")
        said = exporter.export_as(form, checkpoint, target, depth=exit_depth, base=base)
        out.say(f"{form}: {target}" + (f"; {said}" if said else ""))
        return
    check(exit_depth is None, "exit", exit_depth, "only with --as; a checkpoint has all its exits")
    if depths := parse_depths("exits", exits):
        found = exporter.export_untrained(checkpoint, depths, target, full=full)
    else:
        found = exporter.export(Path(checkpoint), target, full=full, base=base)
    out.say(
        f"EE checkpoint: {target}; checked: {found['prompts']} prompts, {found['new_tokens']} new "
        f"tokens, accepted of the drafts {accepted(found)}"
    )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="EE checkpoint, plain model, or a fetched name")],
    base: Annotated[str | None, typer.Option(help="where the checkpoint's base is")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, for programs")] = False,
) -> None:
    """Say what can be read there: exits, sizes, license, base, figures, plan."""
    import json

    from hispec.checkpoint import inspect as inspection

    quiet_transformers()
    report = inspection.inspect(model, base)
    if as_json:
        print(json.dumps(report))
        return
    for line in inspection.lines(report):
        out.say(line)


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="folder of an EE checkpoint")],
    repo: Annotated[str, typer.Argument(help="ORG/NAME on the Hub")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="of a new repository; private by default"),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="branch, made if it is new; default: main")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list the files, print the card, contact nobody")
    ] = False,
) -> None:
    """Put an EE checkpoint on the Hugging Face Hub, checked, in one commit."""
    from hispec.hub.transfer import push as push_checkpoint

    push_checkpoint(
        checkpoint, repo, private=private, revision=revision, dry_run=dry_run, say=out.say
    )


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="ORG/NAME or ORG/NAME@REVISION on the Hub")],
    folder: Annotated[
        Path | None, typer.Argument(help="where to; default: checkpoints/ORG--NAME")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit")] = None,
) -> None:
    """Bring an EE checkpoint from the Hugging Face Hub, whole or not at all, and check it."""
    from hispec.hub.transfer import pull as pull_checkpoint

    pull_checkpoint(repo, folder, revision=revision, say=out.say)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_cleanly(app))
