"""A report's page as a reader sees it, and files of made-up figures that it is made of."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from hispec.planner.plan_file import Machine, Plan, Tried

VOID = {"meta", "br"}
PLAIN = {"ladder": [6]}
BEST = {"ladder": [2, 4, 6], "drafter": "exit", "draft_length": 3, "buffer": 2}
LOOKUP = {"ladder": [6], "drafter": "lookup", "lookup_length": 8}
TASKS = ("chat", "code")


class Page(HTMLParser):
    """Text, tables, attributes and sections of a page whose elements are all closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.tokens: list[str] = []
        self.classes: list[str] = []
        self._section, self._token = "head", False
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "section":
            self._section = attributes["id"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        names = (attributes.get("class") or "").split()
        self._token = "t" in names and "title" in attributes
        if self._token:
            self.tokens.append("")
            self.classes.append(names[1])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self._token = False

    def handle_data(self, data):
        self.sections.setdefault(self._section, []).append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if self._token:
            self.tokens[-1] += data

    def text(self, section: str) -> str:
        """What is read there, with one space for any run of blanks."""
        return " ".join("".join(self.sections[section]).split())

    def row(self, *begins: str) -> list[str]:
        """The only row of a table whose first cells are these."""
        rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        (found,) = [row for row in rows if tuple(row[: len(begins)]) == begins]
        return found


def machine(threads: int = 1) -> Machine:
    return Machine("an abacus", threads, "float32", "2.11.0")


def write_plan(folder: Path, **changed) -> Plan:
    confirmed = [
        Tried(BEST, 61.0, 1.75, 6, 64.24, (60.16, 66.31), 5),
        Tried(PLAIN, 40.0, 1.0, 6, 40.15, (39.0, 41.0), 6),
    ]
    plan = Plan(
        **{
            "setting": BEST,
            "tokens_per_second": 64.24,
            "plain_tokens_per_second": 40.15,
            "machine": machine(),
            "text": {"source": "mine.jsonl", "tasks": ["chat"], "prompts": 6,
                     "prompt_tokens": [5, 9], "new_tokens": 48},
            "exits": [2, 4],
            "num_layers": 6,
            "confirmed": confirmed,
            "settings": [*confirmed, Tried(LOOKUP, 30.1125, 1.2)],
            "seconds": 75.2,
            **changed,
        }
    )  # fmt: skip
    plan.save(folder)
    return plan


def write_agreement(folder: Path) -> None:
    def row(shallow, deep, top1, acceptance):
        return {"shallow": shallow, "deep": deep, "top1": top1, "acceptance": acceptance,
                "tokens": 1234, "runs": []}  # fmt: skip

    found = {
        "settings": {},
        "exits": [2, 4],
        "agreement": [row(2, 6, 0.3125, 0.2949), row(4, 6, 0.5217, 0.5), row(2, 4, 0.6, 0.61)],
        "untrained": [row(d, 6, d / 100, d / 200) for d in range(1, 6)],
    }
    (folder / "agreement.json").write_text(json.dumps(found))


def write_speed(folder: Path) -> None:
    def rate(median):
        return {"median": median, "lowest": max(median - 1, 0.0), "highest": median + 2}

    def row(name, outside, over_all, tasks, acceptance):
        def cells(value):
            return {"tokens_per_second": rate(value), "over_generate": rate(value / 20),
                    "over_plain": rate(value / 25)}  # fmt: skip

        return {
            "setting": name,
            "outside": outside,
            **cells(over_all),
            "tasks": {task: cells(value) for task, value in zip(TASKS, tasks, strict=True)},
            "tokens_per_target_pass": over_all / 25,
            "acceptance": acceptance,
            "rungs": {},
            "same_as_generate": 3,
            "same_as_plain": 4,
            "differences": {"tie": 1},
            "largest_gap": None,
        }

    found = {
        "settings": {"max_new_tokens": 32, "repeats": 3},
        "machine": {"threads": 2, "torch": "2.11.0", "device": "cpu", "dtype": "bfloat16"},
        "prompts": {"chat": 2, "code": 2},
        "results": [
            row("HF generate", True, 20.0, (21.0, 19.0), {}),
            row("plain (6)", False, 25.0, (26.0, 24.0), {}),
            row("lookup (6)", False, 31.4, (27.3, 35.5), {"free": 0.625}),
            row("HiSpec (2, 4, 6)", False, 28.0, (30.0, 26.0), {"2": 0.4, "4": None}),
            row("other lookup", True, 36.0, (37.0, 35.0), {"lookup": 0.5}),
        ],
    }
    (folder / "speed.json").write_text(json.dumps(found))
