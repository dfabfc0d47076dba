"""The `hispec report` command: everything known about a checkpoint in one HTML file."""

from __future__ import annotations

import re
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hispec.checkpoint.format import read_config
from hispec.data.prompts import some
from hispec.lm import EarlyExitLM
from hispec.report import figures, measured
from hispec.report.texts import decode
from hispec.utils.console import Output, bar
from hispec.utils.files import write_text
from hispec.utils.settings import check

REPORT = "report.html"
_TEMPLATE = "report.html.jinja"


def gather(folder: Path) -> dict[str, Any]:
    """Read the files of a checkpoint.

    Returns:
        Plain values by section. The value of a section whose file does not exist is None, and
        `missing` has the command that makes it.

    Raises:
        ValueError: `folder` is no checkpoint, or a file in it is damaged.
    """
    config = read_config(folder)
    found: dict[str, Any] = {
        "name": folder.resolve().name,
        "made": datetime.now().strftime("%Y-%m-%d"),
        "version": version("hispec"),
        "lead": figures.lead(config),
        "facts": figures.facts(config),
        "settings": figures.settings(config),
        "agreement": measured.agreement(folder, config),
        "plan": figures.plan(folder),
        "speed": measured.speed(folder),
        "texts": None,
    }
    commands = {
        "agreement": f"python eval/agreement.py checkpoint={folder}",
        "plan": f"hispec plan {folder}",
        "speed": f"python eval/speed.py checkpoint={folder}",
        "texts": f"hispec report {folder}",
    }
    curve = found["agreement"] and not found["agreement"]["of_training"]
    found["missing"] = {
        part: command
        for part, command in commands.items()
        if not (curve if part == "agreement" else found[part])
    }
    return found


def add_texts(
    found: dict[str, Any], lm: EarlyExitLM, *, data: Path | None, count: int, new_tokens: int
) -> None:
    """Decode prompts and add their texts to what `gather` has found.

    Args:
        data: JSONL file of prompts; None for the package's own.
        count: number of prompts.
        new_tokens: most new tokens of each.

    Raises:
        ValueError: no prompts, or a number below 1.
    """
    check(new_tokens >= 1, "max_new_tokens", new_tokens, "1 or more")
    prompts, source = some(data, count)
    check(bool(prompts), "data", str(data), "a file with at least one prompt")
    found["texts"] = {**decode(lm, prompts, new_tokens, bar), "source": source}
    del found["missing"]["texts"]


def render(found: dict[str, Any]) -> str:
    """The page as HTML: it loads no file, script or address, and all values are escaped."""
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["percent"] = lambda share, digits=0: f"{share:.{digits}%}"
    jinja.filters["times"] = lambda ratio: f"{ratio:.2f}x"
    # no line break within a ladder such as (6, 12, 30)
    jinja.filters["whole"] = lambda text: re.sub(
        r"\([\d, ]+\)", lambda ladder: ladder[0].replace(" ", "\N{NO-BREAK SPACE}"), text
    )
    return jinja.get_template(_TEMPLATE).render(found)


def write(out: Output, found: dict[str, Any], path: Path) -> None:
    """Write the page to `path`, whole or not at all, and print where it is and what is missing."""
    check(not path.is_dir(), "output", str(path), "a file to write, such as report.html")
    write_text(path, render(found))
    for part, command in found["missing"].items():
        out.say(f"not in it: {part}; `{command}` makes it")
    out.say(f"report: {path}, {path.stat().st_size / 1000:,.0f} kB")
