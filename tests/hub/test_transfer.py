"""Push and pull against a Hub on the loopback, through huggingface_hub as users run it."""

from __future__ import annotations

import shutil

import pytest
import yaml
from conftest import plan_of
from fetching import hidden
from hub_server import Repo, sha256
from hub_worker import flip, look, pushed

from hispec.checkpoint.model_card import WRITTEN, model_card
from hispec.hub import contents
from hispec.planner.plan_file import Tried
from hispec.utils.schema import read_json

PROMPT = "def main():\n    return"


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
        contents.verify(kept)
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
    assert "files that have arrived whole are not sent again" in message
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
    contents.verify(target)
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


def test_a_branch_is_pushed_and_pulled(worker, server, made):
    light, full = made
    repo = pushed(worker, server, light)
    main = repo.head
    for source in (full, light):  # the second time it is there
        code, out, errors = worker("push", source, "alice/ee", "--revision", "v2")
        assert code == 0, errors
        assert repo.head == main
        assert repo.commits[repo.at("v2")]["exits.safetensors"] == repo.files["exits.safetensors"]
        weights = any(name.startswith("model-") for name in repo.commits[repo.at("v2")])
        assert weights == (source == full)
    assert "goes with this one: config.json" in out
    folder = worker.folder / "branch"
    assert worker("pull", "alice/ee@v2", folder)[0] == 0
    assert read_json(folder / "pulled.json")["revision"] == repo.at("v2")
    assert worker("push", light, "alice/new", "--revision", "v2")[0] == 0
    new = server.repos["alice/new"]
    assert "exit_config.json" in new.commits[new.at("v2")]
    assert list(new.files) == [".gitattributes"]


CUSTOM = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(name).eval()
inputs = AutoTokenizer.from_pretrained(name)("def main():", return_tensors="pt")
words = dict(**inputs, max_new_tokens=12, do_sample=False)
plain = model.generate(**words)
ours = model.generate(**words, custom_generate=name, trust_remote_code=True)
assert vars(model)["_hispec_exits"][1].exits.depths == [2, 4]
assert torch.equal(plain, ours), (plain, ours)
"""


@pytest.mark.slow
def test_custom_generate_by_the_name_on_the_hub(worker, server, made):
    """Plain transformers takes model, code and exits from there."""
    pushed(worker, server, made[1])
    done = worker.fresh("-c", CUSTOM, "alice/ee")
    assert done.returncode == 0, done.stderr
    assert "/alice/ee/resolve/main/custom_generate/generate.py" in " ".join(server.asked)
    assert server.served["exits.safetensors"] > 0


CACHE = "import sys; from huggingface_hub import snapshot_download as get; get(sys.argv[1])"


@pytest.mark.slow
def test_a_base_in_the_cache_of_huggingface_hub_is_found(worker, server, made):
    """With just the weights that the checkpoint names, or it is none."""
    home = worker.folder / "checkpoints" / "base" / "org--base"
    files = {file.name: file.read_bytes() for file in home.iterdir()}
    shard = "model-00003-of-00005.safetensors"
    changed = {**files, shard: files[shard][:-1] + bytes([files[shard][-1] ^ 1])}
    repo = server.repos["org/base"] = Repo("org", private=False)
    away = worker.folder / "away"
    home.rename(away)
    try:
        words = ("generate", made[0], "def main():", "--raw")
        repo.commit(changed)
        assert worker.fresh("-c", CACHE, "org/base").returncode == 0
        assert f"to get it: hispec fetch org/base@{'a' * 40}" in worker.fails(*words)
        repo.commit(files)
        assert worker.fresh("-c", CACHE, "org/base").returncode == 0
        code, out, errors = worker(*words)
        assert code == 0, errors
        assert out.strip()
        assert "/snapshots/" in worker("inspect", made[0])[1]
    finally:
        away.rename(home)


def test_what_somebody_else_pushes_meanwhile_is_not_overwritten(worker, server, made):
    repo = pushed(worker, server, made[0])
    server.meddled.add("alice/ee")
    assert "somebody else has pushed" in worker.fails("push", made[1], "alice/ee")
    assert list(repo.files)[-1] == "theirs"
    assert "config.json" not in repo.files


def test_a_pull_leaves_other_folders_alone(worker, server, mine):
    pushed(worker, server, mine[0])
    message = worker.fails("pull", "alice/ee", mine[0])
    assert "exists and was not pulled from alice/ee: it is left as it is" in message
    (mine[0].parent / "thesis").mkdir()
    (mine[0].parent / "thesis" / "x.txt").write_text("mine")
    assert "was not pulled from" in worker.fails("pull", "alice/ee", mine[0].parent / "thesis")
    assert "was not pulled from" in worker.fails("pull", "alice/ee", mine[0] / "README.md")
    contents.verify(mine[0])
    assert "name one revision" in worker.fails("pull", "alice/ee@v1", "--revision", "v2")


def test_a_newer_push_replaces_the_older_whole(worker, server, mine):
    (mine[1] / "agreement.png").write_bytes(b"\x89PNG")
    repo = pushed(worker, server, mine[1])
    assert {"agreement.png", "model.safetensors.index.json"} <= repo.files.keys()
    pushed(worker, server, mine[0])
    assert [name for name in repo.files if name.endswith(".safetensors")] == ["exits.safetensors"]
    assert not {"agreement.png", "model.safetensors.index.json"} & repo.files.keys()


def test_a_card_of_the_users_own_is_kept(worker, server, mine):
    own = "---\nlicense: mit\n---\n# Mine\n"
    (mine[0] / "README.md").write_text(own)
    assert pushed(worker, server, mine[0]).files["README.md"].decode() == own


def test_the_card_holds_what_the_hub_shows(made):
    config = read_json(made[0] / "exit_config.json")
    confirmed = [Tried({"ladder": [2, 6], "drafter": "exit"}, 19.0, 1.5, 6, 20.0, (19.0, 21.0), 1)]
    plan = plan_of(confirmed[0].setting, confirmed=confirmed)
    card = model_card("alice/ee", config, files={"agreement.png", "plan.png"}, plan=plan)
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
        "**(2, 6) exit**, 20.0 tokens/s, 2.00x plain decoding",
        "| (2, 6) exit | 20.0 | 2.00x | 1.50 |",
        "![Predicted gain over what drafts and what verifies](plan.png)",
        "| `steps` | 7 |",
        "| `data` | books.jsonl |",
        f"hispec fetch org/base@{'a' * 40}",
        "hispec pull alice/ee",
        'lm = hispec.load("alice/ee")',
    ):
        assert line in card
    assert "/home/someone" not in card
    assert "agreement.png" not in model_card("alice/ee", config)
