"""How often does an exit agree with the full model? `python eval/agreement.py checkpoint=DIR`.

Prints a table, writes `agreement.json` and `agreement.png` (agreement over depth, every depth read
through the final norm for contrast) to `output`, and ends with one JSON line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.table import Table

from eval.prompts import held_out_rows
from eval.settings import Name, SeqLen, Sequences, TextSource
from hispec.utils.command_line import parse_device, parse_dtype, run_cleanly
from hispec.utils.console import Output, quiet_transformers
from hispec.utils.files import new_file, output_path, write_json
from hispec.utils.settings import check, resolve


@dataclass
class Settings(TextSource):
    """The checkpoint to measure, and the text to measure it on."""

    checkpoint: Name = MISSING
    output: Name | None = None
    """Folder of the results; default: the checkpoint's own."""
    seq_len: SeqLen = 256
    """Tokens of a row of text."""
    sequences: Sequences = 16
    """Rows of text."""
    answers: bool = False
    """Count only what the assistant of a chat wrote."""
    dtype: str = "auto"
    device: str | None = "cpu"


def main(words: Sequence[str]) -> None:
    from hispec.lm import load
    from hispec.metrics.agreement import Agreement, agreement, ladder_pairs
    from hispec.models.exit_model import ExitModel

    settings = resolve(Settings, overrides=words)
    quiet_transformers()
    folder = Path(settings.checkpoint)
    target = Path(settings.output) if settings.output else folder
    output_path(target / "agreement.json")
    lm = load(folder, dtype=parse_dtype(settings.dtype), device=parse_device(settings.device))
    check(bool(lm.model.exits.depths), "checkpoint", settings.checkpoint, "it has no exits")
    name, rows = held_out_rows(
        settings, settings.checkpoint, lm, settings.seq_len, settings.sequences
    )

    layers = lm.model.num_layers
    pairs = ladder_pairs(lm.model.exits.depths, layers)
    trained = agreement(lm.model, rows, pairs, answers=settings.answers)
    bare = ExitModel(lm.model.hf)
    every = [(depth, layers) for depth in range(1, layers)]
    untrained = agreement(bare, rows, every, answers=settings.answers)

    out = Output()
    out.print(_table(trained, {m.shallow: m for m in untrained}))
    of = "answers in held-out text" if settings.answers else "held-out text"
    text = f"{trained[0].tokens:,} tokens of {of} ({name})"
    out.say(f"{text}, temperature 1")
    results: dict[str, Any] = {
        "settings": asdict(settings),
        "exits": lm.model.exits.depths,
        "agreement": [asdict(m) for m in trained],
        "untrained": [asdict(m) for m in untrained],
    }
    write_json(target / "agreement.json", results)
    picture = target / "agreement.png"
    finals: list[Agreement] = [m for m in trained if m.deep == layers]
    draw(picture, finals, untrained, f"{folder.name}: {text}")
    out.say(f"picture: {picture}")
    print(json.dumps({k: results[k] for k in ("settings", "exits", "agreement")}))


def _table(trained: Sequence[Any], untrained: dict[int, Any]) -> Table:
    table = Table(title="agreement of exits with deeper depths")
    for title in (
        "exit",
        "verified by",
        "same top token",
        "acceptance",
        "untrained: same top token",
    ):
        table.add_column(title, justify="right")
    for m in trained:
        contrast = untrained.get(m.shallow)  # none at depth 0, which only a head can read
        table.add_row(
            f"depth {m.shallow}",
            f"depth {m.deep}",
            f"{m.top1:.3f}",
            f"{m.acceptance:.3f}",
            f"{contrast.top1:.3f}" if contrast is not None and m.deep == contrast.deep else "",
        )
    return table


def draw(path: Path, trained: Sequence[Any], untrained: Sequence[Any], title: str) -> None:
    """Draw agreement and acceptance over depth as a PNG: lines untrained, markers trained."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    colours = {"top1": "tab:blue", "acceptance": "tab:orange"}
    names = {"top1": "same top token", "acceptance": "acceptance, sum of min(p, q)"}
    for key, name in names.items():
        axes.plot(
            [m.shallow for m in untrained],
            [getattr(m, key) for m in untrained],
            color=colours[key],
            linewidth=1.5,
            alpha=0.6,
            label=f"{name}: final norm, untrained",
        )
        axes.scatter(
            [m.shallow for m in trained],
            [getattr(m, key) for m in trained],
            facecolors=colours[key] if key == "top1" else "none",
            edgecolors=colours[key],
            linewidths=1.8,
            s=45 if key == "top1" else 110,
            marker="o" if key == "top1" else "D",
            zorder=3,
            label=f"{name}: trained exit",
        )
    for m in trained:
        axes.annotate(
            f"{m.top1:.2f}", (m.shallow, m.top1), xytext=(9, -3), textcoords="offset points"
        )
    axes.set(
        title=title,
        xlabel="depth (layers run)",
        ylabel="agreement with the full model",
        ylim=(0, 1),
        xlim=(0, max(m.shallow for m in untrained) + 1),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run_cleanly(lambda: main(sys.argv[1:])))
