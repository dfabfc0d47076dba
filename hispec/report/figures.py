"""A checkpoint's config and plan as plain values that a report shows."""

from __future__ import annotations

import math
from pathlib import Path

from hispec.checkpoint.format import exit_depths
from hispec.checkpoint.inspect import heads_in_words
from hispec.checkpoint.model_card import accepted, public, training_settings
from hispec.planner.heatmap import axes_of, gain_by_exits, place
from hispec.planner.plan_file import Plan, is_plain, read_plan, shown
from hispec.report.measured import Figures, longest


def lead(config: Figures) -> str:
    """The checkpoint in one sentence."""
    model, depths = config["model"], exit_depths(config)
    exits = "Early exits" if len(depths) > 1 else "An early exit"
    return (
        f"{exits} at {_depths(depths)} of {model['num_hidden_layers']} for "
        f"{public(config['base']['id'])} ({model['model_type']})."
    )


def facts(config: Figures) -> dict[str, str]:
    """Facts about the checkpoint from its `exit_config.json`, by name."""
    model, base = config["model"], config["base"]
    figures, versions = config["figures"], config.get("versions", {})
    trunk = "its layers trained too" if base.get("trained") else "its layers unchanged"
    where = "included" if base["included"] else "not included"
    found = {
        "model": f"{model['model_type']}, {model['num_hidden_layers']} layers, hidden size "
        f"{model['hidden_size']:,}, vocabulary {model['vocab_size']:,}",
        "exits": f"{_depths(exit_depths(config))} of {model['num_hidden_layers']}; heads: "
        + heads_in_words(config),
        "base": f"{public(base['id'])}, {where}, {trunk}",
        "license": base["license"] or "unknown",
    }
    if "training_tokens" in figures:
        tokens, minutes = figures["training_tokens"], figures["minutes"]
        found["trained on"] = f"{tokens:,} tokens in {minutes:.1f} minutes"
    if (drift := figures.get("drift")) is not None:
        found["drift"] = f"{drift:.4f} nats KL of the full model to its base"
    if check := figures.get("check"):
        found["checked"] = (
            f"{check['prompts']} prompts, {check['new_tokens']} new tokens in {check['dtype']}: "
            f"the text of the full model; accepted drafts: {accepted(check)}"
        )
    if versions:
        found["written by"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    return found


def settings(config: Figures) -> list[tuple[str, str]]:
    """(key, value) of the settings that the exits were trained with."""
    return training_settings(config["recipe"])


def plan(folder: Path) -> Figures | None:
    """What the planner found, None without a plan, and its map of the gain of each pair of exits.

    Raises:
        ValueError: `plan.json` is not what `hispec plan` writes.
    """
    found = read_plan(folder)
    return None if found is None else _planned(found)


def _planned(found: Plan) -> Figures:
    text = found.text
    lengths = " to ".join(str(n) for n in dict.fromkeys(text["prompt_tokens"]))
    confirmed = [
        {
            "name": shown(tried.setting),
            "predicted": tried.predicted,
            "rate": _rate(tried.measured, *(tried.spread or (None, None))),
            "over_plain": (tried.measured or 0.0) / found.plain_tokens_per_second,
            "tokens_per_target_pass": tried.tokens_per_target_pass,
            "same_text": tried.same_text,
            "kind": "reference" if is_plain(tried.setting) else "ours",
            "chosen": tried.setting == found.setting,
        }
        for tried in found.confirmed
    ]
    return {
        "setting": shown(found.setting),
        "plain": found.plain,
        "tokens_per_second": found.tokens_per_second,
        "plain_tokens_per_second": found.plain_tokens_per_second,
        "speedup": found.speedup,
        "tokens_per_target_pass": next(
            (row["tokens_per_target_pass"] for row in confirmed if row["chosen"]), None
        ),
        "machine": str(found.machine),
        "text": f"{text['prompts']} prompts of {lengths} tokens from {text['source']} "
        f"({', '.join(filter(None, text['tasks'])) or 'no tasks named'}), "
        f"{text['new_tokens']} new tokens of each{found.together}",
        "prompts": text["prompts"],
        "tried": len(found.settings),
        "seconds": found.seconds,
        "confirmed": confirmed,
        "longest": longest(confirmed),
        "map": _map(found),
    }


def _map(found: Plan) -> Figures:
    """Rows of cells: the gain over plain decoding, and the strength of its colour, 0 to 1."""
    rows, columns = axes_of(found)
    gains = gain_by_exits(found)
    # twice as fast and half as fast get colours of the same strength
    reach = max(0.05, *(abs(math.log(gain)) for gain in gains.values()))

    def cell(row: str, column: str) -> Figures | None:
        gain = gains.get((row, column))
        if gain is None:
            return None
        return {
            "gain": gain,
            "strength": abs(math.log(gain)) / reach,
            "faster": gain >= 1,
            "chosen": (row, column) == place(found.setting),
        }

    return {
        "columns": columns,
        "rows": [{"name": row, "cells": [cell(row, column) for column in columns]} for row in rows],
    }


def _rate(median: float | None, lowest: float | None, highest: float | None) -> Figures:
    rate = median or 0.0
    return {
        "median": rate,
        "lowest": rate if lowest is None else lowest,
        "highest": rate if highest is None else highest,
    }


def _depths(depths: list[int]) -> str:
    *most, last = map(str, depths)
    return "depth " + (f"{', '.join(most)} and {last}" if most else last)
