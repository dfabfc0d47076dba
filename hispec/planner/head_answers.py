"""Answers of a head that reads the token before.

What it says of a token depends on the prefix and on how far the full model had run: up to there it
has read the full model's states, from there on its own. A *view* is a prefix with that length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from hispec.models.exit_model import ExitModel
from hispec.planner.forest import PASS, Forest

States = Callable[[Sequence[int]], torch.Tensor]
"""For some nodes of the trie, states [N, H]."""


class HeadAnswers:
    """The blocks of one head on the views of one prompt; each view is run once.

    Args:
        parent: for each node of the trie of `Answers` the one before it, -1 for none.
        place: for each node the position of its token.
        trunk: states at the depth of the head.
        before: what the head reads of tokens that the full model has run on.
        room: views whose KV is kept; when more are needed, all of it is dropped.
    """

    def __init__(
        self,
        model: ExitModel,
        depth: int,
        parent: list[int],
        place: list[int],
        trunk: States,
        before: States,
        room: int,
    ) -> None:
        self.model, self.depth = model, depth
        self._parent_node, self._place = parent, place
        self._trunk, self._before = trunk, before
        self._forest = Forest(room, model.device, *model.cache_layout())
        self._view: dict[tuple[int, int], int] = {}
        self._node: list[int] = []
        self._parent: list[int] = []
        self._steps: list[int] = []
        """For each view, tokens past those that the full model had run on; 0 for its own."""
        self._slot: list[int] = []

    def view(self, node: int, known: int) -> int:
        """The view of a node, where the full model had run on the first `known` tokens."""
        new = []
        while node >= 0 and self._key(node, known) not in self._view:
            new.append(node)
            node = self._parent_node[node]
        view = self._view[self._key(node, known)] if node >= 0 else -1
        for node in reversed(new):
            self._node.append(node)
            self._parent.append(view)
            self._steps.append(max(0, self._place[node] - known))
            self._slot.append(-1)
            view = self._view[self._key(node, known)] = len(self._node) - 1
        return view

    def _key(self, node: int, known: int) -> tuple[int, int]:
        """What its view is found by: within the known tokens, how many they are does not matter."""
        return node, known if self._place[node] > known else -1

    @torch.inference_mode()
    def states(self, views: Sequence[int]) -> torch.Tensor:
        """States [N, H] behind the blocks, before the norm."""
        needed = self._lacking(views)
        if self._forest.used + len(needed) > self._forest.capacity:
            self._forest.used = 0
            self._slot = [-1] * len(self._slot)
            needed = self._lacking(views)
            assert len(needed) <= self._forest.capacity, "too little room"
        for view in needed:
            parent = self._parent[view]
            self._slot[view] = self._forest.add(self._slot[parent] if parent >= 0 else None)
        # a view that is fed with its parent's own state comes behind it
        for steps in sorted({self._steps[view] for view in needed}):
            level = [view for view in needed if self._steps[view] == steps]
            for start in range(0, len(level), PASS):
                self._run(level[start : start + PASS], own=steps > 0)
        return self._kept(views)

    def _run(self, views: Sequence[int], *, own: bool) -> None:
        """Run some views whose parents, if they are fed with the states of these, have run."""
        nodes = [self._node[view] for view in views]
        hidden_1TH = self._trunk(nodes)[None]
        previous_TH = torch.zeros_like(hidden_1TH[0])
        after = [i for i, view in enumerate(views) if self._parent[view] >= 0]
        if own:
            hidden_TH = self._kept([self._parent[view] for view in views])
            normed_TH = self.model.normed(self.depth, hidden_TH)
            previous_TH = self.model.head(self.depth).own(hidden_TH, normed_TH)
        elif after:
            previous_TH[after] = self._before([self._parent_node[nodes[i]] for i in after])
        slots_1T = np.array([[self._slot[view] for view in views]])
        positions_1T = self._forest.place(slots_1T)
        args = hidden_1TH, positions_1T, self._forest, previous_TH[None]
        self._forest.store_hidden(("head", 0), self.model.run_head(self.depth, *args))

    def _kept(self, views: Sequence[int]) -> torch.Tensor:
        slots_1T = torch.tensor([[self._slot[view] for view in views]], device=self.model.device)
        return self._forest.hidden(("head", 0), slots_1T)[0]

    def _lacking(self, views: Sequence[int]) -> list[int]:
        """These views and those before them that have no slot, parents before children."""
        found: set[int] = set()
        for view in views:
            while view >= 0 and view not in found and self._slot[view] < 0:
                found.add(view)
                view = self._parent[view]
        return sorted(found)
