"""The cache: KV of every layer, hidden states of every rung, and one length per track and row.

A *track* is a run of layers that is always run together: a segment of the trunk, or the blocks of
an exit head. Position `t` of row `b` lives in slot `b * capacity + t` of every buffer. What lies at
or past a track's length is garbage that a later write replaces, so rolling back is lowering a
number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# Attention kernels sum keys in whole vectors and the rest one by one. With no rest ever, the same
# visible keys give the same bits however many masked ones follow.
_VECTOR = 16


def _round_up(slots: int) -> int:
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
        self.capacity = _round_up(capacity)
        self.device = device
        self.lengths: dict[Any, np.ndarray] = {}
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._hidden: dict[Any, torch.Tensor] = {}
        self._slots: torch.Tensor | None = None
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

    def slots(self, positions_BT: torch.Tensor) -> torch.Tensor:
        """Flat buffer indices [B * T] of positions [B, T]."""
        offsets = torch.arange(self.rows, device=positions_BT.device)[:, None] * self.capacity
        return (positions_BT + offsets).reshape(-1)

    def place(self, positions_BT: torch.Tensor, visible: int) -> None:
        """Announce a pass: its tokens go to `positions_BT` and see the first `visible` slots.

        A few more are shown, all of them masked, to end at a whole vector of the kernel.
        """
        assert visible <= self.capacity, (visible, self.capacity)
        self._slots = self.slots(positions_BT)
        self.visible = _round_up(visible)

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
        assert self._slots is not None, "place() comes before the first layer of a pass"
        heads, dim = new_BHTD.shape[1], new_BHTD.shape[3]
        if layer_idx not in store:
            # zeros, not empty: a masked NaN would still poison the attention's weighted sum
            store[layer_idx] = new_BHTD.new_zeros(self.rows, self.capacity, heads, dim)
        flat = store[layer_idx].view(self.rows * self.capacity, heads * dim)
        flat.index_copy_(0, self._slots, new_BHTD.transpose(1, 2).reshape(-1, heads * dim))
        return store[layer_idx][:, : self.visible].transpose(1, 2)

    def store_hidden(
        self, track: Any, positions_BT: torch.Tensor, hidden_BTH: torch.Tensor
    ) -> None:
        """Keep the hidden states that a track computed for `positions_BT` (the boundary)."""
        width = hidden_BTH.shape[-1]
        if track not in self._hidden:
            self._hidden[track] = hidden_BTH.new_zeros(self.rows * self.capacity, width)
        self._hidden[track].index_copy_(0, self.slots(positions_BT), hidden_BTH.reshape(-1, width))

    def hidden(self, track: Any, positions_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, H] that a track stored for `positions_BT`."""
        picked = self._hidden[track].index_select(0, self.slots(positions_BT))
        return picked.view(*positions_BT.shape, -1)
