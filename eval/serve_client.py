"""Servers of OpenAI's API on this machine, and clients that load them."""

from __future__ import annotations

import json
import random
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

_START_SECONDS = 180


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
    """0 where the server does not tell."""
    first: float
    """To the first token."""
    whole: float
    """To the last one."""


@dataclass
class Server:
    """A running server.

    Args:
        fields: of every request, besides the prompt and its length.
    """

    name: str
    url: str
    model: str
    process: subprocess.Popen[str]
    fields: dict[str, Any] = field(default_factory=dict)

    def memory(self) -> int:
        """MB that it has in memory."""
        return psutil.Process(self.process.pid).memory_info().rss // 10**6

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        with urllib.request.urlopen(f"{self.url}metrics") as page:
            found = re.search(rf"^{name} (\S+)$", page.read().decode(), re.MULTILINE)
        if found is None:
            raise ValueError(f"{self.name} has no metric {name}")
        return float(found[1])

    @contextmanager
    def sent(self, asked: Asked) -> Iterator[HTTPConnection]:
        """The connection over which a request was sent; it is closed with the block."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": asked.prompt}],
            "max_tokens": asked.tokens,
            "seed": asked.seed,
            "stream": True,
            **self.fields,
        }
        with closing(HTTPConnection(urlsplit(self.url).netloc)) as connection:
            kind = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), kind)
            yield connection

    def ask(self, asked: Asked) -> Answer:
        """Send one request, and read its stream.

        Raises:
            RuntimeError: the server answered with an error.
        """
        began = time.perf_counter()
        text, first, tokens = "", 0.0, 0
        with self.sent(asked) as connection:
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(response.read().decode())
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                    first = first or (time.perf_counter() - began if text else 0.0)
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
        whole = time.perf_counter() - began
        return Answer(text, tokens, first or whole, whole)

    def abandon(self, asked: Asked, seconds: float) -> None:
        """Send a request, and go away after some seconds, whatever came until then."""
        with self.sent(asked):
            time.sleep(seconds)


@contextmanager
def hispec_server(checkpoint: str, options: Sequence[str], fields: dict[str, Any]) -> Iterator[Any]:
    """`hispec serve` with these options, at a free port."""
    command = (sys.executable, "-m", "hispec.cli", "serve", checkpoint, "--port", "0", *options)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+/", process.stdout.readline())
        if found is None:
            raise ValueError("the server did not start")
        model = Path(checkpoint).resolve().name
        yield Server("hispec serve", found[0], model, process, fields)
    finally:
        _end(process)


@contextmanager
def transformers_server(
    folder: str, options: Sequence[str], fields: dict[str, Any]
) -> Iterator[Any]:
    """`transformers serve` with these options, at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(sys.executable).with_name("transformers"))
    command = (program, "serve", folder, "--host", "127.0.0.1", "--port", str(port), *options)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    try:
        url = f"http://127.0.0.1:{port}/"
        _wait_for(f"{url}health", process)
        yield Server("transformers serve", url, folder, process, fields)
    finally:
        _end(process)


def _wait_for(url: str, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(url):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise ValueError(f"the server at {url} did not start")


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.communicate()


def abandoned(server: Server, load: Sequence[Asked], clients: int, seed: int) -> dict[str, Any]:
    """Let clients go away at random moments, up to a second after their request; returns what the
    server has left of them once it is idle, or after a minute."""
    before = server.memory()
    rng = random.Random(seed)
    for number in range(clients):
        server.abandon(load[number % len(load)], rng.random())
    began = time.monotonic()
    names = "hispec_rows_running", "hispec_queue_waiting"
    while any(map(server.metric, names)) and time.monotonic() - began < 60:
        time.sleep(0.05)
    return {
        "clients": clients,
        "idle_after_seconds": time.monotonic() - began,
        **{name: server.metric(name) for name in names},
        "megabytes_before": before,
        "megabytes_after": server.memory(),
    }


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The median and the 95th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
