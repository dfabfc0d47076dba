"""Prompts decoded for a report: which rung made each token, and the acceptance of each task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hispec.config import DecodeConfig
from hispec.data.prompts import Prompt, spread
from hispec.decoding.decoder import Decode
from hispec.decoding.state import FREE as FREE_DEPTH
from hispec.decoding.stats import DecodeStats, DraftStats
from hispec.lm import EarlyExitLM
from hispec.planner.heatmap import FREE
from hispec.planner.plan_file import Machine, Setting, is_plain, shown
from hispec.planner.search_space import drafts_trees
from hispec.report.trace import columns, followed
from hispec.utils.console import Progress

SHOWN = 3
"""Prompts whose text is shown; the others only count in the acceptance."""
_LONGEST_PROMPT = 240  # characters of it that are shown
_COLOURS = 4


def decode(
    lm: EarlyExitLM,
    prompts: Sequence[Prompt],
    new_tokens: int,
    progress: Progress = lambda items, _: items,
) -> dict[str, Any]:
    """Decode prompts with the plan's setting, or what is taken without one, and with all exits.

    Args:
        new_tokens: most new tokens of each prompt.

    Returns:
        `ways`: the settings with their acceptance per task; `texts`: the first prompts with the
        rung of each token and what each round drafted; and the plan, the numbers and the machine
        that these hold for.
    """
    planned, words = lm.planned()
    by_exits: Setting = {"ladder": lm.ladder()}
    ways = [by_exits] if planned is None else [planned]
    if planned is None:
        default, because = lm.choose(None, {})
        if len(default["ladder"]) > 1:
            ways, words = [default, by_exits], f"{because}; all exits are shown too"
    elif len(planned["ladder"]) == 1:
        ways = [by_exits] if is_plain(planned) else [planned, by_exits]
        words += "; all exits are shown too" if len(ways) > 1 else "; all exits are shown instead"
    classes = _classes(ways, lm.model.num_layers)
    to_show = {prompt.line for prompt in spread(prompts, SHOWN)}
    stats: list[dict[str, list[DecodeStats]]] = [defaultdict(list) for _ in ways]
    texts = []
    for prompt in progress(prompts, f"decoding {len(prompts)} prompts"):
        tokens, shown_ways = prompt.encode(lm.tokenizer), []
        for way, by_task in zip(ways, stats, strict=True):
            config = DecodeConfig(**way, max_new_tokens=new_tokens, eos=lm.eos())
            run = Decode(lm.model, [tokens], config)
            pieces, rounds = followed(lm, run)
            by_task[prompt.task].append(run.stats)
            chart = columns(rounds, classes, lm.model.num_layers)
            shown_ways.append({**_text(way, pieces, run.stats, classes), "trace": chart})
        if prompt.line in to_show:
            question = prompt.messages[-1]["content"] if prompt.messages else prompt.text
            texts.append({"task": prompt.task, "prompt": _short(question), "ways": shown_ways})
    return {
        "ways": [
            {
                "name": shown(way),
                "tree": drafts_trees(way),
                "levels": _levels(way),
                "tasks": [_row(task or "all", way, found) for task, found in by_task.items()],
                "all": _row("all tasks", way, [s for found in by_task.values() for s in found]),
            }
            for way, by_task in zip(ways, stats, strict=True)
        ],
        "texts": texts,
        "words": words,
        "prompts": len(prompts),
        "new_tokens": new_tokens,
        "machine": str(Machine.of(lm.model)),
    }


def _levels(way: Setting) -> list[str]:
    """What drafts: free drafts, then the depths below the full model, shallowest first."""
    free = [FREE] if way.get("drafter", "exit") != "exit" else []
    return free + [f"depth {depth}" for depth in way["ladder"][:-1]]


def _row(task: str, way: Setting, found: Sequence[DecodeStats]) -> dict[str, Any]:
    """Acceptance of each level over some decodes."""
    drafts = [DraftStats() for _ in _levels(way)]
    for stats in found:
        free = [stats.free] if way.get("drafter", "exit") != "exit" else []
        for total, one in zip(drafts, [*free, *stats.rungs[:-1]], strict=True):
            total.merge(one)
    tokens = sum(stats.new_tokens for stats in found)
    return {
        "task": task,
        "prompts": len(found),
        "tokens": tokens,
        "levels": [
            {"proposed": one.proposed, "accepted": one.accepted, "acceptance": one.acceptance}
            for one in drafts
        ],
        "tokens_per_target_pass": tokens / sum(stats.rungs[-1].passes for stats in found),
    }


def _text(
    way: Setting, pieces: Sequence[tuple[int, str]], stats: DecodeStats, classes: dict[int, str]
) -> dict[str, Any]:
    """One continuation: its tokens with their rungs, and the number of tokens of each rung."""
    made = [depth for depth, _ in pieces]
    rungs = ([FREE_DEPTH] if way.get("drafter", "exit") != "exit" else []) + list(way["ladder"])
    return {
        "name": shown(way),
        "tokens": [
            {"rung": classes[depth], "by": _by(depth, way["ladder"][-1]), "text": text}
            for depth, text in pieces
        ],
        "legend": [
            {
                "rung": classes[depth],
                "by": _by(depth, way["ladder"][-1]),
                "count": made.count(depth),
            }
            for depth in rungs
        ],
        "total": len(pieces),
        "tokens_per_target_pass": stats.tokens_per_target_pass,
        "acceptance": _row("", way, [stats])["levels"],
        "levels": _levels(way),
    }


def _by(depth: int, full: int) -> str:
    """What proposed a token, in words."""
    if depth == FREE_DEPTH:
        return "free draft"
    return f"depth {depth}" + (", full model" if depth == full else "")


def _classes(ways: Sequence[Setting], full: int) -> dict[int, str]:
    """CSS class of the tokens of each depth, the same for all settings."""
    exits = sorted({depth for way in ways for depth in way["ladder"]} - {full})
    coloured = {depth: f"exit{number % _COLOURS}" for number, depth in enumerate(exits)}
    return {FREE_DEPTH: "free", **coloured, full: "full"}


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_PROMPT else text[:_LONGEST_PROMPT].rstrip() + " …"
