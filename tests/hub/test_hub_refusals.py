"""Refused pushes and pulls, each with one message that gives the reason."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from conftest import tiny_hf, tiny_tokenizer
from fetching import closed_port, hidden
from hub_server import ALICE, BOB, READER, Repo
from hub_worker import PROMPT, WORKER, edit, flip, pushed

from hispec.utils.schema import read_json


def test_tokens_and_rights(worker, server, made, tmp_path):
    light = made[0]
    assert "there is no token; set HF_TOKEN" in worker.fails("push", light, "alice/ee", token=None)
    assert server.asked == []
    wrong = "hf_notATokenAtAll9999"
    assert "does not accept the token in use (HF_TOKEN)" in worker.fails(
        "push", light, "alice/ee", token=wrong
    )
    assert "is valid but has no right" in worker.fails("push", light, "alice/ee", token=READER)
    assert "is valid but has no right" in worker.fails("push", light, "alice/ee", token=BOB)
    assert server.repos == {}
    server.repos["bob/ee"] = Repo("bob", private=False)  # seen by all, bob's to write
    server.repos["bob/ee"].commit({"exit_config.json": b"{}"})
    assert "somebody else's" in worker.fails("push", light, "bob/ee")
    assert list(server.repos["bob/ee"].files) == ["exit_config.json"]

    pushed(worker, server, light)
    target = tmp_path / "out"
    assert "private and no token is set" in worker.fails("pull", "alice/ee", target, token=None)
    assert "private and the token in use" in worker.fails("pull", "alice/ee", target, token=BOB)
    assert "does not accept the token" in worker.fails("pull", "alice/ee", target, token=wrong)
    assert "the Hub has no such model" in worker.fails("pull", "alice/none", target)
    assert "no such revision" in worker.fails("pull", "alice/ee", target, "--revision", "v9")
    assert wrong not in worker.output
    assert not target.exists()
    # The standard file serves as well as the variable.
    (worker.folder / "hf").mkdir(exist_ok=True)
    (worker.folder / "hf" / "token").write_text(ALICE)
    try:
        assert worker("pull", "alice/ee", target, token=None)[0] == 0
    finally:
        (worker.folder / "hf" / "token").unlink()
    assert f"Bearer {ALICE}" in server.headers


def test_a_repository_of_something_else_is_left_alone(worker, server, made):
    repo = server.repos["alice/thesis"] = Repo("alice", private=True)
    repo.commit({"config.json": b"{}", "model.safetensors": b"x", "README.md": b"mine"})
    message = worker.fails("push", made[0], "alice/thesis")
    assert "holds no EE checkpoint but config.json, model.safetensors" in message
    assert len(repo.commits) == 1
    message = worker.fails("pull", "alice/thesis")
    assert "is a plain model, which is got as a base: hispec fetch alice/thesis" in message


def test_names_that_leave_the_folder_are_not_followed(worker, server, made):
    repo = pushed(worker, server, made[0])
    files = {**read_json(made[0] / "exit_config.json")["files"], "../../planted.txt": "0" * 64}
    config = edit(repo.files["exit_config.json"], files=files)
    repo.commit({**repo.files, "exit_config.json": config, "../../planted.txt": b"boo"})
    message = worker.fails("pull", "alice/ee", worker.folder / "deep" / "never")
    assert "'../../planted.txt' is not possible: the name of a file inside its folder" in message
    assert not list(worker.folder.rglob("planted.txt"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: flip(f / "model-00001-of-00005.safetensors"),
            "model-00001-.* is damaged or was",
        ),
        (lambda f: (f / "model-00003-of-00005.safetensors").unlink(), "model-00003-.* is missing"),
        (lambda f: (f / "exits.safetensors").unlink(), "exits.safetensors is missing"),
        (lambda f: (f / "config.json").unlink(), ": config.json is missing"),
        (lambda f: (f / "exit_config.json").unlink(), "no EE checkpoint: it has no exit_config"),
        (lambda f: (f / "x.safetensors").write_bytes(b""), "does not name x.safetensors"),
        (
            lambda f: (f / "exit_config.json").write_bytes(
                edit((f / "exit_config.json").read_bytes(), format_version=4)
            ),
            "format_version=4 cannot be read, this hispec reads 1, 2, 3; upgrade hispec",
        ),
        (
            lambda f: (f / "exit_config.json").write_bytes(
                edit(
                    (f / "exit_config.json").read_bytes(),
                    files={"exits.safetensors": "0" * 64, "../light/README.md": "0" * 64},
                )
            ),
            r"'../light/README.md' is not possible: the name of a file inside its folder",
        ),
    ],
)
def test_only_whole_checkpoints_are_pushed(worker, server, mine, damage, message):
    damage(mine[1])
    assert re.search(message, worker.fails("push", mine[1], "alice/ee"))
    assert server.asked == []


def test_a_base_that_nobody_has_is_not_pushed(worker, server, mine):
    path = mine[0] / "exit_config.json"
    base = {**read_json(path)["base"], "hub_id": None, "id": "/home/someone/base"}
    path.write_bytes(edit(path.read_bytes(), base=base))
    message = worker.fails("push", mine[0], "alice/ee")
    assert "nobody else could find its base, the local folder '/home/someone/base'" in message
    assert "is not possible: name the repository as ORG/NAME" in worker.fails("push", mine[0], "ee")
    assert server.asked == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("exits.safetensors", lambda data: None, "exits.safetensors is missing"),
        (
            "model-00002-of-00005.safetensors",
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            "model-00002-of-00005.safetensors is damaged or was changed: SHA-256",
        ),
        (
            "exit_config.json",
            lambda data: edit(data, format_version=7),
            "format_version=7 cannot be read, this hispec reads 1, 2, 3; upgrade hispec",
        ),
        ("exit_config.json", lambda data: None, "is no EE checkpoint: it has no exit_config.json"),
        ("exit_config.json", lambda data: b"<html>", "is not valid JSON"),
    ],
)
def test_what_is_not_whole_on_the_hub_is_not_pulled(worker, server, made, name, content, message):
    repo = pushed(worker, server, made[1])
    files = {**repo.files, name: content(repo.files[name])}
    repo.commit({key: data for key, data in files.items() if data is not None})
    target = worker.folder / "never"
    found = worker.fails("pull", "alice/ee", target)
    assert message in found
    assert ".downloads" not in found
    assert not target.exists()
    assert hidden(worker.folder) == []


def test_a_byte_flipped_on_the_way_is_noticed_and_brought_again(worker, server, made):
    pushed(worker, server, made[1])
    target = worker.folder / "flipped"
    server.flipped.add("model-00001-of-00005.safetensors")
    message = worker.fails("pull", "alice/ee", target)
    assert "model-00001-of-00005.safetensors of alice/ee arrived damaged" in message
    assert not target.exists()
    server.flipped.clear()
    server.served.clear()
    assert worker("pull", "alice/ee", target)[0] == 0
    weights = [name for name in server.served if name.endswith(".safetensors")]
    assert weights == ["model-00001-of-00005.safetensors"]


@pytest.mark.slow
def test_another_base_or_none_is_said(worker, server, made):
    """Pulling needs no base; what `load` finds must be the one that the exits belong to."""
    pushed(worker, server, made[0])
    base = worker.folder / "checkpoints" / "base" / "org--base"
    away = worker.folder / "away"
    shutil.move(base, away)
    try:
        get = f"to get it: hispec fetch org/base@{'a' * 40}"
        assert get in worker("pull", "alice/ee", worker.folder / "alone")[1]
        assert get in worker.fails("generate", worker.folder / "alone", PROMPT)
        tiny_hf(vocab_size=320, seed=9).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        message = worker.fails("generate", worker.folder / "alone", PROMPT)
        assert "org--base is not the base 'org/base' that these exits were trained on" in message
        exact = base.with_name(f"org--base@{'a' * 40}")
        shutil.copytree(away, exact)  # the revision that the checkpoint names comes first
        code, out, errors = worker("generate", worker.folder / "alone", PROMPT, "--raw")
        assert code == 0, errors
        assert out.strip()
        shutil.rmtree(exact)
    finally:
        shutil.rmtree(base, ignore_errors=True)
        shutil.move(away, base)


@pytest.mark.slow
def test_no_network_is_one_clear_line(worker, server, made, tmp_path):
    commands = [
        ("push", made[0], "alice/ee"),
        ("pull", "alice/ee", tmp_path / "x"),
        ("generate", "alice/ee", PROMPT),
    ]
    lines = "".join(json.dumps([list(map(str, words)), ALICE]) + "\n" for words in commands)
    nowhere = f"http://127.0.0.1:{closed_port()}"
    for environment, reason in (
        ({"HF_ENDPOINT": nowhere}, f"{nowhere} cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ):
        done = worker.fresh("-c", WORKER, given=lines, **environment)
        ends = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(ends) == 3
        for code, _, errors in ends:
            assert code == 2
            assert reason in errors
            assert len(errors.strip().splitlines()) == 1
        assert "'alice/ee' is no local folder and not in checkpoints/alice--ee" in ends[2][2]
    assert server.asked == []
