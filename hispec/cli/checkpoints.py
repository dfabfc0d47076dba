"""Commands that read checkpoints or write new ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hispec.cli.options import Backend, Base, Data, Device, Dtype, Exits, Weights, load_model, out
from hispec.utils.command_line import parse_depths
from hispec.utils.console import bar, quiet_transformers
from hispec.utils.settings import check


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
            help="for other tools: draft-model (the exit as a causal LM of its own), eagle3 or "
            "speculators (the EAGLE-3 head at depth 0), or gguf (for llama.cpp: the full model, "
            "or with --exit the draft model)",
        ),
    ] = None,
    exit_depth: Annotated[
        int | None, typer.Option("--exit", help="with --as: the exit to write")
    ] = None,
    base: Base = None,
    exits: Annotated[
        str | None, typer.Option(help="for a plain model: depths read through its final norm")
    ] = None,
) -> None:
    """Write a verified copy of an EE checkpoint, with or without its base, or for other tools."""
    from hispec.export import exporter

    quiet_transformers()
    if form is not None:
        check(not full, "full", full, "--as writes for another tool, not an EE checkpoint")
        check(exits is None, "exits", exits, "--as writes one exit: name it with --exit DEPTH")
    else:
        check(exit_depth is None, "exit", exit_depth, "only with --as; a checkpoint has all exits")
    depths = parse_depths("exits", exits)
    _clean_up("export", target)
    if form is not None:
        note = exporter.export_as(form, checkpoint, target, depth=exit_depth, base=base)
        out.say(f"{form}: {target}" + (f"; {note}" if note else ""))
        return
    if depths:
        found = exporter.export_untrained(checkpoint, depths, target, full=full)
    else:
        found = exporter.export(Path(checkpoint), target, full=full, base=base)
    _say_verified(target, found)


def import_drafter(
    source: Annotated[str, typer.Argument(help="folder or Hub id of an EAGLE-3 head")],
    base: Annotated[str, typer.Argument(help="the model that it drafts for: a name or a folder")],
    target: Annotated[Path, typer.Argument(help="folder of the EE checkpoint to write")],
    aux_depths: Annotated[
        str | None,
        typer.Option(help="depths whose states the head reads, if not those of its config"),
    ] = None,
) -> None:
    """Turn a published EAGLE-3 head into an EE checkpoint, whose exit at depth 0 drafts with it."""
    from hispec.export import import_drafter as importer

    quiet_transformers()
    depths = parse_depths("aux_depths", aux_depths)
    _clean_up("import", target)
    found = importer.import_drafter(source, base, target, aux_depths=depths, say=out.say)
    out.say(f"the head reads the depths {', '.join(map(str, found.depths))}")
    if found.rounded:
        out.say("its weights were rounded to the dtype of the base")
    _say_verified(target, found.figures)


def merge(
    first: Annotated[Path, typer.Argument(help="folder of an EE checkpoint")],
    second: Annotated[Path, typer.Argument(help="one with other exits of the same base")],
    target: Annotated[Path, typer.Argument(help="folder of the EE checkpoint to write")],
    base: Base = None,
) -> None:
    """Put the exits of two EE checkpoints of one base into one, as they were trained."""
    from hispec.export import merge as merging

    quiet_transformers()
    _clean_up("merge", target)
    found = merging.merge(first, second, target, base=base)
    _say_verified(target, found)


def inspect(
    model: Annotated[str, typer.Argument(help="EE checkpoint, plain model, or a fetched name")],
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, for programs")] = False,
) -> None:
    """Describe a checkpoint or model without loading it: exits, sizes, license, figures, plan."""
    import json

    from hispec.checkpoint import inspect as inspection

    quiet_transformers()
    found = inspection.inspect(model, base)
    if as_json:
        print(json.dumps(found))
        return
    for line in inspection.lines(found):
        out.say(line)


def compile_checkpoint(
    checkpoint: Annotated[str, typer.Argument(help="EE checkpoint, or a plain model's folder")],
    exits: Exits = None,
    base: Base = None,
    dtype: Dtype = "auto",
    weights: Weights = "full",
) -> None:
    """Compile the passes of a model for this machine ahead of its first decode."""
    from hispec.config import OPENVINO

    quiet_transformers()
    lm = load_model(
        checkpoint,
        dtype=dtype,
        device="cpu",
        exits=exits,
        base=base,
        backend=OPENVINO,
        weights=weights,
    )
    assert lm.model.engine is not None
    began = time.perf_counter()
    files = lm.model.engine.compile(bar)
    seconds, size = time.perf_counter() - began, sum(file.stat().st_size for file in files)
    out.say(f"{len(files)} pieces, {size / 1e6:.0f} MB, ready in {seconds:.1f} s")
    out.say(f"kept in {files[0].parent}; HISPEC_CACHE names another folder")


def report(
    checkpoint: Annotated[Path, typer.Argument(help="folder of an EE checkpoint")],
    output: Annotated[
        Path | None, typer.Option(help="the HTML file; default: CHECKPOINT/report.html")
    ] = None,
    data: Data = None,
    prompts: Annotated[int, typer.Option(help="how many are decoded, evenly over their tasks")] = 6,
    max_new_tokens: Annotated[int, typer.Option(help="new tokens per prompt")] = 64,
    decode: Annotated[bool, typer.Option(help="decode prompts; otherwise load no model")] = True,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = None,
    backend: Backend = "auto",
    weights: Weights = "full",
) -> None:
    """Write all that was measured on a checkpoint, with pictures, into one HTML file."""
    from hispec.report import page

    quiet_transformers()
    found = page.gather(checkpoint)
    if decode:
        lm = load_model(
            checkpoint, dtype=dtype, device=device, base=base, backend=backend, weights=weights
        )
        page.add_texts(found, lm, data=data, count=prompts, new_tokens=max_new_tokens)
    page.write(out, found, output or checkpoint / page.REPORT)


def _clean_up(what: str, target: Path) -> None:
    """Remove what an interrupted run left beside its target, and say so."""
    from hispec.utils.files import clear_leftovers

    if clear_leftovers(target):
        out.say(f"an earlier {what} to {target} was interrupted: cleaned up")


def _say_verified(target: Path, found: dict[str, Any]) -> None:
    """Say what was written, and what the new process that decoded with it has found."""
    from hispec.checkpoint.model_card import accepted

    out.say(
        f"EE checkpoint: {target}; verified: {found['prompts']} prompts, {found['new_tokens']} new "
        f"tokens, accepted of the drafts {accepted(found)}"
    )
