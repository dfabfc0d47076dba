"""The settings that the planner tries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from hispec.models.exit_model import ExitModel
from hispec.planner.plan_file import Setting, Tried

LONGEST_DRAFT = 8


def lookup_setting(model: ExitModel) -> Setting:
    """What decodes without a plan and without exits: the full model verifies prompt lookups."""
    # three drafts cost little in any pass, so even a match of one token is worth a try
    return {"ladder": [model.num_layers], "drafter": "lookup", "lookup_length": 3}


def default_setting(model: ExitModel) -> Setting:
    """What decodes greedily without a plan: prompt lookup, and where a head at depth 0 is compiled
    its trees of three drafts, in as many steps as pay, and none while rounds without are faster."""
    lookup = lookup_setting(model)
    if 0 not in model.exits.depths or model.engine is None:
        return lookup
    exit = {"ladder": [0, model.num_layers], "drafter": "lookup+exit", "draft_length": 3}
    tree = {"draft_width": 3, "tree_tokens": 3, "join_drafts": False}
    return {**lookup, **exit, **tree, "lookup_shortest": 2, "adaptive": True}


def drafts_trees(setting: Setting) -> bool:
    """Whether drafts may be trees, which verification `rejection` cannot verify."""
    drafter = setting.get("drafter", "exit")
    return "recycle" in drafter or ("exit" in drafter and setting.get("draft_width", 1) > 1)


def settings(exits: Sequence[int], full: int) -> list[Setting]:
    """All settings that are tried; plain decoding is the first.

    Args:
        exits: increasing depths below the full model's.
    """
    found: list[Setting] = [{"ladder": [full]}]

    def add(ladder: Sequence[int], drafter: str, **lists: Sequence[Any]) -> None:
        deep = len(ladder) - ("exit" in drafter) > 1  # a second rung verifies, so there is a buffer
        lists = {**lists, **({"buffer": (2, 4, 8)} if deep else {})}
        tried: list[Setting] = [{"ladder": list(ladder), "drafter": drafter}]
        for key, values in lists.items():
            tried = [{**setting, key: value} for setting in tried for value in values]
        found.extend(tried)

    # three drafts and the token before them fill a pass of four, which costs as much as one of one
    add((full,), "lookup", lookup_length=(3, 8), lookup_shortest=(1, 2))
    grown = dict(lookup_length=(3,), max_lookup_length=(8, 15))
    add((full,), "lookup", **grown, lookup_shortest=(1, 2))
    add((full,), "recycle", tree_tokens=(7, 15, 25))
    for verify in exits:
        if not verify:  # a head at depth 0 drafts well for its cost, and verifies badly
            continue
        add((verify, full), "lookup", lookup_length=(4, 8))
        add((verify, full), "recycle", tree_tokens=(7, 15))
    ladder: tuple[int, ...]
    for draft in exits:
        ladder = (draft, full)
        add(ladder, "exit", draft_length=(1, 2, 3, 4, 5, 6))
        add(ladder, "exit", draft_length=(4, LONGEST_DRAFT), draft_threshold=(0.3, 0.5, 0.7))
        small = dict(draft_width=(3,), draft_length=(2, 3), tree_tokens=(3,))
        add(ladder, "exit", **small)
        add(
            ladder,
            "lookup+exit",
            lookup_length=(3,),
            lookup_shortest=(2,),
            join_drafts=(False,),
            **small,
        )
        add(ladder, "lookup+exit", **grown, lookup_shortest=(2, 3), draft_length=(2, 3))
        add(ladder, "lookup+exit", lookup_length=(8,), draft_length=(1, 3))
        add(ladder, "recycle+exit", tree_tokens=(7, 15), draft_length=(1, 2))
        add(ladder, "exit", draft_width=(2, 4), draft_length=(2, 3, 5), tree_tokens=(7, 15))
        add(ladder, "exit", draft_width=(4,), draft_length=(6,), draft_threshold=(0.05, 0.1))
        joined = dict(draft_width=(4,), draft_length=(2, 4), tree_tokens=(7, 11))
        add(ladder, "lookup+exit", lookup_length=(4,), **joined)
    for pair in combinations(exits, 2):
        ladder = (*pair, full)
        add(ladder, "exit", draft_length=(1, 2, 3, 4))
        add(ladder, "exit", draft_length=(6,), draft_threshold=(0.5,))
        add(ladder, "lookup+exit", lookup_length=(8,), draft_length=(1, 2))
        add(ladder, "recycle+exit", tree_tokens=(15,), draft_length=(2,))
        add(ladder, "exit", draft_width=(4,), draft_length=(3,), tree_tokens=(7, 15))
    return found


def two_of_each(tried: Sequence[Setting]) -> list[Setting]:
    """The first two settings of every ladder and drafter."""
    seen: dict[tuple[Any, ...], list[Setting]] = defaultdict(list)
    for setting in tried:
        seen[_kind(setting)].append(setting)
    return [setting for group in seen.values() for setting in group[:2]]


def to_confirm(tried: Sequence[Tried], count: int) -> list[Tried]:
    """The most promising settings: first the best of each ladder and drafter, as the prediction
    errs for all settings of such a group alike, then the others. Of two or more, one drafts without
    an exit: such a decode has the fewest parts, so a machine that was busy misleads least there."""
    ranked = sorted(tried, key=lambda entry: -entry.predicted)
    firsts: dict[tuple[Any, ...], Tried] = {}
    for entry in ranked:
        firsts.setdefault(_kind(entry.setting), entry)
    best = list(firsts.values())
    chosen = (best + [entry for entry in ranked if entry not in best])[:count]
    if count > 1 and all(len(entry.setting["ladder"]) > 1 for entry in chosen):
        chosen[-1] = next(entry for entry in ranked if len(entry.setting["ladder"]) == 1)
    return chosen


def _kind(setting: Setting) -> tuple[Any, ...]:
    """Its ladder, its drafter, and whether an exit drafts trees."""
    return *setting["ladder"], setting.get("drafter"), setting.get("draft_width", 1) > 1
