"""Settings that the evaluations share, with their types and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from hispec.utils.limits import at_most
from hispec.utils.schema import STRICT

HELD_OUT = "held-out"

Name = Annotated[str, Field(min_length=1)]
"""Name of a file, folder or model."""
HeldOutShare = Annotated[float, Field(gt=0, lt=1)]
SeqLen = Annotated[
    int,
    Field(ge=2),
    at_most(2**20, "memory grows with a row's tokens, that of its attention with their square"),
]
Sequences = Annotated[
    int, Field(ge=1), at_most(2**20, "every model that is measured runs over all of these rows")
]
MaxNewTokens = Annotated[
    int, Field(ge=1), at_most(2**17, "plain decoding runs the full model once for each of them")
]
BatchRows = Annotated[
    int, Field(ge=1), at_most(4096, "the memory of a pass grows with its rows, each has a KV cache")
]


@dataclass
class TextSource:
    """Held-out text. What is None is taken from the checkpoint's recipe, so that nothing is
    measured on text of the training; without a recipe it is Python's standard library."""

    __pydantic_config__ = STRICT

    data: Name | None = None
    """`stdlib`, a local file or folder, or a Hub dataset id."""
    data_split: Name | None = None
    """Split of a Hub dataset."""
    text_column: Name | None = None
    """Column that holds a text or a chat."""
    held_out: HeldOutShare | None = None
    """Share of the documents that is held out."""
    streaming: bool | None = None
    """Read only as much of `data` as is needed. The held-out documents are others than those of a
    source that is read at once."""


@dataclass
class PromptSource(TextSource):
    """Prompts to decode."""

    prompts_from: Name = HELD_OUT
    """`held-out`: the beginnings of held-out documents; `builtin`: prompts of the package;
    `spec-bench`, `humaneval`, `gsm8k`, `cnn-dm`, `xsum`, `sharegpt`; or a local JSONL file of such
    rows, or of rows as in `hispec.data.prompts.to_prompt`."""
    prompts: Annotated[
        int, Field(ge=1), at_most(10**6, "each prompt is decoded with every setting")
    ] = 6
    """Number of prompts, spread evenly over the tasks of a set."""
    chat: bool | None = None
    """Whether to apply the chat template; default: to questions, if the tokenizer has one."""
    prompt_tokens: Annotated[
        int, Field(ge=1), at_most(2**17, "memory and time of a prefill grow with its tokens")
    ] = 64
    """Length of a held-out document's beginning."""
    max_new_tokens: MaxNewTokens = 64
