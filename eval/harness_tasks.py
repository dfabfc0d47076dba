"""Tasks of lm-evaluation-harness: its own by name; ours, and GSM8K, from local files."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.api.task
import yaml
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from eval.harness import HarnessModel
from hispec.data.rows import NonEmpty, Row, local_rows, reason
from hispec.utils.schema import validate
from hispec.utils.settings import check

LOCAL = Path(__file__).with_name("tasks_local")
OURS = {
    "local/common": ("common.yaml", "common.jsonl"),
    "local/word_problems": ("gsm8k.yaml", "word_problems.jsonl"),
}
"""Task file and rows of each task that needs no network."""
GSM8K = "gsm8k"


class ProblemRow(Row):
    """A word problem and its worked answer."""

    question: NonEmpty
    answer: NonEmpty


class ChoiceRow(Row):
    """A beginning of a sentence, its possible endings, and the index of the right one."""

    question: NonEmpty
    choices: list[NonEmpty]
    answer: int


@dataclass
class Metric:
    """One metric of one task for one model."""

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int
    higher_is_better: bool
    each: list[float] = field(default_factory=list, repr=False)
    """The value of every document, if the metric is their mean."""


def load_tasks(names: Sequence[str], gsm8k_file: str | None = None) -> list[Any]:
    """Load tasks, or groups of tasks, of the harness.

    Args:
        names: of our own tasks (`local/...`), of the harness's, or of task files in YAML.
        gsm8k_file: JSONL file that `gsm8k` is read from instead of the Hub.

    Raises:
        ValueError: an unknown name, a file without questions and answers, or a task whose data
            cannot be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # a bar for every task of every depth
    check(
        gsm8k_file is None or GSM8K in names,
        "gsm8k_file",
        gsm8k_file,
        f"it is the data of the task {GSM8K!r}, which is not in tasks={list(names)}",
    )
    check(len(set(names)) == len(names), "tasks", list(names), "each of them once")
    unknown = [n for n in names if n.startswith("local/") and n not in OURS]
    check(not unknown, "tasks", unknown, f"the local ones are {', '.join(OURS)}")
    found, manager = {}, None
    for name in names:  # the local ones first: the index of all others takes a while
        if name in OURS:
            task_file, rows = OURS[name]
            found[name] = [_local_task(name, task_file, LOCAL / rows)]
        elif name == GSM8K and gsm8k_file is not None:
            found[name] = [_local_task(name, "gsm8k.yaml", Path(gsm8k_file))]
    for name in names:
        if name not in found:
            manager = manager or TaskManager()
            found[name] = _harness_tasks(manager, name)
    return [task for name in names for task in found[name]]


def _local_task(name: str, task_file: str, file: Path) -> ConfigurableTask:
    config = yaml.safe_load((LOCAL / task_file).read_text("utf-8"))
    kind = ChoiceRow if config["output_type"] == "multiple_choice" else ProblemRow
    rows = [
        validate(kind, row, f"{file}, line {line}").model_dump() for line, row in local_rows(file)
    ]
    if not rows:
        raise ValueError(f"{file} holds no questions")
    data = partial(_given, {config["test_split"]: Dataset.from_list(rows)})
    return ConfigurableTask(config={**config, "task": name, "custom_dataset": data})


def _given(data: dict[str, Dataset], **_: Any) -> dict[str, Dataset]:
    """Return `data`: the harness calls a function for a dataset that is not on the Hub."""
    return data


def _harness_tasks(manager: TaskManager, name: str) -> list[Any]:
    if name not in manager.task_index and not Path(name).is_file():
        near = get_close_matches(name, manager.all_tasks, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "lm-eval ls tasks lists them"
        raise ValueError(f"tasks: lm-evaluation-harness has no task {name!r}; {hint}")
    try:
        loaded = manager.load([name])
    except Exception as error:  # data sets and task files raise a dozen unrelated types here
        own = f"; {GSM8K} reads gsm8k_file=FILE" if name == GSM8K else ""
        raise ValueError(
            f"tasks: the data of {name!r} cannot be loaded: {reason(error)}; without network there "
            f"are {', '.join(OURS)}{own}"
        ) from error
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def generates_text(task: Any) -> bool:
    """Whether the model generates text for a task, or for one of a group."""
    members = task.get_all_tasks() if isinstance(task, Group) else [task]
    return any(member.OUTPUT_TYPE == "generate_until" for member in members)


def run_tasks(
    model: HarnessModel, tasks: Sequence[Any], limit: int | None = None, chat: bool = False
) -> list[Metric]:
    """Run tasks for one depth of a model and return all their metrics.

    Args:
        limit: documents of each task; None for all.
        chat: whether to apply the chat template.
    """
    results = simple_evaluate(
        model,
        tasks=list(tasks),
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        apply_chat_template=chat,
        bootstrap_iters=1000,
    )
    counts = {name: count["effective"] for name, count in results["n-samples"].items()}
    for top in (task for task in tasks if isinstance(task, Group)):
        for group in (top, *top.get_all_groups()):
            counts[group.name] = sum(counts[task.task_name] for task in group.get_all_tasks())
    found = []
    for name, metrics in results["results"].items():
        samples = results["samples"].get(name, [])
        better = results["higher_is_better"].get(name, {})
        for key, value in metrics.items():
            metric, _, chain = key.partition(",")
            if not chain or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            each = [s.get(metric) for s in samples if s["filter"] == chain]
            if not all(isinstance(e, int | float) for e in each):
                each = []
            stderr = metrics.get(f"{metric}_stderr,{chain}")
            found.append(
                Metric(
                    name,
                    metric if chain == "none" else f"{metric}, {chain}",
                    float(value),
                    float(stderr) if isinstance(stderr, int | float) else None,
                    counts.get(name, 0),
                    better.get(metric) is not False,
                    list(map(float, each)),
                )
            )
    return found


def difference(ours: Metric, base: Metric) -> tuple[float, float | None]:
    """(our value minus the base's, the standard error of that, or None if it is unknown).

    The error is that of the paired differences over the documents, which both have answered.
    """
    gap = ours.value - base.value
    if len(ours.each) != len(base.each) or len(ours.each) < 2:
        return gap, None
    gaps = [a - b for a, b in zip(ours.each, base.each, strict=True)]
    return gap, statistics.stdev(gaps) / math.sqrt(len(gaps))
