"""A reduced vocabulary to draft from: chosen from the text, stored with the exits, never seen in
what is committed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import VOCAB, decode_tokens, tiny_hf
from safetensors.torch import load_file, save_file
from test_trainer import settings

from hispec.checkpoint import io as checkpoint
from hispec.config import DecodeConfig, ExitConfig
from hispec.data.packing import Rows
from hispec.decoding.decoder import Decode
from hispec.decoding.ladder import Ladder
from hispec.export.exporter import export
from hispec.lm import load
from hispec.metrics.agreement import agreement
from hispec.models.exit_model import ExitModel
from hispec.utils.files import read_json, sha256, write_json
from train.data import TrainingRows, frequent_tokens
from train.recipe import load_recipe
from train.trainer import Trainer

KEPT = torch.tensor([2, 5, 11, 12, 30, 31, 47, 60])


def reduced_model(family="llama", kept=KEPT):
    config = ExitConfig.of([2, 4], "block", blocks=1, draft_vocab=len(kept))
    model = ExitModel(tiny_hf(family), config).eval()
    model.draft_tokens.copy_(kept)
    return model


@torch.inference_mode()
def test_drafts_have_the_exits_own_logits_where_they_may_be(family):
    model = reduced_model(family)
    text = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(1)).numpy()
    ladder = Ladder(model, (2, 6), rows=1, capacity=16)
    read = ladder.logits(0, text, np.array([0]), np.array([9]))
    draft = ladder.logits(0, text, np.array([0]), np.array([9]), drafting=True)
    torch.testing.assert_close(draft[..., KEPT], read[..., KEPT])
    assert torch.isinf(draft).sum() == 9 * (VOCAB - len(KEPT))
    whole = Ladder(model, (2, 6), rows=1, capacity=16, draft_vocab=False)
    again = whole.logits(0, text, np.array([0]), np.array([9]), drafting=True)
    torch.testing.assert_close(again, read)


@pytest.mark.parametrize("ladder", [(2, 6), (2, 4, 6)])
@pytest.mark.parametrize("drafter", ["exit", "recycle+exit"])
def test_the_text_is_that_of_plain_decoding(ladder, drafter, prompts):
    """Also where the text needs tokens that no exit may draft."""
    model = reduced_model()
    for temperature in (0.0, 0.9):
        common = dict(max_new_tokens=24, temperature=temperature, seed=1)
        expected = [decode_tokens(model, prompt, (6,), **common) for prompt in prompts]
        assert not np.isin(np.concatenate(expected), KEPT.numpy()).all()
        config = DecodeConfig(list(ladder), drafter=drafter, repetition_penalty=1.0, **common)
        assert Decode(model, prompts, config).finish() == expected


def test_only_tokens_of_the_vocabulary_are_drafted(prompts):
    """With rejection sampling too, where what was drafted counts."""
    model = reduced_model()
    for law in ("match", "rejection"):
        config = DecodeConfig([2, 6], max_new_tokens=30, temperature=1.0, verification=law, seed=2)
        decode = Decode(model, prompts, config)
        decode.finish()
        drafted = decode.state.tokens_BN[decode.state.depth_BN == 2]
        assert len(drafted) > 5
        assert np.isin(drafted, KEPT.numpy()).all()


def test_agreement_is_that_of_the_drafts():
    tokens = torch.randint(3, VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))
    rows = Rows.whole(tokens)
    model = reduced_model(kept=torch.arange(VOCAB))
    (whole,) = agreement(model, rows, [(4, 6)])
    tops = set(model.read(6, model.run(model.embed(tokens), 0, 6)).argmax(-1).flatten().tolist())
    never = torch.tensor([token for token in range(VOCAB) if token not in tops])
    (none,) = agreement(reduced_model(kept=never), rows, [(4, 6)])
    assert whole.top1 > 0.1
    assert none.top1 == 0
    assert none.acceptance < whole.acceptance


def test_the_most_frequent_tokens_are_taken():
    labels = torch.tensor([[7, 7, 7, -100, 3], [3, 9, 9, 1, -100]])
    assert frequent_tokens(labels, 3, 12).tolist() == [3, 7, 9]
    assert frequent_tokens(labels, 6, 12).tolist() == [0, 1, 2, 3, 7, 9]  # ties: the smaller ids


def test_training_chooses_stores_and_uses_it(tiny_base, texts, tmp_path):
    trainer = Trainer(load_recipe(settings(tiny_base, texts, tmp_path / "ee", draft_vocab=40)))
    trainer.train()
    chosen = frequent_tokens(trainer.loader.dataset.labels_RT, 40, 320)
    assert checkpoint.read_config(tmp_path / "ee")["draft_vocab"] == 40
    lm = load(tmp_path / "ee", device="cpu")
    assert torch.equal(lm.model.draft_tokens, chosen)
    prompt = "def read(path):"
    plain = lm.generate(prompt, ladder="plain", max_new_tokens=12)
    for reduced in (True, False):
        found = lm.generate(prompt, max_new_tokens=12, draft_vocab=reduced)
        assert found.tokens == plain.tokens
    export(tmp_path / "ee", tmp_path / "full", full=True)
    assert torch.equal(load(tmp_path / "full", device="cpu").model.draft_tokens, chosen)


def test_of_a_stream_the_first_block_chooses(tiny_base, texts, tmp_path):
    words = settings(tiny_base, texts, tmp_path / "ee", draft_vocab=40, streaming="true")
    trainer = Trainer(load_recipe(words))
    rows = TrainingRows(trainer.stream.first_block())
    assert torch.equal(trainer.model.draft_tokens, frequent_tokens(rows.labels_RT, 40, 320))
    first = trainer.stream.take(len(rows))
    assert torch.equal(first.tokens_RT, rows.rows.tokens_RT)


@pytest.mark.parametrize("ids", [[5, 5, 6], [6, 5, 7], [-1, 5, 6], [5, 6, 320]])
def test_a_vocabulary_that_is_none_is_refused(tiny_base, texts, tmp_path, ids):
    words = settings(tiny_base, texts, tmp_path / "ee", draft_vocab=3, steps=1)
    Trainer(load_recipe(words)).train()
    file, about = tmp_path / "ee" / checkpoint.EXITS, tmp_path / "ee" / checkpoint.CONFIG
    tensors = {**load_file(file), "draft_tokens": torch.tensor(ids, dtype=torch.int32)}
    save_file(tensors, file)
    config = read_json(about)
    config["files"][checkpoint.EXITS] = sha256(file)
    write_json(about, config)
    with pytest.raises(ValueError, match="draft_tokens must be increasing ids"):
        load(tmp_path / "ee", device="cpu")


def test_more_tokens_than_there_are_is_refused():
    with pytest.raises(ValueError, match=f"draft_vocab=99 is not possible: .* {VOCAB} tokens"):
        ExitModel(tiny_hf(), ExitConfig.of([2], "block", blocks=1, draft_vocab=99))
