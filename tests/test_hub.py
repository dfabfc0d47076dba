"""Push and pull against a Hub on the loopback, through huggingface_hub as users run it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_hf, tiny_tokenizer
from fetching import closed_port, hidden
from hub_server import ALICE, BOB, READER, HubServer, Repo, sha256
from hub_worker import WORKER, Worker, look

from hispec import checkpoint, parcel
from hispec.card import WRITTEN, model_card
from hispec.config import ExitConfig
from hispec.files import read_json
from hispec.model import ExitModel

PROMPT = "def main():\n    return"
FIGURES = {
    "text": "held-out documents of stdlib",
    "agreement": [dict(shallow=2, deep=6, top1=0.5, acceptance=0.43217, tokens=9)],
    "training_tokens": 1000,
    "minutes": 1.5,
}
RECIPE = {"data": "/home/someone/books.jsonl", "steps": 7, "head": "block", "threads": None}


@pytest.fixture(scope="module")
def server():
    found = HubServer()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def clean(request):
    """Each test has a Hub without repositories, and switches that are off."""
    if "server" not in request.fixturenames:
        return
    server = request.getfixturevalue("server")
    switches = (server.meddled, server.cut_uploads, server.cut_downloads, server.flipped)
    counts = (server.asked, server.headers, server.received, server.served)
    for store in (server.repos, *switches, *counts):
        store.clear()


@pytest.fixture(scope="module")
def worker(server, tmp_path_factory):
    found = Worker(server, tmp_path_factory.mktemp("home"))
    yield found
    found.process.stdin.close()
    found.process.wait()
    for token in (ALICE, BOB, READER):  # of everything that any test of this file made it print
        assert token not in found.output


@pytest.fixture(scope="module")
def made(worker):
    """(light, full): a checkpoint of a base that `hispec fetch` could have fetched."""
    home = worker.folder / "checkpoints" / "base" / "org--base"
    tiny_hf(vocab_size=320).save_pretrained(home, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(home)
    torch.manual_seed(3)
    model = ExitModel(checkpoint.load_base(home), ExitConfig([2, 4], "block", 1)).eval()
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    provenance = {"hub_id": "org/base", "revision": "a" * 40, "license": "apache-2.0"}
    base = checkpoint.LocalBase("org/base", home, provenance)
    for name, full in (("light", False), ("full", True)):
        folder = worker.folder / "mine" / name
        checkpoint.save(folder, model, base, recipe=RECIPE, figures=FIGURES, full=full)
    assert len(list((worker.folder / "mine" / "full").glob("model-*.safetensors"))) == 5
    return worker.folder / "mine" / "light", worker.folder / "mine" / "full"


@pytest.fixture
def mine(made, tmp_path):
    """Copies of (light, full) that a test may change."""
    for folder in made:
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / "light", tmp_path / "full"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit(data: bytes, **changes) -> bytes:
    return json.dumps({**json.loads(data), **changes}).encode()


def pushed(worker: Worker, server: HubServer, folder: Path, name: str = "alice/ee") -> Repo:
    code, _, errors = worker("push", folder, name)
    assert code == 0, errors
    return server.repos[name]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1], ids=["light", "full"])
def test_what_is_pulled_gives_the_same_bits_in_a_fresh_process(worker, server, made, kind):
    repo = pushed(worker, server, made[kind])
    assert len(repo.commits) == 2  # the Hub's own first one, and ours
    (original,) = look(worker, made[kind])
    code, out, errors = worker("pull", "alice/ee", worker.folder / f"back{kind}")
    assert code == 0, errors
    back = worker.folder / f"back{kind}"
    if kind:
        shutil.move(worker.folder / "checkpoints" / "base", worker.folder / "away")
    try:
        # By name it comes out of huggingface_hub's cache; then without a network, too.
        asked = len(server.asked)
        assert look(worker, back, "alice/ee") == [original] * 2
        assert len(server.asked) > asked
        assert look(worker, "alice/ee", HF_HUB_OFFLINE="1") == [original]
        assert ("its base is in checkpoints/base/org--base" in out) == (not kind)
    finally:
        if kind:
            shutil.move(worker.folder / "away", worker.folder / "checkpoints" / "base")
        shutil.rmtree(worker.folder / "hf" / "hub")
    names = {file.name for file in made[kind].iterdir()} | {"pulled.json"}
    assert {file.name for file in back.iterdir()} == names
    assert hidden(worker.folder) == []


@pytest.mark.slow
def test_a_pulled_checkpoint_is_loaded_by_name_and_followed(worker, server, mine):
    repo = pushed(worker, server, mine[0])
    kept = worker.folder / "checkpoints" / "alice--ee"
    assert worker("pull", "alice/ee")[0] == 0
    try:
        first = repo.head
        assert read_json(kept / "pulled.json") == {"repo": "alice/ee", "revision": first}
        by_name, original = look(worker, "alice/ee", mine[0], HF_HUB_OFFLINE="1")
        assert by_name == original
        assert f"at {first} is already in" in worker("pull", "alice/ee")[1]
        flip(kept / "exits.safetensors")
        assert worker("pull", "alice/ee")[0] == 0  # damaged, so brought again
        parcel.verify(kept)
        (mine[0] / "agreement.png").write_bytes(b"\x89PNG")
        pushed(worker, server, mine[0])
        assert worker("pull", "alice/ee")[0] == 0
        assert read_json(kept / "pulled.json")["revision"] == repo.head != first
        assert (kept / "agreement.png").exists()
        assert worker("pull", f"alice/ee@{first}", worker.folder / "older")[0] == 0
        assert not (worker.folder / "older" / "agreement.png").exists()
        message = worker.fails("pull", "bob/other", kept)
        assert "exists and was pulled from alice/ee: it is left as it is" in message
    finally:
        shutil.rmtree(kept)


def test_a_broken_upload_goes_on_and_shows_nothing_before(worker, server, made):
    full = made[1]
    broken = sha256((full / "model-00002-of-00005.safetensors").read_bytes())
    server.cut_uploads.add(broken)
    message = worker.fails("push", full, "alice/big")
    assert "alice/big could not be pushed: " in message
    assert "the connection broke off" in message
    assert "what has arrived is not sent again" in message
    repo = server.repos["alice/big"]
    assert list(repo.files) == [".gitattributes"]
    assert "is no EE checkpoint: it has no exit_config.json" in worker.fails("pull", "alice/big")
    arrived = set(repo.large)
    assert len(arrived) >= 2  # else nothing could be sent twice
    assert broken not in arrived

    server.cut_uploads.clear()
    server.received.clear()
    assert worker("push", full, "alice/big")[0] == 0
    weights = {sha256(f.read_bytes()): f.stat().st_size for f in full.glob("*.safetensors")}
    assert server.received == {oid: weights[oid] for oid in weights.keys() - arrived}
    assert broken in server.received
    assert {"exit_config.json", "model-00002-of-00005.safetensors"} <= repo.files.keys()

    server.received.clear()
    commits = len(repo.commits)
    assert worker("push", full, "alice/big")[0] == 0  # nothing is new
    assert server.received == {}
    assert len(repo.commits) == commits


def files_below(folder):
    """Names of the files in a folder, as the Hub has them; what the download keeps for itself left
    out."""
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {file.as_posix() for file in files if not file.parts[0].startswith(".")}


def test_a_broken_download_goes_on(worker, server, made):
    pushed(worker, server, made[1])
    server.cut_downloads.add("model-00002-of-00005.safetensors")
    target = worker.folder / "resumed"
    message = worker.fails("pull", "alice/ee", target)
    assert "cannot be reached or the connection broke off" in message
    assert not target.exists()
    (arrived,) = (worker.folder / ".downloads" / "resumed").iterdir()
    there = files_below(arrived)
    assert {"exit_config.json", "exits.safetensors"} <= there
    assert "model-00002-of-00005.safetensors" not in there
    server.cut_downloads.clear()
    server.served.clear()
    code, out, errors = worker("pull", "alice/ee", target)
    assert code == 0, errors
    assert "going on with alice/ee" in out
    assert server.served.keys() == files_below(made[1]) - there
    parcel.verify(target)
    assert hidden(worker.folder) == []


def test_a_dry_run_lists_everything_and_contacts_nobody(worker, server, mine):
    (mine[1] / "agreement.png").write_bytes(b"\x89PNG")
    (mine[1] / "notes.py").write_text("import os")
    code, out, _ = worker("push", mine[1], "alice/ee", "--dry-run", token=None)
    assert code == 0
    assert server.asked == []
    for name in files_below(mine[1]) - {"README.md", "notes.py"}:
        assert f"{(mine[1] / name).stat().st_size:,}  {name}\n" in out
    assert "not part of a checkpoint, not sent: notes.py" in out
    assert "tells these paths of this machine: /home/someone/books.jsonl" in out
    for line in ("# alice/ee", "library_name: hispec", "![Agreement", "dry run: nothing was sent"):
        assert line in out


def test_a_repository_is_private_unless_asked_and_keeps_what_it_is(worker, server, made):
    assert pushed(worker, server, made[0]).private
    assert "private: pushing changes nothing" in worker.fails(
        "push", made[0], "alice/ee", "--public"
    )
    assert worker("push", made[0], "alice/open", "--public")[0] == 0
    assert not server.repos["alice/open"].private
    assert "is public" in worker("push", made[0], "alice/open")[1]
    assert "is public: pushing" in worker.fails("push", made[0], "alice/open", "--private")
    assert not server.repos["alice/open"].private


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


def test_what_somebody_else_pushes_meanwhile_is_not_overwritten(worker, server, made):
    repo = pushed(worker, server, made[0])
    server.meddled.add("alice/ee")
    assert "somebody else has pushed" in worker.fails("push", made[1], "alice/ee")
    assert list(repo.files)[-1] == "theirs"
    assert "config.json" not in repo.files


def test_names_that_leave_the_folder_are_not_followed(worker, server, made):
    repo = pushed(worker, server, made[0])
    files = {**read_json(made[0] / "exit_config.json")["files"], "../../planted.txt": "0" * 64}
    config = edit(repo.files["exit_config.json"], files=files)
    repo.commit({**repo.files, "exit_config.json": config, "../../planted.txt": b"boo"})
    message = worker.fails("pull", "alice/ee", worker.folder / "deep" / "never")
    assert "'../../planted.txt', which is no file of this folder" in message
    assert not list(worker.folder.rglob("planted.txt"))


def test_a_pull_leaves_other_folders_alone(worker, server, mine):
    pushed(worker, server, mine[0])
    message = worker.fails("pull", "alice/ee", mine[0])
    assert "exists and was not pulled from alice/ee: it is left as it is" in message
    (mine[0].parent / "thesis").mkdir()
    (mine[0].parent / "thesis" / "x.txt").write_text("mine")
    assert "was not pulled from" in worker.fails("pull", "alice/ee", mine[0].parent / "thesis")
    assert "was not pulled from" in worker.fails("pull", "alice/ee", mine[0] / "README.md")
    parcel.verify(mine[0])
    assert "name one revision" in worker.fails("pull", "alice/ee@v1", "--revision", "v2")


def test_a_newer_push_replaces_the_older_whole(worker, server, mine):
    (mine[1] / "agreement.png").write_bytes(b"\x89PNG")
    repo = pushed(worker, server, mine[1])
    assert {"agreement.png", "model.safetensors.index.json"} <= repo.files.keys()
    pushed(worker, server, mine[0])
    assert [name for name in repo.files if name.endswith(".safetensors")] == ["exits.safetensors"]
    assert not {"agreement.png", "model.safetensors.index.json"} & repo.files.keys()


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
                edit((f / "exit_config.json").read_bytes(), format_version=2)
            ),
            "format_version=2 cannot be read, this hispec reads 1; upgrade hispec",
        ),
        (
            lambda f: (f / "exit_config.json").write_bytes(
                edit(
                    (f / "exit_config.json").read_bytes(),
                    files={"exits.safetensors": "0" * 64, "../light/README.md": "0" * 64},
                )
            ),
            r"'../light/README.md', which is no file of this folder",
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
            "format_version=7 cannot be read, this hispec reads 1; upgrade hispec",
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


def test_a_card_of_the_users_own_is_kept(worker, server, mine):
    own = "---\nlicense: mit\n---\n# Mine\n"
    (mine[0] / "README.md").write_text(own)
    assert pushed(worker, server, mine[0]).files["README.md"].decode() == own


def test_the_card_holds_what_the_hub_shows(made):
    config = read_json(made[0] / "exit_config.json")
    plan = {"ladder": [2, 6], "drafter": "exit", "table": [{"rung": 2}]}
    card = model_card("alice/ee", config, files={"agreement.png"}, plan=plan)
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "org/base"
    assert head["license"] == "apache-2.0"
    assert head["library_name"] == "hispec"
    assert head["pipeline_tag"] == "text-generation"
    assert "early-exit" in head["tags"]
    (entry,) = head["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "ee"
    assert result["dataset"]["name"] == "held-out documents of stdlib"
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [
        ("agreement", 0.5),
        ("acceptance", 0.4322),
    ]
    for line in (
        WRITTEN,
        "![Agreement with the full model over depth](agreement.png)",
        "| `ladder` | [2, 6] |",
        "| `steps` | 7 |",
        "| `data` | books.jsonl |",
        f"hispec fetch org/base@{'a' * 40}",
        "hispec pull alice/ee",
        'lm = hispec.load("alice/ee")',
    ):
        assert line in card
    assert "table" not in card.split("## Plan")[1].split("##")[0]
    assert "/home/someone" not in card
    assert "agreement.png" not in model_card("alice/ee", config)
