"""Draws which packages of `hispec` import which: `python docs/drawings/import_graph.py OUT.svg`.

The graph is read from the source files. A package stands above everything that it imports, so all
arrows point down; a circle is an error. To keep the picture readable, an arrow is left out where
a longer way leads to the same package. The second line of a box lists what the package imports
without an arrow.
"""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = "checkpoint/custom_generate.py"
"""Copied into full checkpoints, never imported, so its imports belong to no package."""
WIDTH, HEIGHT, GAP_X, GAP_Y, DUMMY = 200, 62, 24, 34, 16

Graph = dict[str, set[str]]


def import_graph(package: Path) -> Graph:
    """For each package or module at the top of `package`, the others that its files import."""
    graph: Graph = {}
    for path in _files(package):
        inside = path.relative_to(package)
        if inside.as_posix() in (COPIED, "__init__.py"):
            continue
        name = inside.parts[0].removesuffix(".py")
        graph.setdefault(name, set()).update(_imported(path, package.name) - {name})
    return graph


def _files(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def _imported(path: Path, package: str) -> set[str]:
    """Top-level parts of `package` that a file imports, those for types alone left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == package:
            names = [f"{package}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found.update(name.split(".")[1] for name in names if name.startswith(f"{package}."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def levels_of(graph: Graph) -> dict[str, int]:
    """Level of each package: one above the highest that it imports.

    Raises:
        graphlib.CycleError: packages that import each other; the message names them.
    """
    levels: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        levels[name] = 1 + max((levels[below] for below in graph[name]), default=-1)
    return levels


def direct(graph: Graph) -> Graph:
    """The graph without the imports that a longer way implies (its transitive reduction)."""

    def below(name: str) -> set[str]:
        return graph[name].union(*(below(other) for other in graph[name]))

    return {
        name: {other for other in others if not any(other in below(o) for o in others - {other})}
        for name, others in graph.items()
    }


def draw(graph: Graph) -> str:
    """The picture as SVG.

    Raises:
        graphlib.CycleError: packages that import each other; the message names them.
    """
    levels, arrows = levels_of(graph), direct(graph)
    rows: list[list[str]] = [[] for _ in range(max(levels.values()) + 1)]
    for name in sorted(levels):
        rows[levels[name]].append(name)
    # An arrow over more than one level passes through places of its own, between the boxes.
    paths: list[list[str]] = []
    for name in sorted(arrows):
        for other in sorted(arrows[name]):
            between = range(levels[name] - 1, levels[other], -1)
            passed = [f"{name}>{other}@{level}" for level in between]
            for level, place in zip(between, passed, strict=True):
                rows[level].append(place)
            paths.append([name, *passed, other])
    _uncross(rows, paths)

    width = max(sum(_width(n) + GAP_X for n in row) for row in rows) + GAP_X
    height = len(rows) * (HEIGHT + GAP_Y) + GAP_Y
    centre: dict[str, tuple[float, float]] = {}
    for level, row in enumerate(rows):
        x = (width - sum(_width(n) + GAP_X for n in row) + GAP_X) / 2
        y = height - (level + 1) * (HEIGHT + GAP_Y)
        for name in row:
            centre[name] = (x + _width(name) / 2, y + HEIGHT / 2)
            x += _width(name) + GAP_X

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" font-family="sans-serif" role="img">',
        "<title>Imports between the packages of hispec; all arrows point down</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#55606e"/>'
        "</marker></defs>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
    ]
    parts += [_arrow([centre[place] for place in path]) for path in paths]
    for name in sorted(graph):
        x, y = centre[name]
        hidden = ", ".join(sorted(graph[name] - arrows[name]))
        parts += _box(x, y, name, hidden)
    return "\n".join([*parts, "</svg>", ""])


def _uncross(rows: list[list[str]], paths: list[list[str]]) -> None:
    """Order the places of each row by the mean position of their neighbours, a few times over."""
    near: dict[str, list[str]] = {}
    for path in paths:
        for upper, lower in pairwise(path):
            near.setdefault(upper, []).append(lower)
            near.setdefault(lower, []).append(upper)
    for _ in range(24):
        place = {n: (i + 0.5) / len(row) for row in rows for i, n in enumerate(row)}
        for row in rows:
            row.sort(
                key=lambda n: (sum(place[o] for o in near.get(n, [n])) / len(near.get(n, [n])), n)
            )
            place.update({n: (i + 0.5) / len(row) for i, n in enumerate(row)})


def _width(name: str) -> int:
    return DUMMY if "@" in name else WIDTH


def _arrow(points: list[tuple[float, float]]) -> str:
    (x, y), *rest = points
    y += HEIGHT / 2
    steps = [f"M{x:.1f} {y:.1f}"]
    for i, (x2, y2) in enumerate(rest):
        top = y2 - HEIGHT / 2 - (2 if i == len(rest) - 1 else 0)
        middle = (y + top) / 2
        steps.append(f"C{x:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {top:.1f}")
        if i < len(rest) - 1:
            steps.append(f"L{x2:.1f} {y2 + HEIGHT / 2:.1f}")
        x, y = x2, y2 + HEIGHT / 2
    path = " ".join(steps)
    return f'<path d="{path}" fill="none" stroke="#55606e" marker-end="url(#head)"/>'


def _box(x: float, y: float, name: str, hidden: str) -> list[str]:
    left, top = x - WIDTH / 2, y - HEIGHT / 2
    lines = _wrapped(f"+ {hidden}", 38) if hidden else []
    first = y + 5 - 7 * len(lines)
    box = [
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="6" '
        'fill="#eef3fa" stroke="#3c6eb4"/>',
        f'<text x="{x:.1f}" y="{first:.1f}" text-anchor="middle" font-size="14" '
        f'font-weight="bold" fill="#16202c">{name}</text>',
    ]
    for i, line in enumerate(lines):
        box.append(
            f'<text x="{x:.1f}" y="{first + 17 + 12.5 * i:.1f}" text-anchor="middle" '
            f'font-size="9.5" fill="#55606e">{line}</text>'
        )
    return box


def _wrapped(text: str, most: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def main(target: Path) -> None:
    package = ROOT / "hispec"
    graph = import_graph(package)
    target.write_text(draw(graph), encoding="utf-8")
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _files(package)}
    longest = max(lines, key=lambda path: lines[path])
    print(f"{target}: {len(graph)} packages and modules, {sum(map(len, graph.values()))} imports")
    print(f"longest file: {longest.relative_to(ROOT)}, {lines[longest]} lines")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
