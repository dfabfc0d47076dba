"""Documents, at once and as a stream; whole-document hold-out, chats as tokens."""

from __future__ import annotations

import json

import pytest
from conftest import tiny_tokenizer, write_jsonl

from hispec.data.documents import Document, documents, split, stream_documents
from hispec.data.packing import windows


def test_the_standard_library_is_there_without_tests_and_tables():
    found = documents("stdlib")
    names = {document.name for document in found}
    assert {"argparse.py", "json/decoder.py", "collections/__init__.py"} <= names
    assert not any(name.startswith(("test/", "encodings/")) for name in names)
    assert sum(len(document.text) for document in found) > 3_000_000


def test_whole_documents_are_held_out_by_name_alone():
    found = [Document(f"d{i}", f"text {i}") for i in range(200)]
    training, held_out = split(found, 0.05)
    assert len(held_out) == 10
    assert len(training) == 190
    assert not {d.name for d in training} & {d.name for d in held_out}
    again = split(list(reversed(found)), 0.05)[1]
    assert {d.name for d in again} == {d.name for d in held_out}
    assert [len(part) for part in split(found[:2], 0.001)] == [1, 1]
    assert [len(part) for part in split(found[:2], 0.999)] == [1, 1]
    with pytest.raises(ValueError, match="cannot be split"):
        split(found[:1], 0.5)


def test_local_files_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("line\n" * 4000)
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"body": f"t{i}"}) for i in range(3)))
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    assert [d.text for d in documents(str(tmp_path / "b.jsonl"), "body")] == ["t0", "t1", "t2"]
    long = documents(str(tmp_path / "a.txt"))  # a file alone is cut into pieces
    assert len(long) == 3
    assert "".join(d.text for d in long) == "line\n" * 4000
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("other")
    found = documents(str(tmp_path), "body")  # in a folder, a file is one document
    assert [d.name for d in found] == ["a.txt", "b.jsonl:1", "b.jsonl:2", "b.jsonl:3", "sub/a.txt"]
    assert len(found[0].text) == 20_000
    with pytest.raises(ValueError, match=r"text_column='text': .*b.jsonl, line 1 .*it has: body"):
        documents(str(tmp_path / "b.jsonl"))
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{broken\n')
    with pytest.raises(ValueError, match="line 2 is not valid JSON"):
        documents(str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match=r"a file must end in \.txt"):
        documents(str(tmp_path / "ignored.bin"))


def test_a_name_that_is_nothing_says_so():
    with pytest.raises(ValueError, match="neither 'stdlib' nor a local file or folder"):
        documents("no-such-org/no-such-set")


def test_rows_of_a_dataset_become_documents(tmp_path):
    """Through the library that reads the Hub, from a folder in the Hub's layout."""
    from hispec.data.documents import hub_documents

    rows = [json.dumps({"content": f"row {i}"}) for i in range(5)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    found = hub_documents(str(tmp_path), "content", "train")
    assert [d.text for d in found] == [f"row {i}" for i in range(5)]
    assert len({d.name for d in found}) == 5
    with pytest.raises(ValueError, match=r"text_column='text': .* has the columns content"):
        hub_documents(str(tmp_path), "text", "train")


CHAT = [
    {"role": "user", "content": "import os"},
    {"role": "assistant", "content": "return 1"},
    {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "def f"},
]


def test_in_a_chat_only_what_the_assistant_says_is_taught(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(3)))
    tokenizer = tiny_tokenizer()
    found = documents(str(file), "messages")
    assert [list(document.chat) for document in found] == [CHAT] * 3
    rows = windows(found[:1], tokenizer, 1)
    said = rows.tokens_RT[rows.loss_mask_RT].tolist()
    assert tokenizer.decode(said) == " return 1\n def f\n"
    unsaid = rows.tokens_RT[~rows.loss_mask_RT].tolist()
    assert tokenizer.decode(unsaid).startswith("user: import os\nassistant:user: and then?")


def test_a_file_of_one_chat_is_one_document(tmp_path):
    """A file of a single long text is cut into pieces; a chat is not."""
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": CHAT}))
    (document,) = documents(str(file), "messages")
    assert list(document.chat) == CHAT
    file.write_text(json.dumps({"text": "line\n" * 4000}))
    assert len(documents(str(file))) == 3


def test_texts_and_chats_may_be_mixed():
    tokenizer = tiny_tokenizer()
    mixed = [Document("a", "import os\n"), Document("b", "", tuple(CHAT)), Document("c", "x = 1")]
    rows = windows(mixed, tokenizer, 1)
    taught = rows.loss_mask_RT.flatten()
    text = tokenizer.decode(rows.tokens_RT.flatten().tolist())
    assert text.startswith("import os\n</s>user: import os\nassistant: return 1\n")
    assert text.endswith("def f\nx = 1</s>")
    first, last = (len(tokenizer(t)["input_ids"]) + 1 for t in ("import os\n", "x = 1"))
    assert taught[:first].all()
    assert taught[-last:].all()
    assert not taught.all()


@pytest.mark.parametrize(
    ("chat", "template", "message"),
    [
        (CHAT, None, "d is a chat, but the base's tokenizer has no chat template"),
        (CHAT[:1], "{{ messages }}", "d: a chat without a turn of the role 'assistant'"),
        (CHAT, "{{ messages | length }}{{ messages }}", "turn 2 otherwise once more turns follow"),
    ],
)
def test_chats_that_cannot_be_rendered_are_refused(chat, template, message):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        windows([Document("d", "", tuple(chat))], tokenizer, 1)


def test_parquet_files_are_read_as_jsonl_files_are(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"body": ["one", "two"]}).to_parquet(str(tmp_path / "t.parquet"))
    Dataset.from_dict({"body": [CHAT, CHAT]}).to_parquet(str(tmp_path / "c.parquet"))
    assert [d.text for d in documents(str(tmp_path / "t.parquet"), "body")] == ["one", "two"]
    assert list(documents(str(tmp_path / "c.parquet"), "body")[0].chat) == CHAT
    with pytest.raises(ValueError, match=r"text_column='text': .*line 1 has no such column"):
        documents(str(tmp_path / "t.parquet"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"broken.parquet cannot be read as Parquet"):
        documents(str(tmp_path / "broken.parquet"))


def test_local_sources_give_the_documents_that_are_read_at_once(tmp_path):
    """JSONL, Parquet, a folder with both and plain text; one file of plain text; the library."""
    from datasets import Dataset

    folder = tmp_path / "set [1]"  # a pattern to those who look for one
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", ["one", "two", "three"])
    Dataset.from_dict({"body": ["four", "five"]}).to_parquet(str(folder / "b.parquet"))
    (folder / "c.txt").write_text("six")
    (tmp_path / "long.txt").write_text("line\n" * 4000)
    for source in (folder, *folder.iterdir(), tmp_path / "long.txt", "stdlib"):
        expected = documents(str(source), "body")
        assert list(stream_documents(str(source), "body")) == expected
        assert list(stream_documents(str(source), "body", skip=2)) == expected[2:]
    assert len(documents(str(folder), "body")) == 6


def test_local_files_are_read_lazily_and_broken_lines_named(tmp_path):
    file = tmp_path / "a.jsonl"
    write_jsonl(file, ["one", "two"])
    with open(file, "a") as end:
        end.write("{broken\n")
    stream = stream_documents(str(file), "body")
    assert [next(stream).text, next(stream).text] == ["one", "two"]
    with pytest.raises(ValueError, match=r"a.jsonl, line 3 is not valid JSON"):
        next(stream)
    with pytest.raises(ValueError, match=r"text_column='text': .*line 1 .* it has: body"):
        next(stream_documents(str(file)))
    file.write_bytes(b'{"body": "\xff"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 1 is not valid JSON: invalid unicode"):
        next(stream_documents(str(file), "body"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"b.parquet cannot be read as Parquet"):
        next(stream_documents(str(tmp_path / "b.parquet"), "body"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' holds no text"):
        next(stream_documents(str(tmp_path / "empty")))
    with pytest.raises(ValueError, match="neither 'stdlib' nor a local file or folder"):
        next(stream_documents("no-such-org/no-such-set"))


def test_a_hub_dataset_is_streamed(hub_dataset):
    found = list(stream_documents("org/set", "body", "train"))
    assert [d.text for d in found] == [f"x{i} = {i}\n" * 6 for i in range(120)]
    assert len({d.name for d in found}) == 120
    assert hub_dataset == [{"split": "train", "streaming": True}]
    assert list(stream_documents("org/set", "body", "train", skip=100)) == found[100:]
    with pytest.raises(ValueError, match="text_column='text': the dataset org/set has the columns"):
        next(stream_documents("org/set"))
    with pytest.raises(ValueError, match=r"data='org/set' .*Bad split: test"):
        next(stream_documents("org/set", "body", "test"))


def test_a_hub_dataset_that_names_no_columns_or_breaks_off_is_refused_by_name(monkeypatch):
    import datasets

    def rows():
        yield {"body": "one"}
        raise RuntimeError("the line went dead")

    unnamed = datasets.IterableDataset.from_generator(rows)
    assert unnamed.column_names is None
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: unnamed)
    with pytest.raises(ValueError, match=r"text_column='text': row 0 of org/set .* it has: body"):
        next(stream_documents("org/set"))
    stream = stream_documents("org/set", "body")
    assert next(stream).text == "one"
    with pytest.raises(ValueError, match="data='org/set' cannot be read on: the line went dead"):
        next(stream)
