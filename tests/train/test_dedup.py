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


def shingles_of(words):
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def test_the_threshold_is_a_jaccard_similarity():
    """Over random pairs of known similarity; the estimate deviates by sqrt(j (1 - j) / 128), which
    is 0.044 at most, and candidates of more than 0.5 are seldom overlooked."""
    chance = random.Random(3)
    vocabulary = [f"w{i}" for i in range(5000)]
    near = far = 0
    for _ in range(80):
        first = chance.sample(vocabulary, 120)
        cut = chance.randrange(10, 119)
        second = first[:cut] + chance.sample(vocabulary, 120 - cut)
        mine, other = shingles_of(first), shingles_of(second)
        true = len(mine & other) / len(mine | other)
        seen = SeenTexts(0.65)
        seen.add(" ".join(first))
        if true > 0.8:
            near += 1
            assert " ".join(second) in seen
        elif true < 0.5:
            far += 1
            assert " ".join(second) not in seen
    assert near > 5
    assert far > 20


def test_at_threshold_1_only_the_same_shingles_count():
    words = [f"w{i}" for i in range(200)]
    seen = SeenTexts(1)
    seen.add(" ".join(words))
    assert " ".join(words).upper() in seen
    assert " ".join([*words[:100], "other", *words[101:]]) not in seen
    assert "" not in seen
    seen.add("")
    assert " " in seen


def test_repetition_is_the_share_of_repeated_ngrams():
    assert seq_rep([1, 2, 3]) == 0
    assert seq_rep(list(range(100))) == 0
    assert seq_rep([1, 2, 3, 4] * 25) == pytest.approx(1 - 4 / 97)
    assert seq_rep([*range(50), *range(50)]) == pytest.approx(47 / 97)
