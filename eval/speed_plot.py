"""The picture of `eval/speed.py`: one panel per task, one bar per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hispec.utils.files import new_file

_COLOURS = {"reference": "0.45", "ours": "tab:blue", "outside": "tab:orange"}
_NAMES = {
    "reference": "HF generate",
    "ours": "settings of our own loop",
    "outside": "other packages",
}
_COLUMNS = 4


def draw(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Draw tokens per second of every method over all prompts and per task, as a PNG.

    Thin lines reach from the slowest to the fastest repeat; the number is the ratio to the first
    row, transformers' `generate`.

    Args:
        rows: results of `eval.speed_results.summary`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    tasks = rows[0]["tasks"]
    panels = {"all prompts": rows}
    if len(tasks) > 1:
        panels |= {task: [row["tasks"][task] for row in rows] for task in tasks}
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes_LC = plt.subplots(
        lines,
        columns,
        figsize=(3.2 + 3.4 * columns, (1.1 + 0.24 * len(rows)) * lines + 0.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    kinds = [_kind(number, row) for number, row in enumerate(rows)]
    for axes, (name, cells) in zip(axes_LC.flat, panels.items(), strict=False):
        _panel(axes, cells, [_COLOURS[kind] for kind in kinds])
        axes.set_title(name, fontsize=10)
        axes.set_yticks(range(len(rows)), [row["setting"] for row in rows], fontsize=8)
    for axes in axes_LC.flat[len(panels) :]:
        axes.set_axis_off()
    axes_LC[0, 0].invert_yaxis()  # shared by all panels
    meaning = "tokens per second; numbers: ratio to HF generate; dashed: own plain decoding"
    figure.suptitle(f"{title}\n{meaning}", fontsize=11)
    handles = [Patch(color=_COLOURS[kind], label=_NAMES[kind]) for kind in dict.fromkeys(kinds)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def _kind(number: int, row: dict[str, Any]) -> str:
    if number == 0:
        return "reference"
    return "outside" if row["outside"] else "ours"


def _panel(axes: Any, cells: Sequence[dict[str, Any]], colours: Sequence[str]) -> None:
    rates = [cell["tokens_per_second"] for cell in cells]
    medians = [rate["median"] for rate in rates]
    lower = [rate["median"] - rate["lowest"] for rate in rates]
    upper = [rate["highest"] - rate["median"] for rate in rates]
    axes.barh(
        range(len(cells)),
        medians,
        xerr=(lower, upper),
        color=colours,
        height=0.7,
        error_kw={"linewidth": 0.8, "ecolor": "0.2"},
    )
    longest = max(rate["highest"] for rate in rates)
    for number, (cell, rate) in enumerate(zip(cells, rates, strict=True)):
        ratio = f"{cell['over_generate']['median']:.2f}x"
        axes.text(
            rate["highest"] + 0.02 * longest,
            number,
            ratio,
            va="center",
            fontsize=7.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    axes.axvline(medians[1], color="0.2", linewidth=0.8, linestyle="--", zorder=1.5)
    axes.set_xlim(0, 1.2 * longest)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
