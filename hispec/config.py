"""Settings of exits and of decoding: their types and limits, declared once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field

from hispec.utils.limits import MaxNewTokens, Share, Temperature, at_most, one_of
from hispec.utils.schema import STRICT, ListOf, TupleOf, validate
from hispec.utils.settings import check

HEAD_KINDS = ("shared", "adapter", "block")
DRAFTERS = ("exit", "lookup", "recycle", "lookup+exit", "recycle+exit")
VERIFICATIONS = ("match", "rejection")
OLD_NAMES = {"law": "verification"}
"""Names that settings had in earlier versions; calls from Python may still use them."""

_Draft = Annotated[
    int, Field(ge=1), at_most(256, "an exit runs once per token, and a rejection discards the rest")
]
_Depth = Annotated[int, Field(ge=0, le=10_000)]


@dataclass
class ExitConfig:
    """Which depths of a model are exits, and what reads them."""

    __pydantic_config__ = STRICT

    depths: ListOf[_Depth] = field(default_factory=list)
    """Depths of the exits, increasing, each from 1 to L - 1."""
    head: Annotated[str, one_of(*HEAD_KINDS)] = "block"
    """`shared`: final norm and LM head as they are (LayerSkip). `adapter`: own norm and a low-rank
    adapter before the shared LM head. `block`: own transformer blocks and own norm."""
    blocks: Annotated[int, Field(ge=0)] = 2
    """Transformer blocks of a `block` head."""
    rank: Annotated[
        int, Field(ge=1), at_most(2**16, "an adapter has 2 x rank x hidden size weights")
    ] = 64
    """Width of an `adapter` head's bottleneck."""
    draft_vocab: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Tokens that the exits draft from, stored with them; 0 for the whole vocabulary."""
    previous: bool = False
    """Whether a `block` head also reads the final hidden state of the token before."""

    def validate(self, num_layers: int) -> None:
        """Raises ValueError if this cannot describe exits of a model of `num_layers` layers."""
        validate(ExitConfig, self)
        check_depths("exits", self.depths, num_layers)
        check(
            self.head != "block" or 1 <= self.blocks <= num_layers,
            "blocks",
            self.blocks,
            f"from 1 to {num_layers}, the layers of the model",
        )
        check(
            not self.previous or self.head == "block",
            "previous",
            self.previous,
            f"a head of the kind {self.head!r} does not read the token before; it needs 'block'",
        )


@dataclass
class DecodeConfig:
    """Settings of one decode: what drafts, what verifies, and how tokens are sampled."""

    __pydantic_config__ = STRICT

    ladder: ListOf[_Depth]
    """Increasing depths ending at L. With an exit among the drafters the first one drafts; the
    others verify. `[L]` alone is plain decoding, or the full model verifying free drafts."""
    drafter: Annotated[str, one_of(*DRAFTERS)] = "exit"
    """`exit`: the shallowest rung continues its own draft. `lookup`: what followed the same n-gram
    earlier in the text. `recycle`: a tree of recent top candidates. `lookup+exit`,
    `recycle+exit`: the exit where the free drafter has nothing."""
    draft_length: _Draft = 2
    """Tokens that an exit drafts before the first verifying rung runs (N_d of HiSpec)."""
    max_draft_length: _Draft | None = None
    """If given, an exit's draft length follows recent acceptance between 1 and this."""
    draft_threshold: Share = 0.0
    """An exit's draft ends after a token whose top probability is below this."""
    draft_vocab: bool = True
    """Whether exits draft from the reduced vocabulary that is stored with them, if one is."""
    lookup_length: Annotated[
        int, Field(ge=1), at_most(512, "one pass verifies all of them, mostly in vain")
    ] = 8
    """Tokens that a lookup proposes."""
    lookup_ngram: Annotated[
        int, Field(ge=1), at_most(1024, "each round compares that many tokens with all before")
    ] = 4
    """Longest n-gram that a lookup searches for; the longest match wins, then the latest."""
    lookup_shortest: Annotated[int, Field(ge=1)] = 1
    """Shortest n-gram that counts as a match."""
    tree_tokens: Annotated[
        int, Field(ge=1), at_most(512, "one pass verifies all of them, and keeps a single path")
    ] = 15
    """Tokens of a recycled tree."""
    buffer: Annotated[
        int, Field(ge=1), at_most(1024, "a rejection by the next rung discards what is behind it")
    ] = 4
    """Tokens that a verifying rung collects before the next deeper one runs (N_i of HiSpec)."""
    buffer_threshold: Share = 0.0
    """The next deeper rung also runs once a verifying rung's top probability is below this."""
    max_new_tokens: MaxNewTokens = 128
    max_time: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which no further round begins."""
    verification: Annotated[str, one_of(*VERIFICATIONS)] = "match"
    """`match`: the same text for every ladder and drafter. `rejection`: the same distribution, and
    more accepted drafts at high temperature, but the text depends on the other settings. Greedy
    text is the same in both."""
    temperature: Temperature = 0.0
    """0 is greedy: the argmax of the target, first index wins a tie."""
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """As in transformers, over the whole prefix, prompt included; 1 is off."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """As in transformers: no n-gram of this size occurs twice; 0 is off."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    """Fixes the noise of every position; with `match` the same seed gives the same text on any
    ladder."""
    eos: TupleOf[Annotated[int, Field(ge=0, lt=2**31)]] = ()
    """Token ids that end a text; the one that ended it is part of the output."""

    def validate(self, num_layers: int) -> None:
        """Raises ValueError naming the key, the value and what is allowed."""
        validate(DecodeConfig, self)
        ladder = tuple(self.ladder)
        check_depths("ladder", ladder[:-1], num_layers, at_least=0)
        check(
            ladder[-1:] == (num_layers,),
            "ladder",
            ladder,
            f"it must end at {num_layers}, the depth of the full model",
        )
        check(
            len(ladder) > 1 or "+" not in self.drafter,
            "ladder",
            ladder,
            f"drafter {self.drafter!r} needs an exit below the full model",
        )
        check(
            self.verification == "match" or "recycle" not in self.drafter,
            "verification",
            self.verification,
            f"drafter {self.drafter!r} proposes trees, and these need 'match'",
        )
        check(
            self.lookup_shortest <= self.lookup_ngram,
            "lookup_shortest",
            self.lookup_shortest,
            f"at most lookup_ngram, {self.lookup_ngram}",
        )
        check(
            self.max_draft_length is None or self.max_draft_length >= self.draft_length,
            "max_draft_length",
            self.max_draft_length,
            f"at least draft_length, {self.draft_length}",
        )


def current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the names that `DecodeConfig` has now.

    Raises:
        ValueError: a setting is given under its old and its new name.
    """
    for old, new in OLD_NAMES.items():
        both = old in settings and new in settings
        check(not both, old, settings.get(old), f"it is the old name of {new}, which is given too")
    return {OLD_NAMES.get(key, key): value for key, value in settings.items()}


def check_depths(key: str, depths: Sequence[int], num_layers: int, at_least: int = 1) -> None:
    """Raise ValueError unless `depths` increase inside the model and are `at_least` so many."""
    shown = tuple(depths)
    check(len(depths) >= at_least, key, shown, f"name {at_least} or more depths")
    check(
        all(1 <= depth < num_layers for depth in depths),
        key,
        shown,
        f"depths from 1 to {num_layers - 1} (the model has {num_layers} layers; "
        f"depth {num_layers} is the full model, not an exit)",
    )
    check(all(a < b for a, b in pairwise(depths)), key, shown, "increasing depths, none twice")
