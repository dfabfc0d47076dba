"""What passes get besides hidden states, keys and values: rotary embeddings and masks."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from hispec.models.attention import PassCache, RowTree

Inputs = tuple[torch.Tensor, ...]
"""cos and sin [B, T, head size], and the mask [B, 1, heads per KV head * T, T + S], of an attention
type."""


class PassInputs:
    """The inputs of one announced pass, by attention type; the pieces of a trunk share them."""

    def __init__(self, cache: PassCache, positions_BT: torch.Tensor, padding: int) -> None:
        self._cache = weakref.ref(cache)
        self._positions_BT, self._padding = positions_BT, padding
        self.by_kind: dict[str, Inputs] = {}

    def of(self, cache: PassCache, positions_BT: torch.Tensor, padding: int) -> bool:
        """Whether they are those of this pass: every pass has its own tensor of positions."""
        same = self._cache() is cache and self._positions_BT is positions_BT
        return same and self._padding == padding


class RopeTable:
    """Rotary embeddings by position, computed once.

    Args:
        model: an `ExitModel`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, kind: str, first: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) [1, T, head size] of an attention type for positions from `first` on."""
        cos, sin = self._up_to(kind, first + tokens)
        return cos[:, first : first + tokens], sin[:, first : first + tokens]

    def at(self, kind: str, positions_T: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) [1, T, head size] of an attention type for these positions."""
        cos, sin = self._up_to(kind, int(positions_T.max()) + 1)
        index_T = torch.from_numpy(positions_T)
        return cos.index_select(1, index_T), sin.index_select(1, index_T)

    def _up_to(self, kind: str, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The table of an attention type, with `stop` positions at least."""
        if kind not in self._tables or self._tables[kind][0].shape[1] < stop:
            positions_1T = torch.arange(2 * stop)[None]
            if (longest := self._model.longest_text) is not None:  # all frequencies change there
                positions_1T = positions_1T.clamp_max(longest - 1)
            self._tables[kind] = self._model.rope(kind, torch.zeros(1, 1, 1), positions_1T)
        return self._tables[kind]


class RowInputs:
    """The inputs of passes over a few tokens of one row, draft trees included.

    A round of decoding has few such passes, each a little further than the one before. So
    embeddings are looked up in a table, and masks are changed where they differ from those of the
    pass before: made anew, both take 0.5 ms of a round of 20 (docs/benchmarks.md).

    Args:
        model: an `ExitModel`.
        ropes: of the same model.
    """

    def __init__(self, model: Any, ropes: RopeTable) -> None:
        self._model, self._ropes = model, ropes
        config = model.hf.config
        self._heads_per_kv = config.num_attention_heads // config.num_key_value_heads
        self._masks: dict[int, _RowMask] = {}
        """By tokens of a pass."""

    def takes(self, kinds: Iterable[str], cache: PassCache, tokens: int) -> bool:
        """Whether it has the inputs of the announced pass, padded to so many tokens."""
        first = cache.first
        return first is not None and all(self._sees_all(kind, first + tokens) for kind in kinds)

    def of(self, kinds: Iterable[str], cache: PassCache, tokens: int) -> dict[str, Inputs]:
        """The inputs by attention type. Padding attends to what is before it, as text does.

        The next call changes the mask.
        """
        first, slots = cache.first, cache.visible
        assert first is not None
        mask = self._masks.get(tokens)
        if mask is None or mask.slots != slots:
            mask = self._masks[tokens] = _RowMask(tokens, slots, self._heads_per_kv)
        shown, tree = mask.of(first, cache.row_tree), cache.row_tree
        if tree is None:
            return {kind: (*self._ropes.of(kind, first, tokens), shown) for kind in kinds}
        positions_T = np.full(tokens, first)
        positions_T[: len(tree.depth_T)] += tree.depth_T
        return {kind: (*self._ropes.at(kind, positions_T), shown) for kind in kinds}

    def _sees_all(self, kind: str, stop: int) -> bool:
        """Whether tokens before slot `stop` attend to all that is before them."""
        reach = self._model.reach(kind)
        return not reach.first and (reach.window is None or stop <= reach.window)


class _RowMask:
    """The mask of tokens behind some of the slots."""

    def __init__(self, tokens: int, slots: int, heads_per_kv: int) -> None:
        self.slots, self._tokens, self._shown = slots, tokens, 0
        size = heads_per_kv, tokens, tokens + slots
        mask_GTS = torch.full(size, -torch.inf)
        self._mask = mask_GTS.view(1, 1, -1, size[2])
        self._own_GTT = mask_GTS[..., :tokens]
        self._in_order_TT = torch.full((tokens, tokens), -torch.inf).triu(1)
        self._own_GTT[:] = self._in_order_TT
        self._tree: RowTree | None = None

    def of(self, stop: int, tree: RowTree | None) -> torch.Tensor:
        """The mask [1, 1, heads per KV head * T, T + S] that shows the slots before `stop`, and of
        the tokens of the pass those before each, or those that lead to it in a tree."""
        if tree is not self._tree:
            self._own_GTT[:] = self._in_order_TT
            if tree is not None:
                count = len(tree.sees_TT)
                seen_TT = torch.from_numpy(np.where(tree.sees_TT, np.float32(0), -np.inf))
                self._own_GTT[:, :count, :count] = seen_TT
            self._tree = tree
        low, high = sorted((self._shown, stop))
        if low < high:
            value = 0.0 if stop > self._shown else -torch.inf
            self._mask[..., self._tokens + low : self._tokens + high] = value
            self._shown = stop
        return self._mask
