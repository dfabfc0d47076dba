"""Results of `eval/speed.py`: one row per method, and the tables that show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from eval.prompts import TokenizedPrompt
from eval.timing import Rate, Timing
from hispec.metrics.equivalence import first_difference
from hispec.utils.console import Output

ALL = "all"
"""Name of all tasks together."""


def summary(
    hf: Any, timings: Sequence[Timing], prompts: Sequence[TokenizedPrompt]
) -> list[dict[str, Any]]:
    """One row per method, as `speed.json` holds them.

    Args:
        hf: the full model, which tells why texts differ.
        timings: the first two are transformers' `generate` and own plain decoding.
    """
    by_task: dict[str, list[int]] = {ALL: list(range(len(prompts)))}
    for p, prompt in enumerate(prompts):
        by_task.setdefault(prompt.task, []).append(p)
    reference, plain = timings[:2]
    rows = []
    for timing in timings:
        tasks = {}
        for task, numbers in by_task.items():
            rates = timing.rates(numbers)
            tasks[task] = {"tokens_per_second": asdict(Rate.over(rates))}
            for key, other in (("over_generate", reference), ("over_plain", plain)):
                ratios = [a / b for a, b in zip(rates, other.rates(numbers), strict=True)]
                tasks[task][key] = asdict(Rate.over(ratios))
        triples = zip(prompts, timing.texts[0], reference.texts[0], strict=True)
        compared = [first_difference(hf, prompt.tokens, a, b) for prompt, a, b in triples]
        differences = [d for d in compared if d is not None]
        rows.append(
            {
                "setting": timing.name,
                "outside": timing.external,
                **tasks.pop(ALL),
                "tasks": tasks,
                # another engine does not count its passes
                "tokens_per_target_pass": timing.new_tokens / timing.target_passes
                if timing.target_passes
                else None,
                "acceptance": {name: d.acceptance for name, d in timing.drafts.items()},
                "rungs": {
                    depth: {
                        "passes": spent.passes,
                        "ms_per_token": 1000 * spent.seconds / timing.new_tokens,
                        "share_of_time": spent.seconds / timing.total_seconds,
                    }
                    for depth, spent in timing.rungs.items()
                },
                "same_as_generate": timing.same(reference),
                "same_as_plain": timing.same(plain),
                "differences": Counter(d.kind for d in differences),
                "largest_gap": max((d.gap for d in differences), default=None),
            }
        )
    return rows


def report(out: Output, rows: Sequence[dict[str, Any]], prompts: Sequence[TokenizedPrompt]) -> None:
    """Print the tables, and in words what they show."""
    out.print(_overall(rows, len(prompts)))
    if len(rows[0]["tasks"]) > 1:
        out.print(_per_task(rows))
    out.print(_per_rung(rows))
    rate = rows[1]["tokens_per_second"]["median"]
    for row in rows[2:]:
        ratio = row["tokens_per_second"]["median"] / rate
        verdict = "faster" if ratio > 1 else "slower"
        out.say(f"{row['setting']} is {verdict} than own plain decoding: {ratio:.2f}x")
    kinds = sum((Counter(row["differences"]) for row in rows), Counter())
    if kinds:
        gap = max(row["largest_gap"] for row in rows if row["largest_gap"] is not None)
        counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        out.say(
            f"texts that differ from HF's, by the class of their first difference: {counted}; the "
            f"two highest logits were at most {gap:.3f} apart there (a tie: rounding decides; "
            "compare with dtype=float32)"
        )


def _overall(rows: Sequence[dict[str, Any]], prompts: int) -> Table:
    table = Table(title=f"greedy, {prompts} prompts: median (lowest to highest of the repeats)")
    table.add_column("setting")
    for title in ("tokens/s", "against HF", "against plain", "tokens per target pass",
                  "text of HF", "of own plain"):  # fmt: skip
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row["setting"],
            _spread(row["tokens_per_second"], ".1f"),
            _spread(row["over_generate"], ".2f"),
            _spread(row["over_plain"], ".2f"),
            "-" if (passed := row["tokens_per_target_pass"]) is None else f"{passed:.2f}",
            _same(row["same_as_generate"], prompts, row["differences"]),
            _same(row["same_as_plain"], prompts),
        )
    return table


def _same(count: int, prompts: int, kinds: dict[str, int] | None = None) -> str:
    """How many texts are the same, and the classes of the first differences of the others."""
    if count == prompts:
        return "same"
    classes = [f"{number} {kind}" for kind, number in (kinds or {}).items()]
    return ", ".join([f"{count} of {prompts}", *classes])


def _spread(rate: dict[str, float], form: str) -> str:
    low, high = (format(rate[key], form) for key in ("lowest", "highest"))
    return format(rate["median"], form) + (f" ({low} to {high})" if low != high else "")


def _per_task(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="tokens/s per task, and how many times HF's")
    table.add_column("setting")
    for task in rows[0]["tasks"]:
        table.add_column(task, justify="right")
    for row in rows:
        cells = [
            f"{task['tokens_per_second']['median']:.1f} ({task['over_generate']['median']:.2f}x)"
            for task in row["tasks"].values()
        ]
        table.add_row(row["setting"], *cells)
    return table


def _per_rung(rows: Sequence[dict[str, Any]]) -> Table:
    """Where the time goes; the rest is prefill, drafting without the model, and Python."""
    table = Table(title="rungs: how much of their drafts is accepted, and their time")
    table.add_column("setting")
    for title in ("rung", "accepted", "passes", "ms per token", "share of time"):
        table.add_column(title, justify="right")
    for row in rows:
        acceptance = row["acceptance"]
        for rung in dict.fromkeys([*acceptance, *row["rungs"]]):
            accepted, spent = acceptance.get(rung), row["rungs"].get(rung)
            times = ["", "", ""]
            if spent is not None:
                times = [f"{spent['passes']}", f"{spent['ms_per_token']:.1f}",
                         f"{spent['share_of_time']:.0%}"]  # fmt: skip
            shown = "" if accepted is None else f"{accepted:.0%}"
            table.add_row(row["setting"], rung, shown, *times)
    return table
