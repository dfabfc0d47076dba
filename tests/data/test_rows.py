"""Rows of data sets and prompt files that are wrong: one ValueError with file, line and key."""

from __future__ import annotations

import json
import os
import re

import pyarrow
import pyarrow.parquet
import pytest
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

from hispec.data.documents import documents, hub_documents, split, stream_documents
from hispec.data.prompts import read_prompts, to_prompt
from hispec.data.rows import local_rows

HOSTILE = {
    "invalid UTF-8": (b'{"text": "\xff"}', "is not valid JSON: invalid unicode"),
    "lone surrogate": (b'{"text": "\\ud800"}', "is not valid JSON: .*hex escape"),
    "nested objects": (b'{"text": ' * 50_000, "is not valid JSON: recursion limit exceeded"),
    "nested lists": (
        b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "is not valid JSON: recursion limit exceeded",
    ),
    "huge integer": (b'{"text": ' + b"9" * 5000 + b"}", "is not valid JSON: number out of range"),
    "a list": (b"[1]", r"is no JSON object: \[1\]"),
    "a text": (b'"x"', 'is no JSON object: "x"'),
    "two objects": (b'{"text": "a"} {"text": "b"}', "is not valid JSON: trailing characters"),
    "no value": (b"\0", "is not valid JSON: expected value"),
}


@pytest.mark.parametrize("fault", HOSTILE)
@pytest.mark.parametrize("read", ["rows", "documents", "prompts"])
def test_lines_that_are_no_row_are_named(tmp_path, fault, read):
    line, message = HOSTILE[fault]
    file = tmp_path / "mine.jsonl"
    file.write_bytes(b'{"text": "a", "prompt": "a"}\n\n' + line + b"\n")
    take = {
        "rows": local_rows,
        "documents": lambda path: stream_documents(str(path)),
        "prompts": read_prompts,
    }[read]
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}, line 3 {message}") as error:
        list(take(file))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "text=None is not possible: a text"),
        (5, "text=5 is not possible: a text"),
        (True, "text=True is not possible: a text"),
        ({"a": 1}, "text=.'a': 1. is not possible: a text"),
        ([], r"text=\[\] is not possible: at least 1 values"),
        (["a"], r"text\[0\]='a' is not possible"),
        ([{"role": "user", "content": None}], r"text\[0\].content=None is not possible: a text"),
        ([{"role": "user"}], r"text\[0\].content is missing"),
        ([{"role": 1, "content": "a"}], r"text\[0\].role=1 is not possible: a text"),
    ],
)
def test_a_column_that_is_no_text_and_no_chat_is_named(tmp_path, value, message):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"text": "a"}\n' + json.dumps({"text": value}))
    with pytest.raises(ValueError, match=f"line 2: {message}"):
        documents(str(file))


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [d.text for d in documents(str(file))] == ["a", "b"]


def test_files_that_cannot_be_read_are_named(tmp_path):
    """Missing, a folder, a pipe, a broken or half Parquet file, a text that is a folder."""
    for name in ("missing.jsonl", "folder.jsonl", "pipe.jsonl"):
        file = tmp_path / name
        if name.startswith("folder"):
            file.mkdir()
        if name.startswith("pipe"):
            os.mkfifo(file)
        with pytest.raises(ValueError, match=rf"{name} (does not exist|is no file)"):
            list(local_rows(file))
    whole = tmp_path / "whole.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 1000}), whole)
    half = tmp_path / "half.parquet"
    half.write_bytes(whole.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"half.parquet cannot be read as Parquet"):
        documents(str(half))
    (tmp_path / "texts" / "a.txt").mkdir(parents=True)
    (tmp_path / "texts" / "b.txt").write_text("b")
    assert [d.text for d in documents(str(tmp_path / "texts"))] == ["b"]


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    """Root may read everything, so the system's answer to others is given here."""
    for name in ("mine.jsonl", "mine.txt"):
        (tmp_path / name).write_text("{}")

    def forbidden(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", forbidden)
    monkeypatch.setattr("io.open", forbidden)
    for name in ("mine.jsonl", "mine.txt"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read: Permission denied"):
            documents(str(tmp_path / name))


def test_a_parquet_file_without_rows_holds_no_text(tmp_path):
    file = tmp_path / "empty.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), file)
    with pytest.raises(ValueError, match=r"empty.parquet' holds no text"):
        documents(str(file))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([None, "b"], "line 1: text=None is not possible: a text"),
        ([1, 2], "line 1: text=1 is not possible: a text"),
        ([[{"role": "user"}]], r"line 1: text\[0\].content is missing"),
    ],
)
def test_rows_of_parquet_are_checked(tmp_path, values, message):
    file = tmp_path / "mine.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), file)
    with pytest.raises(ValueError, match=message):
        documents(str(file))


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_hub_dataset_are_checked(tmp_path, monkeypatch, streaming):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a", None]})
    found = rows.to_iterable_dataset() if streaming else rows
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    with pytest.raises(ValueError, match="row 1 of org/set: text=None is not possible: a text"):
        list(stream_documents("org/set") if streaming else hub_documents("org/set", "text", "x"))


def test_names_in_no_encoding_are_split_too():
    """File names of bytes that are no UTF-8 come as lone surrogates."""
    from hispec.data.documents import Document

    training, held_out = split([Document("a\udcff", "x"), Document("b", "y")], 0.5)
    assert {d.name for d in (*training, *held_out)} == {"a\udcff", "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None}, "prompt=None is not possible: a text"),
        ({"prompt": 5}, "prompt=5 is not possible: a text"),
        ({"prompt": ""}, "prompt='' is not possible: a text that is not empty"),
        ({"prompt": ["a"]}, r"prompt=\['a'\] is not possible: a text"),
        ({"prompt": "\ud800"}, "prompt=.* is not possible: a text in valid UTF-8"),
        ({"question": None}, "question=None is not possible: a text"),
        ({"question": {"a": 1}}, "question=.* is not possible: a text"),
        ({"turns": "abc"}, "turns='abc' is not possible: a list"),
        ({"turns": 2}, "turns=2 is not possible: a list"),
        ({"turns": []}, r"turns=\[\] is not possible: at least 1 values"),
        ({"turns": [None]}, r"turns\[0\]=None is not possible: a text"),
        ({"turns": ["a", 2]}, r"turns\[1\]=2 is not possible: a text"),
        ({"turns": [""]}, r"turns\[0\]='' is not possible: a text that is not empty"),
        ({"messages": "abc"}, "messages='abc' is not possible: a list"),
        ({"messages": []}, r"messages=\[\] is not possible: at least 1 values"),
        ({"messages": [{"role": "user", "content": ""}]}, r"messages\[0\].content is an empty"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\].role is missing"),
        ({"prompt": "a", "task": 3}, "task=3 is not possible: a text"),
        ({"text": "a"}, "has none of turns, question, messages, prompt; it has: text"),
        ({}, "has none of turns, question, messages, prompt"),
    ],
)
def test_rows_without_a_prompt_are_refused_by_key(row, message):
    with pytest.raises(ValueError, match=f"x.jsonl, line 7:? {message}"):
        to_prompt(row, 7, "x.jsonl, line 7")


def test_columns_that_are_null_are_missing_where_another_has_the_prompt():
    """As in tables that join sets with different columns."""
    row = {"turns": None, "question": None, "prompt": "x", "task": None, "id": 3}
    assert to_prompt(row, 1, "x").text == "x"
    assert to_prompt(row, 1, "x").task == ""


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=5)}
    ),
    max_size=3,
)
prompt_rows = st.fixed_dictionaries(
    {},
    optional={
        "turns": st.lists(st.text(max_size=4), max_size=2) | json_values,
        "question": st.text(max_size=4) | json_values,
        "messages": messages | json_values,
        "prompt": st.text(max_size=4) | json_values,
        "task": st.text(max_size=4) | json_values,
        "id": json_values,
    },
)


def texts_in(value: object) -> list[str]:
    """All texts in a value, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for member in value for text in texts_in(member)]
    return [value] if isinstance(value, str) else []


@fuzz("rows of prompts", 150)
@given(prompt_rows)
def test_any_row_is_a_prompt_or_refused(row):
    """Nothing but ValueError; a prompt is text from the row, never made up from another type."""
    try:
        prompt = to_prompt(row, 1, "x")
    except ValueError as error:
        assert str(error).startswith("x")  # noqa: PT017
        return
    text = prompt.messages[-1]["content"] if prompt.messages else prompt.text
    assert type(text) is str
    assert text
    assert text in texts_in(row)
    assert type(prompt.task) is str


@fuzz("lines of data", 150)
@given(st.binary(max_size=40) | prompt_rows.map(lambda row: json.dumps(row).encode()))
def test_any_line_is_a_document_or_refused(tmp_path, line):
    file = tmp_path / "any.jsonl"
    file.write_bytes(line)
    try:
        found = documents(str(file), "prompt")
    except ValueError as error:
        assert "any.jsonl" in str(error)  # noqa: PT017
        return
    assert [type(d.text) for d in found] == [str]
