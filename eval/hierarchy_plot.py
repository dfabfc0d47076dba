"""The picture of `eval/hierarchy.py`: three rungs over two, by rows and by the ratio of costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hispec.utils.files import new_file

_STYLES = {
    "best three rungs over best two": ("tab:blue", "o"),
    "the same, really decoded": ("tab:green", "s"),
    "the paper's three rungs over its two": ("tab:orange", "^"),
    "best three rungs over the paper's two": ("tab:red", "v"),
}


def draw(path: Path, results: Sequence[dict[str, Any]], title: str) -> None:
    """Draw the ratios of every number of rows, as a PNG.

    Args:
        results: `eval.rungs.Found.as_dict()` of each number of rows.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_rows, by_costs) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for name, (colour, marker) in _STYLES.items():
        points = [(of["rows"], of["ratios"][name]) for of in results]
        points = [(rows, ratio) for rows, ratio in points if ratio is not None]
        if points:
            by_rows.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name)
    shades = plt.get_cmap("viridis")
    for number, of in enumerate(results):
        line = [point for point in of["line"] if point["three_over_two"] is not None]
        if not line:
            continue
        colour = shades(number / max(1, len(results) - 1) * 0.9)
        x = [point["ratio_of_costs"] for point in line]
        y = [point["three_over_two"] for point in line]
        by_costs.plot(x, y, color=colour, label=f"rows: {of['rows']}")
        here = next(point for point in line if point["factor"] == 1)
        by_costs.plot(here["ratio_of_costs"], here["three_over_two"], "o", color=colour)
    for axes in (by_rows, by_costs):
        axes.axhline(1, color="0.4", linewidth=0.8, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_ylabel("three rungs over two, tokens per second")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    by_rows.set_xticks([of["rows"] for of in results], [of["rows"] for of in results])
    by_rows.set_xlabel("rows")
    by_costs.xaxis.set_major_formatter("{x:g}")
    by_costs.set_xlabel("seconds of a full pass of three tokens over those of a draft step")
    by_costs.set_title("what if the layers above the deepest exit took longer (dots: as they are)")
    by_costs.title.set_fontsize(9)
    figure.suptitle(title, fontsize=11)
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
