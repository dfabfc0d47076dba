"""The planner's heat map: what the best setting of every pair of exits is predicted to gain."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

import numpy as np

from hispec.planner.plan_file import Plan, Setting, is_plain, shown
from hispec.utils.files import new_file

NOTHING, FREE = "nothing", "free drafts"
_LETTERS = 12
"""Letters of the title to an inch of the figure's width."""


def axes_of(plan: Plan) -> tuple[list[str], list[str]]:
    """(rows: what may draft, columns: what may verify first) of the map."""
    drafts = [NOTHING, FREE, *(f"depth {depth}" for depth in plan.exits)]
    return drafts, [f"depth {depth}" for depth in [*plan.exits, plan.num_layers]]


def place(setting: Setting) -> tuple[str, str]:
    """(row, column) of a setting in the map, named as the axes have them."""
    ladder, drafter = list(setting["ladder"]), setting.get("drafter", "exit")
    if is_plain(setting):
        draft = NOTHING
    elif "exit" in drafter:
        draft = f"depth {ladder.pop(0)}"
    else:
        draft = FREE
    return draft, f"depth {ladder[0]}"


def gain_by_exits(plan: Plan) -> dict[tuple[str, str], float]:
    """For what drafts and what verifies first, the highest predicted multiple of plain decoding.

    Prediction over prediction: over what plain decoding was measured at, the noise of that one
    figure would be in every other, and plain decoding itself would not be at 1.
    """
    plain = next(tried.predicted for tried in plan.settings if is_plain(tried.setting))
    found: dict[tuple[str, str], float] = {}
    for tried in plan.settings:
        pair = place(tried.setting)
        found[pair] = max(found.get(pair, 0.0), tried.predicted / plain)
    return found


def draw(plan: Plan, path: Path, title: str) -> None:
    """Write the heat map, predicted tokens/s against plain decoding, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    rows, columns = axes_of(plan)
    gain = np.full((len(rows), len(columns)), np.nan)
    for (draft, verify), value in gain_by_exits(plan).items():
        gain[rows.index(draft), columns.index(verify)] = value
    reach = max(0.05, float(np.nanmax(np.abs(gain - 1))))
    size = (2.8 + 1.1 * len(columns), 1.9 + 0.55 * len(rows))
    figure, axes = plt.subplots(figsize=(max(size[0], 6.4), size[1]), layout="constrained")
    image = axes.imshow(
        gain, cmap="RdBu", norm=TwoSlopeNorm(1.0, 1.0 - reach, 1.0 + reach), aspect="auto"
    )
    for (row, column), value in np.ndenumerate(gain):
        if not np.isnan(value):
            dark = abs(value - 1) > 0.6 * reach
            colour = "white" if dark else "black"
            axes.text(column, row, f"{value:.2f}x", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(columns)), [*columns[:-1], f"{columns[-1]}\n(full model)"])
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="verifies first", ylabel="drafts")
    said = title, f"plan: {shown(plan.setting)}, {plan.speedup:.2f}x measured"
    wide = int(_LETTERS * figure.get_figwidth())
    heading = "\n".join(fill(line, wide, break_on_hyphens=False) for line in said)
    figure.suptitle(heading, fontsize=10)
    figure.set_figheight(size[1] + 0.18 * len(heading.splitlines()))
    figure.colorbar(image, ax=axes, label="predicted tokens/s, plain = 1")
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
