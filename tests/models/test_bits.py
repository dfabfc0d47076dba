"""bf16 on a CPU: a token gets the same bits in a tree as in plain decoding, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import VOCAB, tiny_model

from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.ladder import Ladder
from hispec.models import attention


def random_tree(rng: np.random.Generator, sizes: list[int]) -> DraftTree:
    """A tree per row, depth first, with as many tokens as `sizes` say."""
    parent_BN = np.full((len(sizes), max(sizes)), -1)
    for row, size in enumerate(sizes):
        path = [0]
        for i in range(size):
            if rng.random() < 0.5:
                path = path[: rng.integers(1, len(path) + 1)]
            parent_BN[row, i] = path[-1]
            path = [*path, i + 1]
    return DraftTree(rng.integers(3, VOCAB, parent_BN.shape), parent_BN, chain=False)


def logits(ladder: Ladder, rung: int, texts_BN, base_B, tree=None) -> torch.Tensor:
    """[B, C, V] after the last agreed token (and the tree behind it); the cache goes back then."""
    upto_B = base_B + (tree.count_B if tree else 0)
    found = ladder.logits(rung, texts_BN, base_B - 1, upto_B, tree)
    ladder.truncate(base_B - 1)
    return found


def differing(model, sizes: list[int], lengths: list[int], seed: int) -> tuple[int, int]:
    """(columns whose logits differ from those of their path token by token, columns compared)."""
    rng = np.random.default_rng(seed)
    tree, base_B = random_tree(rng, sizes), np.array(lengths)
    texts_BN = rng.integers(3, VOCAB, (len(sizes), max(lengths) + 20))
    with torch.inference_mode():
        ladder = Ladder(model, [2, 6], len(sizes), texts_BN.shape[1])
        ladder.prefill(texts_BN, base_B)
        ladder.truncate(base_B - 1)
        treed_BN = texts_BN.copy()
        for row, base in enumerate(lengths):
            treed_BN[row, base : base + sizes[row]] = tree.tokens_BN[row, : sizes[row]]
        found = {r: logits(ladder, r, treed_BN, base_B, tree) for r in (0, 1)}
        bad = compared = 0
        for row, size in enumerate(sizes):
            alone = Ladder(model, [2, 6], 1, texts_BN.shape[1])
            alone.prefill(texts_BN[row : row + 1], base_B[row : row + 1])
            for column in range(size + 1):
                path = tree.path_BCD[row, column][: tree.depth_BC[row, column]]
                text_1N = texts_BN[row : row + 1].copy()
                text_1N[0, lengths[row] : lengths[row] + len(path)] = tree.tokens_BN[row, path - 1]
                for rung in (0, 1):
                    alone.truncate(base_B[row : row + 1] - 1)
                    for stop in range(lengths[row], lengths[row] + len(path) + 1):
                        first, upto = np.array([stop - 1]), np.array([stop])
                        expected = alone.logits(rung, text_1N, first, upto)[0, 0]
                    bad += not torch.equal(found[rung][row, column], expected)
                    compared += 1
    return bad, compared


# AMX multiplies 32 numbers at a time; a narrower head's products are padded, and round otherwise.
WIDE = dict(hidden_size=128, head_dim=32)


@pytest.fixture(scope="module", params=["block", "shared"])
def head(request) -> str:
    return request.param


def test_a_tree_gets_the_bits_of_plain_decoding(family, head):
    """Sliding windows, exit blocks, small and large trees, tile borders."""
    model = tiny_model(family, exits=(2,), head=head, **WIDE).bfloat16()
    for seed, (size, length) in enumerate([(12, 30), (15, 58), (5, 13), (6, 120)]):
        assert differing(model, [size], [length], seed)[0] == 0, (size, length)


def test_a_single_token_gets_the_bits_of_larger_passes():
    """`F.linear` of more than 1,024 inputs rounds a single row differently with AVX-512 bf16."""
    wide = dict(hidden_size=1152, intermediate_size=2048, head_dim=32)
    model = tiny_model("llama", exits=(2,), **wide).bfloat16()
    for seed, (size, length) in enumerate([(3, 30), (1, 61)]):
        assert differing(model, [size], [length], seed)[0] == 0, (size, length)


def test_rows_of_unlike_trees_and_lengths_get_the_bits_that_they_get_alone(family, head):
    """With AMX, rare columns of passes over several rows round differently (docs/decisions.md)."""
    model = tiny_model(family, exits=(2,), head=head, **WIDE).bfloat16()
    for seed, (sizes, lengths) in enumerate([([5, 0, 7], [13, 40, 62]), ([1, 6], [9, 120])]):
        bad, compared = differing(model, sizes, lengths, seed)
        assert bad <= (compared // 5 if torch.cpu._is_amx_tile_supported() else 0), (sizes, lengths)


def test_attention_gives_a_token_the_same_bits_in_any_small_pass():
    """Processors with AMX round a pass of 66 rows (22 tokens, 3 heads per KV head) differently from
    one of 32, those without it the last rows of a pass unless they come in fours."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.arange(304) <= torch.arange(282, 304)[:, None]
    mask = torch.zeros(22, 304, dtype=torch.bfloat16).masked_fill_(~seen, float("-inf"))
    for _ in range(20):
        query = torch.randn(1, 9, 22, 64, generator=generator).mul(2).bfloat16()
        key, value = torch.randn(2, 1, 3, 304, 64, generator=generator).bfloat16()

        def attend(tokens: slice, q=query, k=key, v=value) -> torch.Tensor:
            grouped = attention.padded_rows(mask[tokens].repeat(3, 1)[None, None])
            return attention.masked_attention(None, q[:, :, tokens], k, v, grouped)[0]

        one_by_one = torch.cat([attend(slice(t, t + 1)) for t in range(22)], dim=1)
        assert torch.equal(attend(slice(0, 22)), one_by_one)
