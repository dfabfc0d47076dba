"""`plan.json`: the fastest setting that was found for a checkpoint, and for which machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import torch
from pydantic import AfterValidator, BeforeValidator, Field, create_model

from hispec.config import DecodeConfig, check_depths
from hispec.models.quantization import FULL
from hispec.utils.devices import processor
from hispec.utils.files import read_json, write_json
from hispec.utils.schema import STRICT, Schema, filled, validate
from hispec.utils.settings import check, differences

if TYPE_CHECKING:
    from hispec.models.exit_model import ExitModel

PLAN, PICTURE = "plan.json", "plan.png"
FORMAT = 1
PLANNED = (
    *("drafter", "draft_length", "max_draft_length", "adaptive", "draft_threshold"),
    *("draft_width", "join_drafts", "draft_vocab"),
    *("lookup_length", "max_lookup_length", "lookup_ngram", "lookup_shortest", "tree_tokens"),
    *("buffer", "buffer_threshold"),
)
"""Settings that a plan may choose, besides the ladder: those that do not change the text."""
_AGAIN = "`hispec plan` writes it anew"


def _like(kind: type[Schema]) -> AfterValidator:
    """Checks a dict against a schema, and leaves it a dict."""

    def check_it(value: dict[str, Any]) -> dict[str, Any]:
        validate(kind, value)
        return value

    return AfterValidator(check_it)


def _to(kind: type[Any]) -> Callable[[Any], Any]:
    """Makes an instance of a dataclass from its JSON object."""

    def make(value: Any) -> Any:
        if not isinstance(value, dict | kind):
            raise ValueError("an object of keys and values")
        return filled(kind, value, "") if isinstance(value, dict) else value

    return make


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_HINTS = get_type_hints(DecodeConfig, include_extras=True)
_FIELDS: Any = {"ladder": (_HINTS["ladder"], ...), **{key: (_HINTS[key], None) for key in PLANNED}}
_Planned = create_model("_Planned", __base__=Schema, **_FIELDS)
Setting = Annotated[dict[str, Any], _like(_Planned)]
"""Fields of `DecodeConfig` that a plan may choose, `ladder` always among them."""
Count = Annotated[int, Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(ge=1e-6, le=1e9)]
"""Tokens per second, or per pass."""


class Text(Schema):
    """The prompts that a plan was made on."""

    source: str
    """Where they come from."""
    tasks: list[str]
    prompts: Annotated[int, Field(ge=1)]
    prompt_tokens: Annotated[list[Count], Field(min_length=2, max_length=2)]
    """Of the shortest and the longest."""
    new_tokens: Annotated[int, Field(ge=1)]
    """Decoded of each prompt."""


class Timings(Schema):
    """What the predictions were made from, see `Latency`."""

    lengths: list[Count] = Field(default_factory=list)
    tokens: list[Count] = Field(default_factory=list)
    seconds: dict[str, list[list[float]]] = Field(default_factory=dict)
    scale: float = 1.0
    """Measured over predicted speed, the median over what was confirmed."""


@dataclass
class Machine:
    """The machine that a plan's figures hold for."""

    __pydantic_config__ = STRICT

    device: str
    """Name of the processor or the accelerator."""
    threads: Annotated[int, Field(ge=1)] | None
    """Threads of torch, if the processor computes."""
    dtype: str
    torch_version: str
    backend: str = "eager"
    """What ran the passes, see `hispec.engine`."""
    weights: str = FULL
    """`full` or `int8`."""

    @classmethod
    def here(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        backend: str = "eager",
        weights: str = FULL,
    ) -> Machine:
        """This machine, for a model on `device` whose passes `backend` runs."""
        name = processor()
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        elif device.type != "cpu":  # mps and others are a part of the processor, without a name
            name = f"{device.type} of {name}"
        return cls(
            name,
            torch.get_num_threads() if device.type == "cpu" else None,
            str(dtype).removeprefix("torch."),
            torch.__version__,
            backend,
            weights,
        )

    @classmethod
    def of(cls, model: ExitModel) -> Machine:
        """This machine, as it runs this model."""
        return cls.here(model.device, model.hf.dtype, model.backend, model.weights)

    def differences(self, other: Machine) -> list[str]:
        """Why figures of one machine do not hold for the other; torch's version is ignored."""
        keys = "device", "threads", "dtype", "backend", "weights"
        return differences(vars(self), vars(other), keys)

    def __str__(self) -> str:
        threads = "" if self.threads is None else f", {self.threads} threads"
        dtype = self.dtype if self.weights == FULL else f"{self.dtype} with {self.weights} weights"
        return f"{self.device}{threads}, {dtype}, {self.backend}, torch {self.torch_version}"


@dataclass
class Tried:
    """One setting: its predicted speed, and its measured one if it was confirmed."""

    __pydantic_config__ = STRICT

    setting: Setting
    predicted: Rate
    """Tokens per second."""
    tokens_per_target_pass: Rate
    prompts: Count = 0
    """Number of prompts that it was tried on."""
    measured: Rate | None = None
    """Tokens per second, the median over the repeats."""
    spread: Annotated[tuple[Rate, Rate], BeforeValidator(_pair)] | None = None
    """The slowest and the fastest repeat."""
    same_text: Count | None = None
    """Number of prompts whose text was that of own plain decoding."""


@dataclass
class Plan:
    """The result of `hispec plan`."""

    __pydantic_config__ = STRICT

    setting: Setting
    """The fastest one."""
    tokens_per_second: Rate
    plain_tokens_per_second: Rate
    machine: Annotated[Machine, BeforeValidator(_to(Machine))]
    text: Annotated[dict[str, Any], _like(Text)]
    """See `Text`."""
    exits: list[Count]
    """Depths that were tried as exits."""
    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    confirmed: list[Annotated[Tried, BeforeValidator(_to(Tried))]] = field(default_factory=list)
    """The settings that were really decoded, fastest first."""
    settings: list[Annotated[Tried, BeforeValidator(_to(Tried))]] = field(default_factory=list)
    """All settings that were tried, by prediction, fastest first."""
    latency: Annotated[dict[str, Any], _like(Timings)] = field(default_factory=dict)
    """See `Timings`."""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """How long planning took."""
    rows: Annotated[int, Field(ge=1, le=4096)] = 1
    """Prompts that were decoded together; figures per second are of all of them."""
    other_rows: list[Annotated[Plan, BeforeValidator(lambda v: _to(Plan)(v))]] = field(
        default_factory=list
    )
    """Plans of the same machine for more rows, by these; none of them has others."""
    format_version: int = FORMAT

    def for_rows(self, rows: int) -> Plan:
        """The plan for the nearest number of rows, by ratio; for the fewer ones of two."""
        return min((self, *self.other_rows), key=lambda plan: abs(math.log(plan.rows / rows)))

    def beside(self, older: Plan | None) -> Plan:
        """This plan and an older file's plans for other numbers of rows, if they hold for the same
        machine and exits; the one for the fewest rows holds the others."""
        plans = {self.rows: self}
        if older is not None and older.exits == self.exits:
            for plan in (older, *older.other_rows):
                if not plan.machine.differences(self.machine):
                    plans.setdefault(plan.rows, plan)
        first, *others = [replace(plans[rows], other_rows=[]) for rows in sorted(plans)]
        return replace(first, other_rows=others)

    @property
    def together(self) -> str:
        """How many prompts were decoded together, in words; nothing for one."""
        return "" if self.rows == 1 else f", {self.rows} at a time"

    @property
    def speedup(self) -> float:
        """Measured, against plain decoding in the same minutes."""
        return self.tokens_per_second / self.plain_tokens_per_second

    @property
    def plain(self) -> bool:
        """Whether nothing was faster than the full model alone."""
        return is_plain(self.setting)

    def save(self, folder: Path) -> Path:
        """Write `plan.json`, whole or not at all."""
        path = folder / PLAN
        write_json(path, {**asdict(self), "speedup": self.speedup})
        return path


def is_plain(setting: Setting) -> bool:
    """Whether a setting is plain decoding."""
    return len(setting["ladder"]) == 1 and setting.get("drafter", "exit") == "exit"


def read_plan(folder: Path, num_layers: int | None = None) -> Plan | None:
    """The plan of a checkpoint; None if it has none. Raises ValueError as `parse`."""
    path = folder / PLAN
    return parse(read_json(path), str(path), num_layers) if path.is_file() else None


def parse(content: dict[str, Any], name: str, num_layers: int | None = None) -> Plan:
    """A plan from the content of `plan.json`.

    Args:
        name: the file, for messages.
        num_layers: of the model that the plan is for, if that is known.

    Raises:
        ValueError: it is no plan, another version of HiSpec wrote it, or it is for another model.
    """
    version = content.get("format_version")
    allowed = f"this version reads {FORMAT}; {_AGAIN}"
    check(type(version) is int and version == FORMAT, f"{name}: format_version", version, allowed)
    try:
        plan = validate(Plan, {key: content[key] for key in content if key != "speedup"})
        _check_ladders(plan)
        layers, allowed = plan.num_layers, f"the model has {num_layers} layers"
        check(num_layers in (None, layers), "num_layers", layers, allowed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; {_AGAIN}") from None
    return plan


def _check_ladders(plan: Plan) -> None:
    """Raise ValueError unless every setting can be decoded, and all are comparable."""
    rows = [of.rows for of in (plan, *plan.other_rows)]
    rising = all(a < b for a, b in pairwise(rows))
    check(rising, "rows", rows, "increasing numbers, that of the first plan first")
    for other in plan.other_rows:
        check(not other.other_rows, "other_rows", "...", "plans that have no others")
        check(other.exits == plan.exits, "exits", other.exits, f"those of all, {plan.exits}")
        check(other.num_layers == plan.num_layers, "num_layers", other.num_layers, "as of all")
        _check_ladders(other)
    check_depths("exits", plan.exits, plan.num_layers, at_least=0, lowest=0)
    settings = [plan.setting, *(tried.setting for tried in [*plan.confirmed, *plan.settings])]
    for setting in settings:
        DecodeConfig(**setting).validate(plan.num_layers)
        ladder = setting["ladder"]
        check(set(ladder[:-1]) <= set(plan.exits), "ladder", ladder, f"exits of {plan.exits}")
    for key in ("confirmed", "settings"):
        has_plain = any(is_plain(tried.setting) for tried in getattr(plan, key))
        check(has_plain, key, "...", "plain decoding is among them")


def shown(setting: Setting) -> str:
    """A setting in words, as tables show it."""
    if is_plain(setting):
        return "plain"
    rest = {key: value for key, value in setting.items() if key not in ("ladder", "drafter")}
    ladder = ", ".join(map(str, setting["ladder"]))
    numbers = ", ".join(f"{key} {value}" for key, value in rest.items())
    return f"({ladder}) {setting.get('drafter', 'exit')}" + (f": {numbers}" if numbers else "")
