"""The cache: KV of every layer, hidden states of every rung, and one length per track and row.

A *track* is a run of layers that is always run together: a segment of the trunk, or the blocks of
an exit head. Token `t` of row `b` lives in slot `t` of the row, index `b * capacity + t` of every
buffer; only the proposals of a tree lie in slots that are not their positions, until `keep`. What
lies at or past a track's length is garbage that a later write replaces, so rolling back is lowering
a number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch

from hispec.decoding.draft_tree import Proposal
from hispec.models.attention import Branch, causal

# Attention kernels sum keys in whole vectors and the rest one by one. With no rest ever, the same
# visible keys give the same bits however many masked ones follow.
_VECTOR = 16


def round_up(slots: int) -> int:
    """The next number of slots that is whole vectors."""
    return -(-slots // _VECTOR) * _VECTOR


class Cache:
    """Static KV buffers with the `update` call that transformers' attention layers make.

    Before a pass, `place` says where its tokens are written; the layers then call `update`, which
    is all of the `past_key_values` protocol that they use.

    Args:
        rows: number of prompts decoded together.
        capacity: slots per row.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.rows = rows
        self.capacity = round_up(capacity)
        self.device = device
        self.lengths: dict[Any, np.ndarray] = {}
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._hidden: dict[Any, torch.Tensor] = {}
        self._slots_BT: torch.Tensor | None = None
        self._tree: _PlacedTree | None = None
        self.visible = 0
        """Slots of a row that the current pass may see."""

    def length(self, track: Any) -> np.ndarray:
        """Tokens [B] whose KV (and boundary) the track holds."""
        if track not in self.lengths:
            self.lengths[track] = np.zeros(self.rows, dtype=np.int64)
        return self.lengths[track]

    def truncate(self, length_B: np.ndarray) -> None:
        """Roll every track of every row back to at most `length_B` tokens."""
        for track, held in self.lengths.items():
            self.lengths[track] = np.minimum(held, length_B)

    def flat(self, slots_BT: torch.Tensor) -> torch.Tensor:
        """Buffer indices [B * T] of every row's slots [B, T]."""
        offsets = torch.arange(self.rows, device=slots_BT.device)[:, None] * self.capacity
        return (slots_BT + offsets).reshape(-1)

    def place(
        self, slots_BT: torch.Tensor, proposal: Proposal | None = None, base_B: Any = None
    ) -> torch.Tensor:
        """Announce a pass over the tokens in `slots_BT`; returns their positions [B, T].

        A slot is the position of its token, unless a tree is proposed from slot `base` on: then
        tokens side by side in the tree share a position, and see their own ancestors only.
        """
        visible = int(slots_BT.max()) + 1
        self._slots_BT = slots_BT
        self._tree = None
        if proposal is not None and not proposal.chain:
            self._tree = _PlacedTree(proposal, base_B, slots_BT)
            visible = max(visible, int(base_B.max()) + proposal.parent_BN.shape[1])
        assert visible <= self.capacity, (visible, self.capacity)
        self.visible = round_up(visible)  # the few slots more are all masked
        return slots_BT if self._tree is None else self._tree.positions(slots_BT)

    def slots_before(self, slots_BT: torch.Tensor) -> torch.Tensor:
        """Slots [B, T] of the tokens before those of the announced pass; -1 for none."""
        return slots_BT - 1 if self._tree is None else self._tree.slots_before(slots_BT)

    def seen(self, window: int | None) -> torch.Tensor:
        """Which slots the tokens of the announced pass attend to, bool [B, T, visible].

        Args:
            window: with sliding attention, how many of the last positions, its own included.
        """
        assert self._slots_BT is not None, "place() comes before the first layer of a pass"
        keys_K = torch.arange(self.visible, device=self._slots_BT.device)
        seen_BTK = keys_K <= self._slots_BT[..., None]
        if self._tree is not None:
            seen_BTK = self._tree.hide(seen_BTK, self._slots_BT)
        if window is not None:
            positions_BT, key_positions = self._slots_BT, keys_K
            if self._tree is not None:
                positions_BT = self._tree.positions(self._slots_BT)
                key_positions = self._tree.positions(keys_K.expand(self.rows, -1))[:, None]
            seen_BTK = seen_BTK & (key_positions > positions_BT[..., None] - window)
        return seen_BTK

    def branches(
        self, window: int | None, mask: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[Branch]:
        """The announced tree branch by branch, depth first; nothing if none was announced.

        The first branch of a row includes the tokens of the pass before the tree.

        Args:
            window: as in `seen`.
            mask: makes the attention's mask of what is seen, bool [1, T, K].
        """
        if self._tree is None:
            return []
        assert self._slots_BT is not None
        found: list[Branch] = []
        for row, runs in enumerate(self._tree.runs):
            begin, end = int(self._slots_BT[row, 0]), int(self._slots_BT[row, -1]) + 1
            base = int(self._tree.base_B1[row, 0])
            for place, slot, stop in runs:
                first, stop = begin if slot == base else max(begin, slot), min(stop, end)
                if stop <= first:
                    continue
                moved = place - slot
                positions_1T = torch.arange(first + moved, stop + moved)[None]
                keys_K = torch.arange(round_up(stop + moved))
                found.append(
                    Branch(
                        row=row,
                        tokens=slice(first - begin, stop - begin),
                        slots=slice(first, stop),
                        places=slice(first + moved, stop + moved),
                        proposals=slice(base, base + self._tree.width),
                        mask=mask(causal(positions_1T, keys_K, window)),
                    )
                )
        return found

    def update(
        self, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the KV of the tokens announced by `place`; return all that is visible to them."""
        return (
            self._write(self._keys, keys_BHTD, layer_idx),
            self._write(self._values, values_BHTD, layer_idx),
        )

    def _write(
        self, store: dict[int, torch.Tensor], new_BHTD: torch.Tensor, layer_idx: int
    ) -> torch.Tensor:
        assert self._slots_BT is not None, "place() comes before the first layer of a pass"
        heads, dim = new_BHTD.shape[1], new_BHTD.shape[3]
        if layer_idx not in store:
            # zeros, not empty: a masked NaN would still poison the attention's weighted sum
            store[layer_idx] = new_BHTD.new_zeros(self.rows * self.capacity, heads * dim)
        new_ND = new_BHTD.transpose(1, 2).reshape(-1, heads * dim)
        store[layer_idx].index_copy_(0, self.flat(self._slots_BT), new_ND)
        buffer_BKHD = store[layer_idx].view(self.rows, self.capacity, heads, dim)
        return buffer_BKHD[:, : self.visible].transpose(1, 2)

    def store_hidden(self, track: Any, slots_BT: torch.Tensor, hidden_BTH: torch.Tensor) -> None:
        """Keep the hidden states that a track computed for `slots_BT` (the boundary)."""
        width = hidden_BTH.shape[-1]
        if track not in self._hidden:
            self._hidden[track] = hidden_BTH.new_zeros(self.rows * self.capacity, width)
        self._hidden[track].index_copy_(0, self.flat(slots_BT), hidden_BTH.reshape(-1, width))

    def hidden(self, track: Any, slots_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, H] that a track stored for `slots_BT`."""
        picked = self._hidden[track].index_select(0, self.flat(slots_BT))
        return picked.view(*slots_BT.shape, -1)

    def keep(self, base_B: np.ndarray, path_BD: np.ndarray) -> None:
        """Move the accepted path of a tree to where its tokens belong, KV and boundary together.

        Args:
            base_B: slot of the first proposal of each row.
            path_BD: columns of the accepted proposals, see `Proposal`; a row that accepted fewer
                is filled up with any column, whose copy lands past the row's length.
        """
        base_B1 = torch.from_numpy(base_B[:, None])
        source = self.flat((base_B1 + torch.from_numpy(path_BD) - 1).to(self.device))
        target = self.flat((base_B1 + torch.arange(path_BD.shape[1])).to(self.device))
        for store in (self._keys, self._values, self._hidden):
            for buffer in store.values():
                buffer.index_copy_(0, target, buffer.index_select(0, source))


class _PlacedTree:
    """A tree whose proposals lie in the slots from `base` on, with what a pass asks about it."""

    def __init__(self, proposal: Proposal, base_B: np.ndarray, like: torch.Tensor) -> None:
        device = like.device
        self.base_B1 = torch.from_numpy(base_B[:, None]).to(device)
        self.depth_BN = torch.from_numpy(proposal.depth_BC[:, 1:].copy()).to(device)
        self.width = proposal.parent_BN.shape[1]
        self._proposal = proposal

    @cached_property
    def runs(self) -> list[list[tuple[int, int, int]]]:
        """Chains of each row: position of the first, slot of the first, slot after the last."""
        bases, depth_BC = self.base_B1[:, 0].tolist(), self._proposal.depth_BC.tolist()
        return [
            [(base + depth_C[first] - 1, base + first - 1, base + stop - 1) for first, stop in runs]
            or [(base, base, base)]  # nothing but the tokens before
            for base, depth_C, runs in zip(bases, depth_BC, self._proposal.runs, strict=True)
        ]

    def _inside(self, slots_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(which slots hold proposals, the number of the proposal there)."""
        number_BT = slots_BT - self.base_B1
        inside_BT = (number_BT >= 0) & (number_BT < self.width)
        return inside_BT, number_BT.clamp(0, self.width - 1)

    def positions(self, slots_BT: torch.Tensor) -> torch.Tensor:
        """Position [B, T] in the text of the token in each slot."""
        inside_BT, number_BT = self._inside(slots_BT)
        deep_BT = self.base_B1 + self.depth_BN.gather(1, number_BT) - 1
        return torch.where(inside_BT, deep_BT, slots_BT)

    def slots_before(self, slots_BT: torch.Tensor) -> torch.Tensor:
        """Slot [B, T] of the token that each one follows."""
        inside_BT, number_BT = self._inside(slots_BT)
        parent_BN = torch.from_numpy(self._proposal.parent_BN).to(slots_BT.device)
        parents_BT = self.base_B1 - 1 + parent_BN.gather(1, number_BT).clamp_min(0)
        return torch.where(inside_BT, parents_BT, slots_BT - 1)

    def hide(self, seen_BTK: torch.Tensor, slots_BT: torch.Tensor) -> torch.Tensor:
        """`seen` without the proposals that are no ancestors of the token that looks."""
        inside_BT, number_BT = self._inside(slots_BT)
        index_BTN = number_BT[..., None].expand(-1, -1, self.width)
        sees_BNN = torch.from_numpy(self._proposal.sees_BNN).to(slots_BT.device)
        sees_BTN = sees_BNN.gather(1, index_BTN) & inside_BT[..., None]
        keys_B1N = self.base_B1[:, None] + torch.arange(self.width, device=slots_BT.device)
        return seen_BTK.scatter(2, keys_B1N.expand_as(sees_BTN), sees_BTN)
