"""The exits of two checkpoints in one: the same bits, decoded together, and what is refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import decode_tokens, disturbed, tiny_hf, tiny_tokenizer
from safetensors.torch import load_file

import hispec
from hispec.base_models.local import find_base, load_base
from hispec.checkpoint import io as checkpoint
from hispec.checkpoint.format import read_config
from hispec.config import Exit, ExitConfig
from hispec.export.merge import merge
from hispec.models.exit_model import ExitModel


@pytest.fixture(scope="module")
def written(tiny_base, tmp_path_factory):
    """A function that writes a checkpoint with these exits, which are no copies of layers."""

    def write(name, exits, draft_vocab=0, base=tiny_base, **more):
        found = find_base(str(base))
        model = disturbed(ExitModel(load_base(found.folder), ExitConfig(exits, draft_vocab)).eval())
        if model.draft_tokens is not None:
            model.draft_tokens.copy_(torch.arange(draft_vocab) * 2 + 1)
        folder = tmp_path_factory.mktemp("merge") / name
        checkpoint.save_checkpoint(folder, model, found, **more)
        return folder

    return write


@pytest.fixture(scope="module")
def drafting(written):
    return written("drafting", [Exit(0, "eagle3", aux_depths=[2, 3, 5])], draft_vocab=64)


@pytest.fixture(scope="module")
def verifying(written):
    return written("verifying", [Exit(3, blocks=1), Exit(4, blocks=2)], draft_vocab=32)


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
def test_exits_stay_as_they_were_and_decode_together(drafting, verifying, tmp_path, turned):
    sources = [verifying, drafting] if turned else [drafting, verifying]
    found = merge(*sources, tmp_path / "merged")
    assert found["new_tokens"] > 0
    stored = load_file(tmp_path / "merged" / "exits.safetensors")
    # the shallowest exit drafts, from its own tokens
    expected = {}
    for source in (verifying, drafting):
        expected |= load_file(source / "exits.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    config = read_config(tmp_path / "merged")
    assert [one["depth"] for one in config["exits"]] == [0, 3, 4]
    assert config["draft_vocab"] == 64
    assert config["recipe"]["merged"] == [source.name for source in sources]
    lm = hispec.load(tmp_path / "merged", device="cpu", dtype=torch.float32)
    text = [5, 9, 30, 12, 7]
    ladders = ((6,), (0, 6), (0, 3, 6), (0, 3, 4, 6), (3, 6))
    common = {"max_new_tokens": 24, "buffer": 4}
    texts = [decode_tokens(lm.model, text, ladder, **common) for ladder in ladders]
    assert all(one == texts[0] for one in texts)


def test_two_exits_at_one_depth_are_refused(verifying, written, tmp_path):
    other = written("other", [Exit(2, blocks=1), Exit(4, blocks=1)])
    with pytest.raises(ValueError, match="both have an exit at depth 4"):
        merge(verifying, other, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_base_is_refused(verifying, written, tmp_path):
    base = tmp_path / "base"
    torch.manual_seed(77)
    tiny_hf(vocab_size=320, seed=5).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    other = written("elsewhere", [Exit(2, blocks=1)], base=base)
    with pytest.raises(ValueError, match="different bases"):
        merge(verifying, other, tmp_path / "merged")


@pytest.mark.parametrize("which", [0, 1])
def test_a_source_is_not_replaced(drafting, verifying, which):
    sources = [drafting, verifying]
    with pytest.raises(ValueError, match="name another folder"):
        merge(*sources, sources[which])


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_source_is_named(drafting, verifying, tmp_path, which):
    sources = [drafting, verifying]
    damaged = tmp_path / "damaged"
    shutil.copytree(sources[which], damaged)
    file = damaged / "exits.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    sources[which] = damaged
    with pytest.raises(ValueError, match=r"exits\.safetensors is damaged"):
        merge(*sources, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_the_command(drafting, verifying, tmp_path, hispec_command):
    done = hispec_command("merge", drafting, verifying, tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert "verified: 8 prompts" in done.stdout
    done = hispec_command("inspect", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    again = hispec_command("merge", drafting, tmp_path / "merged", tmp_path / "more")
    assert again.returncode == 2
    assert "both have an exit at depth 0" in again.stderr


@pytest.mark.slow
def test_an_included_base_stays_included(written, tmp_path):
    sources = [written(f"at {depth}", [Exit(depth, blocks=1)], full=True) for depth in (2, 4)]
    merge(*sources, tmp_path / "merged")
    assert read_config(tmp_path / "merged")["base"]["included"]
    assert hispec.load(tmp_path / "merged", device="cpu").ladder() == [2, 4, 6]
