"""`rejection`: the law of the output is the target's, by enumeration and by sampling."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import tiny_model

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.decoding.sampling import to_log_probs
from hispec.decoding.verification import RejectionSampler

VOCAB = 3
PROMPT = [1, 0, 2, 2]


@pytest.fixture(scope="module")
def model():
    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2,
                 num_key_value_heads=1, layers=3, vocab_size=VOCAB)  # fmt: skip
    return tiny_model(exits=(1, 2), head="shared", seed=3, **sizes)


class Enumerator(RejectionSampler):
    """Takes every random decision from a list, and remembers how likely each was.

    The decisions are a path through a tree; `following` is the next path of a depth-first walk.
    """

    def __init__(self, config, shape, device, path):
        super().__init__(config, shape, device)
        self.path, self.options = list(path), []
        self.inner = False

    def decide(self, chances):
        possible = [(i, chance) for i, chance in enumerate(chances) if chance > 0]
        at = len(self.options)
        if at == len(self.path):
            self.path.append(0)
        self.options.append(possible)
        return possible[self.path[at]][0]

    def accept(self, ratio_BN):
        accepted = torch.zeros(ratio_BN.shape, dtype=torch.bool)
        for column, ratio in enumerate(ratio_BN[0].clamp(max=1).tolist()):
            accepted[0, column] = self.decide([1 - ratio, ratio])
            if not accepted[0, column]:
                break  # what comes after a rejected draft token is never read
        return accepted

    def sample(self, probs_BV):
        return np.array([self.decide(probs_BV[0].double().tolist())])

    @property
    def probability(self):
        return np.prod([o[i][1] for o, i in zip(self.options, self.path, strict=True)])

    @property
    def following(self):
        path = list(self.path)
        while path and path[-1] + 1 == len(self.options[len(path) - 1]):
            path.pop()
        return [*path[:-1], path[-1] + 1] if path else None


class DrawsFromVerifier(Enumerator):
    """The known bug: what the inner verifier rejects is drawn anew from p_v, not the residual."""

    def residual(self, probs_BV, proposed_BV):
        return probs_BV if self.inner else super().residual(probs_BV, proposed_BV)


def _verify(run, walk, verify, rung, draft):
    walk.inner = rung < run.state.last
    verify(rung, draft)


def output_law(model, config: DecodeConfig, sampler=Enumerator) -> dict[tuple[int, ...], float]:
    """Probability of every output, summed over all outcomes of all random decisions."""
    law: dict[tuple[int, ...], float] = {}
    path: list[int] | None = []
    while path is not None:
        run = Decode(model, [PROMPT], config)
        run.sampler = walk = sampler(config, run.sampler._probs_BNV.shape, model.device, path)
        run._verify = partial(_verify, run, walk, run._verify)
        text = tuple(run.finish()[0])
        law[text] = law.get(text, 0) + walk.probability
        path = walk.following
    return law


def target_law(model, config: DecodeConfig) -> dict[tuple[int, ...], float]:
    """Probability of every text of full length by the full model alone."""
    law = {}
    for text in itertools.product(range(VOCAB), repeat=config.max_new_tokens):
        with torch.inference_mode():
            logits = model.hf(torch.tensor([[*PROMPT, *text]])).logits[0, len(PROMPT) - 1 : -1]
        steps = to_log_probs(logits, config).double()
        law[text] = steps[range(len(text)), list(text)].sum().exp().item()
    return law


def error(law, target):
    return max(abs(law.get(text, 0) - target.get(text, 0)) for text in law.keys() | target.keys())


BASE = DecodeConfig([3], verification="rejection", temperature=1.3, max_new_tokens=3)
CASES = {
    "two rungs": dict(ladder=[1, 3], max_new_tokens=4),
    "two rungs, confident drafts": dict(
        ladder=[1, 3], draft_length=3, draft_threshold=0.5, max_new_tokens=4
    ),
    "three rungs": dict(ladder=[1, 2, 3], draft_length=1, buffer=2),
    "three rungs, unsure verifier": dict(
        ladder=[1, 2, 3], draft_length=2, buffer=9, buffer_threshold=0.5
    ),
    "lookup": dict(ladder=[2, 3], drafter="lookup", lookup_shortest=1, buffer=2),
    "lookup, then the exit": dict(
        ladder=[1, 3], drafter="lookup+exit", lookup_length=2, max_new_tokens=4
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_output_law_is_the_targets(model, case):
    config = replace(BASE, **case)
    law, target = output_law(model, config), target_law(model, config)
    assert sum(law.values()) == pytest.approx(1, abs=1e-6)
    assert error(law, target) < 1e-6


def test_drawing_from_the_verifier_would_be_seen(model):
    config = replace(BASE, **CASES["three rungs"])
    law = output_law(model, config, DrawsFromVerifier)
    assert error(law, target_law(model, config)) > 0.001  # a thousand times what is allowed


@pytest.mark.parametrize("case", ["two rungs", "three rungs", "lookup, then the exit"])
def test_sampled_texts_follow_the_targets_law(model, case):
    """Chi-square over 200,000 texts of 3 tokens; the seeds are fixed."""
    rows, decodes = 4000, 50
    config = replace(BASE, **{**CASES[case], "max_new_tokens": 3})
    target = target_law(model, config)
    counts = dict.fromkeys(target, 0)
    for seed in range(decodes):
        for text in Decode(model, [PROMPT] * rows, replace(config, seed=seed)).finish():
            counts[tuple(text)] += 1
    expected = {text: chance * rows * decodes for text, chance in target.items()}
    assert min(expected.values()) > 5
    chi_square = sum((counts[text] - expected[text]) ** 2 / expected[text] for text in target)
    assert chi_square < 54.1  # 0.999 quantile at 26 degrees of freedom


def test_greedy_rejection_is_greedy(model):
    config = DecodeConfig([1, 2, 3], verification="rejection", max_new_tokens=30)
    expected = Decode(model, [PROMPT], replace(config, ladder=[3], verification="match")).finish()
    assert Decode(model, [PROMPT], config).finish() == expected


def test_rejection_accepts_more_than_match_at_high_temperature(model):
    accepted = {}
    for law in ("match", "rejection"):
        config = DecodeConfig([1, 3], verification=law, temperature=1.5, max_new_tokens=60)
        run = Decode(model, [PROMPT] * 50, config)
        run.finish()
        accepted[law] = run.stats.rungs[0].acceptance
    assert accepted["rejection"] > accepted["match"]
