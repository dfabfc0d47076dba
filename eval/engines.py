"""Other engines as baselines, each in a Python environment of its own.

Their packages do not go together with each other or with ours, so each runs `engine_worker.py` with
the interpreter that has it, and gets prompts and gives texts as token ids over a pipe. It takes its
turn prompt by prompt like any other method.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import torch

from eval.baselines import Limits
from eval.engine_worker import ENGINES, Asked
from eval.settings import Name
from eval.timing import Method, Outcome
from hispec.utils.limits import one_of
from hispec.utils.schema import STRICT, filled, validate
from hispec.utils.settings import check

_WORKER = Path(__file__).with_name("engine_worker.py")
_WITH_DRAFTS = ("llama.cpp", "vllm")


@dataclass
class Engine:
    """Another engine."""

    __pydantic_config__ = STRICT

    engine: Annotated[str, one_of(*ENGINES)]
    python: Name
    """The interpreter of an environment that has its package."""
    model: Name
    """What it loads: a folder of OpenVINO's, a GGUF file, for vLLM a folder of transformers'."""
    lookup: bool = False
    """Whether it drafts with its own prompt lookup, of as many tokens as ours."""
    draft: Name | None = None
    """What drafts for it, as many tokens as our exits: a draft model's folder or GGUF; for vLLM
    also the folder of an EAGLE-3 head."""
    dtype: Annotated[str, one_of("auto", "float32")] = "auto"
    """What it computes in; for llama.cpp, which takes the dtype of the GGUF, that of its cache."""


@contextmanager
def running(settings: Sequence[dict[str, Any]], limits: Limits) -> Iterator[list[Method]]:
    """The engines of these settings, their models loaded; they end with the block.

    Raises:
        ValueError: an unknown key or engine, a file that does not exist, or an engine that did not
            start.
    """
    engines = [filled(Engine, setting, "engines") for setting in settings]
    for engine in engines:
        validate(Engine, engine)
        for key in ("python", "model", "draft"):
            named = getattr(engine, key)
            there = named is None or Path(named).exists()
            check(there, f"engines.{key}", named, "a file or folder that exists")
        check(
            engine.draft is None or (not engine.lookup and engine.engine in _WITH_DRAFTS),
            "engines.draft",
            engine.draft,
            f"only without lookup, and of {' or '.join(_WITH_DRAFTS)}",
        )
    with ExitStack() as stack:
        yield [stack.enter_context(_running(engine, limits)) for engine in engines]


@contextmanager
def _running(engine: Engine, limits: Limits) -> Iterator[Method]:
    given = Asked(
        engine=engine.engine,
        model=engine.model,
        draft=engine.draft,
        draft_length=limits.draft_length,
        lookup=limits.lookup_length if engine.lookup else 0,
        dtype=engine.dtype,
        threads=torch.get_num_threads(),
    )
    with ExitStack() as stack:
        said = stack.enter_context(tempfile.TemporaryFile("w+"))
        process = stack.enter_context(
            subprocess.Popen(
                [engine.python, str(_WORKER), json.dumps(asdict(given))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        )
        stack.callback(process.kill)
        version = _answer(engine, process, said)["version"]

        def decode(prompt: list[int]) -> Outcome:
            asked = {
                "tokens": prompt,
                "max_new_tokens": limits.max_new_tokens,
                "eos": list(limits.eos),
            }
            _ask(process, asked)
            answer = _answer(engine, process, said)
            return Outcome(answer["tokens"], answer["target_passes"])

        name = f"{engine.engine} {version}" + " with lookup" * engine.lookup
        if engine.draft is not None:
            name += f" with {Path(engine.draft).name}"
        yield Method(name, decode, external=True)


def _ask(process: subprocess.Popen[str], asked: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(asked) + "\n")
    process.stdin.flush()


def _answer(engine: Engine, process: subprocess.Popen[str], said: IO[str]) -> dict[str, Any]:
    """The next line of a worker.

    Args:
        said: its standard error.
    """
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        process.wait()
        said.seek(0)
        words = said.read().strip().splitlines() or ["nothing"]
        raise ValueError(
            f"engines: {engine.engine} with python={engine.python!r} and model={engine.model!r} "
            f"ended; the last that it said: {words[-1]}"
        )
    found: dict[str, Any] = json.loads(line)
    return found
