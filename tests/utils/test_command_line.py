"""Values of command lines, and errors as one line with an exit code."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

from hispec.hub.errors import HubError
from hispec.utils.command_line import parse_depths, parse_device, parse_dtype, run_cleanly
from hispec.utils.files import FetchError


def test_depths():
    assert parse_depths("exits", None) is None
    assert parse_depths("exits", "6,12, 30") == [6, 12, 30]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "write depths such as 6,12,30") for text in ("", "2,,4", "2;4", "1e1", "-2", "٣")),
        *((text, "write depths such as") for text in ("2.0", "1_0", "9" * 5000, "[2,4]", "\udcff")),
        *((text, "increasing depths, none twice") for text in ("4,2", "2,2", "1,3,2")),
    ],
)
def test_depths_that_are_none(text, message):
    with pytest.raises(ValueError, match=rf"exits=.* is not possible: {message}"):
        parse_depths("exits", text)


@fuzz("depths on the command line", 100)
@given(st.text() | st.text("0123456789,", max_size=12))
def test_depths_are_increasing_numbers_or_refused(text):
    try:
        found = parse_depths("exits", text)
    except ValueError:
        return
    assert found == sorted(set(found))
    assert [int(part) for part in text.split(",")] == found


def test_devices_and_dtypes():
    assert parse_device(None) is None
    assert parse_device("cpu") == torch.device("cpu")
    assert parse_dtype("bfloat16") is torch.bfloat16
    assert parse_dtype("auto") == "auto"
    for name in ("meta", "abacus", "", "cpu:7", "cuda:99", "cpu:x", "\udcff", "privateuseone"):
        with pytest.raises(ValueError, match=r"^device=.* is not possible"):
            parse_device(name)
    for name in ("int4", "", "torch.float32", "Float32"):
        with pytest.raises(ValueError, match=r"^dtype=.* is not possible: one of auto, float32"):
            parse_dtype(name)


def failing(error: BaseException):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("steps=0\n  is\n\nwrong"), "hispec: steps=0 is wrong"),
        (ValueError(), "hispec: ValueError"),
        (ValueError("a\udcff"), "hispec: a\\udcff"),
        (HubError("the Hub refuses it"), "hispec: the Hub refuses it"),
        (FetchError("no such model"), "hispec: no such model"),
        (FileNotFoundError(2, "No such file", "x.json"), "[Errno 2] No such file: 'x.json'"),
        (MemoryError(), "hispec: out of memory: use a smaller model"),
        (torch.OutOfMemoryError("CUDA out of memory"), "hispec: CUDA out of memory"),
    ],
)
def test_what_a_user_can_correct_is_one_line(capsys, error, said):
    assert run_cleanly(failing(error)) == 2
    stderr = capsys.readouterr().err
    assert said in stderr
    assert stderr.count("\n") == 1


def test_what_is_our_fault_keeps_its_traceback():
    for error in (RuntimeError("a bug"), TypeError("a bug"), KeyError("a bug")):
        with pytest.raises(type(error)):
            run_cleanly(failing(error))


def test_exit_codes(capsys):
    assert run_cleanly(lambda: None) == 0
    assert run_cleanly(lambda: 1) == 1
    assert run_cleanly(failing(KeyboardInterrupt())) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_warning_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards

    def command():
        warnings.simplefilter("always")
        warnings.warn("plan.json is\ndamaged", stacklevel=1)

    with warnings.catch_warnings():
        assert run_cleanly(command) == 0
    assert capsys.readouterr().err == "hispec: warning: plan.json is damaged\n"


def test_a_reader_that_goes_away_is_no_error():
    """As in `hispec inspect ... | head -1`."""
    script = (
        "import sys\nfrom hispec.utils.command_line import run_cleanly\n"
        "def command():\n    for _ in range(10 ** 5):\n        print('x' * 100, flush=True)\n"
        "sys.exit(run_cleanly(command))"
    )
    words = [sys.executable, "-c", script]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141
