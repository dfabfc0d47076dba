"""A KV cache of many prefixes at once: a slot holds a token of a trie, which sees its ancestors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hispec.decoding.kv_cache import KVCache
from hispec.models.attention import Reach

PASS = 128
"""Nodes of one pass, at most."""


class Forest(KVCache):
    """A cache of one row whose slots are nodes: each sees itself and its ancestors."""

    def __init__(
        self, capacity: int, device: torch.device, dtype: torch.dtype, block: int | None
    ) -> None:
        super().__init__(1, capacity, device, dtype, block)
        self.used = 0
        self._position_S = torch.zeros(self.capacity, dtype=torch.long, device=device)
        self._sees_SS = torch.zeros(self.capacity, self.capacity, dtype=torch.bool, device=device)

    def add(self, parent: int | None) -> int:
        """The slot of a new node."""
        slot = self.used
        self.used += 1
        if parent is None:
            self._sees_SS[slot] = False
            self._position_S[slot] = 0
        else:
            self._sees_SS[slot] = self._sees_SS[parent]
            self._position_S[slot] = self._position_S[parent] + 1
        self._sees_SS[slot, slot] = True
        return slot

    def place(
        self,
        slots_BT: np.ndarray,
        tree: Any = None,
        base_B: Any = None,
        *,
        count_B: Any = None,
        whole: bool = False,
    ) -> torch.Tensor:
        super().place(slots_BT)
        self.first = None  # what lies side by side need not follow each other
        self.show(self.used)
        assert self._slots_BT is not None
        return self._position_S[self._slots_BT]

    def seen(self, reach: Reach) -> torch.Tensor:
        assert self._slots_BT is not None, "place() comes before the first layer of a pass"
        seen_BTS = self._sees_SS[self._slots_BT][..., : self.visible]
        position_S = self._position_S
        return reach.limit(seen_BTS, position_S[self._slots_BT], position_S[: self.visible])
