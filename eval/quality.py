"""Does training hurt the target? `python eval/quality.py checkpoint=DIR`.

Held-out text (perplexity, KL to the base) and tasks of lm-evaluation-harness, for the base, the
full model and every exit, side by side. Prints a table, writes `quality.json` to `output`, and ends
with one JSON line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.table import Table

from eval.prompts import TextSource, held_out_rows
from hispec.checkpoint.format import is_checkpoint, read_config
from hispec.checkpoint.io import own_base
from hispec.config import DecodeConfig
from hispec.export.draft_model import check_expressible
from hispec.hub.pull import locate
from hispec.lm import AUTO, PLAIN, EarlyExitLM, load
from hispec.metrics.equivalence import same_weights
from hispec.metrics.perplexity import Fit, Reference, final_states, fit
from hispec.utils.command_line import parse_depths, parse_device, parse_dtype, run_cleanly
from hispec.utils.console import Output, quiet_transformers
from hispec.utils.files import write_json
from hispec.utils.settings import check, resolve


@dataclass
class Settings(TextSource):
    """What to measure, and on what."""

    checkpoint: str = MISSING
    """EE checkpoint, or a plain model: every depth is then read through the final norm."""
    base: str | None = None
    """What it is compared with, and where the base of a light checkpoint is; default: the base that
    the checkpoint names."""
    output: str | None = None
    """Folder of the results; default: the checkpoint's own, or `runs` if it is no folder."""
    tasks: list[str] = field(default_factory=lambda: ["local/common"])
    """`local/common`, `local/word_problems`, `gsm8k`, others that lm-evaluation-harness knows, or
    YAML files of such; [] for the text alone."""
    gsm8k_file: str | None = None
    """JSONL of `question` and `answer` for the task `gsm8k`; without it the Hub is asked."""
    limit: int | None = None
    """Documents of each task; default: all."""
    depths: list[int] | None = None
    """Exits to measure beside the full model; default: all of them."""
    chat: bool = False
    """Wrap what tasks ask in the chat template."""
    ladder: str = AUTO
    """How the full model generates text: depths such as 6,12,30, `plain`, or as planned, else all
    exits. The text is the same."""
    drafter: str | None = None
    """Default: the plan's, or `exit`."""
    max_new_tokens: int = 256
    """Where a task does not say."""
    batch_size: int = 16
    """Texts that are scored together."""
    rows: int = 4
    """Texts that are generated together."""
    seq_len: int = 256
    sequences: int = 16
    dtype: str = "auto"
    device: str | None = "cpu"


@dataclass
class Column:
    """Everything that was measured of one depth of one model."""

    name: str
    lm: EarlyExitLM
    depth: int
    text: Fit
    figures: list[Any] = field(default_factory=list)
    """A `Figure` per task and metric."""

    def as_dict(self, each: bool) -> dict[str, Any]:
        """Args: each: with the value of every document."""
        figures = [asdict(figure) for figure in self.figures]
        if not each:
            figures = [{k: v for k, v in figure.items() if k != "each"} for figure in figures]
        text = {**asdict(self.text), "perplexity": self.text.perplexity}
        return {"name": self.name, "depth": self.depth, "text": text, "figures": figures}


def main(words: Sequence[str]) -> None:
    settings = resolve(Settings, overrides=words)
    for key in ("batch_size", "rows", "sequences", "max_new_tokens", "limit"):
        value = getattr(settings, key)
        check(value is None or value >= 1, key, value, "1 or more")
    check(settings.seq_len >= 2, "seq_len", settings.seq_len, "2 or more tokens")
    quiet_transformers()
    tasks = _tasks(settings)
    folder = Path(settings.checkpoint)
    if not folder.exists():
        folder = locate(settings.checkpoint) or folder
    lm, base, same, verdict = _models(settings, folder)
    full = lm.model.num_layers
    exits = _exits(settings, lm)
    decoding = _decoding(settings, lm)
    decoding.validate(full)
    name, rows = held_out_rows(settings, str(folder), lm, settings.seq_len, settings.sequences)

    out = Output()
    out.say(verdict)
    said = base or lm
    reference = Reference(final_states(said.model, rows), said.model.hf.lm_head.weight)
    columns = [
        Column(
            "full model" if found.depth == full else f"exit {found.depth}", lm, found.depth, found
        )
        for found in reversed(fit(lm.model, rows, [*exits, full], reference))
    ]
    if same:
        columns[0].name, base = "full model = base", None
    elif base is not None:
        (found,) = fit(base.model, rows, [base.model.num_layers], reference)
        columns.insert(0, Column("base", base, found.depth, found))
    if tasks:
        _run(settings, columns, tasks, decoding, out)

    compared = same or base is not None
    out.print(_table(columns, "base" if compared else "full model"))
    text = f"{rows.tokens_RT.numel():,} tokens of held-out text ({name})"
    dtype = str(lm.model.hf.dtype).removeprefix("torch.")
    out.say(f"perplexity and KL: {text}; {dtype}")
    gaps = _differences(columns) if base is not None else []
    for gap in gaps:
        error = "" if gap["stderr"] is None else f" ± {gap['stderr']:.4f}"
        out.say(f"{gap['task']} {gap['metric']}: full model - base = {gap['value']:+.4f}{error}")
    results = {
        "settings": asdict(settings),
        "verdict": verdict,
        "same_as_base": same,
        "versions": {"lm_eval": version("lm_eval")} if tasks else {},
        "dtype": dtype,
        "text": text,
    }
    target = Path(settings.output or (folder if folder.is_dir() else "runs"))
    whole = [column.as_dict(each=True) for column in columns]
    write_json(target / "quality.json", {**results, "columns": whole, "differences": gaps})
    brief = [column.as_dict(each=False) for column in columns]
    print(json.dumps({**results, "columns": brief, "differences": gaps}))


def _tasks(settings: Settings) -> list[Any]:
    if not settings.tasks:
        return []
    if find_spec("lm_eval") is None:
        raise ValueError("tasks need lm-evaluation-harness: pip install -e '.[eval]'; or tasks=[]")
    from eval.harness_tasks import load_tasks

    return load_tasks(settings.tasks, settings.gsm8k_file)


def _models(
    settings: Settings, folder: Path
) -> tuple[EarlyExitLM, EarlyExitLM | None, bool | None, str]:
    """(the model, its base, whether their weights are the same, what to say of that).

    There may be no base, and then nothing is known.
    """
    how: dict[str, Any] = {
        "dtype": parse_dtype(settings.dtype),
        "device": parse_device(settings.device),
    }
    config = read_config(folder) if is_checkpoint(folder) else None
    light = config is not None and not config["base"]["included"]
    lm = load(settings.checkpoint, **how, base=settings.base if light else None)
    name = settings.base
    if name is None and config is not None:
        try:
            name = str(own_base(folder, config).folder)
        except ValueError as error:
            if config["base"].get("trained"):
                raise
            return lm, None, None, f"not compared with the base: {error}; KL is to the full model"
    if name is None:
        return lm, None, None, "a plain model and no base= to compare it with; KL is to itself"
    base = load(name, **how)
    check(
        base.model.vocab_size == lm.model.vocab_size
        and base.tokenizer.get_vocab() == lm.tokenizer.get_vocab(),
        *("base", name, "it has another vocabulary than the checkpoint"),
    )
    if same_weights(lm.model.hf, base.model.hf):
        return lm, base, True, "frozen trunk: the target is the base bit for bit"
    return lm, base, False, f"trained trunk: the target is no longer the base ({name})"


def _exits(settings: Settings, lm: EarlyExitLM) -> list[int]:
    """The depths to measure beside the full one, increasing."""
    trained, full = lm.model.exits.depths, lm.model.num_layers
    exits = trained if settings.depths is None else sorted(set(settings.depths) - {full})
    allowed = f"the exits are {', '.join(map(str, trained))}" if trained else f"1 to {full - 1}"
    for depth in exits:
        check(depth in (trained or range(1, full)), "depths", settings.depths, allowed)
    return exits


def _decoding(settings: Settings, lm: EarlyExitLM) -> DecodeConfig:
    """How the full model is to generate text."""
    named = settings.ladder in (AUTO, PLAIN)
    ladder = settings.ladder if named else parse_depths("ladder", settings.ladder)
    drafter = {} if settings.drafter is None else {"drafter": settings.drafter}
    return DecodeConfig(**lm.choose(ladder, drafter)[0])


def _run(
    settings: Settings,
    columns: Sequence[Column],
    tasks: Sequence[Any],
    decoding: DecodeConfig,
    out: Output,
) -> None:
    """Fill the columns with the figures of the tasks."""
    from eval.harness import HarnessModel, Scores, Writing, longest_text
    from eval.harness_tasks import run_tasks, writes

    shared: dict[int, Scores] = {}
    for column in columns:
        lm, full = column.lm, column.lm.model.num_layers
        depths = [c.depth for c in columns if c.lm is lm]
        if id(lm) not in shared:
            shared[id(lm)] = Scores(lm.model, depths, settings.batch_size, longest_text(lm.model))
        of_base = column.name == "base"
        writing = Writing(
            DecodeConfig([full]) if of_base else decoding, settings.rows, settings.max_new_tokens
        )
        asked = list(tasks)
        if column.depth < full:
            try:
                check_expressible(lm.model, column.depth)
            except ValueError as error:
                asked = [task for task in tasks if not writes(task)]
                if len(asked) < len(tasks):
                    out.say(f"{column.name} generates no text alone: {error}")
        model = HarnessModel(lm, column.depth, shared[id(lm)], writing)
        if asked:
            column.figures = run_tasks(model, asked, settings.limit, settings.chat)


def _table(columns: Sequence[Column], judge: str) -> Table:
    table = Table(title="quality")
    table.add_column("")
    for column in columns:
        table.add_column(column.name, justify="right")
    table.add_row("perplexity", *(f"{column.text.perplexity:.4g}" for column in columns))
    table.add_row(f"KL to the {judge}, nats", *(f"{column.text.kl:.4f}" for column in columns))
    for figure in columns[0].figures:
        cells = []
        for column in columns:
            found = _same_figure(column, figure)
            error = f" ± {found.stderr:.3f}" if found and found.stderr is not None else ""
            cells.append(f"{found.value:.3f}{error}" if found else "")
        table.add_row(f"{figure.task} {figure.metric} ({figure.documents})", *cells)
    return table


def _same_figure(column: Column, figure: Any) -> Any:
    wanted = figure.task, figure.metric
    return next((f for f in column.figures if (f.task, f.metric) == wanted), None)


def _differences(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """What the full model lost or gained against the base, over the same documents."""
    from eval.harness_tasks import difference

    base, ours = columns[:2]
    found = []
    for figure in base.figures:
        gap, stderr = difference(_same_figure(ours, figure), figure)
        found.append({"task": figure.task, "metric": figure.metric, "value": gap, "stderr": stderr})
    return found


if __name__ == "__main__":
    sys.exit(run_cleanly(lambda: main(sys.argv[1:])))
