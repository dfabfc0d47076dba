"""What the files of a checkpoint say of it, as plain values that a report can show."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hispec.checkpoint.inspect import heads_in_words
from hispec.checkpoint.model_card import accepted, public, training_settings
from hispec.planner.heatmap import FREE, axes_of, gain_by_exits, place
from hispec.planner.plan_file import PLAN, Plan, is_plain, read_plan, shown
from hispec.utils.files import read_json

AGREEMENT, SPEED = "agreement.json", "speed.json"

Figures = dict[str, Any]


def lead(config: Figures) -> str:
    """The checkpoint in one sentence."""
    model, depths = config["model"], config["exits"]["depths"]
    exits = "Early exits" if len(depths) > 1 else "An early exit"
    return (
        f"{exits} at {_depths(depths)} of {model['num_hidden_layers']} for "
        f"{public(config['base']['id'])} ({model['model_type']})."
    )


def facts(config: Figures) -> dict[str, str]:
    """What the checkpoint is, by name, from its `exit_config.json`."""
    model, exits, base = config["model"], config["exits"], config["base"]
    figures, versions = config["figures"], config.get("versions", {})
    trunk = "its layers trained too" if base.get("trained") else "its layers as they were"
    where = "included" if base["included"] else "not included"
    found = {
        "model": f"{model['model_type']}, {model['num_hidden_layers']} layers, hidden size "
        f"{model['hidden_size']:,}, vocabulary {model['vocab_size']:,}",
        "exits": f"{_depths(exits['depths'])} of {model['num_hidden_layers']}; heads: "
        + heads_in_words(exits),
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
            f"the full model's own text; accepted of the drafts: {accepted(check)}"
        )
    if versions:
        found["written by"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    return found


def settings(config: Figures) -> list[tuple[str, str]]:
    """(key, value) of how the exits were trained."""
    return training_settings(config["recipe"])


def agreement(folder: Path, config: Figures) -> Figures | None:
    """How often exits agree with the full model; from the training if nothing else was measured.

    Raises:
        ValueError: `agreement.json` is not what `eval/agreement.py` writes.
    """
    layers = config["model"]["num_hidden_layers"]

    def take(found: Figures) -> Figures:
        rows, untrained = found["agreement"], found["untrained"]
        contrast = {(row["shallow"], row["deep"]): row["top1"] for row in untrained}
        keys = ("shallow", "deep", "top1", "acceptance")
        exits = [
            {key: row[key] for key in keys} | {"untrained": contrast.get(_pair(row))}
            for row in rows
        ]
        return {
            "tokens": rows[0]["tokens"],
            "layers": layers,
            "exits": exits,
            "points": [row for row in exits if row["deep"] == layers],
            "curve": [{key: row[key] for key in keys} for row in untrained if _full(row)],
            "ticks": _ticks(layers),
        }

    def _full(row: Figures) -> bool:
        return bool(row["deep"] == layers)

    measured = _taken(folder, AGREEMENT, "eval/agreement.py", take)
    if measured is not None:
        return {**measured, "of_training": False}
    figures = config["figures"]
    if not figures.get("agreement"):
        return None
    # The training looks at the exits alone, which makes no curve over depth.
    trained = take({"agreement": figures["agreement"], "untrained": figures.get("untrained", ())})
    return {**trained, "curve": [], "of_training": True}


def plan(folder: Path) -> Figures | None:
    """What the planner found, if it was asked, and its map: what each pair of exits gains.

    Raises:
        ValueError: `plan.json` is not what `hispec plan` writes.
    """

    def take() -> Figures | None:
        found = read_plan(folder)
        return None if found is None else _planned(found)

    return _checked(folder / PLAN, "hispec plan", take)


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
        f"{text['new_tokens']} new tokens of each",
        "prompts": text["prompts"],
        "tried": len(found.settings),
        "seconds": found.seconds,
        "confirmed": confirmed,
        "longest": _longest(confirmed),
        "map": _map(found),
    }


def _map(found: Plan) -> Figures:
    """Rows of cells: the gain over plain decoding, and how strong a colour it has, 0 to 1."""
    rows, columns = axes_of(found)
    gains = gain_by_exits(found)
    # Twice as fast and half as fast are as far from plain decoding as each other.
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


def speed(folder: Path) -> Figures | None:
    """What `eval/speed.py` has timed, if it has.

    Raises:
        ValueError: `speed.json` is not what it writes.
    """

    def take(found: Figures) -> Figures:
        results, asked = found["results"], found["settings"]
        plain = results[1]["tokens_per_second"]["median"]
        rows = [
            {
                "name": row["setting"],
                "kind": ("outside" if row["outside"] else "ours") if number else "reference",
                "rate": _rate(**row["tokens_per_second"]),
                "over_plain": row["over_plain"]["median"],
                "over_generate": row["over_generate"]["median"],
                "tokens_per_target_pass": row["tokens_per_target_pass"],
                "acceptance": {_rung(n): share for n, share in row["acceptance"].items()},
                "same_as_generate": row["same_as_generate"],
                "same_as_plain": row["same_as_plain"],
                "differences": row["differences"],
                "tasks": [
                    {
                        "rate": row["tasks"][task]["tokens_per_second"]["median"],
                        "over_plain": row["tasks"][task]["over_plain"]["median"],
                    }
                    for task in results[0]["tasks"]
                ],
            }
            for number, row in enumerate(results)
        ]
        tasks = list(results[0]["tasks"])
        for number in range(len(tasks)):
            best = max(row["tasks"][number]["rate"] for row in rows)
            for row in rows:
                row["tasks"][number]["best"] = row["tasks"][number]["rate"] == best
        return {
            "rows": rows,
            "tasks": tasks,
            "plain": plain,
            "best": max(
                (row for row in rows if row["kind"] == "ours"),
                key=lambda row: row["over_generate"],
            ),
            "longest": _longest(rows),
            "prompts": sum(found["prompts"].values()),
            "new_tokens": asked["max_new_tokens"],
            "repeats": asked["repeats"],
            "machine": _machine(found["machine"]),
        }

    return _taken(folder, SPEED, "eval/speed.py", take)


def _taken(
    folder: Path, name: str, writer: str, take: Callable[[Figures], Figures]
) -> Figures | None:
    """What `take` makes of a JSON file, None if the file is not there."""
    path = folder / name
    return _checked(path, writer, lambda: take(read_json(path))) if path.is_file() else None


def _checked(path: Path, writer: str, read: Callable[[], Figures | None]) -> Figures | None:
    try:
        return read()
    except (KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not what `{writer}` writes ({why}); write it anew") from error


def _rate(median: float | None, lowest: float | None, highest: float | None) -> Figures:
    rate = median or 0.0
    return {
        "median": rate,
        "lowest": rate if lowest is None else lowest,
        "highest": rate if highest is None else highest,
    }


def _longest(rows: list[Figures]) -> float:
    """What a bar of full length stands for."""
    return max((row["rate"]["highest"] for row in rows), default=0.0) or 1.0


def _machine(machine: Figures) -> str:
    """The machine of `speed.json` as the plan's is written."""
    threads = machine.get("threads")
    return ", ".join(
        [
            str(machine["device"]),
            *([f"{threads} threads"] if threads else []),
            str(machine["dtype"]),
            f"torch {machine.get('torch_version', machine.get('torch'))}",
        ]
    )


def _rung(name: str) -> str:
    """`free`, a depth, or another package's drafter."""
    return FREE if name == "free" else f"depth {name}" if name.isdigit() else name


def _pair(row: Figures) -> tuple[int, int]:
    return row["shallow"], row["deep"]


def _depths(depths: list[int]) -> str:
    *most, last = map(str, depths)
    return "depth " + (f"{', '.join(most)} and {last}" if most else last)


def _ticks(layers: int) -> list[int]:
    """About six round depths, 0 and the last one among them."""
    step = next((s for s in (1, 2, 5, 10, 20) if layers / s <= 7), 50)
    marks = [*range(0, layers, step)]
    if len(marks) > 1 and layers - marks[-1] < step / 2:
        del marks[-1]
    return [*marks, layers]
