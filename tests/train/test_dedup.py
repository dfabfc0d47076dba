"""Nothing twice: texts that are nearly the same, and repetition within one."""

from __future__ import annotations

import random

import pytest

from train.dedup import SeenTexts, seq_rep


def test_duplicates_are_found():
    seen = SeenTexts(0.7)
    text = "The quick brown fox jumps over the lazy dog near the old river bank at dawn every day."
    seen.add(text)
    assert "  the QUICK brown fox jumps over\nthe lazy dog near the old river bank at dawn every day." in seen  # noqa: E501  # fmt: skip
    assert text.replace("every day", "every night") in seen
    assert "A slow green turtle walks under the lazy dog near the old bridge at noon." not in seen
    assert "What is 3 + 4?" not in seen
    seen.add("What is 3 + 4?")
    assert "what is 3 + 4 ?" in seen
    assert "What is 3 - 4?" not in seen


def test_minhash_estimates_the_jaccard_similarity():
    """Over random pairs of known similarity; the deviation is sqrt(j (1 - j) / 128), to 0.044."""
    chance = random.Random(3)
    vocabulary = [f"w{i}" for i in range(5000)]
    for _ in range(30):
        first = chance.sample(vocabulary, 120)
        cut = chance.randrange(10, 110)
        second = first[:cut] + chance.sample(vocabulary, 120 - cut)
        shingles = [{tuple(t[i : i + 3]) for i in range(118)} for t in (first, second)]
        true = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
        seen = SeenTexts(0.5)
        estimate = (seen._signature(first) == seen._signature(second)).mean()
        assert abs(estimate - true) < 0.2


def test_repetition_is_the_share_of_repeated_ngrams():
    assert seq_rep([1, 2, 3]) == 0
    assert seq_rep(list(range(100))) == 0
    assert seq_rep([1, 2, 3, 4] * 25) == pytest.approx(1 - 4 / 97)
    assert seq_rep([*range(50), *range(50)]) == pytest.approx(47 / 97)
