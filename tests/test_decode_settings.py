"""DecodeConfig and ExitConfig: every value is used as it is, or refused in one kind of message."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

import hispec
from hispec.config import DRAFTERS, VERIFICATIONS, DecodeConfig, Exit, ExitConfig
from hispec.generation import generate

PROMPT = "def main():\n    return"
NAMES = [field.name for field in fields(DecodeConfig)]
ODD: list[Any] = [
    *(None, True, 2, -1, 0, 1.5, -0.5, math.inf, math.nan, 10**30, -(10**30), 10**5000),
    *("", "exit", "6", "\udcff", b"x", [], [2.9, 6], [[2], 6], (6,), {}, {"a": 1}, object(), len),
]


def refusal(call: Callable[[], Any]) -> str | None:
    """The message of the ValueError that a call ends in. Any other error is a fault."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("key", NAMES)
def test_odd_values_are_used_as_they_are_or_refused(key):
    """A check of the value alone let some through, and died in a TypeError at others."""
    hint = DecodeConfig.__dataclass_fields__[key].type
    for value in ODD:
        config = DecodeConfig(**{"ladder": [2, 6], key: value})
        message = refusal(lambda config=config: config.validate(6))
        if message is not None:
            assert message.startswith((key, "max_draft_length=", "lookup_shortest="))
            assert " is not possible: " in message
            assert "\n" not in message
        elif isinstance(value, bool):  # no number is taken for a switch, no switch for a number
            assert key in ("adaptive", "draft_vocab", "join_drafts")
        elif isinstance(value, float):
            assert "int" not in hint


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ladder": [2.9, 6]}, r"ladder\[0\]=2.9 is not possible: a whole number"),
        ({"ladder": 6}, "ladder=6 is not possible: a list"),
        ({"ladder": [True, 6]}, r"ladder\[0\]=True is not possible: a whole number"),
        ({"draft_length": 1.5}, "draft_length=1.5 is not possible: a whole number"),
        ({"draft_vocab": 2}, "draft_vocab=2 is not possible: true or false"),
        ({"temperature": math.inf}, "temperature=inf is not possible: a finite number"),
        ({"temperature": math.nan}, "temperature=nan is not possible: a finite number"),
        ({"max_time": math.inf}, "max_time=inf is not possible: a finite number"),
        ({"tree_tokens": 100_000}, "tree_tokens=100000 is not possible: at most 512: one pass"),
        ({"draft_length": 257}, "draft_length=257 is not possible: at most 256: an exit runs"),
        ({"max_new_tokens": 10**9}, "at most 131,072: the KV cache has room for all of them"),
        ({"seed": 10**5000}, "seed=a number of thousands of digits is not possible"),
        ({"eos": ["</s>"]}, r"eos\[0\]='</s>' is not possible: a whole number"),
    ],
)
def test_messages_name_the_key_and_what_is_allowed(changed, message):
    with pytest.raises(ValueError, match=message):
        DecodeConfig(**{"ladder": [2, 6], **changed}).validate(6)


def counts(most: int) -> st.SearchStrategy[int]:
    return st.integers(1, most)


VALID = st.fixed_dictionaries(
    {"ladder": st.sets(st.integers(1, 5)).map(lambda found: [*sorted(found), 6])},
    optional={
        "drafter": st.sampled_from(DRAFTERS),
        "draft_length": counts(256),
        "adaptive": st.booleans(),
        "draft_threshold": st.floats(0, 1),
        "draft_vocab": st.booleans(),
        "join_drafts": st.booleans(),
        "lookup_length": counts(512),
        "max_lookup_length": st.none() | counts(512),
        "lookup_ngram": counts(1024),
        "tree_tokens": counts(512),
        "buffer": counts(1024),
        "buffer_threshold": st.floats(0, 1),
        "max_new_tokens": counts(2**17),
        "max_time": st.none() | st.floats(1e-9, 1e9),
        "verification": st.sampled_from(VERIFICATIONS),
        "temperature": st.just(0) | st.floats(1e-3, 100),
        "top_k": st.none() | counts(10**6),
        "top_p": st.none() | st.floats(0.01, 1),
        "min_p": st.none() | st.floats(0, 1),
        "repetition_penalty": st.floats(0.01, 1000),
        "no_repeat_ngram_size": st.integers(0, 100),
        "seed": st.integers(0, 2**64 - 1),
        "eos": st.lists(st.integers(0, 50_000)),
    },
)


@fuzz("decode settings, valid", 100)
@given(VALID)
def test_valid_settings_are_left_as_they_are(found):
    """Refused at most because two settings do not go together."""
    config = DecodeConfig(**found)
    message = refusal(lambda: config.validate(6))
    if message is not None:
        assert message.startswith(("ladder=", "verification="))
        assert "drafter" in message
    assert {key: getattr(config, key) for key in found} == found


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=9,
)


@fuzz("decode settings, hostile", 300)
@given(VALID, st.sampled_from(NAMES), ANYTHING)
def test_hostile_settings_end_in_a_value_error_or_not_at_all(found, key, value):
    config = DecodeConfig(**{**found, key: value})
    message = refusal(lambda: config.validate(6))
    if message is not None:
        assert " is not possible: " in message
        assert len(message) < 500


@fuzz("exit settings, hostile", 100)
@given(st.sampled_from([field.name for field in fields(ExitConfig)]), ANYTHING)
def test_hostile_exits_end_in_a_value_error_or_not_at_all(key, value):
    config = ExitConfig(**{"exits": [Exit(2), Exit(4)], key: value})
    message = refusal(lambda: config.validate(6))
    assert message is None or " is not possible: " in message


@fuzz("fields of an exit, hostile", 100)
@given(st.sampled_from([field.name for field in fields(Exit)]), ANYTHING)
def test_hostile_fields_of_an_exit_end_in_a_value_error_or_not_at_all(key, value):
    message = refusal(lambda: ExitConfig([Exit(**{"depth": 2, key: value})]).validate(6))
    assert message is None or " is not possible: " in message


ARGUMENTS = [
    *("prompts", "chat", "stop_strings", "seeds", "logits_processor", "stopping_criteria"),
    *("streamer", "ladder"),
]


@pytest.mark.parametrize("key", ARGUMENTS)
def test_odd_arguments_of_calls_are_refused(lm, key):
    for value in ODD:
        words = {"prompts": PROMPT, "max_new_tokens": 1, "chat": False, key: value}
        message = refusal(lambda words=words: lm.generate(**words))
        if message is not None:
            assert key.removesuffix("s") in message
            assert "is not possible" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": None}, "prompts=None is not possible: a list"),
        ({"prompts": ["a", None]}, r"prompts\[1\]=None is not possible: a text"),
        ({"prompts": "a\udcff"}, "prompt is not possible: character 1 is half of a pair"),
        ({"prompts": [], "drafter": "exit"}, "give at least one prompt"),
        ({"seeds": 5}, "seeds=5 is not possible: a list"),
        ({"seeds": [1.5]}, r"seeds\[0\]=1.5 is not possible: a whole number"),
        ({"ladder": 6}, "ladder=6 is not possible: depths, 'auto' or 'plain'"),
        ({"ladder": [2.9, 6]}, r"ladder\[0\]=2.9 is not possible"),
        ({"stop_strings": 5}, "stop_strings=5 is not possible: a list"),
        ({"chat": 1}, "chat=1 is not possible: true or false"),
        ({"streamer": 5}, "streamer=5 is not possible: a streamer of transformers"),
        ({"logits_processor": [5]}, r"logits_processor\[0\]=5 is not possible"),
    ],
)
def test_arguments_of_calls(lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(**{"prompts": PROMPT, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": None}, "path=None is not possible: a folder or a name"),
        ({"path": ""}, "path='' is not possible: a folder or a name"),
        ({"device": "meta"}, "device='meta' is not possible here"),
        ({"device": "abacus"}, "device='abacus' is not possible here"),
        ({"dtype": "int4"}, "dtype='int4' is not possible: one of auto"),
        ({"exits": (4, 2)}, "increasing depths, none twice"),
        ({"exits": [2.0]}, r"exits\[0\].depth=2.0 is not possible: a whole number"),
        ({"exits": 2}, "exits=2 is not possible: a list"),
    ],
)
def test_arguments_of_load(tiny_base, arguments, message):
    with pytest.raises(ValueError, match=message):
        hispec.load(**{"path": tiny_base, "device": "cpu", **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ladder": 6}, "ladder=6 is not possible: a list"),
        ({"ladder": [2.9, 6]}, r"ladder\[0\]=2.9 is not possible: a whole number"),
        ({"seed": "x", "do_sample": True}, "seed='x' is not possible: a whole number"),
        ({"draft_length": 1.5}, "draft_length=1.5 is not possible: a whole number"),
        ({"verification": None}, "verification=None is not possible: a text"),
    ],
)
def test_arguments_of_generate_in_transformers(full, arguments, message):
    """They reached torch, which raised a TypeError or cut them."""
    lm = hispec.load(full, device="cpu")
    inputs = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=message):
        generate(lm.model.hf, inputs=inputs, exits_from=str(full), max_new_tokens=2, **arguments)
