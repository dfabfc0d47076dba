"""Text made by the target: the same in any batch and after a kill, nothing twice, trainable."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
import torch
from conftest import run, tiny_config, tiny_tokenizer
from killing import kill_when
from transformers import AutoModelForCausalLM

from hispec.base_models.local import weight_hashes
from hispec.checkpoint import io as checkpoint
from hispec.data.chat import render, user_turn
from hispec.export.exporter import export_untrained
from train.recipe import load_recipe
from train.synthesize import main
from train.trainer import Trainer

SPECIAL = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
WORDS = (  # ends the user's turn by words, not by a token of its own
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[Q] ' + m['content'] + ' [A]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
COMMAND = (sys.executable, "train/synthesize.py")


def sums(count: int) -> list[list[dict[str, str]]]:
    return [
        [
            {"role": "user", "content": f"What is {a} plus {b}?"},
            {"role": "assistant", "content": f"{a} plus {b} is {a + b}."},
        ]
        for a in range(count)
        for b in range(count)
    ]


def talking_base(folder, template: str):
    """A tiny model that has learned to ask for sums, and to answer."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_config(tiny_config("llama", 3, vocab_size=320))
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in sums(9)]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(80):
        picked = torch.randperm(len(labels))[:24]
        loss = model(
            input_ids=batch["input_ids"][picked],
            attention_mask=batch["attention_mask"][picked],
            labels=labels[picked],
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return talking_base(tmp_path_factory.mktemp("talker") / "base", SPECIAL)


def words(base, output, **changes) -> list[str]:
    chosen = {
        **{"base": base, "output": output, "samples": 24, "max_new_tokens": 40, "threads": 1},
        **{"max_prompt_tokens": 40, "device": None if "server" in changes else "cpu", **changes},
    }
    return [f"{key}={value}" for key, value in chosen.items() if value is not None]


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def made(capsys, *given, **changes):
    """(rows, final JSON line) of a run in this process."""
    assert main(words(*given, **changes)) == 0
    return rows_of(given[1]), json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def invented(talker, tmp_path_factory):
    """A finished file of invented samples, in groups of four."""
    file = tmp_path_factory.mktemp("made") / "chats.jsonl"
    assert main(words(talker, file, batch_size=4)) == 0
    return file


def test_the_target_invents_turns_and_answers_them(invented, talker):
    rows = rows_of(invented)
    assert len(rows) > 5
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert not {"<s>", "</s>"} & {*user["content"].split(), *assistant["content"].split()}
        note = row["provenance"]
        assert note["source"] == "invented"
        assert note["weights"] == weight_hashes(talker)
        assert note["tokens"]["answer"] > 0
    asked = [row["messages"][0]["content"] for row in rows]
    assert sum(text.startswith("What is ") for text in asked) > len(asked) / 2
    assert len({text.casefold() for text in asked}) == len(asked)
    indices = [row["provenance"]["index"] for row in rows]
    assert indices == sorted(set(indices))


def test_what_is_dropped_is_counted(invented, talker, capsys):
    """A finished run says the same again, and makes nothing."""
    before = invented.read_bytes()
    rows, final = made(capsys, talker, invented, batch_size=4)
    assert invented.read_bytes() == before
    assert final["samples"] == len(rows)
    assert sum(final["dropped"].values()) == 24 - len(rows) > 0
    assert "question: duplicate" in final["dropped"]
    assert final["tokens"] > 24


def test_answers_are_the_targets_own(invented, talker):
    """Greedy answers to the same questions, by transformers."""
    import hispec

    lm = hispec.load(talker, device="cpu")
    file = invented.parent / "asked.jsonl"
    asked = [row["messages"][0]["content"] for row in rows_of(invented)]
    file.write_text("\n".join(json.dumps({"question": text}) for text in asked))
    output = invented.parent / "greedy.jsonl"
    assert main(words(talker, output, prompts=file, temperature=0, samples=None)) == 0
    for row in rows_of(output):
        ids = lm.encode(row["messages"][0]["content"])
        out = lm.model.hf.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=40, eos_token_id=2, pad_token_id=0
        )
        theirs = lm.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        assert row["messages"][1]["content"] == theirs.strip()


@pytest.mark.parametrize(
    "changes", [{"batch_size": 1}, {"batch_size": 7}, {"drafter": "recycle"}, {"drafter": "lookup"}]
)
def test_neither_the_batch_nor_the_drafter_matters(invented, talker, tmp_path, capsys, changes):
    rows, final = made(capsys, talker, tmp_path / "again.jsonl", **{"batch_size": 4, **changes})
    assert rows == rows_of(invented)
    noted = json.loads(invented.with_name("chats.jsonl.meta.json").read_text())["progress"]
    assert final["dropped"] == noted["dropped"]


def test_other_seeds_say_other_things(invented, talker, tmp_path, capsys):
    rows, _ = made(capsys, talker, tmp_path / "other.jsonl", seed=1)
    said = {json.dumps(row["messages"]) for row in rows_of(invented)}
    assert sum(json.dumps(row["messages"]) in said for row in rows) < len(rows) / 2


def test_shards_share_the_samples(invented, talker, tmp_path, capsys):
    found = {}
    for shard in range(2):
        file = tmp_path / f"{shard}.jsonl"
        for row in made(capsys, talker, file, shard=shard, shards=2)[0]:
            assert row["provenance"]["index"] % 2 == shard
            found[row["provenance"]["index"]] = row["messages"]
    for row in rows_of(invented):  # a shard drops no more than one file of all does
        assert found[row["provenance"]["index"]] == row["messages"]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(invented, talker, tmp_path):
    file = tmp_path / "chats.jsonl"
    given = words(talker, file, batch_size=4)
    kill_when(lambda: file.exists() and file.stat().st_size > 0, *COMMAND, *given)
    with open(file, "ab") as half:
        half.write(b'{"messages": [{"role": "us')
    noted = json.loads((tmp_path / "chats.jsonl.meta.json").read_text())["progress"]["next"]
    assert noted < 24
    resumed = run(*COMMAND, *given)
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on at sample {noted}" in resumed.stdout or noted == 0
    assert "of an unfinished group: cut off" in resumed.stdout
    assert file.read_bytes() == invented.read_bytes()


def test_a_finished_run_goes_on_if_more_is_wanted(invented, talker, tmp_path, capsys):
    file = tmp_path / "chats.jsonl"
    made(capsys, talker, file, samples=10, batch_size=4)
    rows, final = made(capsys, talker, file, batch_size=4)
    assert rows == rows_of(invented)  # what was said before the stop is not said again
    assert sum(final["dropped"].values()) == 24 - len(rows)


def test_what_was_made_otherwise_is_refused(invented, talker, tmp_path):
    before = invented.read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(temperature: 0.8 there, 0.3 now\)"):
        main(words(talker, invented, temperature=0.3))
    changed = talking_base_of_other_weights(talker, tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(weights: "):
        main(words(changed, invented))
    assert invented.read_bytes() == before
    (tmp_path / "mine.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(ValueError, match=r"mine.jsonl exists, and no mine.jsonl.meta.json"):
        main(words(talker, tmp_path / "mine.jsonl"))


def talking_base_of_other_weights(talker, folder):
    model = AutoModelForCausalLM.from_pretrained(talker)
    with torch.no_grad():
        model.lm_head.weight[5, 5] += 1
    model.save_pretrained(folder / "other")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / "other" / name).write_bytes((talker / name).read_bytes())
    return folder / "other"


def test_in_half_precision_a_run_keeps_its_batch_size(talker, tmp_path, capsys):
    """Who decodes beside may decide a near-tie, so what was written stays, and no more is said."""
    given = {"dtype": "bfloat16", "samples": 8, "batch_size": 4}
    part, _ = made(capsys, talker, tmp_path / "a.jsonl", **{**given, "samples": 4})
    rows, final = made(capsys, talker, tmp_path / "a.jsonl", **given)
    assert rows[: len(part)] == part
    assert len(rows) + sum(final["dropped"].values()) == 8
    with pytest.raises(ValueError, match=r"other settings \(batch_size: 4 there, 2 now\)"):
        main(words(talker, tmp_path / "a.jsonl", **{**given, "batch_size": 2}))


def test_prompts_of_a_file_are_answered(talker, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    chat = [*sums(3)[4], {"role": "user", "content": "never asked"}]
    rows = [
        {"question": "What is 3 plus 4?"},
        {"turns": ["What is 2 plus 2?", "never asked"]},
        {"messages": chat},
        {"question": "What is " + "very " * 50 + "much?"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    made_rows, final = made(capsys, talker, tmp_path / "a.jsonl", prompts=file, samples=None)
    asked = {r["provenance"]["source"]["line"]: r["messages"][0]["content"] for r in made_rows}
    wanted = {1: "What is 3 plus 4?", 2: "What is 2 plus 2?", 3: chat[0]["content"]}
    assert asked.items() <= wanted.items()
    assert asked
    assert final["dropped"].pop("question: too long") == 1
    assert len(asked) + sum(final["dropped"].values()) == 3
    many, _ = made(capsys, talker, tmp_path / "b.jsonl", prompts=file, samples=12)
    assert len(many) > len(made_rows)  # more answers to the same prompts
    assert [r["messages"] for r in many[: len(asked)]] == [r["messages"] for r in made_rows]
    file.write_text("\n".join(map(json.dumps, [rows[0], {"prompt": "What"}])))
    with pytest.raises(ValueError, match="line 2 and line 1 are not both texts"):
        main(words(talker, tmp_path / "c.jsonl", prompts=file))


def test_texts_are_continued_as_they_are(talker, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "<s>user\nWhat is"}))
    rows, _ = made(capsys, talker, tmp_path / "a.jsonl", prompts=file, samples=6, temperature=1.5)
    assert rows
    for row in rows:
        assert row["text"].startswith("<s>user\nWhat is")
        assert len(row["text"]) > row["provenance"]["given_characters"] == 15


def test_a_base_without_a_template_writes_texts(talker, tmp_path, capsys):
    base = tmp_path / "raw"
    shutil.copytree(talker, base)
    (base / "chat_template.jinja").unlink()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    rows, _ = made(capsys, base, tmp_path / "a.jsonl")
    assert rows
    assert all(row["text"] and "messages" not in row for row in rows)
    assert all(row["provenance"]["tokens"]["context"] == 1 for row in rows)
    again, _ = made(capsys, base, tmp_path / "b.jsonl", batch_size=1)
    assert again == rows
    with pytest.raises(ValueError, match=r"^temperature=0.0 is not possible: above 0 without"):
        main(words(base, tmp_path / "c.jsonl", temperature=0))


def test_a_turn_may_end_with_words(tmp_path, capsys):
    base = talking_base(tmp_path / "base", WORDS)
    rows, _ = made(capsys, base, tmp_path / "a.jsonl")
    assert rows
    for row in rows:
        assert "[A]" not in row["messages"][0]["content"]
        assert row["messages"][0]["content"].strip() == row["messages"][0]["content"]
    assert any(row["messages"][0]["content"].endswith("?") for row in rows)


def test_an_exit_may_draft(talker, invented, tmp_path, capsys):
    export_untrained(str(talker), [1], tmp_path / "ee", full=False)
    given = (tmp_path / "ee", tmp_path / "a.jsonl")
    rows, _ = made(capsys, *given, drafter="exit", batch_size=4)
    assert [r["messages"] for r in rows] == [r["messages"] for r in rows_of(invented)]
    with pytest.raises(ValueError, match="this base has no exits"):
        main(words(talker, tmp_path / "b.jsonl", drafter="exit"))


def test_truncated_answers_may_be_dropped(talker, tmp_path, capsys):
    short = {"max_new_tokens": 2, "samples": 8}
    rows, _ = made(capsys, talker, tmp_path / "a.jsonl", **short)
    assert rows
    assert not any(row["provenance"]["ended"] for row in rows)
    rows, final = made(capsys, talker, tmp_path / "b.jsonl", keep_truncated="false", **short)
    assert rows == []
    assert final["dropped"]["answer: truncated"] > 0


def test_exits_train_on_the_file(invented, talker, tmp_path):
    given = {
        **{"base": talker, "output": tmp_path / "ee", "exits": "[1]", "steps": 2, "threads": 1},
        **{"data": invented, "text_column": "messages", "seq_len": 16, "precision": "fp32"},
        **{"eval_sequences": 2, "eval_every": 2, "max_drift": "null"},
    }
    trainer = Trainer(load_recipe(["recipe=smoke", *(f"{k}={v}" for k, v in given.items())]))
    batches = trainer._batches()
    labels = torch.cat([next(batches)["labels"] for _ in range(len(trainer.loader))])
    taught = trainer.tokenizer.decode(labels[labels >= 0])
    assert "</s>" in taught
    assert "user" not in taught
    trainer.train()
    assert checkpoint.is_checkpoint(tmp_path / "ee")


def test_rendered_again_a_sample_is_what_was_said(invented, talker):
    import hispec

    lm = hispec.load(talker, device="cpu")
    for row in rows_of(invented):
        text, spoken = render(row["messages"], lm.tokenizer, "row")
        user, assistant = (message["content"] for message in row["messages"])
        assert text[slice(*spoken[0])] == assistant + "</s>"
        ids = lm.encode(user)
        assert len(ids) == row["provenance"]["tokens"]["context"]
        assert text.startswith(lm.tokenizer.decode(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temprature": 1}, "unknown key 'temprature'"),
        ({"batch_size": 0}, "batch_size=0 is not possible: 1 or more"),
        ({"shard": 2, "shards": 2}, "shard=2 is not possible: 0 to 1"),
        ({"temperature": -1}, "temperature=-1 is not possible: 0 (greedy), or 0.001 and more"),
        ({"temperature": ".inf"}, "temperature=inf is not possible: a finite number"),
        ({"samples": "???"}, "samples has no value"),
        ({"threads": 10**12}, "threads=1000000000000 is not possible: at most 1,024"),
        ({"keep_truncated": 2}, "keep_truncated=2 is not possible: true or false"),
        ({"prompt_temperature": 0}, "prompt_temperature=0.0 is not possible: above 0 without"),
        ({"top_p": 0}, "top_p=0 is not possible"),
        ({"near_duplicate": 0}, "near_duplicate=0 is not possible"),
        ({"drafter": "ngram"}, "drafter='ngram' is not possible: one of none, exit, lookup"),
        ({"output": "here.json"}, "output='here.json' is not possible"),
        ({"prompts": "/no/such/file"}, "/no/such/file does not exist"),
    ],
)
def test_wrong_settings_are_refused(talker, tmp_path, changes, message):
    with pytest.raises(ValueError, match=r"(?s).*") as error:
        main(words(talker, **{"output": tmp_path / "a.jsonl", **changes}))
    assert message in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_the_command_refuses_with_exit_code_2(tmp_path):
    done = run(*COMMAND, *words("/no/such/base", tmp_path / "a.jsonl"))
    assert done.returncode == 2
    assert done.stderr == "hispec: no such folder: /no/such/base\n"
    assert "Traceback" not in done.stderr


def test_the_users_turn_of_a_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = SPECIAL
    assert user_turn(tokenizer) == ("<s>user\n", "</s><s>assistant\n")
    tokenizer.chat_template = WORDS
    assert user_turn(tokenizer) == ("[Q]", " [A]")
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(ValueError, match="does not write a user's turn once"):
        user_turn(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        user_turn(tokenizer)
