"""Configuration: dataclass defaults <- YAML <- `key=value`, strict on every level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hispec.utils.settings import check

HEAD_KINDS = ("shared", "adapter", "block")
DRAFTERS = ("exit", "lookup", "recycle", "lookup+exit", "recycle+exit")
VERIFICATIONS = ("match", "rejection")
OLD_NAMES = {"law": "verification"}
"""Names that settings had in earlier versions; calls from Python may still use them."""


@dataclass
class ExitConfig:
    """Which depths of a model are exits, and what reads them."""

    depths: list[int] = field(default_factory=list)
    """Depths of the exits, increasing, each from 1 to L - 1."""
    head: str = "block"
    """`shared`: final norm and LM head as they are (LayerSkip). `adapter`: own norm and a low-rank
    adapter before the shared LM head. `block`: own transformer blocks and own norm."""
    blocks: int = 2
    """Transformer blocks of a `block` head."""
    rank: int = 64
    """Width of an `adapter` head's bottleneck."""
    draft_vocab: int = 0
    """Tokens that the exits draft from, stored with them; 0 for the whole vocabulary."""
    previous: bool = False
    """Whether a `block` head also reads the final hidden state of the token before."""

    def validate(self, num_layers: int) -> None:
        """Raises ValueError if this cannot describe exits of a model of `num_layers` layers."""
        check_depths("exits", self.depths, num_layers)
        check(self.head in HEAD_KINDS, "head", self.head, f"one of {', '.join(HEAD_KINDS)}")
        if self.head == "block":
            check(
                1 <= self.blocks <= num_layers,
                "blocks",
                self.blocks,
                f"from 1 to {num_layers}, the layers of the model",
            )
        check(self.rank >= 1, "rank", self.rank, "1 or more")
        check(self.draft_vocab >= 0, "draft_vocab", self.draft_vocab, "0 (all tokens) or a number")
        check(
            not self.previous or self.head == "block",
            "previous",
            self.previous,
            f"a head of the kind {self.head!r} does not read the token before; it needs 'block'",
        )


@dataclass
class DecodeConfig:
    """Settings of one decode: what drafts, what verifies, and how tokens are sampled."""

    ladder: list[int]
    """Increasing depths ending at L. With an exit among the drafters the first one drafts; the
    others verify. `[L]` alone is plain decoding, or the full model judging free drafts."""
    drafter: str = "exit"
    """`exit`: the shallowest rung continues its own draft. `lookup`: what followed the same n-gram
    earlier in the text. `recycle`: a tree of recent top candidates. `lookup+exit`,
    `recycle+exit`: the exit where the free drafter has nothing."""
    draft_length: int = 2
    """Tokens that an exit drafts before the first verifying rung runs (N_d of HiSpec)."""
    max_draft_length: int | None = None
    """If given, an exit's draft length follows recent acceptance between 1 and this."""
    draft_threshold: float = 0.0
    """An exit's draft ends after a token whose top probability is below this."""
    draft_vocab: bool = True
    """Whether exits draft from the reduced vocabulary that is stored with them, if one is."""
    lookup_length: int = 8
    """Tokens that a lookup proposes."""
    lookup_ngram: int = 4
    """Longest n-gram that a lookup searches for; the longest match wins, then the latest."""
    lookup_shortest: int = 1
    """Shortest n-gram that counts as a match."""
    tree_tokens: int = 15
    """Tokens of a recycled tree."""
    buffer: int = 4
    """Tokens that a verifying rung collects before the next deeper one runs (N_i of HiSpec)."""
    buffer_threshold: float = 0.0
    """The next deeper rung also runs once a verifying rung's top probability is below this."""
    max_new_tokens: int = 128
    max_time: float | None = None
    """Seconds after which no further round begins."""
    verification: str = "match"
    """`match`: the same text for every ladder and drafter. `rejection`: the same distribution, and
    more accepted drafts at high temperature, but the text depends on the other settings. Greedy
    text is the same in both."""
    temperature: float = 0.0
    """0 is greedy: the argmax of the target, first index wins a tie."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    """As in transformers, over the whole prefix, prompt included; 1 is off."""
    no_repeat_ngram_size: int = 0
    """As in transformers: no n-gram of this size occurs twice; 0 is off."""
    seed: int = 0
    """Fixes the noise of every position; with `match` the same seed gives the same text on any
    ladder."""
    eos: tuple[int, ...] = ()
    """Token ids that end a text; the one that ended it is part of the output."""

    def validate(self, num_layers: int) -> None:
        """Raises ValueError naming the key, the value and what is allowed."""
        check_depths("ladder", self.ladder[:-1], num_layers, at_least=0)
        check(
            bool(self.ladder) and self.ladder[-1] == num_layers,
            "ladder",
            tuple(self.ladder),
            f"it must end at {num_layers}, the depth of the full model",
        )
        check(self.drafter in DRAFTERS, "drafter", self.drafter, f"one of {', '.join(DRAFTERS)}")
        check(
            len(self.ladder) > 1 or "+" not in self.drafter,
            "ladder",
            tuple(self.ladder),
            f"drafter {self.drafter!r} needs an exit below the full model",
        )
        check(
            self.verification in VERIFICATIONS,
            "verification",
            self.verification,
            f"one of {', '.join(VERIFICATIONS)}",
        )
        check(
            self.verification == "match" or "recycle" not in self.drafter,
            "verification",
            self.verification,
            f"drafter {self.drafter!r} proposes trees, and these need 'match'",
        )
        for key in (
            *("draft_length", "max_draft_length", "lookup_length", "lookup_ngram"),
            *("lookup_shortest", "tree_tokens", "buffer", "max_new_tokens", "top_k"),
        ):
            value = getattr(self, key)
            check(value is None or value >= 1, key, value, "1 or more")
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
        for key in ("draft_threshold", "buffer_threshold"):
            check(0 <= getattr(self, key) <= 1, key, getattr(self, key), "from 0 (off) to 1")
        check(
            self.temperature == 0 or self.temperature >= 1e-3,
            "temperature",
            self.temperature,
            "0 (greedy), or 0.001 and more",
        )
        check(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1")
        check(self.min_p is None or 0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        check(self.max_time is None or self.max_time > 0, "max_time", self.max_time, "above 0")
        check(
            self.repetition_penalty > 0,
            "repetition_penalty",
            self.repetition_penalty,
            "above 0; 1 is off",
        )
        check(
            self.no_repeat_ngram_size >= 0,
            "no_repeat_ngram_size",
            self.no_repeat_ngram_size,
            "0 (off) or more",
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
    check(list(depths) == sorted(set(depths)), key, shown, "increasing depths, none twice")
