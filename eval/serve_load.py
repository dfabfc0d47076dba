"""Load test of `hispec serve` on this machine: `python eval/serve_load.py checkpoint=DIR`.

A server is started at a free port of the loopback. For every number of concurrent streams, all
prompts are sent, each stream taking the next one as its last text has ended. Every text is compared
with the one that the model gives when it is decoded alone. Prints a table, writes
`serve_load.json` to `output`, and ends with one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from omegaconf import MISSING
from pydantic import Field

from eval.settings import Name
from hispec.utils.command_line import run_cleanly
from hispec.utils.console import Output, quiet_transformers
from hispec.utils.limits import Seed, Temperature, at_most
from hispec.utils.schema import STRICT
from hispec.utils.settings import resolve

_Streams = Annotated[int, Field(ge=1), at_most(1024, "each is a connection and a thread")]


@dataclass
class Settings:
    """The model, the server and the load."""

    __pydantic_config__ = STRICT

    checkpoint: Name = MISSING
    """EE checkpoint or base model."""
    output: Name = "runs/serve_load"
    """Folder of the results."""
    streams: list[_Streams] = field(default_factory=lambda: [1, 4, 8, 16])
    """Numbers of concurrent streams."""
    requests: Annotated[
        int, Field(ge=1), at_most(10**5, "all are decoded for every number of streams")
    ] = 50
    """For every number of streams."""
    max_rows: Annotated[int, Field(ge=1, le=1024)] = 8
    """Of the server."""
    shortest: Annotated[int, Field(ge=1, le=1024)] = 8
    """New tokens of the shortest text; lengths are drawn between it and `longest`."""
    longest: Annotated[int, Field(ge=1, le=1024)] = 96
    temperature: Temperature = 0.0
    seed: Seed = 0
    """Of the prompts, the lengths and the texts."""
    ladder: str = "auto"
    """`auto` or `plain`."""
    dtype: str = "float32"
    compare: bool = True
    """Whether every text is compared with that of `generate`, afterwards."""


@dataclass
class Asked:
    """A request of the load."""

    prompt: str
    tokens: int
    seed: int


@dataclass
class Answer:
    """What a stream brought, and when, in seconds."""

    text: str
    tokens: int
    first: float
    """To the first token."""
    whole: float
    """To the last one."""


def load_of(settings: Settings) -> list[Asked]:
    """Prompts of mixed kind and length."""
    from hispec.data.prompts import some

    rng = random.Random(settings.seed)
    prompts, _ = some(None, 1000)
    texts = [prompt.messages[0]["content"] for prompt in prompts if prompt.messages]
    longest = max(settings.shortest, settings.longest)
    return [
        Asked(
            "\n\n".join(rng.sample(texts, rng.choice([1, 1, 1, 2, 3]))),
            rng.randint(settings.shortest, longest),
            rng.randrange(2**31),
        )
        for _ in range(settings.requests)
    ]


def ask(url: str, model: str, asked: Asked, settings: Settings) -> Answer:
    """Send one request, and read its stream."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": asked.prompt}],
        "max_tokens": asked.tokens,
        "temperature": settings.temperature,
        "seed": asked.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        "hispec": {"ladder": settings.ladder},
    }
    request = urllib.request.Request(
        f"{url}v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    began = time.perf_counter()
    text, first, tokens = "", 0.0, 0
    with urllib.request.urlopen(request) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                first = first or (time.perf_counter() - began if text else 0.0)
            if chunk["usage"]:
                tokens = chunk["usage"]["completion_tokens"]
    whole = time.perf_counter() - began
    return Answer(text, tokens, first or whole, whole)


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The median and the 95th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def measured(streams: int, seconds: float, answers: Sequence[Answer]) -> dict[str, Any]:
    """Figures of one number of streams."""
    tokens = sum(answer.tokens for answer in answers)
    first = percentiles([answer.first for answer in answers])
    later = [a for a in answers if a.tokens > 1]
    each = percentiles([(a.whole - a.first) / (a.tokens - 1) for a in later] or [0.0])
    return {
        "streams": streams,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "first_token_p50": first[0],
        "first_token_p95": first[1],
        "per_token_p50": each[0],
        "per_token_p95": each[1],
    }


def main(words: Sequence[str]) -> None:
    from rich.table import Table

    from hispec.lm import load
    from hispec.utils.command_line import parse_dtype
    from hispec.utils.files import output_path, write_json

    settings = resolve(Settings, overrides=words)
    quiet_transformers()
    out = Output()
    target = output_path(Path(settings.output) / "serve_load.json")
    load_asked = load_of(settings)
    model = Path(settings.checkpoint).resolve().name
    most = max(settings.shortest, settings.longest)
    command = [
        *(sys.executable, "-m", "hispec.cli", "serve", settings.checkpoint, "--port", "0"),
        *("--max-rows", str(settings.max_rows), "--dtype", settings.dtype),
        *("--max-queue", str(max(settings.streams)), "--max-new-tokens", str(most)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+/", process.stdout.readline())
        if found is None:
            raise ValueError("the server did not start")
        url, rows, texts = found[0], [], []
        for streams in settings.streams:
            began = time.perf_counter()
            with ThreadPoolExecutor(streams) as pool:
                answers = list(pool.map(lambda asked: ask(url, model, asked, settings), load_asked))
            rows.append(measured(streams, time.perf_counter() - began, answers))
            texts.append([answer.text for answer in answers])
    finally:
        process.terminate()
        process.communicate()

    if settings.compare:
        lm = load(settings.checkpoint, dtype=parse_dtype(settings.dtype), device="cpu")
        alone = [
            lm.generate(
                asked.prompt,
                ladder=settings.ladder,
                max_new_tokens=asked.tokens,
                temperature=settings.temperature,
                seed=asked.seed,
            ).text[0]
            for asked in load_asked
        ]
        for row, found_texts in zip(rows, texts, strict=True):
            pairs = zip(found_texts, alone, strict=True)
            row["texts_that_differ"] = sum(text != other for text, other in pairs)

    table = Table(title=f"{settings.requests} requests, {settings.max_rows} rows at most")
    for name in ("streams", "tokens/s", "first token p50", "p95", "per token p50", "p95", "differ"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["streams"]),
            f"{row['tokens_per_second']:.1f}",
            *(f"{row[key]:.2f} s" for key in ("first_token_p50", "first_token_p95")),
            *(f"{1000 * row[key]:.0f} ms" for key in ("per_token_p50", "per_token_p95")),
            str(row.get("texts_that_differ", "-")),
        )
    out.print(table)
    result = {"settings": {**asdict(settings), "checkpoint": model}, "results": rows}
    write_json(target, result)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_cleanly(lambda: main(sys.argv[1:])))
