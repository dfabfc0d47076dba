"""Where the time of a decode goes: `python eval/rounds.py checkpoint=DIR`.

Decodes prompts with plain decoding and with each preset, and adds up the time of the parts of a
round, each without the parts that it calls: compiled graphs, modules, drafting, verification,
bookkeeping of the cache, and the rest of the loop. Reading the prompt is left out. Prints a table
of ms per round, and ends with one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from omegaconf import MISSING

from eval.prompts import load_prompts
from eval.settings import Name, PromptSource
from hispec.utils.command_line import parse_dtype, run_cleanly
from hispec.utils.console import Output, bar, quiet_transformers
from hispec.utils.schema import STRICT
from hispec.utils.settings import resolve

if TYPE_CHECKING:
    from eval.timing import Method

PROMPT, GRAPHS, MODULES = "prompt", "graphs", "modules"
DRAFTING, VERIFICATION, CACHE, LOOP = "drafting", "verification", "cache", "loop"
PARTS = (GRAPHS, MODULES, DRAFTING, VERIFICATION, CACHE, LOOP)
COMPUTING = (GRAPHS, MODULES)
"""Parts that compute the model; with graphs, `modules` is what surrounds them: masks, rotary
embeddings, norms, the embedding."""


@dataclass(kw_only=True)
class Settings(PromptSource):
    """The model and the prompts."""

    __pydantic_config__ = STRICT

    checkpoint: Name = MISSING
    """An EE checkpoint, or a base model."""
    dtype: str = "auto"
    backend: str = "auto"
    """What runs our passes: "eager", "openvino", or "auto"."""
    weights: str = "full"


class Clock:
    """Adds up the time of functions by part, each without the timed functions that it calls."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed. What the reading of a prompt calls counts as that."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._lap()
            self._open.append(PROMPT if PROMPT in self._open else part)
            self.calls[part] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._lap()
                self._open.pop()

        return run

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def watched() -> Iterator[Clock]:
    """A clock on the parts of our decoder."""
    clock = Clock()
    with ExitStack() as stack:
        for part, owner, names in _functions():
            for name in names:
                timed = clock.timed(part, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, timed))
        yield clock


def _functions() -> Iterator[tuple[str, type, tuple[str, ...]]]:
    """(part, class, its methods)."""
    from hispec.decoding.decoder import Decode
    from hispec.decoding.drafters.build import FreeAndExit
    from hispec.decoding.drafters.exit_chain import ExitChain
    from hispec.decoding.drafters.exit_tree import ExitTree
    from hispec.decoding.drafters.lookup import Lookup
    from hispec.decoding.drafters.recycle import Recycle
    from hispec.decoding.kv_cache import KVCache
    from hispec.decoding.ladder import Ladder
    from hispec.decoding.verification import MatchSampler
    from hispec.engine.build import openvino_installed
    from hispec.models.exit_heads import Eagle3Head, ExitHead
    from hispec.models.exit_model import ExitModel

    yield LOOP, Decode, ("step",)
    yield PROMPT, Ladder, ("prefill",)
    yield MODULES, ExitModel, ("embed", "run", "run_head", "normed", "project", "draft")
    for head in (ExitHead, Eagle3Head):
        yield MODULES, head, ("before",)
    for drafter in (FreeAndExit, ExitChain, ExitTree, Lookup, Recycle):
        yield DRAFTING, drafter, ("propose",)
    yield DRAFTING, Recycle, ("observe",)
    yield VERIFICATION, MatchSampler, ("verify", "draw", "best", "confidence", "candidates")
    names = "place", "keep", "truncate", "write", "store_hidden", "placed_hidden", "hidden"
    yield CACHE, KVCache, names
    if openvino_installed():
        from hispec.engine.openvino_graph import Graph

        yield GRAPHS, Graph, ("infer",)


def main(words: Sequence[str]) -> None:
    from rich.table import Table

    from eval.presets import presets
    from eval.timing import machine_of
    from hispec.lm import load

    settings = resolve(Settings, overrides=words)
    quiet_transformers()
    out = Output()
    lm = load(
        settings.checkpoint,
        dtype=parse_dtype(settings.dtype),
        device="cpu",
        backend=settings.backend,
        weights=settings.weights,
    )
    methods = presets(lm, {"max_new_tokens": settings.max_new_tokens, "eos": lm.eos()})
    prompts = [prompt.tokens for prompt in load_prompts(lm, settings, settings.checkpoint)]
    rows = [_measure(method, prompts) for method in methods]
    table = Table(*("setting", "rounds", "ms per round", *PARTS, "besides the model"))
    for row in rows:
        shown = (f"{row['ms'][part]:.2f}" for part in PARTS)
        share = f"{row['besides_the_model']:.1%}"
        table.add_row(
            row["setting"], str(row["rounds"]), f"{row['ms_per_round']:.1f}", *shown, share
        )
    out.print(table)
    result = {"settings": asdict(settings), "machine": machine_of(lm), "results": rows}
    print(json.dumps(result))


def _measure(method: Method, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Time per round and part of one method over all prompts."""
    method.decode(prompts[0])  # warm-up: graphs are compiled
    with watched() as clock:
        for prompt in bar(prompts, method.name):
            method.decode(prompt)
    rounds = clock.calls[LOOP] - len(prompts)
    ms = {part: 1e3 * clock.seconds[part] / max(rounds, 1) for part in PARTS}
    whole = sum(ms.values())
    return {
        "setting": method.name,
        "rounds": rounds,
        "ms_per_round": whole,
        "ms": ms,
        "besides_the_model": 1 - sum(ms[part] for part in COMPUTING) / whole,
    }


if __name__ == "__main__":
    sys.exit(run_cleanly(lambda: main(sys.argv[1:])))
