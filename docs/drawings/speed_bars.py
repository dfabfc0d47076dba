"""Draws the speed table of docs/benchmarks.md: `python docs/drawings/speed_bars.py OUT.svg`.

Each bar is a way to decode, relative to transformers' `generate` in the same run. The figures are
read from the table, so the picture cannot say anything else.
"""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks.md"
HEADING = "## Spec-Bench, every decoder in one run"
CAPTION = "SmolLM2-135M, bf16, two CPU cores with AMX, 24 Spec-Bench prompts, 2.3 hours of training"
OTHERS = {
    "HF": ("transformers", "#9aa5b1"),
    "OpenVINO": ("OpenVINO GenAI", "#7d9f6b"),
    "llama.cpp": ("llama.cpp", "#c9a25f"),
    "vLLM": ("vLLM", "#b0788f"),
}
OURS = ("HiSpec's own loop", "#3c6eb4")
LABEL, PLOT, BAR, GAP, TOP = 300, 460, 17, 7, 66


def read_table(text: str) -> list[tuple[str, float]]:
    """(setting, its speed relative to `generate`) of every row of the table under `HEADING`.

    Raises:
        ValueError: no such heading, or no table below it.
    """
    if HEADING not in text:
        raise ValueError(f"{BENCHMARKS.name} has no heading {HEADING!r}")
    section = text.split(HEADING, 1)[1].split("\n## ", 1)[0]
    table = section[max(section.find("\n| "), 0) :].strip().split("\n\n", 1)[0]  # the first one
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:2] == "| "]
    if len(rows) < 2:
        raise ValueError(f"{BENCHMARKS.name} has no table under {HEADING!r}")
    column = rows[0].index("against HF")
    return [(row[0].replace("`", ""), float(row[column].rstrip("x"))) for row in rows[1:]]


def draw(rows: list[tuple[str, float]]) -> str:
    """The bars as SVG, fastest first."""
    rows = sorted(rows, key=lambda row: -row[1])
    scale = PLOT / (max(speed for _, speed in rows) * 1.08)
    height = TOP + len(rows) * (BAR + GAP) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LABEL + PLOT + 20} {height}" '
        f'width="{LABEL + PLOT + 20}" font-family="sans-serif" font-size="12" role="img">',
        "<title>Tokens per second relative to transformers' generate</title>",
        f'<rect width="{LABEL + PLOT + 20}" height="{height}" fill="white"/>',
        '<text x="16" y="22" font-size="15" font-weight="bold" fill="#16202c">'
        "Tokens per second, relative to transformers' generate</text>",
        f'<text x="16" y="40" font-size="11" fill="#55606e">{CAPTION}</text>',
    ]
    x = 16
    for name, colour in (OURS, *OTHERS.values()):
        parts.append(f'<rect x="{x}" y="48" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15}" y="57" font-size="11" fill="#55606e">{name}</text>')
        x += 140
    one = LABEL + scale
    parts.append(
        f'<path d="M{one:.1f} {TOP - 4} V{height - 12}" stroke="#16202c" stroke-dasharray="3 3"/>'
    )
    for i, (name, speed) in enumerate(rows):
        y = TOP + i * (BAR + GAP)
        _, colour = next((o for key, o in OTHERS.items() if name.startswith(key)), OURS)
        parts += [
            f'<text x="{LABEL - 8}" y="{y + 13}" text-anchor="end" fill="#16202c">{name}</text>',
            f'<rect x="{LABEL}" y="{y}" width="{speed * scale:.1f}" height="{BAR}" '
            f'fill="{colour}"/>',
            f'<text x="{LABEL + speed * scale + 5:.1f}" y="{y + 13}" fill="white" '
            f'stroke="white" stroke-width="4">{speed:.2f}x</text>',  # hides the dashed line
            f'<text x="{LABEL + speed * scale + 5:.1f}" y="{y + 13}" fill="#16202c">'
            f"{speed:.2f}x</text>",
        ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    target = Path(sys.argv[1])
    bars = read_table(BENCHMARKS.read_text(encoding="utf-8"))
    target.write_text(draw(bars), encoding="utf-8")
    print(f"{target}: {len(bars)} bars")
