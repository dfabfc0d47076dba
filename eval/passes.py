"""What a pass of the full model costs: `python eval/passes.py checkpoint=DIR`.

A pass reads a whole prompt, or some tokens after a text with the argmax of their logits at the end.
transformers' forward, our modules (`eager`) and the compiled graphs (`openvino`, where they can run
the model) take turns, so that a slow spell of the machine affects all of them; so does a chain of
three drafts where the checkpoint has a head at depth 0. Beside them stands what the bytes of a pass
would take at the memory bandwidth measured in the same run: weights once, in as many bits as the
graphs hold them, keys and values once. Prints a table of medians in ms; the last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from omegaconf import MISSING
from pydantic import Field

from eval.settings import Name
from hispec.utils.command_line import parse_dtype, run_cleanly
from hispec.utils.console import Output, bar, quiet_transformers
from hispec.utils.limits import at_most
from hispec.utils.schema import STRICT
from hispec.utils.settings import resolve

if TYPE_CHECKING:
    import torch

    from hispec.models.engine import Engine
    from hispec.models.exit_model import ExitModel

_Count = Annotated[int, Field(ge=1), at_most(2**17, "memory grows with them")]
_READ = 2**28
"""Bytes that are read to measure the bandwidth: more than a cache holds."""


@dataclass
class Settings:
    """The model and the sizes of its passes."""

    __pydantic_config__ = STRICT

    checkpoint: Name = MISSING
    """An EE checkpoint, or a base model."""
    tokens: list[_Count] = field(default_factory=lambda: [1, 4, 16])
    """Tokens of a pass."""
    lengths: list[_Count] = field(default_factory=lambda: [128, 1024])
    """Tokens of the text before it."""
    prompts: list[_Count] = field(default_factory=lambda: [128, 512])
    """Tokens of prompts that are read whole."""
    repeats: Annotated[int, Field(ge=1), at_most(10_000, "each repeat runs every pass")] = 15
    dtype: str = "auto"
    weights: str = "full"
    """"full", or "int8": all decode the rounded model."""


def main(words: Sequence[str]) -> None:
    import torch
    from rich.table import Table

    from hispec.config import AUTO
    from hispec.engine.build import build_engine
    from hispec.lm import load

    settings = resolve(Settings, overrides=words)
    quiet_transformers()
    out = Output()
    lm = load(
        settings.checkpoint,
        dtype=parse_dtype(settings.dtype),
        device="cpu",
        backend="eager",
        weights=settings.weights,
    )
    model = lm.model
    engines = {"eager": None}
    if (engine := build_engine(model, AUTO)) is not None:
        engines[engine.name] = engine
    weight_bytes = _weight_bytes(model, held=engine is not None)

    def measured(jobs: dict[str, Callable[[], float]], length: int, tokens: int) -> dict[str, Any]:
        found, bandwidth = _medians(jobs, settings.repeats, f"{tokens} after {length}")
        size = weight_bytes + _kv_bytes(model, length, engine)
        alone = {"bytes_alone_ms": 1e3 * size / bandwidth, "gigabytes_per_second": bandwidth / 1e9}
        return {"length": length, "tokens": tokens, "ms": found, "bytes": size, **alone}

    rows, prompts = [], []
    for tokens in settings.prompts:
        jobs = {"generate's forward": _prompt_forward(model, tokens)}
        jobs |= {name: _prompt(model, of, tokens) for name, of in engines.items()}
        prompts.append(measured(jobs, 0, tokens))
    for length in settings.lengths:
        for tokens in settings.tokens:
            jobs = {"generate's forward": _forward(model, length, tokens)}
            for name, of in engines.items():
                jobs[name] = _own(model, of, length, tokens)
            if (chain := _chain(model, engine, length)) is not None:
                jobs["chain of 3 drafts"] = chain
            rows.append(measured(jobs, length, tokens))
    ways = list(dict.fromkeys(name for row in (*prompts, *rows) for name in row["ms"]))
    table = Table(*("after", "tokens", *ways, "bytes alone", "GB/s"))
    for row in (*prompts, *rows):
        first = row["ms"]["generate's forward"]
        times = [row["ms"].get(way) for way in ways]
        shown = ["" if ms is None else f"{ms:.1f} ({first / ms:.2f}x)" for ms in times]
        table.add_row(
            *(str(row["length"] or "prompt"), str(row["tokens"]), *shown),
            *(f"{row['bytes_alone_ms']:.1f}", f"{row['gigabytes_per_second']:.1f}"),
        )
    out.print(table)
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    machine["dtype"] = str(model.hf.dtype).removeprefix("torch.")
    print(
        json.dumps(
            {"settings": asdict(settings), "machine": machine, "passes": rows, "prompts": prompts}
        )
    )


def _medians(
    jobs: dict[str, Callable[[], float]], repeats: int, title: str
) -> tuple[dict[str, float], float]:
    """Median ms of jobs that take turns, and the bytes per second read between them."""
    import torch

    much = torch.zeros(_READ // 4)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    reading = []
    for job in jobs.values():  # warm-up: graphs are compiled, buffers are made
        job()
        job()
    for _ in bar(range(repeats), title):
        for name, job in jobs.items():
            seconds[name].append(job())
        began = time.perf_counter()
        much.sum()
        reading.append(_READ / (time.perf_counter() - began))
    medians = {name: 1e3 * statistics.median(of) for name, of in seconds.items()}
    return medians, statistics.median(reading)


def _weight_bytes(model: ExitModel, *, held: bool) -> int:
    """Bytes of the weights of the layers and of the LM head.

    Args:
        held: as the graphs hold them, else as the modules do.
    """
    from hispec.engine.tracing import exact_copy

    size = 0
    for weight in (*model.hf.model.layers.parameters(), model.hf.lm_head.weight):
        copy = exact_copy(weight.detach()) if held and weight.dim() == 2 else None
        size += weight.numel() * (weight if copy is None else copy[0]).element_size()
    return size


def _kv_bytes(model: ExitModel, length: int, engine: Engine | None) -> int:
    """Bytes of the keys and values of the text."""
    from hispec.engine.graph import Shape

    shape = Shape.of(model.hf.config)
    kv = 2 * model.num_layers * shape.kv_heads * shape.head_size * length
    return kv * (model.hf.dtype if engine is None else engine.dtype).itemsize


def _tokens(model: ExitModel, count: int) -> torch.Tensor:
    """A text [1, T] of some tokens, always the same."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.vocab_size, (1, count), generator=generator)


def _forward(model: ExitModel, length: int, tokens: int) -> Callable[[], float]:
    """Times a forward of transformers over its own cache, as `generate` calls it."""
    import torch
    from transformers import DynamicCache

    text = _tokens(model, length + tokens)
    cache = DynamicCache(config=model.hf.config)
    with torch.inference_mode():
        model.hf(text[:, :length], past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def run() -> float:
        began = time.perf_counter()
        out = model.hf(text[:, length:], past_key_values=cache, use_cache=True)
        out.logits.argmax(-1)
        seconds = time.perf_counter() - began
        cache.crop(-tokens)
        return seconds

    return run


def _own(model: ExitModel, engine: Engine | None, length: int, tokens: int) -> Callable[[], float]:
    """Times a pass of the ladder that has the full model alone, by an engine or the modules."""
    import numpy as np
    import torch

    from hispec.decoding.ladder import Ladder

    model.engine = engine
    text = _tokens(model, length + tokens).numpy()
    ladder = Ladder(model, [model.num_layers], 1, length + tokens)
    held, upto = np.array([length]), np.array([length + tokens])
    with torch.inference_mode():
        ladder.prefill(text, held)

    @torch.inference_mode()
    def run() -> float:
        model.engine = engine
        ladder.truncate(held)
        with model.between_passes():
            began = time.perf_counter()
            ladder.logits(0, text, held, upto).argmax(-1)
            return time.perf_counter() - began

    return run


def _prompt_forward(model: ExitModel, tokens: int) -> Callable[[], float]:
    """Times how transformers reads a prompt."""
    import torch

    text = _tokens(model, tokens)

    @torch.inference_mode()
    def run() -> float:
        began = time.perf_counter()
        model.hf(text, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        return time.perf_counter() - began

    return run


def _prompt(model: ExitModel, engine: Engine | None, tokens: int) -> Callable[[], float]:
    """Times how the ladder that has the full model alone reads a prompt."""
    import numpy as np
    import torch

    from hispec.decoding.ladder import Ladder

    text, upto = _tokens(model, tokens).numpy(), np.array([tokens])

    @torch.inference_mode()
    def run() -> float:
        model.engine = engine
        with model.between_passes():
            began = time.perf_counter()
            Ladder(model, [model.num_layers], 1, tokens).prefill(text, upto)
            return time.perf_counter() - began

    return run


def _chain(model: ExitModel, engine: Engine | None, length: int) -> Callable[[], float] | None:
    """Times a chain of three drafts from a head at depth 0; None where there is none."""
    import numpy as np
    import torch

    from hispec.decoding.head_chain import HeadChain
    from hispec.decoding.ladder import Ladder

    model.engine = engine
    if 0 not in model.exits.depths:
        return None
    text = _tokens(model, length).numpy()
    ladder = Ladder(model, [0, model.num_layers], 1, length + 8)
    if (chain := HeadChain.of(ladder)) is None:
        return None
    held = np.array([length - 1])
    with torch.inference_mode():
        ladder.prefill(text, np.array([length]))

    @torch.inference_mode()
    def run() -> float:
        model.engine = engine
        ladder.truncate(held)
        with model.between_passes():
            began = time.perf_counter()
            chain.draft(text[0], length, 3, 0.0, np.array([]))
            return time.perf_counter() - began

    return run


if __name__ == "__main__":
    sys.exit(run_cleanly(lambda: main(sys.argv[1:])))
