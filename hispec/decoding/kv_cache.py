"""The KV cache: keys and values of every layer, hidden states of every rung, lengths per row.

A *segment* is a run of layers that always runs as a whole: the trunk's layers between two rungs, or
the blocks of an exit head. Token `t` of row `b` lies in slot `t` of the row. Only the tokens of a
draft tree lie in slots that are not their positions, until `keep`. What lies at or past the length
of a segment is garbage that a later write replaces, so rolling back means lowering a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hispec.decoding.draft_tree import DraftTree, PlacedTree
from hispec.models.attention import Branch, Reach, RowTree, causal

Segment = tuple[str, int]
"""("segment", rung) for the trunk's layers up to a rung, ("head", rung) for the blocks there."""
# Attention kernels sum keys in whole vectors and the rest one by one. Where there is never a rest,
# the same visible keys give the same bits however many masked ones follow.
_VECTOR = 16


def round_up(slots: int, block: int = _VECTOR) -> int:
    """The next number of slots that is whole blocks."""
    return -(-slots // block) * block


class KVCache:
    """Static KV buffers with the `update` call that transformers' attention layers make.

    `place` announces a pass: which slots its tokens are written to. The layers then call `update`,
    which is all of the `past_key_values` protocol that they use.

    Args:
        rows: number of prompts decoded together.
        capacity: slots per row.
        dtype: of the buffers and of the hidden states.
        block: for an engine, see `Engine.block`: the buffers grow by so many slots, and a pass sees
            all of them.
    """

    def __init__(
        self,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        block: int | None = None,
    ) -> None:
        self.rows = rows
        self.dtype = dtype
        self.capacity = round_up(capacity, block or _VECTOR)
        self.device = device
        self._block = block
        self._allocated = 0 if block else self.capacity
        self.lengths: dict[Segment, np.ndarray] = {}
        self._stacks: dict[tuple[int, ...], torch.Tensor] = {}
        """Keys and values of some layers in turn, [2 * layers, B, heads, S, size]."""
        self._stack_of: dict[int, tuple[int, ...]] = {}
        """The layers that a layer is stacked with."""
        self._hidden: dict[Segment, torch.Tensor] = {}
        self._rows_B1 = torch.arange(rows, device=device)[:, None]
        self._offsets_B1 = self._rows_B1 * self.capacity
        self._slots_BT: torch.Tensor | None = None
        self._index: torch.Tensor | None = None
        """Rows [B * T] of the hidden states of the announced slots."""
        self._tree: PlacedTree | None = None
        self._whole = False
        self.counts: list[int] = []
        self.first: int | None = None
        self.row_tree: RowTree | None = None
        self.of_prompts = False
        self.visible = 0
        """Slots of a row that the current pass may see."""

    def length(self, segment: Segment) -> np.ndarray:
        """Tokens [B] whose KV and hidden states the segment holds."""
        if segment not in self.lengths:
            self.lengths[segment] = np.zeros(self.rows, dtype=np.int64)
        return self.lengths[segment]

    def truncate(self, length_B: np.ndarray) -> None:
        """Roll every segment of every row back to at most `length` tokens."""
        for segment, held_B in self.lengths.items():
            self.lengths[segment] = np.minimum(held_B, length_B)

    def place(
        self,
        slots_BT: np.ndarray,
        tree: DraftTree | None = None,
        base_B: np.ndarray | None = None,
        *,
        count_B: np.ndarray | None = None,
        whole: bool = False,
    ) -> torch.Tensor:
        """Announce a pass over the tokens in `slots`; returns their positions [B, T].

        A slot is the position of its token, unless a tree lies in the slots from `base` on: tokens
        side by side in the tree share a position, and see their own ancestors only.

        Args:
            count_B: tokens of each row, what follows them is padding; default: all.
            whole: the pass reads whole texts. Plain causal attention is enough then.
        """
        visible = int(slots_BT.max()) + 1
        self._slots_BT = torch.from_numpy(slots_BT).to(self.device)
        self._index = (self._slots_BT + self._offsets_B1).reshape(-1)
        self._tree = None
        self.first = int(slots_BT[0, 0]) if self.rows == 1 else None
        self.row_tree = None
        count_B = np.full(len(slots_BT), slots_BT.shape[1]) if count_B is None else count_B
        self.counts, self._whole = count_B.tolist(), whole
        if tree is not None and not tree.chain:
            assert base_B is not None
            self._tree = PlacedTree(tree, base_B, self.device)
            if self.first is not None:
                self.row_tree = self._tree.of_row(self.first, slots_BT.shape[1])
            if self.row_tree is None:
                self.first = None
            visible = max(visible, int(base_B.max()) + tree.parent_BN.shape[1])
        assert visible <= self.capacity, (visible, self.capacity)
        self.show(visible)
        return self._slots_BT if self._tree is None else self._tree.positions(self._slots_BT)

    def show(self, slots: int) -> None:
        """Let a pass see so many slots, and a few more, which are all masked."""
        self.make_room(slots)
        self.visible = round_up(slots) if self._block is None else self._allocated

    def make_room(self, slots: int) -> None:
        """Let the KV buffers hold so many slots of every row."""
        if slots > self._allocated:
            more = round_up(slots, self._block or _VECTOR) - self._allocated
            for layers, stack in self._stacks.items():
                self._stacks[layers] = F.pad(stack, (0, 0, 0, more))
            self._allocated += more

    def whole_texts(self, reach: Reach) -> list[int] | None:
        """Lengths of the texts that the announced pass reads from their first tokens on, where
        plain causal attention over each is enough; None for any other pass."""
        if not self._whole or reach.first:
            return None
        if reach.window is not None and max(self.counts) > reach.window:
            return None
        return self.counts

    def previous_slots(self) -> torch.Tensor:
        """Slots [B, T] of the tokens before those of the announced pass; -1 for none."""
        assert self._slots_BT is not None, "place() comes before the first layer of a pass"
        if self._tree is None:
            return self._slots_BT - 1
        return self._tree.previous_slots(self._slots_BT)

    def seen(self, reach: Reach) -> torch.Tensor:
        """Which slots the tokens of the announced pass attend to, bool [B, T, S]."""
        assert self._slots_BT is not None, "place() comes before the first layer of a pass"
        slots_S = torch.arange(self.visible, device=self._slots_BT.device)
        seen_BTS = slots_S <= self._slots_BT[..., None]
        if self._tree is not None:
            seen_BTS = self._tree.hide(seen_BTS, self._slots_BT)
        if self._tree is None:
            return reach.limit(seen_BTS, self._slots_BT, slots_S)
        positions_BT = self._tree.positions(self._slots_BT)
        key_positions = self._tree.positions(slots_S.expand(self.rows, -1))[:, None]
        return reach.limit(seen_BTS, positions_BT, key_positions)

    def seen_apart(self, reach: Reach) -> tuple[torch.Tensor, torch.Tensor]:
        """As `seen`, for an engine whose passes get their own keys apart from those before them.

        Returns:
            (which slots the tokens attend to, those of the pass itself left out, bool [B, T, S];
            which tokens of the pass, bool [B, T, T]).
        """
        assert self._slots_BT is not None, "place() comes before the first layer of a pass"
        seen_BTS = self.seen(reach)
        own_BTT = self._slots_BT[:, None].expand(-1, self._slots_BT.shape[1], -1)
        return seen_BTS.scatter(2, own_BTT, False), seen_BTS.gather(2, own_BTT)

    def branches(self, reach: Reach, mask: Callable[[torch.Tensor], torch.Tensor]) -> list[Branch]:
        """The branches of the announced tree, depth first; none without a tree in that order.

        The first branch of a row includes the tokens of the pass before the tree.

        Args:
            mask: makes the attention mask of which slots are seen, bool [1, T, S].
        """
        if self._tree is None or not self._tree.depth_first:
            return []
        assert self._slots_BT is not None
        found: list[Branch] = []
        for row, branches in enumerate(self._tree.branches):
            begin, end = int(self._slots_BT[row, 0]), int(self._slots_BT[row, -1]) + 1
            base = int(self._tree.base_B1[row, 0])
            for place, slot, stop in branches:
                first, stop = begin if slot == base else max(begin, slot), min(stop, end)
                if stop <= first:
                    continue
                moved = place - slot
                positions_1T = torch.arange(first + moved, stop + moved)[None]
                slots_S = torch.arange(round_up(stop + moved))
                found.append(
                    Branch(
                        row=row,
                        tokens=slice(first - begin, stop - begin),
                        slots=slice(first, stop),
                        places=slice(first + moved, stop + moved),
                        drafts=slice(base, base + self._tree.width),
                        mask=mask(causal(positions_1T, slots_S, reach)),
                    )
                )
        return found

    def update(
        self, keys_BATE: torch.Tensor, values_BATE: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the KV of the tokens announced by `place`; return all that is visible to them.

        Tokens beyond those announced are padding.
        """
        heads, size = keys_BATE.shape[1], keys_BATE.shape[3]
        if layer_idx not in self._stack_of:
            self.buffers([layer_idx], heads, size)
        assert self._slots_BT is not None, "place() comes before the first layer of a pass"
        stack = self._kv(layer_idx)
        for buffer, new_BATE in zip(stack, (keys_BATE, values_BATE), strict=True):
            new_BATE = new_BATE[:, :, : self._slots_BT.shape[1]]
            self._put(buffer[None], self._slots_BT, new_BATE[None].to(self.dtype))
        keys, values = stack[:, :, :, : self.visible].to(keys_BATE.dtype)
        return keys, values

    def buffers(self, layers: Sequence[int], heads: int, size: int) -> torch.Tensor:
        """Keys and values of some layers in turn, [2 * layers, B, heads, S, size]: the cache's own
        memory. Layers that were stacked otherwise are moved."""
        key = tuple(layers)
        if key not in self._stacks:
            # zeros, not empty: a masked NaN would still poison the attention's weighted sum
            size_NBASE = 2 * len(key), self.rows, heads, self._allocated, size
            stack = torch.zeros(size_NBASE, dtype=self.dtype, device=self.device)
            for i, layer in enumerate(key):
                if layer in self._stack_of:
                    stack[2 * i : 2 * i + 2] = self._kv(layer)
            self._stacks[key] = stack
            self._stack_of |= dict.fromkeys(key, key)
            used = set(self._stack_of.values())
            self._stacks = {of: stack for of, stack in self._stacks.items() if of in used}
        return self._stacks[key]

    def write(self, layers: Sequence[int], new_NBATE: torch.Tensor) -> None:
        """Store the KV of the announced tokens, in the order of `buffers`."""
        assert self._slots_BT is not None, "place() comes before the first layer of a pass"
        if self.first is not None:
            self.put(layers, self.first, new_NBATE)
        else:
            self._put(self._stacks[tuple(layers)], self._slots_BT, new_NBATE)

    def put(self, layers: Sequence[int], first: int, new_N1ATE: torch.Tensor, row: int = 0) -> None:
        """Store the KV of a row's tokens in the slots from `first` on."""
        stop = first + new_N1ATE.shape[3]
        self._stacks[tuple(layers)][:, row : row + 1, :, first:stop] = new_N1ATE

    def put_hidden(self, segment: Segment, first: int, hidden_TH: torch.Tensor) -> None:
        """Keep hidden states of the only row in the slots from `first` on."""
        self._hidden[segment][first : first + len(hidden_TH)] = hidden_TH

    def _kv(self, layer: int) -> torch.Tensor:
        """Keys and values [2, B, heads, S, size] of a layer."""
        key = self._stack_of[layer]
        at = 2 * key.index(layer)
        return self._stacks[key][at : at + 2]

    def _put(self, stack: torch.Tensor, slots_BT: torch.Tensor, new_NBATE: torch.Tensor) -> None:
        """Write to some slots of a stack [N, B, heads, S, size]."""
        if self.rows == 1:
            stack.index_copy_(3, slots_BT[0], new_NBATE)
        else:
            stack[:, self._rows_B1, :, slots_BT] = new_NBATE.permute(1, 3, 0, 2, 4)

    def _take(self, stack: torch.Tensor, slots_BT: torch.Tensor) -> torch.Tensor:
        """A copy [N, B, heads, T, size] of some slots of a stack."""
        if self.rows == 1:
            return stack.index_select(3, slots_BT[0])
        return stack[:, self._rows_B1, :, slots_BT].permute(2, 0, 3, 1, 4)

    def store_hidden(self, segment: Segment, hidden_BTH: torch.Tensor) -> None:
        """Keep the hidden states that a segment computed for the announced slots."""
        assert self._index is not None, "place() comes before the first layer of a pass"
        width = hidden_BTH.shape[-1]
        if segment not in self._hidden:
            self._hidden[segment] = self._states(width)
        hidden_NH = hidden_BTH.reshape(-1, width).to(self.dtype)
        self._hidden[segment].index_copy_(0, self._index, hidden_NH)

    def _states(self, width: int) -> torch.Tensor:
        """Room for the hidden states of a segment."""
        size = self.rows * self.capacity, width
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def placed_hidden(self, segment: Segment) -> torch.Tensor:
        """Hidden states [B, T, H] that a segment stored for the announced slots."""
        assert self._slots_BT is not None
        assert self._index is not None
        return self._hidden[segment].index_select(0, self._index).view(*self._slots_BT.shape, -1)

    def hidden(self, segment: Segment, slots_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, H] that a segment stored for some slots."""
        if slots_BT.shape == (1, 1) and self.device.type == "cpu":
            slot = int(slots_BT)
            return self._hidden[segment][None, slot : slot + 1].clone()
        index = (slots_BT + self._offsets_B1).reshape(-1)
        return self._hidden[segment].index_select(0, index).view(*slots_BT.shape, -1)

    def keep(self, base_B: np.ndarray, path_BD: np.ndarray) -> None:
        """Move the accepted path of a tree to the slots of its positions, KV and hidden states.

        Args:
            base_B: slot of the first draft token of each row.
            path_BD: columns of the accepted draft tokens, see `DraftTree`. A row that accepted
                fewer is padded with any column, whose copy lands past the row's length.
        """
        to_BD = base_B[:, None] + np.arange(path_BD.shape[1])
        moves = np.stack([base_B[:, None] + path_BD - 1, to_BD])
        source_BD, target_BD = torch.from_numpy(moves).to(self.device)
        for stack in self._stacks.values():
            self._put(stack, target_BD, self._take(stack, source_BD))
        source, target = (
            (slots_BD + self._offsets_B1).flatten() for slots_BD in (source_BD, target_BD)
        )
        for states in self._hidden.values():
            states.index_copy_(0, target, states.index_select(0, source))

    def take(self, rows: Sequence[int], other: KVCache, source: Sequence[int]) -> None:
        """Copy the rows `source` of another cache of the same layers into `rows`: KV, hidden states
        and lengths."""
        longest = max(int(length_B[source].max()) for length_B in other.lengths.values())
        self.make_room(longest)
        for layer in other._stack_of:
            theirs = other._kv(layer)
            if layer not in self._stack_of:
                self.buffers([layer], theirs.shape[2], theirs.shape[4])
            self._kv(layer)[:, rows, :, :longest] = theirs[:, source, :, :longest]
        for segment, states in other._hidden.items():
            width = states.shape[-1]
            if segment not in self._hidden:
                self._hidden[segment] = self._states(width)
            mine = self._hidden[segment].view(self.rows, self.capacity, width)
            their = states.view(other.rows, other.capacity, width)
            mine[rows, :longest] = their[source, :longest]
        for segment in {**self.lengths, **other.lengths}:
            length_B = self.length(segment).copy()
            length_B[rows] = other.length(segment)[source]
            self.lengths[segment] = length_B
