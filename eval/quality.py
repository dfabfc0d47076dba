"""Does training change the quality of the model? `python eval/quality.py checkpoint=DIR`.

Measures perplexity and KL to the base on held-out text, and tasks of lm-evaluation-harness, for the
base, the full model and every exit. Prints a table, writes `quality.json` to `output`, and ends
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
from typing import Annotated, Any

from omegaconf import MISSING
from pydantic import Field
from rich.table import Table

from eval.prompts import held_out_rows
from eval.settings import BatchRows, MaxNewTokens, Name, SeqLen, Sequences, TextSource
from hispec.checkpoint.format import is_checkpoint, read_config
from hispec.checkpoint.io import own_base
from hispec.config import DRAFTERS, DecodeConfig
from hispec.export.draft_model import check_expressible
from hispec.hub.pull import locate
from hispec.lm import AUTO, PLAIN, EarlyExitLM, load
from hispec.metrics.equivalence import same_weights
from hispec.metrics.perplexity import Perplexity, ReferenceStates, final_states, perplexity
from hispec.utils.command_line import parse_depths, parse_device, parse_dtype, run_cleanly
from hispec.utils.console import Output, quiet_transformers
from hispec.utils.files import output_path, write_json
from hispec.utils.limits import one_of
from hispec.utils.settings import check, resolve


@dataclass
class Settings(TextSource):
    """The model to measure, its base, the text and the tasks."""

    checkpoint: Name = MISSING
    """EE checkpoint, or a plain model: every depth is then read through the final norm."""
    base: Name | None = None
    """Model to compare with, and the base of a light checkpoint; default: the base that the
    checkpoint names."""
    output: Name | None = None
    """Folder of the results; default: the checkpoint's own, or `runs` if it is no folder."""
    tasks: list[Name] = field(default_factory=lambda: ["local/common"])
    """`local/common`, `local/word_problems`, `gsm8k`, other tasks of lm-evaluation-harness, or task
    files in YAML; [] measures the text only."""
    gsm8k_file: Name | None = None
    """JSONL file of `question` and `answer` for the task `gsm8k`; default: the Hub's."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Documents of each task; default: all."""
    depths: list[int] | None = None
    """Exits to measure besides the full model; default: all of them."""
    chat: bool = False
    """Whether to apply the chat template to the tasks' prompts."""
    ladder: str = AUTO
    """How the full model generates text, which does not change the text: depths such as 6,12,30,
    `plain`, or `auto` for the plan's, or prompt lookup without a plan."""
    drafter: Annotated[str, one_of(*DRAFTERS)] | None = None
    """Default: the plan's, or `exit` with a ladder."""
    max_new_tokens: MaxNewTokens = 256
    """Used where a task names no number."""
    batch_size: BatchRows = 16
    """Texts whose log-likelihoods are computed together."""
    rows: BatchRows = 4
    """Texts that are generated together."""
    seq_len: SeqLen = 256
    """Tokens of a row of held-out text."""
    sequences: Sequences = 16
    """Rows of held-out text."""
    dtype: str = "auto"
    device: str | None = "cpu"


@dataclass
class Column:
    """Everything that was measured for one depth of one model."""

    name: str
    lm: EarlyExitLM
    depth: int
    text: Perplexity
    metrics: list[Any] = field(default_factory=list)
    """A `Metric` per task and metric."""

    def as_dict(self, each: bool) -> dict[str, Any]:
        """The column as JSON holds it.

        Args:
            each: whether to include the value of every document.
        """
        figures = [asdict(metric) for metric in self.metrics]
        if not each:
            figures = [{k: v for k, v in figure.items() if k != "each"} for figure in figures]
        text = {**asdict(self.text), "perplexity": self.text.perplexity}
        return {"name": self.name, "depth": self.depth, "text": text, "figures": figures}


def main(words: Sequence[str]) -> None:
    settings = resolve(Settings, overrides=words)
    quiet_transformers()
    tasks = _tasks(settings)
    folder = Path(settings.checkpoint)
    if not folder.exists():
        folder = locate(settings.checkpoint) or folder
    target = Path(settings.output or (folder if folder.is_dir() else "runs"))
    output_path(target / "quality.json")
    lm, base, same, verdict = _models(settings, folder)
    full = lm.model.num_layers
    exits = _exits(settings, lm)
    decoding = _decoding(settings, lm)
    decoding.validate(full)
    name, rows = held_out_rows(settings, str(folder), lm, settings.seq_len, settings.sequences)

    out = Output()
    out.say(verdict)
    other = (base or lm).model
    reference = ReferenceStates(final_states(other, rows), other.hf.lm_head.weight)
    columns = [
        Column(
            "full model" if found.depth == full else f"exit {found.depth}", lm, found.depth, found
        )
        for found in reversed(perplexity(lm.model, rows, [*exits, full], reference))
    ]
    if same:
        columns[0].name, base = "full model = base", None
    elif base is not None:
        (found,) = perplexity(base.model, rows, [base.model.num_layers], reference)
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
    """Load the model and its base.

    Returns:
        The model, its base or None, whether their weights are the same (None without a base), and
        a sentence that says so.
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
    """The depths to measure besides the full one."""
    trained, full = lm.model.exits.depths, lm.model.num_layers
    asked = settings.depths or []
    check(asked == sorted(set(asked)), "depths", asked, "increasing depths, none twice")
    exits = trained if settings.depths is None else [depth for depth in asked if depth != full]
    allowed = f"the exits are {', '.join(map(str, trained))}" if trained else f"1 to {full - 1}"
    for depth in exits:
        check(depth in (trained or range(1, full)), "depths", settings.depths, allowed)
    return exits


def _decoding(settings: Settings, lm: EarlyExitLM) -> DecodeConfig:
    """Settings with which the full model generates text."""
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
    """Run the tasks and put their metrics into the columns."""
    from eval.harness import GenerationSettings, HarnessModel, LogLikelihoods, longest_text
    from eval.harness_tasks import generates_text, run_tasks

    shared: dict[int, LogLikelihoods] = {}
    for column in columns:
        lm, full = column.lm, column.lm.model.num_layers
        depths = [c.depth for c in columns if c.lm is lm]
        if id(lm) not in shared:
            longest = longest_text(lm.model)
            shared[id(lm)] = LogLikelihoods(lm.model, depths, settings.batch_size, longest)
        of_base = column.name == "base"
        generation = GenerationSettings(
            DecodeConfig([full]) if of_base else decoding, settings.rows, settings.max_new_tokens
        )
        possible = list(tasks)
        if column.depth < full:
            try:
                check_expressible(lm.model, column.depth)
            except ValueError as error:
                possible = [task for task in tasks if not generates_text(task)]
                if len(possible) < len(tasks):
                    out.say(f"{column.name} generates no text alone: {error}")
        model = HarnessModel(lm, column.depth, shared[id(lm)], generation)
        if possible:
            column.metrics = run_tasks(model, possible, settings.limit, settings.chat)


def _table(columns: Sequence[Column], reference: str) -> Table:
    table = Table(title="quality")
    table.add_column("")
    for column in columns:
        table.add_column(column.name, justify="right")
    table.add_row("perplexity", *(f"{column.text.perplexity:.4g}" for column in columns))
    table.add_row(f"KL to the {reference}, nats", *(f"{column.text.kl:.4f}" for column in columns))
    for metric in columns[0].metrics:
        cells = []
        for column in columns:
            found = _same_metric(column, metric)
            error = f" ± {found.stderr:.3f}" if found and found.stderr is not None else ""
            cells.append(f"{found.value:.3f}{error}" if found else "")
        table.add_row(f"{metric.task} {metric.metric} ({metric.documents})", *cells)
    return table


def _same_metric(column: Column, metric: Any) -> Any:
    """The same task's and metric's value in another column, or None."""
    wanted = metric.task, metric.metric
    return next((m for m in column.metrics if (m.task, m.metric) == wanted), None)


def _differences(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The full model's metrics minus the base's, over the same documents."""
    from eval.harness_tasks import difference

    base, ours = columns[:2]
    found = []
    for metric in base.metrics:
        gap, stderr = difference(_same_metric(ours, metric), metric)
        found.append({"task": metric.task, "metric": metric.metric, "value": gap, "stderr": stderr})
    return found


if __name__ == "__main__":
    sys.exit(run_cleanly(lambda: main(sys.argv[1:])))
