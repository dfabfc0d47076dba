"""Laws and noise: exact draws, the same on every rung."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from hispec.config import DecodeConfig
from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.sampling import NucleusWarper, gumbel_noise, to_log_probs
from hispec.decoding.verification import MatchSampler, verify_match


def config(**law) -> DecodeConfig:
    return DecodeConfig([1], **law)


def test_greedy_law_is_one_hot_on_the_first_of_a_tie():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert to_log_probs(logits, config()).exp().tolist() == [[0, 1, 0, 0]]
    assert MatchSampler(config()).draw(logits, np.array([5])).tolist() == [1]


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 0, 3 / 7, 4 / 7]),
        ({"temperature": 1.0, "min_p": 0.6}, [0, 0, 3 / 7, 4 / 7]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, [0, 0, 3 / 7, 4 / 7]),
    ],
)
def test_laws_by_hand(law, expected):
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    law = to_log_probs(logits, config(**law)).exp()
    torch.testing.assert_close(law, torch.tensor([expected]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_top_p_keeps_what_transformers_keeps(top_p, spread):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 4096, generator=generator) * spread
    scores[1, :4000] = -torch.inf  # as top-k leaves them
    kept = NucleusWarper(top_p)(None, scores)
    if spread:
        assert torch.equal(kept, TopPLogitsWarper(top_p)(None, scores))
    else:  # tokens of the same score stay together
        assert torch.equal(kept, scores)
    alone = [NucleusWarper(top_p)(None, row[None]) for row in scores]
    assert torch.equal(kept, torch.cat(alone))


def test_choices_follow_the_law():
    """Chi-square over 20,000 positions; the seed is fixed, so the test is deterministic."""
    law = torch.tensor([0.02, 0.08, 0.2, 0.3, 0.4])
    sampler = MatchSampler(config(temperature=1.0, seed=11))
    count = 20_000
    counts = np.zeros(5)
    for position in range(count):
        counts[sampler.draw(law.log()[None], np.array([position]))[0]] += 1
    expected = law.numpy() * count
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # 0.999 quantile at 4 degrees of freedom


def test_noise_depends_on_seed_and_position_alone():
    first = gumbel_noise(3, 7, 1000)
    assert torch.equal(first, gumbel_noise(3, 7, 1000))
    for seed, position in ((3, 8), (4, 7), (7, 3), (0, 0), (2**62, 7)):
        other = gumbel_noise(seed, position, 1000)
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.12
    assert abs(first.mean() - 0.5772) < 0.15
    assert abs(first.std() - 1.2825) < 0.15


def test_a_sampler_gives_a_position_the_same_noise_again_and_after_many_others():
    logits = torch.zeros(1, 50)
    sampler = MatchSampler(config(temperature=1.0, seed=5))
    first = sampler.draw(logits, np.array([3]))
    assert sampler.draw(logits, np.array([3])) == first
    for position in range(4, 200):
        sampler.draw(logits, np.array([position]))
    assert sampler.draw(logits, np.array([3])) == first


def test_verify_match_counts_the_leading_run_of_a_chain():
    choice = np.array([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [9, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
    proposed = np.array([[1, 2, 9, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    chain = DraftTree.chain_of(proposed, np.array([4, 4, 4, 2]))
    verdict = verify_match(choice, chain)
    assert verdict.accepted_B.tolist() == [2, 4, 0, 2]
    assert verdict.token_B.tolist() == [3, 5, 9, 3]


def test_verify_match_follows_a_tree():
    """Column 0 has the children 1 and 2, column 2 the children 3 and 4, column 4 the child 5."""
    parents = np.array([[0, 0, 2, 2, 4]] * 3)
    tokens = np.array([[7, 8, 7, 9, 5]] * 3)
    tree = DraftTree(tokens, parents, chain=False)
    assert tree.depth_BC[0].tolist() == [0, 1, 1, 2, 2, 3]
    assert tree.path_BCD[0, 5, :3].tolist() == [2, 4, 5]
    assert np.flatnonzero(tree.sees_BNN[0, 4]).tolist() == [1, 3, 4]
    choice = np.array([[8, 0, 9, 0, 5, 1], [7, 8, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]])
    verdict = verify_match(choice, tree)
    assert verdict.accepted_B.tolist() == [3, 1, 0]
    assert verdict.path_BD[0].tolist() == [2, 4, 5]
    assert verdict.path_BD[1, 0] == 1
    assert verdict.token_B.tolist() == [1, 8, 4]
