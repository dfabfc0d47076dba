"""Documents, whole-document hold-out, chats as tokens."""

from __future__ import annotations

import json

import pytest
from conftest import tiny_tokenizer

from hispec.packing import windows
from hispec.text import Document, documents, split


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
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        documents(str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match=r"a file must end in \.txt"):
        documents(str(tmp_path / "ignored.bin"))


def test_a_name_that_is_nothing_says_so():
    with pytest.raises(ValueError, match="neither 'stdlib' nor a local file or folder"):
        documents("no-such-org/no-such-set")


def test_rows_of_a_dataset_become_documents(tmp_path):
    """Through the library that reads the Hub, from a folder in the Hub's layout."""
    from hispec.text import hub_documents

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
    said = rows.tokens_RT[rows.taught_RT].tolist()
    assert tokenizer.decode(said) == " return 1\n def f\n"
    unsaid = rows.tokens_RT[~rows.taught_RT].tolist()
    assert tokenizer.decode(unsaid).startswith("user: import os\nassistant:user: and then?")


def test_texts_and_chats_may_be_mixed():
    tokenizer = tiny_tokenizer()
    mixed = [Document("a", "import os\n"), Document("b", "", tuple(CHAT)), Document("c", "x = 1")]
    rows = windows(mixed, tokenizer, 1)
    taught = rows.taught_RT.flatten()
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
    with pytest.raises(ValueError, match=r"text_column='text': .*line 1 has no such text"):
        documents(str(tmp_path / "t.parquet"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"broken.parquet cannot be read as Parquet"):
        documents(str(tmp_path / "broken.parquet"))
