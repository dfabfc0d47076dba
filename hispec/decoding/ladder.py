"""The ladder at work: bring a rung to a length, read its logits, roll back. One rule for all.

To bring a rung to `n` tokens, first bring the rung above it (shallower) to `n`, then run the
segment between them over the tokens from its own length to `n`. Prefill, catching up after a
correction and resuming from stored hidden states are all this rule, so for one token every layer
runs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from hispec.decoding.draft_tree import Proposal
from hispec.decoding.kv_cache import Cache
from hispec.models.exit_model import ExitModel

_PREFILL = 512  # tokens of one pass: bounds the mask, [tokens, keys]


class Ladder:
    """The rungs of one decode over one shared cache.

    Args:
        model: the model all rungs belong to.
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
        self.cache = Cache(rows, capacity, model.device)
        self.segment_tokens = [0] * len(self.depths)
        """Tokens run through the segment that ends at each rung."""
        self.head_tokens = [0] * len(self.depths)
        """Tokens run through the blocks of each rung's exit head."""

    @cached_property
    def _draft_head(self) -> torch.Tensor | None:
        """Copied from the LM head when the first draft wants it, and by no ladder that drafts
        nothing."""
        return self.model.draft_head() if self.draft_vocab else None

    def segment_layers(self, rung: int) -> int:
        """Layers of the segment that ends at `rung`."""
        return self.depths[rung] - (self.depths[rung - 1] if rung else 0)

    def head_layers(self, rung: int) -> int:
        """Transformer blocks of the exit head at `rung`; none at the full depth."""
        depth = self.depths[rung]
        return len(self.model.head(depth).blocks) if depth < self.model.num_layers else 0

    def bring(
        self,
        rung: int,
        tokens_BN: np.ndarray,
        upto_B: np.ndarray,
        tree: Proposal | None = None,
        base_B: np.ndarray | None = None,
    ) -> None:
        """Bring `rung` to at least `upto` tokens in every row; a tree's lie from `base` on."""
        if rung > 0:
            self.bring(rung - 1, tokens_BN, upto_B, tree, base_B)
        track = ("segment", rung)
        start_B = self.cache.length(track)
        slots_BT = self._slots(start_B, upto_B)
        if slots_BT is None:
            return
        self._run_segment(rung, tokens_BN, slots_BT, tree, base_B)
        self.segment_tokens[rung] += self._advance(track, start_B, upto_B)
        if rung == len(self.depths) - 1:
            self._forget_stand_ins(start_B)

    def prefill(self, tokens_BN: np.ndarray, upto_B: np.ndarray) -> None:
        """Bring every rung to `upto` tokens, in passes of the same shape for every ladder."""
        for stop in range(_PREFILL, int(upto_B.max()) + _PREFILL, _PREFILL):
            block_B = np.minimum(stop, upto_B)
            self.bring(len(self.depths) - 1, tokens_BN, block_B)
            for rung in range(len(self.depths)):
                if self.head_layers(rung):
                    self.bring_head(rung, block_B)

    def logits(
        self,
        rung: int,
        tokens_BN: np.ndarray,
        first_B: np.ndarray,
        upto_B: np.ndarray,
        tree: Proposal | None = None,
        *,
        drafting: bool = False,
    ) -> torch.Tensor:
        """Logits [B, C, V] that `rung` gives after the tokens in slots `first` to `upto - 1`.

        Rows with fewer such slots are padded on the right with garbage. With a tree, slot `first`
        holds the last agreed token and the proposals lie behind it.

        Args:
            drafting: read the reduced draft vocabulary, if there is one.
        """
        track = self.bring_all(rung, tokens_BN, upto_B, tree, first_B + 1)
        slots_BC = self._slots(first_B, upto_B)
        assert slots_BC is not None, "a pass that reads nothing"
        return self.read(self.depths[rung], self.cache.hidden(track, slots_BC), drafting)

    def bring_all(
        self,
        rung: int,
        tokens_BN: np.ndarray,
        upto_B: np.ndarray,
        tree: Proposal | None,
        base_B: np.ndarray,
    ) -> tuple[str, int]:
        """Bring `rung`, and the blocks of its head if it has any; returns the track to be read."""
        self.bring(rung, tokens_BN, upto_B, tree, base_B)
        if self.head_layers(rung):
            return self.bring_head(rung, upto_B, tree, base_B)
        return "segment", rung

    def read(self, depth: int, hidden_BCH: torch.Tensor, drafting: bool) -> torch.Tensor:
        """Logits [B, C, V] of states at `depth`, of the draft vocabulary if the rung drafts."""
        if drafting and self._draft_head is not None:
            return self.model.draft(self.model.normed(depth, hidden_BCH), self._draft_head)
        return self.model.read(depth, hidden_BCH)

    def truncate(self, length_B: np.ndarray) -> None:
        """Roll every rung back to at most `length` tokens per row, KV and boundary together."""
        self.cache.truncate(length_B)

    def _run_segment(
        self,
        rung: int,
        tokens_BN: np.ndarray,
        slots_BT: torch.Tensor,
        tree: Proposal | None,
        base_B: np.ndarray | None,
    ) -> None:
        """Run the layers of a segment over some slots and keep what comes out, the boundary."""
        if rung == 0:
            rows = np.arange(len(tokens_BN))[:, None]
            tokens_BT = torch.from_numpy(tokens_BN[rows, slots_BT.cpu().numpy()])
            hidden_BTH = self.model.embed(tokens_BT.to(self.model.device))
            from_depth = 0
        else:
            hidden_BTH = self.cache.hidden(("segment", rung - 1), slots_BT)
            from_depth = self.depths[rung - 1]
        positions_BT = self.cache.place(slots_BT, tree, base_B)
        hidden_BTH = self.model.run(
            hidden_BTH, from_depth, self.depths[rung], positions_BT, self.cache
        )
        self.cache.store_hidden(("segment", rung), slots_BT, hidden_BTH)

    def bring_head(
        self,
        rung: int,
        upto_B: np.ndarray,
        tree: Proposal | None = None,
        base_B: np.ndarray | None = None,
    ) -> tuple[str, int]:
        """Bring the blocks of a rung's exit head to at least `upto` tokens; returns their track."""
        track = ("head", rung)
        start_B = self.cache.length(track)
        slots_BT = self._slots(start_B, upto_B)
        if slots_BT is not None:
            self._run_head(rung, slots_BT, tree, base_B)
            self.head_tokens[rung] += self._advance(track, start_B, upto_B)
        return track

    def _run_head(
        self,
        rung: int,
        slots_BT: torch.Tensor,
        tree: Proposal | None,
        base_B: np.ndarray | None,
    ) -> None:
        """Run the blocks of a rung's exit head over some slots and keep what comes out."""
        hidden_BTH = self.cache.hidden(("segment", rung), slots_BT)
        positions_BT = self.cache.place(slots_BT, tree, base_B)
        previous_BTH = self._previous(rung, slots_BT)
        depth = self.depths[rung]
        hidden_BTH = self.model.run_head(depth, hidden_BTH, positions_BT, self.cache, previous_BTH)
        self.cache.store_hidden(("head", rung), slots_BT, hidden_BTH)

    def _previous(self, rung: int, slots_BT: torch.Tensor) -> torch.Tensor | None:
        """For a head that reads it, the normed state [B, T, H] of the token before each slot.

        Where the full model has not been yet, what the next shallower rung made of that token (the
        shallowest one: what itself did, in an earlier pass) stands in; where there is not even
        that, 0.
        """
        if self.model.head(self.depths[rung]).mix is None:
            return None
        before_BT = self.cache.slots_before(slots_BT)
        lower, last = max(rung - 1, 0), len(self.depths) - 1
        stand_in = ("head" if self.head_layers(lower) else "segment", lower)
        found_BTH: torch.Tensor | None = None
        for track in (stand_in, ("segment", last)):  # the full model's own state where it is known
            length_B = self.cache.length(track)
            if not length_B.any():
                continue
            length_B1 = torch.from_numpy(length_B[:, None]).to(slots_BT.device)
            known_BT = (before_BT >= 0) & (before_BT < length_B1)
            states_BTH = self.cache.hidden(track, before_BT.clamp_min(0))
            normed_BTH = self.model.normed(self.depths[track[1]], states_BTH)
            if found_BTH is None:
                found_BTH = torch.zeros_like(normed_BTH)
            found_BTH = torch.where(known_BT[..., None], normed_BTH, found_BTH)
        return found_BTH

    def _forget_stand_ins(self, known_B: np.ndarray) -> None:
        """Roll heads back that read stand-ins for states which the full model has now computed.

        Args:
            known_B: tokens whose states at full depth were known before.
        """
        for rung in range(len(self.depths) - 1):
            if self.model.head(self.depths[rung]).mix is not None:
                track = ("head", rung)
                self.cache.lengths[track] = np.minimum(self.cache.length(track), known_B + 1)

    def _advance(self, track: tuple[str, int], start_B: np.ndarray, upto_B: np.ndarray) -> int:
        """Record that `track` now holds `upto` tokens; returns the tokens run, padding left out."""
        end_B = np.maximum(start_B, upto_B)
        self.cache.lengths[track] = end_B
        return int((end_B - start_B).sum())

    def _slots(self, start_B: np.ndarray, upto_B: np.ndarray) -> torch.Tensor | None:
        """Slots [B, T] from `start` on, as many as the row with most needs; None for none."""
        most = int((upto_B - start_B).max())
        if most <= 0:
            return None
        return torch.from_numpy(start_B[:, None] + np.arange(most)).to(self.model.device)
