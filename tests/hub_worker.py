"""Processes that take a Hub on the loopback for the Hub, and run `hispec` there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from hub_server import ALICE, HubServer, Repo

PROMPT = "def main():\n    return"
# Runs commands one after the other in one process, because importing torch for each takes seconds.
# The client's pauses between its retries are left out; the retries are not.
WORKER = """
import contextlib, io, json, os, sys, time
time.sleep = lambda seconds: None
from hispec.cli import main
for line in sys.stdin:
    words, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    sys.argv = ["hispec", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
# Loads checkpoints by name, as a user's program does; prints a digest of every exit's logits.
LOOK = """
import hashlib, json, sys, torch, hispec
for name in sys.argv[1:]:
    lm = hispec.load(name, dtype=torch.float32, device="cpu")
    tokens = torch.tensor([[5, 9, 44, 7, 200, 31]])
    with torch.inference_mode():
        hidden, at, digests = lm.model.embed(tokens), 0, []
        for depth in (2, 4, 6):
            hidden, at = lm.model.run(hidden, at, depth), depth
            logits = lm.model.logits(depth, hidden).contiguous()
            digests.append(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
    found = lm.generate("def main():", chat=False, max_new_tokens=12).tokens
    print(json.dumps([digests, found]))
"""


class Worker:
    """A process with a home of its own, in a folder of its own, that takes this Hub for the Hub."""

    def __init__(self, server: HubServer, folder: Path) -> None:
        self.folder = folder
        self.output = ""
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            **server.environment(folder / "hf", None),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: object, token: str | None = ALICE) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of `hispec WORDS`."""
        self.process.stdin.write(json.dumps([[str(word) for word in words], token]) + "\n")
        self.process.stdin.flush()
        code, out, errors = json.loads(self.process.stdout.readline())
        self.output += out + errors
        return code, out, errors

    def fails(self, *words: object, token: str | None = ALICE) -> str:
        """The one message of a command that ends with exit code 2."""
        code, out, errors = self(*words, token=token)
        assert code == 2, out + errors
        assert "Traceback" not in errors
        (message,) = [line for line in errors.splitlines() if line.startswith("hispec: ")]
        return message

    def fresh(
        self, *words: object, given: str = "", token: str | None = ALICE, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A whole process of its own, with `given` as its standard input."""
        own = {"HF_TOKEN": token} if token else {}
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=self.folder,
            env={**self.environment, **own, **environment},
            input=given,
            capture_output=True,
            text=True,
            timeout=300,
        )
        self.output += done.stdout + done.stderr
        return done


def look(worker: Worker, *names: object, **environment: str) -> list:
    """For each name, the digests of all exits' logits and a text, from a fresh process."""
    done = worker.fresh("-c", LOOK, *names, **environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-len(names) :]]


def pushed(worker: Worker, server: HubServer, folder: Path, name: str = "alice/ee") -> Repo:
    code, _, errors = worker("push", folder, name)
    assert code == 0, errors
    return server.repos[name]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit(data: bytes, **changes) -> bytes:
    return json.dumps({**json.loads(data), **changes}).encode()
