"""Commands in processes of their own that do not import torch again: children of a fork server.

A command of the project takes a tenth of a second and its imports take many. Python's own fork
server imports them once; each command is then run in a fresh child of it, with arguments, working
directory, environment and output of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory

PRELOADED = [
    *("torch", "transformers", "accelerate", "datasets", "peft", "huggingface_hub", "matplotlib"),
    *("transformers.models.llama.modeling_llama", "transformers.generation"),
    *("hispec.lm", "hispec.generation", "hispec.export.exporter", "hispec.report.page"),
    *("hispec.cli", "train.trainer", "train.synthesize", "eval.agreement"),
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def can_run(words: Sequence[str]) -> bool:
    """Whether a command is `python -m MODULE ...` or `python FILE.py ...`."""
    return words[0] == sys.executable and (words[1] == "-m" or words[1].endswith(".py"))


def start(
    words: Sequence[str], folder: Path, environment: dict[str, str], outputs: Path
) -> ForkServerProcess:
    """Start a command; its output goes to the files `stdout` and `stderr` in `outputs`."""
    paths = [str(outputs / name) for name in ("stdout", "stderr")]
    process = _context.Process(
        target=_child, args=(list(words[1:]), str(folder), environment, *paths)
    )
    process.start()
    return process


def run(
    words: Sequence[str], folder: Path, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Returns what `subprocess.run(words, capture_output=True, text=True, ...)` would."""
    with TemporaryDirectory() as outputs:
        process = start(words, folder, environment, Path(outputs))
        _wait(process, words, timeout)
        said = [
            path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            for path in (Path(outputs, "stdout"), Path(outputs, "stderr"))
        ]
    code = process.exitcode
    assert code is not None
    return subprocess.CompletedProcess(list(words), code, *said)


def _wait(process: ForkServerProcess, words: Sequence[str], timeout: float) -> None:
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(list(words), timeout)


def _child(
    words: list[str], folder: str, environment: dict[str, str], stdout: str, stderr: str
) -> None:
    """Become the command: its output, folder, environment and arguments, then its code."""
    for path, descriptor in ((os.devnull, 0), (stdout, 1), (stderr, 2)):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words[1:] if words[0] == "-m" else words
    sys.path.insert(0, folder if words[0] == "-m" else str(Path(folder, words[0]).parent))
    code: object = 0
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(Path(folder, words[0])), run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))  # type: ignore[call-overload]
