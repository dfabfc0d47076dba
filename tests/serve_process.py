"""`hispec serve` in a process of its own, and what its metrics say."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
from conftest import HISPEC, ROOT
from prometheus_client.parser import text_string_to_metric_families

MODEL = "tiny-ee"


class Served:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url
        self.http = httpx.Client(base_url=url, timeout=60)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}v1", api_key=key, max_retries=0, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over all labels that are not given."""
        page = self.http.get("metrics").raise_for_status().text
        return sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == f"hispec_{name}" and labels.items() <= sample.labels.items()
        )

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait for what has to become true."""
        for _ in range(600):
            if holds():
                return
            time.sleep(0.05)
        raise AssertionError("it did not become true")


@contextmanager
def served(checkpoint: Path, *options: str) -> Iterator[Served]:
    """A server at a free port; it is ended by SIGTERM unless it has ended."""
    command = [*HISPEC, "serve", str(checkpoint), "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("HISPEC_API_KEY", None)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+/", line)
        assert found, f"the server ended: {line}"
        server = Served(process, found[0])
        yield server
        server.http.close()
    finally:
        process.terminate()
        process.communicate(timeout=60)
