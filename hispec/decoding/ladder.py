"""The ladder: bring a rung to a length, read its logits, roll back.

To bring a rung to `n` tokens, first bring the rung before it (the shallower one) to `n`, then run
the segment between them over the tokens from its own length to `n`. Prefill, catching up after a
correction and resuming from stored hidden states are all this rule, so every layer runs once per
token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import torch

from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.kv_cache import KVCache, Segment
from hispec.models.exit_model import ExitModel

_FIRST_PREFILL = 4096  # tokens of the first pass over prompts, without a mask: bounds activations
_PREFILL = 512  # tokens of each further pass: bounds the mask, [tokens, slots]
_FULL_SPEED = 256  # tokens from which on a pass takes as long as it has tokens, roughly


class Ladder:
    """The rungs of one decode over one shared KV cache.

    Args:
        model: the model that all rungs belong to.
        depths: increasing depths of the rungs.
        rows: prompts decoded together.
        capacity: slots per row: the longest text, and room for padding past its end.
        draft_vocab: draft from the model's reduced vocabulary, if it has one.
    """

    def __init__(
        self,
        model: ExitModel,
        depths: Sequence[int],
        rows: int,
        capacity: int,
        *,
        draft_vocab: bool = True,
    ) -> None:
        self.model = model
        self.draft_vocab = draft_vocab
        self.depths = tuple(depths)
        self.cache = KVCache(rows, capacity, model.device, *model.cache_layout())
        self.segment_tokens = [0] * len(self.depths)
        """Tokens run through the segment that ends at each rung."""
        self.head_tokens = [0] * len(self.depths)
        """Tokens run through the blocks of each rung's exit head."""

    @cached_property
    def _draft_head(self) -> torch.Tensor | None:
        """Rows of the LM head, copied when the first draft reads them."""
        return self.model.draft_head() if self.draft_vocab else None

    @cached_property
    def read_depths(self) -> list[int]:
        """Depths whose states of committed tokens are kept because a head reads them."""
        heads = [self.model.head(depth) for depth in self.depths[:-1]]
        return sorted({depth for head in heads for depth in head.reads})

    def segment_layers(self, rung: int) -> int:
        """Layers of the segment that ends at `rung`."""
        return self.depths[rung] - (self.depths[rung - 1] if rung else 0)

    def head_layers(self, rung: int) -> int:
        """Transformer blocks of the exit head at `rung`; none at the full depth."""
        depth = self.depths[rung]
        return len(self.model.head(depth).blocks) if depth < self.model.num_layers else 0

    def prefill(self, tokens_BN: np.ndarray, upto_B: np.ndarray) -> None:
        """Bring every rung to `upto` tokens, in passes of the same shape for every ladder."""
        for _ in self.prefill_passes(tokens_BN, upto_B):
            pass

    def prefill_passes(self, tokens_BN: np.ndarray, upto_B: np.ndarray) -> Iterator[None]:
        """As `prefill`; yields between two passes, so that others can run."""
        self.cache.of_prompts = True
        longest = int(upto_B.max())
        self.cache.make_room(longest)  # at once: it is copied when it grows
        engine = self.model.engine
        first, step = (_FIRST_PREFILL, _PREFILL) if engine is None else [engine.prompt_tokens] * 2
        for stop in range(first, max(longest, 1) + first, step):
            block_B = np.minimum(stop, upto_B)
            self.bring(len(self.depths) - 1, tokens_BN, block_B)
            for rung in range(len(self.depths)):
                if self.head_layers(rung):
                    self._prefill_head(rung, block_B)
            if stop >= longest:
                break
            yield
        self.cache.of_prompts = False

    def _prefill_head(self, rung: int, upto_B: np.ndarray) -> None:
        """Bring the blocks of a head to `upto` tokens; in short passes if they need a mask."""
        if self._masked(rung):
            done = int(self.cache.length(("head", rung)).min()) + _PREFILL
            for stop in range(done, int(upto_B.max()), _PREFILL):
                self.bring_head(rung, np.minimum(stop, upto_B))
        self.bring_head(rung, upto_B)

    def _masked(self, rung: int) -> bool:
        """Whether the head at `rung` needs a mask for whole texts too."""
        kinds = self.model.head(self.depths[rung]).layer_types
        return any(self.model.reach(kind).first for kind in kinds)

    def logits(
        self,
        rung: int,
        tokens_BN: np.ndarray,
        first_B: np.ndarray,
        upto_B: np.ndarray,
        tree: DraftTree | None = None,
        *,
        skip: int = 0,
        drafting: bool = False,
    ) -> torch.Tensor:
        """Logits [B, C, V] of `rung` after the tokens in slots `first + skip` to `upto - 1`.

        Rows with fewer such slots are padded on the right with garbage.

        Args:
            tokens_BN: the texts, draft tokens included.
            tree: the draft tokens behind slot `first`, which holds the last verified token.
            drafting: read the reduced draft vocabulary, if there is one.
        """
        segment = self.bring_all(rung, tokens_BN, upto_B, tree, first_B + 1)
        slots_BC = slots_from(first_B + skip, upto_B)
        assert slots_BC is not None, "a pass that reads nothing"
        slots = torch.from_numpy(slots_BC).to(self.model.device)
        return self.read(self.depths[rung], self.cache.hidden(segment, slots), drafting)

    def read(self, depth: int, hidden_BCH: torch.Tensor, drafting: bool) -> torch.Tensor:
        """Logits [B, C, V] of states at `depth`, of the draft vocabulary if the rung drafts."""
        if drafting and self._draft_head is not None:
            return self.model.draft(depth, self.model.normed(depth, hidden_BCH), self._draft_head)
        return self.model.read(depth, hidden_BCH)

    def truncate(self, length_B: np.ndarray) -> None:
        """Roll every rung back to at most `length` tokens per row, KV and hidden states."""
        self.cache.truncate(length_B)

    def take(self, rows: Sequence[int], other: Ladder, source: Sequence[int]) -> None:
        """Put what another ladder of the same depths holds in the rows `source` into `rows`, in
        place of what they hold."""
        self.cache.take(rows, other.cache, source)
        for mine, theirs in (
            (self.segment_tokens, other.segment_tokens),
            (self.head_tokens, other.head_tokens),
        ):
            for rung, tokens in enumerate(theirs):
                mine[rung] += tokens

    def bring_all(
        self,
        rung: int,
        tokens_BN: np.ndarray,
        upto_B: np.ndarray,
        tree: DraftTree | None = None,
        base_B: np.ndarray | None = None,
    ) -> Segment:
        """Bring `rung`, and the blocks of its head if it has any; returns the segment to read."""
        self.bring(rung, tokens_BN, upto_B, tree, base_B)
        if self.head_layers(rung):
            self.bring_head(rung, upto_B, tree, base_B)
            return "head", rung
        return "segment", rung

    def bring(
        self,
        rung: int,
        tokens_BN: np.ndarray,
        upto_B: np.ndarray,
        tree: DraftTree | None = None,
        base_B: np.ndarray | None = None,
    ) -> None:
        """Bring `rung` to at least `upto` tokens in every row; a tree's lie from `base` on."""
        if rung > 0:
            self.bring(rung - 1, tokens_BN, upto_B, tree, base_B)
        start_B = self.cache.length(("segment", rung))
        slots_BT = slots_from(start_B, upto_B)
        if slots_BT is None:
            return
        positions_BT = self._place(slots_BT, start_B, upto_B, tree, base_B)
        self._run_segment(rung, tokens_BN, slots_BT, positions_BT)
        self.segment_tokens[rung] += self._extend(("segment", rung), start_B, upto_B)
        if rung == len(self.depths) - 1:
            self._forget_stand_ins(start_B)

    def bring_head(
        self,
        rung: int,
        upto_B: np.ndarray,
        tree: DraftTree | None = None,
        base_B: np.ndarray | None = None,
    ) -> None:
        """Bring the blocks of a rung's exit head to at least `upto` tokens."""
        for stop_B in self._head_passes(rung, upto_B, tree, base_B):
            start_B = self.cache.length(("head", rung))
            slots_BT = slots_from(start_B, stop_B)
            if slots_BT is None:
                continue
            positions_BT = self._place(slots_BT, start_B, stop_B, tree, base_B)
            self._run_head(rung, positions_BT)
            self.head_tokens[rung] += self._extend(("head", rung), start_B, stop_B)

    def _head_passes(
        self, rung: int, upto_B: np.ndarray, tree: DraftTree | None, base_B: np.ndarray | None
    ) -> Iterator[np.ndarray]:
        """Where the passes of a head end [B], the last one at `upto`.

        The shallowest rung's head, if it reads the token before, is fed its own state of a token
        that the full model has not run on. That state must be there, so such a token and the next
        one are not run together.
        """
        if rung or not self.model.head(self.depths[0]).reads_before:
            yield upto_B
            return
        known_B = self.cache.length(("segment", len(self.depths) - 1))
        stops = [
            _apart(int(start), int(upto), int(known), _parents(tree, base_B, row))
            for row, (start, upto, known) in enumerate(
                zip(self.cache.length(("head", rung)), upto_B, known_B, strict=True)
            )
        ]
        for number in range(max(map(len, stops))):
            yield np.array([row[min(number, len(row) - 1)] for row in stops])

    def _place(
        self,
        slots_BT: np.ndarray,
        start_B: np.ndarray,
        upto_B: np.ndarray,
        tree: DraftTree | None,
        base_B: np.ndarray | None,
    ) -> torch.Tensor:
        """Announce a pass to the cache; returns the positions [B, T] of its tokens."""
        whole = tree is None and not start_B.any()
        count_B = np.maximum(upto_B - start_B, 0)
        return self.cache.place(slots_BT, tree, base_B, count_B=count_B, whole=whole)

    def _run_segment(
        self,
        rung: int,
        tokens_BN: np.ndarray,
        slots_BT: np.ndarray,
        positions_BT: torch.Tensor,
    ) -> None:
        """Run the layers of a segment over the announced slots, and keep the states."""
        if rung == 0:
            tokens_BT = np.take_along_axis(tokens_BN, slots_BT, axis=1)
            hidden_BTH = self.model.embed(torch.from_numpy(tokens_BT).to(self.model.device))
        else:
            hidden_BTH = self.cache.placed_hidden(("segment", rung - 1))
        hidden_BTH = self.run_layers(rung, hidden_BTH, positions_BT, self.cache)
        self.cache.store_hidden(("segment", rung), hidden_BTH)

    def run_layers(
        self, rung: int, hidden_BTH: torch.Tensor, positions_BT: torch.Tensor, cache: KVCache
    ) -> torch.Tensor:
        """States [B, T, H] at a rung from those at the rung before it; the cache keeps what heads
        read on the way."""
        start, stop = self.depths[rung - 1] if rung else 0, self.depths[rung]
        depths = [depth for depth in self.read_depths if start < depth < stop] + [stop]
        found = self.model.run_each(hidden_BTH, start, depths, positions_BT, cache)
        for depth, states_BTH in zip(depths, found, strict=True):
            if depth in self.read_depths:
                cache.store_hidden(("depth", depth), states_BTH)
        return found[-1]

    def _run_head(self, rung: int, positions_BT: torch.Tensor) -> None:
        """Run the blocks of a rung's exit head over the announced slots, and keep the states."""
        hidden_BTH = self.cache.placed_hidden(("segment", rung))
        previous_BTH = self._previous(rung)
        depth = self.depths[rung]
        hidden_BTH = self.model.run_head(depth, hidden_BTH, positions_BT, self.cache, previous_BTH)
        self.cache.store_hidden(("head", rung), hidden_BTH)

    def _previous(self, rung: int) -> torch.Tensor | None:
        """For a head that reads it, what is known [B, T, H] of the token before each slot.

        Where the full model has not run on that token yet, the state of the next shallower rung
        stands in (for the shallowest rung its own, from an earlier pass); where that is unknown
        too, 0.
        """
        if not self.model.head(self.depths[rung]).reads_before:
            return None
        before_BT = self.cache.previous_slots()
        slots_BT = before_BT.clamp_min(0)
        found_BTH = torch.zeros_like(self.cache.hidden(("segment", rung), slots_BT))
        lower, last = max(rung - 1, 0), len(self.depths) - 1
        stand_in = ("head" if self.head_layers(lower) else "segment", lower)
        for segment in (stand_in, ("segment", last)):  # the full model's state where it is known
            length_B = self.cache.length(segment)
            if not length_B.any():
                continue
            length_B1 = torch.from_numpy(length_B[:, None]).to(before_BT.device)
            known_BT = (before_BT >= 0) & (before_BT < length_B1)
            if not known_BT.any():
                continue
            state_BTH = self.state_before(rung, segment, slots_BT)
            found_BTH = torch.where(known_BT[..., None], state_BTH, found_BTH)
        return found_BTH

    def state_before(self, rung: int, segment: Segment, slots_BT: torch.Tensor) -> torch.Tensor:
        """What the head at `rung` reads [B, T, H] of the tokens in some slots, by what a segment
        says of them: the full model's, or the one that stands in for it."""
        depth, of = self.depths[rung], self.depths[segment[1]]
        hidden_BTH = self.cache.hidden(segment, slots_BT)
        if of == self.model.num_layers:
            head = self.model.head(depth)
            states = {d: self.cache.hidden(("depth", d), slots_BT) for d in head.reads}
            final_BTH = None if states else self.model.normed(of, hidden_BTH)
            return head.before(final_BTH, states)
        normed_BTH = self.model.normed(of, hidden_BTH)
        return self.model.head(depth).own(hidden_BTH, normed_BTH) if of == depth else normed_BTH

    def _forget_stand_ins(self, known_B: np.ndarray) -> None:
        """Roll heads back that read stand-ins for states which the full model has now computed.

        Args:
            known_B: tokens whose states at full depth were known before.
        """
        for rung in range(len(self.depths) - 1):
            if self.model.head(self.depths[rung]).reads_before:
                segment = ("head", rung)
                self.cache.lengths[segment] = np.minimum(self.cache.length(segment), known_B + 1)

    def _extend(self, segment: Segment, start_B: np.ndarray, upto_B: np.ndarray) -> int:
        """Record that `segment` holds `upto` tokens; returns the tokens run, without padding."""
        end_B = np.maximum(start_B, upto_B)
        self.cache.lengths[segment] = end_B
        return int((end_B - start_B).sum())


def _parents(tree: DraftTree | None, base_B: np.ndarray | None, row: int) -> Callable[[int], int]:
    """For the slot of a token in a row, the slot of the token that it follows."""
    if tree is None or base_B is None:
        return lambda slot: slot - 1
    base, parent_N = int(base_B[row]), tree.parent_BN[row].tolist()
    return lambda slot: slot - 1 if slot < base else base - 1 + max(parent_N[slot - base], 0)


def _apart(start: int, upto: int, known: int, parent: Callable[[int], int]) -> list[int]:
    """Where to end passes over the slots from `start` to `upto` so that none has a token and the
    one that it follows, unless that one is among the `known` first."""
    stops = []
    for slot in range(max(start, known) + 1, upto):
        if parent(slot) >= max(start, known):
            stops.append(slot)
            start = slot
    return [*stops, upto]


def slots_from(start_B: np.ndarray, upto_B: np.ndarray) -> np.ndarray | None:
    """Slots [B, T] from `start` on, as many as the row that needs most; None for none."""
    most = int((upto_B - start_B).max())
    return start_B[:, None] + np.arange(most) if most > 0 else None


def similar(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of prompts that are read together: little of a pass should be padding.

    A group is of one length up to a fifth; few tokens stay together, whatever their lengths.
    """
    groups: list[list[int]] = []
    longest = 0
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        full = groups and len(groups[-1]) * longest >= _FULL_SPEED
        if not groups or (full and lengths[number] < 0.8 * longest):
            groups.append([])
            longest = lengths[number]
        groups[-1].append(number)
    return groups
