"""`plan.json`: the fastest setting that was found for a checkpoint, and for which machine."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hispec.config import DecodeConfig
from hispec.utils.files import read_json, write_json
from hispec.utils.settings import differences

PLAN, PICTURE = "plan.json", "plan.png"
FORMAT = 1

Setting = dict[str, Any]
"""Fields of `DecodeConfig` that a plan may choose, `ladder` always among them."""


@dataclass
class Machine:
    """What a plan's figures hold for."""

    device: str
    """Name of the processor or the accelerator."""
    threads: int | None
    """Of torch, where the processor computes."""
    dtype: str
    torch_version: str

    @classmethod
    def here(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """This machine, for a model on `device`."""
        name = _processor()
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        elif device.type != "cpu":  # mps and others are a part of the processor, without a name
            name = f"{device.type} of {name}"
        return cls(
            name,
            torch.get_num_threads() if device.type == "cpu" else None,
            str(dtype).removeprefix("torch."),
            torch.__version__,
        )

    def differences(self, other: Machine) -> list[str]:
        """Why figures of the one do not hold for the other; torch's version does not count."""
        return differences(vars(self), vars(other), ("device", "threads", "dtype"))

    def __str__(self) -> str:
        threads = "" if self.threads is None else f", {self.threads} threads"
        return f"{self.device}{threads}, {self.dtype}, torch {self.torch_version}"


@dataclass
class Tried:
    """One setting: what was predicted for it, and what was measured if it was confirmed."""

    setting: Setting
    predicted: float
    """Tokens per second."""
    tokens_per_target_pass: float
    prompts: int = 0
    """That it was tried on."""
    measured: float | None = None
    """Tokens per second, the median over the repeats."""
    spread: tuple[float, float] | None = None
    """The slowest and the fastest repeat."""
    same_text: int | None = None
    """Prompts whose text was that of own plain decoding."""


@dataclass
class Plan:
    """What `hispec plan` found."""

    setting: Setting
    tokens_per_second: float
    plain_tokens_per_second: float
    machine: Machine
    text: dict[str, Any]
    """Prompts, where they come from, their lengths, new tokens of each."""
    exits: list[int]
    """Depths that were tried as exits."""
    num_layers: int
    confirmed: list[Tried] = field(default_factory=list)
    """Really decoded, fastest first."""
    settings: list[Tried] = field(default_factory=list)
    """All that were tried, by prediction, fastest first."""
    latency: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    """How long planning took."""
    format_version: int = FORMAT

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


def parse(found: dict[str, Any], name: str, num_layers: int | None = None) -> Plan:
    """A plan from the content of `plan.json`.

    Args:
        num_layers: of the model that the plan is for, if that is known.

    Raises:
        ValueError: it is no plan, another version of HiSpec wrote it, or it is for another model.
    """
    again = "`hispec plan` writes it anew"
    if found.get("format_version") != FORMAT:
        raise ValueError(
            f"{name}: format_version={found.get('format_version')!r} is not possible: this version "
            f"reads {FORMAT}; {again}"
        )
    try:
        plan = Plan(**{key.name: found[key.name] for key in fields(Plan)})
        plan.machine = Machine(**found["machine"])
        plan.confirmed = [Tried(**tried) for tried in found["confirmed"]]
        plan.settings = [Tried(**tried) for tried in found["settings"]]
        DecodeConfig(**plan.setting).validate(plan.num_layers)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name} is no plan ({error}); {again}") from error
    if num_layers is not None and plan.num_layers != num_layers:
        raise ValueError(
            f"{name}: num_layers={plan.num_layers!r} is not possible: the model has {num_layers} "
            f"layers; {again}"
        )
    return plan


def shown(setting: Setting) -> str:
    """A setting in words, as the tables have it."""
    if is_plain(setting):
        return "plain"
    rest = {key: value for key, value in setting.items() if key not in ("ladder", "drafter")}
    ladder = ", ".join(map(str, setting["ladder"]))
    numbers = ", ".join(f"{key} {value}" for key, value in rest.items())
    return f"({ladder}) {setting.get('drafter', 'exit')}" + (f": {numbers}" if numbers else "")


@cache
def _processor() -> str:
    """The processor's name; Linux keeps it where `platform` does not look."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
