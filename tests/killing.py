"""SIGKILL: of a command at some moment, and of all that it started."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from tempfile import TemporaryFile

import psutil
import pytest
from conftest import ROOT


def kill_when(there: Callable[[], bool], *words: str, **environment: str) -> None:
    """Start a command, and kill it with all that it started once something is there."""
    with TemporaryFile() as said:
        process = subprocess.Popen(
            [str(word) for word in words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 240
            while not there():
                if process.poll() is not None:
                    said.seek(0)
                    pytest.fail(said.read().decode())
                assert time.monotonic() < deadline
                time.sleep(0.002)
        finally:
            kill_all(process)


def kill_all(process: subprocess.Popen) -> None:
    """Kill a process and all that it started; torch's launcher gives each worker a session of its
    own, which the signal to a group does not reach."""
    kill(process.pid)
    process.wait()


def kill(pid: int, *, alone: bool = False) -> None:
    """Kill a process and, unless `alone`, all that it started."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        others = [] if alone else process.children(recursive=True)
        for each in (process, *others):
            with suppress(psutil.NoSuchProcess):
                each.kill()
