"""`agreement.json` and `speed.json`: their schemas, and their content as a report shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from hispec.checkpoint.format import CONFIG
from hispec.planner.heatmap import FREE
from hispec.utils.schema import STRICT, Schema, read_json, validate

AGREEMENT, SPEED = "agreement.json", "speed.json"

Figures = dict[str, Any]
T = TypeVar("T", bound=Schema)

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]


class AgreementRow(Schema):
    """Agreement of a shallower depth with a deeper one, see `hispec.metrics.agreement`."""

    shallow: Count
    deep: Count
    top1: Share
    acceptance: Share
    tokens: Positive
    runs: list[Share] = Field(default_factory=list)

    @model_validator(mode="after")
    def _in_order(self) -> AgreementRow:
        if self.shallow >= self.deep:
            raise ValueError("a depth `shallow` below `deep`")
        return self


class AgreementFile(Schema):
    """What `eval/agreement.py` writes."""

    settings: dict[str, Any] = Field(default_factory=dict)
    exits: list[Count] = Field(default_factory=list)
    agreement: list[AgreementRow] = Field(min_length=1)
    untrained: list[AgreementRow]


class Rate(Schema):
    """Tokens per second, or a ratio of two rates, over the repeats."""

    median: NotNegative
    lowest: NotNegative
    highest: NotNegative

    @model_validator(mode="after")
    def _in_order(self) -> Rate:
        if not self.lowest <= self.median <= self.highest:
            raise ValueError("lowest <= median <= highest")
        return self


class Rates(Schema):
    """Rates of one method over some prompts."""

    tokens_per_second: Rate
    over_generate: Rate
    over_plain: Rate


class RungTime(Schema):
    """Passes and time of one rung."""

    passes: Count
    ms_per_token: NotNegative
    share_of_time: NotNegative


class SpeedRow(Rates):
    """One method: its rates over all prompts and per task, and its counts."""

    setting: str
    outside: bool
    tasks: Annotated[dict[str, Rates], Field(min_length=1)]
    tokens_per_target_pass: NotNegative | None
    """None for an engine that does not count its passes."""
    acceptance: dict[str, Share | None]
    rungs: dict[str, RungTime]
    same_as_generate: Count
    same_as_plain: Count
    differences: dict[str, Count]
    largest_gap: Annotated[float, Field(allow_inf_nan=True)] | None


class SpeedSettings(Schema):
    """The settings of the measurement that a report shows; all others may be there."""

    model_config = ConfigDict(**{**STRICT, "extra": "ignore"})

    max_new_tokens: Positive
    repeats: Positive


class SpeedMachine(Schema):
    """Where it was measured."""

    threads: Positive | None = None
    torch: str
    device: str
    dtype: str
    backend: str = "eager"
    weights: str = "full"


def _comparable(rows: list[SpeedRow]) -> list[SpeedRow]:
    if any(row.tasks.keys() != rows[0].tasks.keys() for row in rows):
        raise ValueError("rows that all have the same tasks")
    if rows[1].outside or not rows[1].tokens_per_second.median:
        raise ValueError("transformers' generate first, then own plain decoding, above 0 tokens/s")
    return rows


class SpeedFile(Schema):
    """What `eval/speed.py` writes."""

    settings: SpeedSettings
    machine: SpeedMachine
    prompts: Annotated[dict[str, Positive], Field(min_length=1)]
    """Number of prompts by task."""
    results: Annotated[list[SpeedRow], Field(min_length=2), AfterValidator(_comparable)]


def agreement(folder: Path, config: Figures) -> Figures | None:
    """How often exits agree with the full model; from the training if nothing else was measured.

    Raises:
        ValueError: `agreement.json` is not what `eval/agreement.py` writes for this model.
    """
    layers = config["model"]["num_hidden_layers"]
    found = _read(folder / AGREEMENT, AgreementFile, "eval/agreement.py")
    if found is not None:
        for row in (*found.agreement, *found.untrained):
            if row.deep > layers:
                raise ValueError(
                    f"{folder / AGREEMENT}: deep={row.deep} is not possible: the model has "
                    f"{layers} layers; `eval/agreement.py` writes it anew"
                )
        curve = [_shown(row) for row in found.untrained if row.deep == layers]
        return {**_agreement(found, layers), "curve": curve, "of_training": False}
    figures = config["figures"]
    if not figures.get("agreement"):
        return None
    # the training measures the exits alone, which makes no curve over depth
    rows = {key: _known_keys(figures.get(key, [])) for key in ("agreement", "untrained")}
    trained = validate(AgreementFile, rows, f"{folder / CONFIG}, figures")
    return {**_agreement(trained, layers), "curve": [], "of_training": True}


def _known_keys(rows: Any) -> Any:
    """Rows without the keys that later versions of the checkpoint format may add."""
    if not isinstance(rows, list):
        return rows
    known = AgreementRow.model_fields
    return [
        {key: row[key] for key in known if key in row} if isinstance(row, dict) else row
        for row in rows
    ]


def _agreement(found: AgreementFile, layers: int) -> Figures:
    contrast = {(row.shallow, row.deep): row.top1 for row in found.untrained}
    exits = [
        {**_shown(row), "untrained": contrast.get((row.shallow, row.deep))}
        for row in found.agreement
    ]
    return {
        "tokens": found.agreement[0].tokens,
        "layers": layers,
        "exits": exits,
        "points": [row for row in exits if row["deep"] == layers],
        "ticks": _ticks(layers),
    }


def _shown(row: AgreementRow) -> Figures:
    return row.model_dump(include={"shallow", "deep", "top1", "acceptance"})


def speed(folder: Path) -> Figures | None:
    """What `eval/speed.py` has measured, None if it has not.

    Raises:
        ValueError: `speed.json` is not what it writes.
    """
    found = _read(folder / SPEED, SpeedFile, "eval/speed.py")
    if found is None:
        return None
    rows = [_method(number, row) for number, row in enumerate(found.results)]
    tasks = list(found.results[0].tasks)
    for number in range(len(tasks)):
        best = max(row["tasks"][number]["rate"] for row in rows)
        for row in rows:
            row["tasks"][number]["best"] = row["tasks"][number]["rate"] == best
    machine = found.machine
    threads = [] if machine.threads is None else [f"{machine.threads} threads"]
    return {
        "rows": rows,
        "tasks": tasks,
        "plain": found.results[1].tokens_per_second.median,
        "best": max(
            (row for row in rows if row["kind"] == "ours"), key=lambda row: row["over_generate"]
        ),
        "longest": longest(rows),
        "prompts": sum(found.prompts.values()),
        "new_tokens": found.settings.max_new_tokens,
        "repeats": found.settings.repeats,
        "machine": ", ".join(
            [
                *(machine.device, *threads, machine.dtype),
                *([] if machine.weights == "full" else [f"{machine.weights} weights"]),
                *(machine.backend, f"torch {machine.torch}"),
            ]
        ),
    }


def _method(number: int, row: SpeedRow) -> Figures:
    kind = "outside" if row.outside else "ours"
    return {
        "name": row.setting,
        "kind": kind if number else "reference",
        "rate": row.tokens_per_second.model_dump(),
        "over_plain": row.over_plain.median,
        "over_generate": row.over_generate.median,
        "tokens_per_target_pass": row.tokens_per_target_pass,
        "acceptance": {_drafter(name): share for name, share in row.acceptance.items()},
        "same_as_generate": row.same_as_generate,
        "same_as_plain": row.same_as_plain,
        "differences": row.differences,
        "tasks": [
            {"rate": task.tokens_per_second.median, "over_plain": task.over_plain.median}
            for task in row.tasks.values()
        ],
    }


def _read(path: Path, kind: type[T], writer: str) -> T | None:
    """The content of a file, None if there is none."""
    if not path.is_file():
        return None
    try:
        return validate(kind, read_json(path), path)
    except ValueError as error:
        raise ValueError(f"{error}; `{writer}` writes it anew") from None


def longest(rows: list[Figures]) -> float:
    """The rate that a bar of full length stands for."""
    return max((row["rate"]["highest"] for row in rows), default=0.0) or 1.0


def _drafter(name: str) -> str:
    """`free`, a depth, or another package's drafter, in words."""
    return FREE if name == "free" else f"depth {name}" if name.isdigit() else name


def _ticks(layers: int) -> list[int]:
    """About six round depths, 0 and the last one among them."""
    step = next((s for s in (1, 2, 5, 10, 20) if layers / s <= 7), 50)
    marks = [*range(0, layers, step)]
    if len(marks) > 1 and layers - marks[-1] < step / 2:
        del marks[-1]
    return [*marks, layers]
