"""ExitModel against transformers: any cut of the trunk gives the model's own logits."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import VOCAB, decode_tokens, tiny_config, tiny_hf, tiny_model

from hispec.config import ExitConfig
from hispec.decoding.ladder import Ladder
from hispec.models.architectures import check_supported
from hispec.models.exit_model import ExitModel


def sequence(length: int = 19, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_two_runs_equal_the_whole_model(family, cut):
    hf = tiny_hf(family)
    model, tokens = ExitModel(hf), sequence()
    with torch.inference_mode():
        expected = hf(tokens, use_cache=False).logits
        hidden = model.run(model.run(model.embed(tokens), 0, cut), cut, 6)
        torch.testing.assert_close(model.logits(6, hidden), expected, rtol=0, atol=1e-6)


def test_every_depth_equals_the_recorded_hidden_state(family):
    hf = tiny_hf(family)
    model, tokens = ExitModel(hf), sequence()
    with torch.inference_mode():
        recorded = hf(tokens, output_hidden_states=True, use_cache=False).hidden_states
        hidden = model.embed(tokens)
        for depth in range(6):  # the last recorded state is after the final norm
            torch.testing.assert_close(hidden, recorded[depth], rtol=0, atol=1e-6)
            hidden = model.run(hidden, depth, depth + 1)


@pytest.mark.parametrize("depths", [(6,), (2, 6), (1, 3, 6)])
def test_cached_passes_equal_one_uncached_pass(family, depths):
    """Any chunks, a window shorter than the text, trained blocks at the exits."""
    model = tiny_model(family, exits=(1, 3))
    tokens = sequence(rows=1)
    ladder = Ladder(model, depths, rows=1, capacity=32)
    with torch.inference_mode():
        hidden, expected = model.embed(tokens), {}
        for depth in range(1, 7):
            hidden = model.run(hidden, depth - 1, depth)
            expected[depth] = model.logits(depth, hidden)[0]
        done = 0
        for upto, rung in [(4, 0), (5, len(depths) - 1), (11, 0), (12, 0), (19, len(depths) - 1)]:
            start = int(ladder.cache.length(("head", rung))[0]) if ladder.head_layers(rung) else 0
            first = max(done, start)
            logits = ladder.logits(rung, tokens.numpy(), np.array([first]), np.array([upto]))[0]
            torch.testing.assert_close(
                logits, expected[depths[rung]][first:upto], rtol=1e-4, atol=1e-4
            )
            done = upto if rung else done


def test_truncate_and_rerun_equals_a_fresh_run(family):
    """Ragged rung lengths, then other tokens over the rolled-back ones."""
    model = tiny_model(family, exits=(2, 4))
    first, second = sequence(rows=1), sequence(rows=2)[1:]
    second[:, :9] = first[:, :9]
    used = Ladder(model, (2, 4, 6), rows=1, capacity=32)
    at = lambda n: np.array([n])  # noqa: E731
    with torch.inference_mode():
        used.logits(0, first.numpy(), at(15), at(16))
        used.logits(1, first.numpy(), at(12), at(13))
        used.logits(2, first.numpy(), at(6), at(7))
        used.truncate(at(9))
        lengths = {track: int(length[0]) for track, length in used.cache.lengths.items()}
        assert lengths == {
            ("segment", 0): 9,
            ("head", 0): 9,
            ("segment", 1): 9,
            ("head", 1): 9,
            ("segment", 2): 7,
        }
        fresh = Ladder(model, (2, 4, 6), rows=1, capacity=32)
        for rung in (0, 1, 2):
            again = used.logits(rung, second.numpy(), at(9), at(19))
            anew = fresh.logits(rung, second.numpy(), at(9), at(19))
            torch.testing.assert_close(again, anew, rtol=1e-5, atol=1e-5)


def test_generate_of_transformers_is_untouched_by_a_decode(family):
    hf = tiny_hf(family)
    before = hf.config._attn_implementation
    ladder = Ladder(ExitModel(hf), (3, 6), rows=1, capacity=32)
    with torch.inference_mode():
        ladder.logits(1, sequence(rows=1).numpy(), np.array([0]), np.array([5]))
    assert hf.config._attn_implementation == before


def test_block_heads_start_as_the_top_of_the_model():
    """A fresh head at depth L - 2 of a model is that model."""
    model, tokens = tiny_model(exits=(4,)), sequence()
    with torch.inference_mode():
        hidden = model.run(model.embed(tokens), 0, 4)
        exit_logits = model.logits(4, hidden)
        final_logits = model.logits(6, model.run(hidden, 4, 6))
    torch.testing.assert_close(exit_logits, final_logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            dict(model_type="gpt2"),
            r"model_type='gpt2' is not supported; supported: llama, .*granite",
        ),
        (dict(model_type="mamba"), "keep a running state, from which a rejected draft cannot"),
        (dict(model_type="new", layer_types=["linear_attention"]), "keep a running state"),
        (dict(model_type="new", expert_capacity=4), "its experts drop tokens by capacity"),
    ],
)
def test_unsupported_architectures_are_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        check_supported(SimpleNamespace(**config))


def test_texts_end_before_the_rotary_frequencies_change():
    """longrope takes other frequencies for all positions past the original context."""
    parameters = dict(
        rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4,
        original_max_position_embeddings=20,
    )  # fmt: skip
    model = ExitModel(
        tiny_hf("phi3", rope_parameters=parameters, original_max_position_embeddings=20)
    )
    assert model.longest_text == 20
    assert len(decode_tokens(model, [3] * 10, (2, 6), max_new_tokens=10)) == 10
    with pytest.raises(ValueError, match="up to 21 tokens, and from 20 on"):
        decode_tokens(model, [3] * 11, (2, 6), max_new_tokens=10)


def test_another_architecture_is_refused_by_name():
    from transformers import AutoModelForCausalLM

    config = tiny_config("gpt2", n_layer=2, n_head=4, n_embd=32)
    with pytest.raises(ValueError, match=r"gpt2.*supported: llama, mistral"):
        ExitModel(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        (ExitConfig.of([6]), "depth 6 is the full model"),
        (ExitConfig.of([0]), "depth=0 is not possible: depth 0 holds one token alone"),
        (ExitConfig.of([3, 2]), "increasing"),
        (ExitConfig.of([2], "mlp"), "head='mlp'"),
        (ExitConfig.of([2], "block", blocks=9), "blocks=9"),
    ],
)
def test_impossible_exits_are_refused(exits, message):
    with pytest.raises(ValueError, match=message):
        ExitModel(tiny_hf(), exits)
