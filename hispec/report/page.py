"""The `hispec report` command: what is known of a checkpoint, as one HTML file on its own."""

from __future__ import annotations

import re
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hispec.checkpoint.io import read_config
from hispec.data.prompts import some
from hispec.lm import EarlyExitLM
from hispec.report import figures
from hispec.report.texts import decode
from hispec.utils.console import Output, bar
from hispec.utils.files import write_text
from hispec.utils.settings import check

REPORT = "report.html"
_TEMPLATE = "report.html.jinja"


def gather(folder: Path) -> dict[str, Any]:
    """What the files of a checkpoint hold, as plain values; what is not there is None, and
    `missing` names the command that would make it.

    Raises:
        ValueError: no checkpoint, or a file that cannot be read.
    """
    config = read_config(folder)
    found: dict[str, Any] = {
        "name": folder.resolve().name,
        "made": datetime.now().strftime("%Y-%m-%d"),
        "version": version("hispec"),
        "lead": figures.lead(config),
        "facts": figures.facts(config),
        "settings": figures.settings(config),
        "agreement": figures.agreement(folder, config),
        "plan": figures.plan(folder),
        "speed": figures.speed(folder),
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
    """Decode some prompts for what `gather` has found.

    Raises:
        ValueError: no prompts, or numbers that are not possible.
    """
    check(new_tokens >= 1, "max_new_tokens", new_tokens, "1 or more")
    prompts, source = some(data, count)
    check(bool(prompts), "data", str(data), "a file with at least one prompt")
    found["texts"] = {**decode(lm, prompts, new_tokens, bar), "source": source}
    del found["missing"]["texts"]


def render(found: dict[str, Any]) -> str:
    """The page: no file, script or address is loaded by it, and all values are escaped."""
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["percent"] = lambda share, digits=0: f"{share:.{digits}%}"
    jinja.filters["times"] = lambda ratio: f"{ratio:.2f}x"
    # A ladder such as (6, 12, 30) stays on one line.
    jinja.filters["whole"] = lambda text: re.sub(
        r"\([\d, ]+\)", lambda ladder: ladder[0].replace(" ", "\N{NO-BREAK SPACE}"), text
    )
    return jinja.get_template(_TEMPLATE).render(found)


def write(out: Output, found: dict[str, Any], path: Path) -> None:
    """Write the page to `path`, whole or not at all, and say where it is and what it lacks."""
    check(not path.is_dir(), "output", str(path), "a file to write, such as report.html")
    write_text(path, render(found))
    for part, command in found["missing"].items():
        out.say(f"not in it: {part}; `{command}` makes it")
    out.say(f"report: {path}, {path.stat().st_size / 1000:,.0f} kB")
