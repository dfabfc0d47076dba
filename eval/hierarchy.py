"""Two rungs against three: `python eval/hierarchy.py checkpoint=DIR rows=[1,4,16]`.

For every number of rows all settings of the planner's search are replayed on the same prompts. The
table has, for each kind of drafter, the best setting with the full model alone as the verifier and
the best one with a middle rung, and the comparison of the HiSpec paper: a chain of fixed length
from an exit near L / 8, without and with a middle rung. Costs are measured on this machine, or come
from a device model; `decode` really decodes the best of both kinds. With `assumed` in place of a
checkpoint the exits are as good as is said.

The line over the ratio of costs says what would be if the layers above the deepest exit took longer
or less long: the seconds of these layers are scaled in every replay. The reading of prompts is left
out everywhere. Prints tables, writes `hierarchy.json` and `hierarchy.png` to `output`, and ends
with one JSON line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from eval.settings import Name, PromptSource
from hispec.utils.command_line import parse_device, parse_dtype, run_cleanly
from hispec.utils.console import Output, bar, quiet_transformers
from hispec.utils.limits import Share
from hispec.utils.settings import check, resolve

if TYPE_CHECKING:
    from eval.rungs import Found

_Rows = Annotated[int, Field(ge=1, le=16)]
_Length = Annotated[int, Field(ge=1, le=16)]


@dataclass
class Settings(PromptSource):
    """The model, the costs and the prompts."""

    checkpoint: Name | None = None
    """EE checkpoint, or a base model; needed without `assumed`."""
    output: Name = "runs/hierarchy"
    """Folder of the results."""
    rows: list[_Rows] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Prompts that are decoded together."""
    exits: list[int] | None = None
    """Depths to try; default: the trained exits."""
    device_model: Name | None = None
    """YAML file, see `hispec plan --device-model`: simulate its costs."""
    assumed: dict[int, Share] = field(default_factory=dict)
    """For each exit the share of tokens that it gets right, such as {3: 0.4, 8: 0.69}; depths are
    those of the device model. Settings that need more than that are left out."""
    same_mistakes: Share = 0.5
    """With `assumed`: where two exits are wrong, how often alike."""
    decode: Annotated[int, Field(ge=0, le=100)] = 0
    """How many of the best settings with two and with three rungs are really decoded."""
    paper_length: _Length = 3
    """Draft length of the paper's comparison without a middle rung; with one it is 2, and 4 tokens
    start the full model."""
    dtype: str = "auto"
    device: str | None = "cpu"
    backend: str = "auto"
    weights: str = "full"


def main(words: Sequence[str]) -> None:
    from eval import rungs
    from eval.hierarchy_plot import draw
    from hispec.planner.device_model import read_device_model
    from hispec.utils.files import output_path, write_json

    settings = resolve(Settings, overrides=words)
    quiet_transformers()
    out = Output()
    one = (settings.checkpoint is None) == bool(settings.assumed)
    check(one, "checkpoint", settings.checkpoint, "either a checkpoint or `assumed`")
    device = (
        None if settings.device_model is None else read_device_model(Path(settings.device_model))
    )
    target = Path(settings.output)
    output_path(target / "hierarchy.json")
    if settings.assumed:
        check(device is not None, "device_model", None, "`assumed` needs one")
        check(not settings.decode, "decode", settings.decode, "0 with `assumed`")
        assert device is not None
        bench = rungs.assumed(
            device,
            settings.assumed,
            settings.same_mistakes,
            count=settings.prompts,
            new_tokens=settings.max_new_tokens,
        )
        name = "assumed exits"
    else:
        bench = _of_checkpoint(settings, device)
        name = Path(settings.checkpoint or "").name
    results = []
    for rows in settings.rows:
        found = bench.run(rows, settings.paper_length, bar)
        if settings.decode:
            bench.decode(found, settings.decode, bar)
        _report(out, found, simulated=device is not None)
        results.append(found)
    summary = [found.as_dict() for found in results]
    result = {
        "settings": {**asdict(settings), "checkpoint": name},
        "simulated": device is not None,
        "device_model": None if device is None else device.name,
        "prompts": bench.count,
        "results": summary,
    }
    write_json(target / "hierarchy.json", result)
    costs = f"simulated: {device.name}" if device is not None else "costs of this machine"
    draw(target / "hierarchy.png", summary, f"{name}; {costs}")
    out.say(f"picture: {target / 'hierarchy.png'}")
    print(json.dumps(result))


def _of_checkpoint(settings: Settings, device: Any) -> Any:
    from eval import rungs
    from eval.prompts import load_prompts
    from hispec.lm import load

    assert settings.checkpoint is not None
    lm = load(
        settings.checkpoint,
        dtype=parse_dtype(settings.dtype),
        device=parse_device(settings.device),
        backend=settings.backend,
        weights=settings.weights,
    )
    prompts = [prompt.tokens for prompt in load_prompts(lm, settings, settings.checkpoint)]
    return rungs.Bench(
        lm.model,
        prompts,
        exits=settings.exits,
        new_tokens=settings.max_new_tokens,
        eos=lm.eos(),
        device=device,
    )


def _report(out: Output, found: Found, *, simulated: bool) -> None:
    """Print the best settings of some rows and what they come to."""
    from rich.table import Table

    from hispec.planner.plan_file import shown

    word = "simulated" if simulated else "predicted"
    table = Table(title=f"rows: {found.rows}")
    for title in ("drafter", "setting"):
        table.add_column(title, overflow="fold")
    for title in (
        *(f"{word} tokens/s", "against plain", "decoded tokens/s"),
        *("tokens per row and target pass", "layer runs per token", "thrown out by the middle"),
    ):
        table.add_column(title, justify="right", overflow="fold")
    for entry in found.listed():
        thrown = entry.thrown_out
        table.add_row(
            entry.kind,
            shown(entry.setting),
            f"{entry.rate:.1f}",
            f"{entry.rate / found.plain.rate:.2f}x",
            "" if entry.decoded is None else f"{entry.decoded:.1f}",
            f"{entry.tokens_per_pass:.2f}",
            f"{entry.layer_runs:.1f}",
            "" if thrown is None else f"{thrown:.0%}",
        )
    out.print(table)
    for words, ratio in found.ratios().items():
        said = "no such settings" if ratio is None else f"{ratio:.2f}"
        out.say(f"rows {found.rows}, {word}, {words}: {said}")


if __name__ == "__main__":
    sys.exit(run_cleanly(lambda: main(sys.argv[1:])))
