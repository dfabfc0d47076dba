"""Device models: what the parts of a decode would cost on other hardware, or in another model.

The roofline model (Williams et al., CACM 52(4), 2009): a pass takes as long as moving its bytes or
as doing its arithmetic, whichever takes longer, and some overhead on top. Bytes and operations of a
transformer's layers are counted as in "Efficiently Scaling Transformer Inference" (2211.05102) and
"LLM Inference Unveiled" (2402.16363).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from hispec.config import Exit
from hispec.decoding.ladder import similar
from hispec.models.exit_model import ExitModel
from hispec.planner.latency import CONFIDENCE, KEEPING, RANKING
from hispec.utils.limits import at_most
from hispec.utils.schema import STRICT, ListOf, filled
from hispec.utils.settings import check, resolve

Size = Annotated[int, Field(ge=1), at_most(2**31, "no model has that many")]
Microseconds = Annotated[float, Field(ge=0, le=1e6)]
Milliseconds = Annotated[float, Field(gt=0, le=1e6)]
_LOGIT_BYTES = 4  # they are compared in float32


def _from_keys(kind: type[Any]) -> BeforeValidator:
    """Takes a mapping of its fields, as YAML has it, for a dataclass."""
    return BeforeValidator(lambda v: filled(kind, v, "") if isinstance(v, Mapping) else v)


@dataclass
class Shape:
    """The shape of a decoder-only model with gated MLPs, such as Llama."""

    __pydantic_config__ = STRICT

    layers: Annotated[int, Field(ge=1, le=10_000)]
    hidden_size: Size
    intermediate_size: Size
    heads: Size
    kv_heads: Size
    vocab_size: Size
    head_size: Size | None = None
    """Default: `hidden_size` over `heads`."""
    draft_vocab: Size | None = None
    """Tokens that exits draft from; default: as many as in the checkpoint, all if it has none."""
    weight_bytes: Annotated[float, Field(gt=0, le=8)] = 2.0
    """Bytes of a weight, scales of quantized ones included."""
    kv_bytes: Annotated[float, Field(gt=0, le=8)] = 2.0
    """Bytes of each number in the KV cache."""

    @property
    def queries(self) -> int:
        """Numbers in the queries of a token."""
        return self.heads * (self.head_size or self.hidden_size // self.heads)

    @property
    def keys(self) -> int:
        """Numbers in the keys of a token."""
        return self.kv_heads * (self.head_size or self.hidden_size // self.heads)

    @property
    def layer_weights(self) -> int:
        """Weights of one layer, norms left out."""
        attention = self.hidden_size * 2 * (self.queries + self.keys)
        return attention + 3 * self.hidden_size * self.intermediate_size

    def extra_weights(self, exit: Exit) -> int:
        """Weights that an exit's head reads before its layers."""
        if exit.head == "eagle3":  # QKV read twice the width, and `fc` fuses three states
            wider = self.hidden_size * (self.queries + 2 * self.keys)
            return wider + 3 * self.hidden_size**2
        return 2 * self.hidden_size**2 if exit.previous else 0


@dataclass
class Hardware:
    """One or more equal devices that share every layer (tensor parallelism)."""

    __pydantic_config__ = STRICT

    bandwidth_gbs: Annotated[float, Field(gt=0, le=1e9)]
    """Peak memory bandwidth of one device, GB/s."""
    tflops: Annotated[float, Field(gt=0, le=1e9)]
    """Peak of its matrix products in the dtype of the weights, without sparsity, TFLOP/s."""
    devices: Annotated[int, Field(ge=1, le=100_000)] = 1
    bandwidth_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the peak bandwidth that is reached."""
    compute_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the peak arithmetic that is reached."""
    pass_us: Microseconds = 0.0
    """Overhead of a pass that ends in logits: the host reads a token and starts the next pass."""
    launch_us: Microseconds = 0.0
    """Overhead of each kernel."""
    layer_kernels: Annotated[int, Field(ge=0, le=10_000)] = 10
    """Kernels of one layer."""
    all_reduce_us: Microseconds = 0.0
    """Time that an all-reduce of few tokens takes, two of which end each layer on more than one
    device."""
    link_gbs: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Bandwidth of each device to the others; None: the all-reduces of many tokens take no longer
    than those of few."""

    def seconds(self, moved: float, operations: float, kernels: int) -> float:
        """The roofline: bytes, floating-point operations, kernels."""
        by_memory = moved / (self.bandwidth_gbs * 1e9 * self.bandwidth_share)
        by_compute = operations / (self.tflops * 1e12 * self.compute_share)
        return max(by_memory, by_compute) / self.devices + kernels * self.launch_us * 1e-6

    def reduced(self, moved: float) -> float:
        """Seconds of one all-reduce of so many bytes on a ring."""
        if self.devices == 1:
            return 0.0
        sent = 2 * (self.devices - 1) / self.devices * moved
        link = 0.0 if self.link_gbs is None else sent / (self.link_gbs * 1e9)
        return max(self.all_reduce_us * 1e-6, link)


@dataclass
class Measured:
    """Latencies that were measured elsewhere, by tokens of a pass, of all rows together."""

    __pydantic_config__ = STRICT

    tokens: Annotated[ListOf[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    """Increasing. In between is interpolated; more than the last take in proportion."""
    layer_ms: Annotated[ListOf[Milliseconds], Field(min_length=1)]
    """One layer, for each of them."""
    lm_head_ms: Annotated[ListOf[Milliseconds], Field(min_length=1)]
    draft_head_ms: Annotated[ListOf[Milliseconds], Field(min_length=1)] | None = None
    """The LM head over the draft vocabulary; default: as the whole one."""
    pass_us: Microseconds = 0.0
    """Overhead of a pass that ends in logits."""

    def check(self) -> None:
        """Raise ValueError unless the lists fit together."""
        rising = all(a < b for a, b in zip(self.tokens, self.tokens[1:], strict=False))
        check(rising, "latency.tokens", self.tokens, "increasing numbers")
        for key in ("layer_ms", "lm_head_ms", "draft_head_ms"):
            of = getattr(self, key)
            fits = of is None or len(of) == len(self.tokens)
            check(fits, f"latency.{key}", of, f"one for each of tokens, {len(self.tokens)}")

    def seconds(self, of: Sequence[float], tokens: int) -> float:
        """Interpolated seconds of so many tokens."""
        beyond = max(1.0, tokens / self.tokens[-1])
        return float(np.interp(tokens, self.tokens, of)) * beyond / 1000


@dataclass
class DeviceModel:
    """A model's shape and either the hardware that it runs on or latencies measured there."""

    __pydantic_config__ = STRICT

    name: Annotated[str, Field(min_length=1)]
    model: Annotated[Shape, _from_keys(Shape)]
    hardware: Annotated[Hardware, _from_keys(Hardware)] | None = None
    latency: Annotated[Measured, _from_keys(Measured)] | None = None
    sources: ListOf[str] = field(default_factory=list)
    """Where the numbers come from."""


def read_device_model(path: Path) -> DeviceModel:
    """Read a device model from a YAML file.

    Raises:
        ValueError: no such file or no YAML, an unknown key or a value that is not possible, or
            neither or both of `hardware` and `latency`; the message names file, key and value.
    """
    check(
        path.is_file(), "device_model", str(path), "a YAML file, such as those in recipes/devices"
    )
    found = resolve(DeviceModel, yaml=path)
    try:
        one = (found.hardware is None) != (found.latency is None)
        given = [key for key in ("hardware", "latency") if getattr(found, key) is not None]
        check(one, "given", given, "either hardware or latency")
        if found.latency is not None:
            found.latency.check()
        whole = found.model.head_size is not None or not found.model.hidden_size % found.model.heads
        check(whole, "model.head_size", None, "needed where hidden_size is no multiple of heads")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found


class SimulatedCosts:
    """What the parts of a checkpoint's decode would cost by a device model.

    The checkpoint's depths stand for those of the other model in proportion: depth `d` of `L` for
    depth `d L' / L` of `L'`, rounded. A head keeps its kind and number of blocks, at the other
    model's width. Drafts without a model, the loop and the sampler cost nothing but `pass_us`.

    Args:
        device: the device model.
        model: the checkpoint's model.
        depths: of the checkpoint, those that may be read and the full model's.
        rows: texts decoded together.

    Raises:
        ValueError: two depths stand for the same one.
    """

    simulated = True

    def __init__(
        self, device: DeviceModel, model: ExitModel, depths: Sequence[int], rows: int = 1
    ) -> None:
        self.device, self.rows = device, rows
        self.shape = device.model
        layers, full = device.model.layers, model.num_layers
        self.depth_of = {depth: round(depth * layers / full) for depth in sorted({0, *depths})}
        """For each of the checkpoint's depths, the other model's."""
        clear = len(set(self.depth_of.values())) == len(self.depth_of)
        words = ", ".join(f"{depth} for {of}" for depth, of in self.depth_of.items())
        check(clear, "exits", tuple(depths), f"depths that stand for different ones ({words})")
        self._exits = {exit.depth: exit for exit in model.exits.exits}
        drafted = len(model.draft_tokens) if model.draft_tokens is not None else 0
        vocab = device.model.vocab_size
        self._words = min(vocab, device.model.draft_vocab or drafted or vocab)

    def of(self, part: str, tokens: int, length: int) -> float:
        """Seconds of a part, named as in `planner.latency`, for so many tokens of every row."""
        words = part.replace(",", "").split()
        if words[0] == "layers":
            count = self.depth_of[int(words[3])] - self.depth_of[int(words[1])]
            return self.layers(count, tokens, length)
        if words[0] == "head":
            return self._head(int(words[1]), tokens, length)
        if part.startswith("chain"):
            depth = int(words[-1])
            return tokens * (self._head(depth, 1, length) + self._logits(depth, 1, drafting=True))
        if "logits" in words:
            return self._logits(int(words[-1]), tokens, drafting=words[0] == "draft")
        assert part in (CONFIDENCE, RANKING, KEEPING), part
        return self._kept(tokens) if part == KEEPING else self._compared(tokens)

    def layers(self, count: int, tokens: int, length: int, extra_weights: int = 0) -> float:
        """Seconds of some layers: their weights are read once, the KV of every row is read, and
        that of its new tokens written."""
        shape, rows = self.shape, self.rows
        if self.device.latency is not None:
            of = self.device.latency
            return count * of.seconds(of.layer_ms, rows * tokens)
        hardware = self.device.hardware
        assert hardware is not None
        weights = count * shape.layer_weights + extra_weights
        seen = length + tokens
        kv = count * rows * seen * 2 * shape.keys * shape.kv_bytes
        products = 2 * weights * rows * tokens
        attention = count * 4 * rows * tokens * (length + (tokens + 1) / 2) * shape.queries
        kernels = count * hardware.layer_kernels
        states = rows * tokens * shape.hidden_size * shape.weight_bytes
        return hardware.seconds(
            weights * shape.weight_bytes + kv, products + attention, kernels
        ) + 2 * count * hardware.reduced(states)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> dict[int, float]:
        """Seconds that reading prompts takes: of all layers, by the checkpoint's full depth, and of
        each exit's head, by its depth. Prompts of like lengths are read together."""
        lengths = [len(prompt) for prompt in prompts]
        found = dict.fromkeys(self.depth_of, 0.0)
        for group in similar(lengths):
            tokens = max(lengths[row] for row in group)
            costs = copy(self)
            costs.rows = len(group)
            for depth in self.depth_of:
                if depth == max(self.depth_of):
                    found[depth] += costs.layers(self.shape.layers, tokens, 0)
                elif depth in self._exits:
                    found[depth] += costs._head(depth, tokens, 0)
        return found

    def _head(self, depth: int, tokens: int, length: int) -> float:
        exit = self._exits[depth]
        blocks = {"block": exit.blocks, "eagle3": 1}.get(exit.head, 0)
        return self.layers(blocks, tokens, length, self.shape.extra_weights(exit))

    def _logits(self, depth: int, tokens: int, *, drafting: bool) -> float:
        """The final norm, the LM head or its part for drafts, and the largest logit."""
        shape, count = self.shape, self.rows * tokens
        if (measured := self.device.latency) is not None:
            of = (measured.draft_head_ms if drafting else None) or measured.lm_head_ms
            return measured.seconds(of, count) + measured.pass_us * 1e-6
        hardware = self.device.hardware
        assert hardware is not None
        words = self._words if drafting else shape.vocab_size
        weights, logits = words * shape.hidden_size, count * words * _LOGIT_BYTES
        if depth in self._exits and self._exits[depth].head == "adapter":
            weights += 2 * self._exits[depth].rank * shape.hidden_size
        moved = weights * shape.weight_bytes + 2 * logits  # written, and read for the largest
        gathered = hardware.reduced(0.0)
        overhead = hardware.pass_us * 1e-6
        return hardware.seconds(moved, 2 * weights * count, 3) + gathered + overhead

    def _compared(self, tokens: int) -> float:
        """Reading the logits once more."""
        hardware = self.device.hardware
        if hardware is None:
            return 0.0
        moved = self.rows * tokens * self.shape.vocab_size * _LOGIT_BYTES
        return hardware.seconds(moved, 0.0, 2)

    def _kept(self, tokens: int) -> float:
        """Moving the KV of an accepted branch."""
        hardware, shape = self.device.hardware, self.shape
        if hardware is None:
            return 0.0
        moved = 2 * shape.layers * self.rows * tokens * 2 * shape.keys * shape.kv_bytes
        return hardware.seconds(moved, 0.0, shape.layers)
