"""Answers: what every depth predicts after every prefix that a decode may read, computed once.

The rungs of a decode read prefixes of the text, drafts that will be rejected, and the branches of
trees. Here all of these are nodes of one trie over one prompt, with one KV cache in which a node
sees its ancestors alone. What one setting of the decoder has read is known to the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from hispec.decoding.drafters.recycle import CANDIDATES
from hispec.decoding.kv_cache import KVCache, Segment
from hispec.decoding.ladder import Ladder
from hispec.decoding.sampling import confidence, top_candidates
from hispec.models.attention import Reach
from hispec.models.exit_model import ExitModel

_PASS = 128  # nodes of one pass
Kind = tuple[int, bool]
"""A depth, and whether it reads the reduced draft vocabulary."""


class Answers:
    """The trie of one prompt and the answers at its nodes; a node stands for the prefix it ends.

    An answer is a row of numbers [2 + K]: the argmax of the logits, their top probability, and the
    ids of the best K candidates.

    Args:
        prompt: token ids, at least one.
        depths: increasing depths that may be read, the last one that of the full model.
        room: nodes beyond the prompt whose KV is kept. When more are needed, all of it is dropped
            and computed again on demand; answers stay.

    Raises:
        ValueError: a head that reads the token before. Its answers depend on how far the full
            model had run, and not on the prefix alone.
    """

    def __init__(
        self, model: ExitModel, prompt: Sequence[int], depths: Sequence[int], room: int = 2048
    ) -> None:
        if any(model.head(depth).reads_before for depth in depths[:-1]):
            raise ValueError("heads that read the token before cannot be replayed")
        self.model = model
        self.prompt = list(prompt)
        self.rungs = Ladder(model, depths, 1, 0)  # knows segments and heads, and runs nothing
        self.candidates = min(CANDIDATES, model.vocab_size)
        self._forest = _Forest(len(self.prompt) + room, model.device, model.cache_block())
        self._token: list[int] = []
        self._parent: list[int] = []
        self._slot: list[int] = []
        """Where the KV of each node lies; -1 for nowhere."""
        self._child: dict[tuple[int, int], int] = {}
        self._held: dict[Segment, np.ndarray] = {}
        """For each segment, the slots whose KV and hidden states are kept."""
        self._answers: dict[Kind, dict[int, np.ndarray]] = {}
        self.computed = 0
        """Answers that were computed so far."""
        self.root = -1
        for token in self.prompt:
            self.root = self.child(self.root, token)

    def child(self, node: int, token: int) -> int:
        """The node of the prefix that `token` extends."""
        found = self._child.get((node, token))
        if found is None:
            found = self._child[node, token] = len(self._token)
            self._token.append(token)
            self._parent.append(node)
            self._slot.append(-1)
        return found

    def follow(self, tokens: Iterable[int]) -> list[int]:
        """The nodes of a text after the prompt, the prompt's last one first."""
        nodes = [self.root]
        for token in tokens:
            nodes.append(self.child(nodes[-1], token))
        return nodes

    def answers(self, kind: Kind, nodes: Sequence[int]) -> np.ndarray:
        """Answers [N, 2 + K] at some nodes; unknown ones are computed."""
        known = self._answers.setdefault(kind, {})
        unknown = [node for node in dict.fromkeys(nodes) if node not in known]
        for start in range(0, len(unknown), _PASS):
            part = unknown[start : start + _PASS]
            known.update(zip(part, self._compute(kind, part), strict=True))
        return np.stack([known[node] for node in nodes])

    def verify(self, depth: int, nodes: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Answers [N, 2 + K] of a depth at the nodes of a chain, up to the first one that rejects
        the token that comes next. That one is repeated for the nodes after it.

        Args:
            tokens: after each node the token that continues the chain; none after the last one.
        """
        known = self._answers.setdefault((depth, False), {})
        found: list[np.ndarray] = []
        for i, node in enumerate(nodes):
            if node not in known:
                return np.stack([*found, *self.answers((depth, False), nodes[i:])])
            found.append(known[node])
            if i < len(tokens) and known[node][0] != tokens[i]:
                break
        return np.stack(found + [found[-1]] * (len(nodes) - len(found)))

    def draft(self, depth: int, nodes: Sequence[int], length: int) -> None:
        """Compute what a depth drafts greedily from some nodes on, up to `length` tokens."""
        kind = depth, self.model.draft_tokens is not None
        for _ in range(length):
            choices = self.answers(kind, nodes)[:, 0].astype(int).tolist()
            nodes = [self.child(*pair) for pair in zip(nodes, choices, strict=True)]

    @torch.inference_mode()
    def _compute(self, kind: Kind, nodes: Sequence[int]) -> np.ndarray:
        depth, drafting = kind
        rung = self.rungs.depths.index(depth)
        segments: list[Segment] = [("segment", r) for r in range(rung + 1)]
        if self.rungs.head_layers(rung):
            segments.append(("head", rung))
        needed = self._place(nodes, segments[-1])
        for segment in segments:
            held_S = self._held.setdefault(segment, np.zeros(self._forest.capacity, dtype=bool))
            missing = [node for node in needed if not held_S[self._slot[node]]]
            for start in range(0, len(missing), _PASS):
                self._run(segment, missing[start : start + _PASS])
        slots_1T = self._slots(nodes)
        normed_TH = self.model.normed(depth, self._forest.hidden(segments[-1], slots_1T)[0])
        project = self.model.project
        logits_TV = self.model.draft(depth, normed_TH) if drafting else project(normed_TH)
        self.computed += len(nodes)
        return np.concatenate(
            [
                logits_TV.argmax(-1, keepdim=True).cpu().numpy(),  # of equals the first, not any
                confidence(logits_TV)[:, None],
                top_candidates(logits_TV, self.candidates).cpu().numpy(),
            ],
            axis=1,
        )

    def _run(self, segment: Segment, nodes: Sequence[int]) -> None:
        kind, rung = segment
        slots_1T = np.array([[self._slot[node] for node in nodes]])
        depth = self.rungs.depths[rung]
        before = self.rungs.depths[rung - 1] if rung else 0
        positions_1T = self._forest.place(slots_1T)
        if kind == "head":
            hidden_1TH = self._forest.placed_hidden(("segment", rung))
            hidden_1TH = self.model.run_head(depth, hidden_1TH, positions_1T, self._forest)
        else:
            if rung:
                hidden_1TH = self._forest.placed_hidden(("segment", rung - 1))
            else:
                tokens_T = torch.tensor([self._token[node] for node in nodes])
                hidden_1TH = self.model.embed(tokens_T[None].to(self.model.device))
            hidden_1TH = self.model.run(hidden_1TH, before, depth, positions_1T, self._forest)
        self._forest.store_hidden(segment, hidden_1TH)
        self._held[segment][slots_1T[0]] = True

    def _slots(self, nodes: Sequence[int]) -> torch.Tensor:
        return torch.tensor([[self._slot[node] for node in nodes]], device=self.model.device)

    def _place(self, nodes: Sequence[int], segment: Segment) -> list[int]:
        """Give slots to some nodes; returns what `_lacking` does not find in the segment, parents
        before children."""
        needed, new = self._lacking(nodes, segment)
        if self._forest.used + len(new) > self._forest.capacity:
            self._forget()
            needed, new = self._lacking(nodes, segment)
            assert self._forest.used + len(new) <= self._forest.capacity, "too little room"
        for node in new:
            parent = self._parent[node]
            self._slot[node] = self._forest.add(self._slot[parent] if parent >= 0 else None)
        return needed

    def _forget(self) -> None:
        """Drop the KV of all nodes beyond the prompt, whose nodes and slots come first."""
        kept = len(self.prompt)
        self._forest.used = kept
        self._slot[kept:] = [-1] * (len(self._slot) - kept)
        for held_S in self._held.values():
            held_S[kept:] = False

    def _lacking(self, nodes: Sequence[int], segment: Segment) -> tuple[list[int], list[int]]:
        """(these nodes and their ancestors that the segment lacks, parents before children; those
        of them that have no slot)."""
        held_S = self._held.get(segment)
        found: set[int] = set()
        for node in nodes:
            while node >= 0 and node not in found:
                slot = self._slot[node]
                if slot >= 0 and held_S is not None and held_S[slot]:
                    break
                found.add(node)
                node = self._parent[node]
        needed = sorted(found)  # a node is older than those that follow it
        return needed, [node for node in needed if self._slot[node] < 0]


class _Forest(KVCache):
    """A cache of one row whose slots are nodes: each sees itself and its ancestors."""

    def __init__(self, capacity: int, device: torch.device, block: int | None) -> None:
        super().__init__(1, capacity, device, block)
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
        whole_B: Any = None,
    ) -> torch.Tensor:
        super().place(slots_BT)
        self._show(self.used)
        assert self._slots_BT is not None
        return self._position_S[self._slots_BT]

    def seen(self, reach: Reach) -> torch.Tensor:
        assert self._slots_BT is not None, "place() comes before the first layer of a pass"
        seen_BTS = self._sees_SS[self._slots_BT][..., : self.visible]
        position_S = self._position_S
        return reach.limit(seen_BTS, position_S[self._slots_BT], position_S[: self.visible])
