"""Settings of exits and of decoding: their types and limits, declared once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from hispec.utils.limits import MaxNewTokens, Share, Temperature, at_most, one_of
from hispec.utils.schema import STRICT, ListOf, TupleOf, filled, validate
from hispec.utils.settings import check

HEAD_KINDS = ("shared", "adapter", "block", "eagle3")
DRAFTERS = ("exit", "lookup", "recycle", "lookup+exit", "recycle+exit")
VERIFICATIONS = ("match", "rejection")
BACKENDS = AUTO, EAGER, OPENVINO = "auto", "eager", "openvino"
"""What runs cached passes, see `hispec.engine.build`."""
OLD_NAMES = {"law": "verification"}
"""Names that settings had in earlier versions; calls from Python may still use them."""

_Draft = Annotated[
    int, Field(ge=1), at_most(256, "an exit runs once per token, and a rejection discards the rest")
]
_Depth = Annotated[int, Field(ge=0, le=10_000)]


def _from_keys(kind: type[Any]) -> BeforeValidator:
    """Takes a mapping of its fields, as JSON and YAML have it, for a dataclass."""
    return BeforeValidator(lambda v: filled(kind, v, "") if isinstance(v, Mapping) else v)


@dataclass
class Eagle3:
    """How a head of kind `eagle3` differs from the first published ones."""

    __pydantic_config__ = STRICT

    intermediate_size: Annotated[
        int, Field(ge=0), at_most(2**17, "its MLP has 3 x this x hidden size weights")
    ] = 0
    """Width of its MLP; 0 for that of the base."""
    norm_before_residual: bool = False
    """Whether the residual of its layer is taken after `hidden_norm`."""
    norm_output: bool = False
    """Whether a chained draft reads the state after the head's norm, not before (EAGLE-3.1)."""
    fc_norm: bool = False
    """Whether each of the three states has a norm of its own (EAGLE-3.1)."""
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    """Base of its rotary embedding; None for the rotary embedding of the base model."""


@dataclass
class Exit:
    """One exit: its depth, and what reads the states there."""

    __pydantic_config__ = STRICT

    depth: _Depth
    """From 1 to L - 1; 0, the embeddings, for a head that reads the token before."""
    head: Annotated[str, one_of(*HEAD_KINDS)] = "block"
    """`shared`: final norm and LM head as they are (LayerSkip). `adapter`: own norm and a low-rank
    adapter before the shared LM head. `block`: own transformer blocks and own norm. `eagle3`: the
    published EAGLE-3 head (2503.01840) at depth 0, with an LM head of its own."""
    blocks: Annotated[int, Field(ge=0)] = 2
    """Transformer blocks of a `block` head."""
    rank: Annotated[
        int, Field(ge=1), at_most(2**16, "an adapter has 2 x rank x hidden size weights")
    ] = 64
    """Width of an `adapter` head's bottleneck."""
    previous: bool = False
    """Whether a `block` head also reads the final hidden state of the token before (EAGLE)."""
    aux_depths: ListOf[_Depth] = field(default_factory=list)
    """Three depths whose states of the token before an `eagle3` head reads; empty for 2, L / 2 and
    L - 3, those of the published heads."""
    eagle3: Annotated[Eagle3, _from_keys(Eagle3)] | None = None
    """Variants of an `eagle3` head; None for the published one."""

    @property
    def reads_before(self) -> bool:
        """Whether the head reads states of the token before."""
        return self.previous or self.head == "eagle3"

    def validate(self, num_layers: int) -> None:
        """Raises ValueError if a model of `num_layers` layers cannot have this exit."""
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
        check(
            self.depth > 0 or self.reads_before,
            "depth",
            self.depth,
            "depth 0 holds one token alone; it needs a head that reads the token before, 'eagle3' "
            "or a 'block' with previous=true",
        )
        eagle3 = self.head == "eagle3"
        check(not eagle3 or self.depth == 0, "depth", self.depth, "0 for a head of kind 'eagle3'")
        check(
            len(self.aux_depths) == (3 if eagle3 else 0),
            "aux_depths",
            self.aux_depths,
            "three depths for a head of kind 'eagle3', none for any other",
        )
        if eagle3:
            inside = all(1 <= depth <= num_layers for depth in self.aux_depths)
            check(inside, "aux_depths", self.aux_depths, f"depths from 1 to {num_layers}")
        check(eagle3 or self.eagle3 is None, "eagle3", self.eagle3, "for a head of that kind")


@dataclass
class ExitConfig:
    """The exits of a model."""

    __pydantic_config__ = STRICT

    exits: ListOf[Annotated[Exit, _from_keys(Exit)]] = field(default_factory=list)
    """By increasing depth."""
    draft_vocab: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Tokens that the exits draft from, stored with them; 0 for the whole vocabulary."""

    @classmethod
    def of(
        cls,
        depths: Sequence[int] = (),
        head: str = "block",
        *,
        draft_vocab: int = 0,
        **settings: Any,
    ) -> ExitConfig:
        """Exits that differ by their depth alone; `settings` are the other fields of `Exit`."""
        check(isinstance(depths, list | tuple), "exits", depths, "a list of depths")
        exits = [Exit(depth, head, **settings) for depth in depths]
        return cls(exits, draft_vocab)

    @property
    def depths(self) -> list[int]:
        """The depths of the exits."""
        return [exit.depth for exit in self.exits]

    def resolved(self, num_layers: int) -> ExitConfig:
        """These exits with the depths that an empty `aux_depths` stands for."""
        published = [min(2, num_layers), max(num_layers // 2, 1), max(num_layers - 3, 1)]
        return replace(
            self,
            exits=[
                replace(exit, aux_depths=published)
                if exit.head == "eagle3" and not exit.aux_depths
                else exit
                for exit in self.exits
            ],
        )

    def validate(self, num_layers: int) -> None:
        """Raises ValueError if this cannot describe exits of a model of `num_layers` layers."""
        validate(ExitConfig, self)
        check_depths("exits", self.depths, num_layers, lowest=0)
        for exit in self.resolved(num_layers).exits:
            exit.validate(num_layers)


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
    `recycle+exit`: the exit where the free drafter has nothing; or both in one tree, see
    `join_drafts`."""
    draft_length: _Draft = 2
    """Tokens that an exit drafts before the first verifying rung runs (N_d of HiSpec)."""
    max_draft_length: _Draft | None = None
    """If given, an exit's draft length follows recent acceptance between 1 and this."""
    adaptive: bool = False
    """Whether an exit drafts by 0 to `draft_length` steps, as many as promise most tokens per
    second by what was accepted and what it took so far. With a single verifying rung nothing is
    drafted, by no drafter, while rounds without drafts are faster. It changes no text."""
    draft_threshold: Share = 0.0
    """An exit's draft ends after a token whose top probability is below this. A tree has no token
    whose path has a probability below it."""
    draft_width: Annotated[
        int, Field(ge=1), at_most(32, "a step runs all of them, and considers their number squared")
    ] = 1
    """Tokens that an exit drafts per step. Above 1 its draft is a tree of the `tree_tokens` most
    probable tokens, `draft_length` steps deep."""
    join_drafts: bool = True
    """Whether such a tree and what a free drafter proposes become one tree; else the exit drafts
    where the free drafter has nothing, as with chains."""
    draft_vocab: bool = True
    """Whether exits draft from the reduced vocabulary that is stored with them, if one is."""
    lookup_length: Annotated[
        int, Field(ge=1), at_most(512, "one pass verifies all of them, mostly in vain")
    ] = 8
    """Tokens that a lookup proposes."""
    max_lookup_length: (
        Annotated[int, Field(ge=1), at_most(512, "one pass verifies all of them, mostly in vain")]
        | None
    ) = None
    """Tokens that it proposes where all of the one before was accepted, as while a text is copied.
    Default: `lookup_length`."""
    lookup_ngram: Annotated[
        int, Field(ge=1), at_most(1024, "each round compares that many tokens with all before")
    ] = 4
    """Longest n-gram that a lookup searches for; the longest match wins, then the latest."""
    lookup_shortest: Annotated[int, Field(ge=1)] = 1
    """Shortest n-gram that counts as a match."""
    tree_tokens: Annotated[
        int, Field(ge=1), at_most(512, "one pass verifies all of them, and keeps a single path")
    ] = 15
    """Tokens of a recycled tree, and of one that an exit drafts."""
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

    @property
    def exit_trees(self) -> bool:
        """Whether an exit drafts trees."""
        return self.draft_width > 1 and "exit" in self.drafter and len(self.ladder) > 1

    @property
    def joined(self) -> bool:
        """Whether drafts of an exit and of a free drafter become one tree."""
        return self.exit_trees and "+" in self.drafter and self.join_drafts

    @property
    def most_drafted(self) -> int:
        """Most draft tokens that one round writes behind the verified ones."""
        steps = max(self.draft_length, self.max_draft_length or 0)
        lookup = max(self.lookup_length, self.max_lookup_length or 0)
        if not self.exit_trees:
            return max(steps, lookup, self.tree_tokens)
        if not self.joined:
            return max(lookup, self.tree_tokens, (steps - 1) * self.draft_width)
        free = {"lookup": lookup, "recycle": self.tree_tokens}
        joined = self.tree_tokens + free.get(self.drafter.split("+")[0], 0)
        return max(joined, (steps - 1) * self.draft_width)

    def validate(self, num_layers: int) -> None:
        """Raises ValueError naming the key, the value and what is allowed."""
        validate(DecodeConfig, self)
        ladder = tuple(self.ladder)
        check_depths("ladder", ladder[:-1], num_layers, at_least=0, lowest=0)
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
            self.verification == "match" or not self.exit_trees,
            "draft_width",
            self.draft_width,
            "1, a chain, as verification='rejection' takes no trees",
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
        check(
            not self.adaptive or self.max_draft_length is None,
            "adaptive",
            self.adaptive,
            "it chooses among 0 to draft_length steps: not with max_draft_length",
        )
        check(
            not self.adaptive or not self.joined,
            "adaptive",
            self.adaptive,
            "what was accepted of a joined tree says little of the exit: it needs "
            "join_drafts=false",
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


def check_depths(
    key: str, depths: Sequence[int], num_layers: int, *, at_least: int = 1, lowest: int = 1
) -> None:
    """Raise ValueError unless `depths` increase inside the model, from `lowest` on, and are
    `at_least` so many."""
    shown = tuple(depths)
    check(len(depths) >= at_least, key, shown, f"name {at_least} or more depths")
    check(
        all(lowest <= depth < num_layers for depth in depths),
        key,
        shown,
        f"depths from {lowest} to {num_layers - 1} (the model has {num_layers} layers; "
        f"depth {num_layers} is the full model, not an exit)",
    )
    check(all(a < b for a, b in pairwise(depths)), key, shown, "increasing depths, none twice")
