"""Load test of `hispec serve` on this machine: `python eval/serve_load.py checkpoint=DIR`.

A server is started at a free port of the loopback. For every number of concurrent streams, all
prompts are sent, each stream taking the next one as its last text has ended. Every text is compared
with the one that the model gives when it is decoded alone. Then clients go away at random moments,
and the server's rows and memory are looked at. With `beside`, `transformers serve` gets some of the
requests in the same run. Prints a table, writes `serve_load.json` to `output`, and ends with one
JSON line.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from omegaconf import MISSING
from pydantic import Field

from eval.serve_client import (
    Answer,
    Asked,
    Server,
    abandoned,
    hispec_server,
    percentiles,
    transformers_server,
)
from eval.settings import Name
from hispec.utils.command_line import run_cleanly
from hispec.utils.console import Output, quiet_transformers
from hispec.utils.limits import Seed, Temperature, at_most
from hispec.utils.schema import STRICT
from hispec.utils.settings import check, resolve

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
    abandoned: Annotated[int, Field(ge=0), at_most(10**4, "each takes half a second")] = 50
    """Clients that go away at random moments, after the loads."""
    beside: Name | None = None
    """A folder of transformers': `transformers serve` is measured on it in the same run."""
    beside_batching: bool = False
    """Whether it batches continuously."""
    beside_requests: Annotated[
        int, Field(ge=1), at_most(10**5, "all are decoded for every number of streams")
    ] = 40
    """How many of the requests it gets."""


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


def measured(
    server: str, streams: int, seconds: float, answers: Sequence[Answer]
) -> dict[str, Any]:
    """Figures of a server and a number of streams."""
    tokens = sum(answer.tokens for answer in answers)
    first = percentiles([answer.first for answer in answers])
    later = [a for a in answers if a.tokens > 1]
    each = percentiles([(a.whole - a.first) / (a.tokens - 1) for a in later] or [0.0])
    return {
        "server": server,
        "streams": streams,
        "requests": len(answers),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "first_token_p50": first[0],
        "first_token_p95": first[1],
        "per_token_p50": each[0],
        "per_token_p95": each[1],
    }


def servers_of(settings: Settings, stack: ExitStack) -> list[Server]:
    """The servers, started; they end with the stack."""
    most = max(settings.shortest, settings.longest)
    rows = ["--max-rows", str(settings.max_rows), "--max-new-tokens", str(most)]
    waiting = ["--max-queue", str(max(settings.streams))]
    ours = {
        "temperature": settings.temperature,
        "stream_options": {"include_usage": True},
        "hispec": {"ladder": settings.ladder},
    }
    dtype = ["--dtype", settings.dtype]
    found = [
        stack.enter_context(hispec_server(settings.checkpoint, [*rows, *waiting, *dtype], ours))
    ]
    if settings.beside is not None:
        there = Path(settings.beside, "config.json").exists()
        check(there, "beside", settings.beside, "a folder of transformers'")
        batching = ["--continuous-batching"] * settings.beside_batching
        folder = str(Path(settings.beside).resolve())
        theirs = {"temperature": settings.temperature}
        found.append(stack.enter_context(transformers_server(folder, [*dtype, *batching], theirs)))
    return found


def main(words: Sequence[str]) -> None:
    from hispec.utils.files import output_path, write_json

    settings = resolve(Settings, overrides=words)
    quiet_transformers()
    out = Output()
    target = output_path(Path(settings.output) / "serve_load.json")
    whole_load = load_of(settings)
    rows, texts = [], []
    with ExitStack() as stack:
        servers = servers_of(settings, stack)
        for server in servers:  # graphs are compiled before a clock runs
            server.ask(whole_load[0])
        memory = [servers[0].memory()]
        for streams in settings.streams:
            for server in servers:
                ours = server is servers[0]
                load = whole_load if ours else whole_load[: settings.beside_requests]
                began = time.perf_counter()
                with ThreadPoolExecutor(streams) as pool:
                    answers = list(pool.map(server.ask, load))
                seconds = time.perf_counter() - began
                if ours:
                    texts.append([answer.text for answer in answers])
                    memory.append(server.memory())
                else:
                    _count(answers, settings)
                rows.append(measured(server.name, streams, seconds, answers))
        left = abandoned(servers[0], whole_load, settings.abandoned, settings.seed)

    if settings.compare:
        differing = _differing(settings, whole_load, texts)
        for row, differ in zip(_of(rows, servers[0]), differing, strict=True):
            row["texts_that_differ"] = differ
    out.print(_table(rows, settings))
    out.print(f"MB of {servers[0].name}, after the first request and each load: {memory}")
    out.print(f"after {left['clients']} clients that went away: {left}")
    name = Path(settings.checkpoint).resolve().name
    shown = {**asdict(settings), "checkpoint": name}
    result = {"settings": shown, "results": rows, "megabytes": memory, "abandoned": left}
    write_json(target, result)
    print(json.dumps(result))


def _of(rows: Sequence[dict[str, Any]], server: Server) -> list[dict[str, Any]]:
    return [row for row in rows if row["server"] == server.name]


def _count(answers: Sequence[Answer], settings: Settings) -> None:
    """Count the tokens of a server that does not tell: those of its text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.beside)
    for answer in answers:
        answer.tokens = answer.tokens or len(tokenizer.encode(answer.text))


def _differing(
    settings: Settings, load: Sequence[Asked], texts: Sequence[Sequence[str]]
) -> list[int]:
    """How many texts of each load are not those of `generate`, which decodes each alone."""
    from hispec.lm import load as load_model
    from hispec.utils.command_line import parse_dtype

    lm = load_model(settings.checkpoint, dtype=parse_dtype(settings.dtype), device="cpu")
    alone = [
        lm.generate(
            asked.prompt,
            ladder=settings.ladder,
            max_new_tokens=asked.tokens,
            temperature=settings.temperature,
            seed=asked.seed,
        ).text[0]
        for asked in load
    ]
    return [sum(a != b for a, b in zip(found, alone, strict=True)) for found in texts]


def _table(rows: Sequence[dict[str, Any]], settings: Settings) -> Any:
    from rich.table import Table

    table = Table(title=f"{settings.requests} requests, {settings.max_rows} rows at most")
    table.add_column("server")
    for name in ("streams", "tokens/s", "first token p50", "p95", "per token p50", "p95", "differ"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["server"],
            str(row["streams"]),
            f"{row['tokens_per_second']:.1f}",
            *(f"{row[key]:.2f} s" for key in ("first_token_p50", "first_token_p95")),
            *(f"{1000 * row[key]:.0f} ms" for key in ("per_token_p50", "per_token_p95")),
            str(row.get("texts_that_differ", "-")),
        )
    return table


if __name__ == "__main__":
    sys.exit(run_cleanly(lambda: main(sys.argv[1:])))
