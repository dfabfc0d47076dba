"""Settings of the entry scripts: strict types, no tracebacks, messages that name key and file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import MISSING
from pydantic import Field

from hispec.utils.schema import STRICT
from hispec.utils.settings import resolve


@dataclass
class Settings:
    __pydantic_config__ = STRICT

    name: str = MISSING
    count: Annotated[int, Field(ge=1, le=10**6)] = 3
    share: float | None = None
    chat: bool = False
    depths: list[Annotated[int, Field(ge=1)]] = field(default_factory=list)
    tasks: list[str] | None = None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("count=???", "count has no value: set it in the YAML file or as count=..."),
        ("name=???", "name has no value"),
        ("count=2.0", "count=2.0 is not possible: a whole number"),
        ("count=true", "count=True is not possible: a whole number"),
        ("count='3'", "count='3' is not possible: a whole number"),
        ("count=", "count=None is not possible: a whole number"),
        ("count=0", "count=0 is not possible: 1 or more"),
        ("count=1000000000000", "count=1000000000000 is not possible: at most 1000000"),
        ("count=" + "9" * 5000, "is not a setting that can be read: Exceeds the limit"),
        ("chat=2", "chat=2 is not possible: true or false"),
        ("share=.nan", "share=nan is not possible: a finite number"),
        ("share=.inf", "share=inf is not possible: a finite number"),
        ("depths=[[1]]", r"depths\[0\]=\[1\] is not possible: a whole number"),
        ("depths=2", "depths=2 is not possible: a list"),
        ("depths=[2.9]", r"depths\[0\]=2.9 is not possible: a whole number"),
        ("depths=" + "[" * 50_000, "nested more than 20 deep"),
        ("depths=[1", "is not a setting that can be read"),
        ("name=[a, *b]", r"aliases such as \*b are not read"),
        ("name={a: 1}", "name=.* is not possible: a text"),
        ("name=null", "name=None is not possible: a text"),
        ("name=${nowhere}", "is not a setting that can be read: Interpolation"),
        ("name=\ud800", "is not a setting that can be read"),
        ("[=1", r"unknown key '\[' \(command line\); known keys: chat"),
        ("=1", r"unknown key '' \(command line\)"),
        ("depths.0=1", r"unknown key 'depths.0'"),
        ("count", "'count' is not a setting: write key=value, e.g. name=..."),
    ],
)
def test_words_that_are_no_settings(word, message):
    with pytest.raises(ValueError, match=message) as error:
        resolve(Settings, overrides=["name=x", word])
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("name=2024", "name", "2024"),
        ("name=1e3", "name", "1e3"),
        ("name=007", "name", "007"),
        ("tasks=[a, 1]", "tasks", ["a", "1"]),
        ("share=1", "share", 1.0),
        ("share=1e-3", "share", 1e-3),
        ("chat=yes", "chat", True),
        ("depths=[1,2]", "depths", [1, 2]),
    ],
)
def test_words_are_read_as_they_are_meant(word, key, value):
    assert getattr(resolve(Settings, overrides=["name=x", word]), key) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count: 0", "{}: count=0 is not possible: 1 or more"),
        ("count: [1]", "{}: count=.1. is not possible: a whole number"),
        ("cuont: 1", "unknown key 'cuont' .{}."),
        ("- 1", "{} must hold keys and values"),
        ("count: 1\ncount: 2", "{} cannot be read as YAML: .*duplicate key"),
        ("depths:\n" + "- " * 40 + "1", "{} cannot be read as YAML: nested more than 20 deep"),
        ("name: &a x\ntasks: [*a]", "{} cannot be read as YAML: aliases"),
        (b"name: \xff", "{} cannot be read as YAML: .*utf-8"),
    ],
)
def test_a_file_is_named_where_it_is_wrong(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message.format(file)):
        resolve(Settings, yaml=file, overrides=["name=x"])


def test_the_command_line_corrects_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: 5\ncount: 0\n")
    found = resolve(Settings, yaml=file, overrides=["count=4"])
    assert (found.name, found.count) == ("5", 4)


@settings(derandomize=True, deadline=None)
@given(st.text(max_size=40), st.sampled_from(["count", "share", "chat", "depths", "tasks", "x"]))
def test_any_value_is_taken_or_refused_in_words(value, key):
    """Nothing but ValueError, and what is taken has the type that the dataclass says."""
    try:
        found = resolve(Settings, overrides=["name=x", f"{key}={value}"])
    except ValueError:
        return
    assert type(found.count) is int
    assert found.count >= 1
    assert type(found.chat) is bool
    assert all(type(depth) is int for depth in found.depths)
    assert found.tasks is None or all(isinstance(task, str) for task in found.tasks)
