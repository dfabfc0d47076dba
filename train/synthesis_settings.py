"""Settings of `train/synthesize.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from omegaconf import MISSING
from pydantic import Field

from hispec.config import BACKENDS, DRAFTERS, EAGER
from hispec.utils.limits import Seed, Temperature, Threads, at_most, ending_in, one_of
from hispec.utils.schema import STRICT, validate
from hispec.utils.settings import check

NO_DRAFTER = "none"
_CACHE = "each one holds its own KV cache"
_TIME = "at 100 tokens a second it takes hours"


@dataclass
class Settings:
    """Which model generates, from which prompts, how, and which samples are kept. Lengths are in
    tokens."""

    __pydantic_config__ = STRICT

    base: str = MISSING
    """A name that `hispec fetch` knows, a Hub id, a folder, or an EE checkpoint, whose full model
    generates."""
    output: Annotated[str, ending_in(".jsonl")] = MISSING
    """JSONL file; `OUTPUT.meta.json` beside it holds the settings and the progress."""
    samples: Annotated[int, Field(ge=1), at_most(10**9, "a month makes millions")] | None = None
    """Samples to generate, from number 0 on; dropped ones count. Default: one for each prompt of
    the file, or 1000. A finished run continues if it is raised."""
    shard: Annotated[int, Field(ge=0)] = 0
    """This process generates the samples whose number modulo `shards` is this, into a file of its
    own (a folder of such files can be trained on); duplicates are looked for in that file alone."""
    shards: Annotated[int, Field(ge=1), at_most(10**6, "each is a process")] = 1

    prompts: str | None = None
    """JSONL of prompts (`turns`, `question`, `messages`, or `prompt`, which is continued as it is),
    taken in order, again and again; default: the model invents them."""

    temperature: Temperature = 0.8
    """Of answers and texts; 0 is greedy."""
    prompt_temperature: Temperature = 1.0
    """Of the invented user's turns."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 0.95
    top_k: Annotated[int, Field(ge=1)] | None = None
    seed: Seed = 0
    max_new_tokens: Annotated[int, Field(ge=1), at_most(2**20, _TIME)] = 512
    """Longest answer or text."""
    max_prompt_tokens: Annotated[int, Field(ge=1), at_most(2**20, _TIME)] = 256
    """Longest user's turn; longer ones are dropped."""

    keep_truncated: bool = True
    """Keep answers that `max_new_tokens` cut off. Their tokens are the target's own; only the end
    of the turn, which the template writes after them, is not."""
    max_repetition: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Drop a text if a larger share of its 4-grams occurred earlier in it (seq-rep-4)."""
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Drop an invented turn, an answer or a text that shares this much of its word 3-grams with an
    earlier one (Jaccard similarity)."""

    drafter: Annotated[str, one_of(NO_DRAFTER, *DRAFTERS)] = NO_DRAFTER
    """`none`, or a drafter of `DecodeConfig`; those with `exit` need an EE checkpoint. It changes
    the speed only: with `match` verification the text is the target's."""
    batch_size: Annotated[int, Field(ge=1), at_most(4096, _CACHE)] = 64
    """Samples decoded together; as one ends, the next begins. In float32 it does not change the
    samples. In half precision passes of another shape round differently, and texts differ at
    near-ties with who decodes beside; so a run only continues with the batch size and the drafter
    that it began with, and samples made after the stop may still be others than without it."""
    server: str | None = None
    """A server of OpenAI's API that runs the target and generates in place of this process,
    `batch_size` requests at a time, as `http://localhost:8000/v1`: vLLM, SGLang, `hispec serve`.
    That it serves the same weights is not checked."""
    backend: Annotated[str, one_of(*BACKENDS)] = EAGER
    """What runs the passes, see `hispec.engine.build`. The modules are the default: with 64 rows in
    bf16 they made 220 tokens/s where graphs, which compute in float32, made 185."""
    dtype: str = "auto"
    device: str | None = None
    threads: Threads | None = None
    """Threads on a CPU."""

    def validate(self) -> None:
        """Raises ValueError naming the key, the value and what is allowed."""
        validate(Settings, self)
        check(self.shard < self.shards, "shard", self.shard, f"0 to {self.shards - 1}")
        if self.server is not None:
            here = "it is the server that decodes; leave it out, or server"
            check(self.drafter == NO_DRAFTER, "drafter", self.drafter, here)
            check(self.backend == EAGER, "backend", self.backend, here)
            check(self.dtype == "auto", "dtype", self.dtype, here)
            check(self.device is None, "device", self.device, here)
