"""Answers: what every depth predicts after every prefix that a decode may read, computed once.

The rungs of a decode read prefixes of the text, drafts that will be rejected, and the branches of
trees. Here all of these are nodes of one trie over one prompt, with one KV cache in which a node
sees its ancestors alone. What one setting of the decoder has read is known to the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from hispec.decoding.drafters.recycle import CANDIDATES
from hispec.decoding.kv_cache import Segment
from hispec.decoding.ladder import Ladder
from hispec.decoding.sampling import confidence, top_candidates
from hispec.models.exit_model import ExitModel
from hispec.planner.forest import PASS, Forest
from hispec.planner.head_answers import HeadAnswers

Kind = tuple[int, bool]
"""A depth, and whether it reads the reduced draft vocabulary."""


class Answers:
    """The trie of one prompt and the answers at its nodes; a node stands for the prefix it ends.

    An answer is a row of numbers [2 + 2 K]: the argmax of the logits, their top probability, the
    ids of the best K candidates, and their log-probabilities.

    Args:
        prompt: token ids, at least one.
        depths: increasing depths that may be read, the last one that of the full model.
        room: nodes beyond the prompt whose KV is kept. When more are needed, all of it is dropped
            and computed again on demand; answers stay.
    """

    def __init__(
        self, model: ExitModel, prompt: Sequence[int], depths: Sequence[int], room: int = 2048
    ) -> None:
        self.model = model
        self.prompt = list(prompt)
        self.rungs = Ladder(model, depths, 1, 0)  # knows segments and heads, and runs nothing
        self.candidates = min(CANDIDATES, model.vocab_size)
        self._forest = Forest(len(self.prompt) + room, model.device, *model.cache_layout())
        self._token: list[int] = []
        self._parent: list[int] = []
        self._place: list[int] = []
        """For each node the position of its token."""
        self._slot: list[int] = []
        """Where the KV of each node lies; -1 for nowhere."""
        self._child: dict[tuple[int, int], int] = {}
        self._held: dict[Segment, np.ndarray] = {}
        """For each segment, the slots whose KV and hidden states are kept."""
        self._answers: dict[Kind, dict[int, np.ndarray]] = {}
        self._heads = {
            depth: self._head(rung, len(self.prompt) + room)
            for rung, depth in enumerate(depths[:-1])
            if model.head(depth).reads_before
        }
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
            self._place.append(self._place[node] + 1 if node >= 0 else 0)
            self._slot.append(-1)
        return found

    def follow(self, tokens: Iterable[int]) -> list[int]:
        """The nodes of a text after the prompt, the prompt's last one first."""
        nodes = [self.root]
        for token in tokens:
            nodes.append(self.child(nodes[-1], token))
        return nodes

    def answers(
        self, kind: Kind, nodes: Sequence[int], read: int | Sequence[int] = 0
    ) -> np.ndarray:
        """Answers [N, 2 + 2 K] at some nodes; unknown ones are computed.

        Args:
            read: tokens that the full model had run on, for all nodes or for each: a head that
                reads the token before depends on it.
        """
        if kind[0] in self._heads:
            head = self._heads[kind[0]]
            read_N = [read] * len(nodes) if isinstance(read, int) else read
            nodes = [head.view(*pair) for pair in zip(nodes, read_N, strict=True)]
        known = self._answers.setdefault(kind, {})
        unknown = [node for node in dict.fromkeys(nodes) if node not in known]
        for start in range(0, len(unknown), PASS):
            part = unknown[start : start + PASS]
            known.update(zip(part, self._compute(kind, part), strict=True))
        return np.stack([known[node] for node in nodes])

    def verify(self, depth: int, nodes: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Answers [N, 2 + 2 K] of a depth at the nodes of a chain, up to the first one that rejects
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

    def verify_tree(
        self, depth: int, nodes: Sequence[int], tokens_N: np.ndarray, parent_N: np.ndarray
    ) -> np.ndarray:
        """Answers [N, 2 + 2 K] of a depth along the path of a tree that it accepts; no rejected
        token is run. The first answer is repeated for all other columns.

        Args:
            tokens_N: the tree's tokens, and for each one the column of the token before it, see
                `DraftTree`.
        """
        found = self.answers((depth, False), nodes[:1]).repeat(len(nodes), axis=0)
        column = 0
        while True:
            fits_N = (parent_N == column) & (tokens_N == found[column, 0])
            if not fits_N.any():
                return found
            column = int(fits_N.argmax()) + 1
            found[column] = self.answers((depth, False), [nodes[column]])[0]

    def draft(self, depth: int, nodes: Sequence[int], length: int) -> None:
        """Compute what a depth drafts greedily from some nodes on, up to `length` tokens."""
        kind = depth, self.model.draft_tokens is not None
        read = [self._place[node] for node in nodes]
        for _ in range(length):
            choices = self.answers(kind, nodes, read)[:, 0].astype(int).tolist()
            nodes = [self.child(*pair) for pair in zip(nodes, choices, strict=True)]

    @torch.inference_mode()
    def _compute(self, kind: Kind, nodes: Sequence[int]) -> np.ndarray:
        """Args: nodes: of a head that reads the token before, views."""
        depth, drafting = kind
        rung = self.rungs.depths.index(depth)
        if depth in self._heads:
            hidden_TH = self._heads[depth].states(nodes)
        else:
            hidden_TH = self._states(rung, nodes, head=self.rungs.head_layers(rung) > 0)
        normed_TH = self.model.normed(depth, hidden_TH)
        own = depth < self.model.num_layers and self.model.head(depth).lm_head is not None
        project = self.model.project
        logits_TV = self.model.draft(depth, normed_TH) if drafting or own else project(normed_TH)
        self.computed += len(nodes)
        best_TK = top_candidates(logits_TV, self.candidates)
        total_T1 = logits_TV.float().logsumexp(-1, keepdim=True)
        return np.concatenate(
            [
                logits_TV.argmax(-1, keepdim=True).cpu().numpy(),  # of equals the first, not any
                confidence(logits_TV)[:, None],
                best_TK.cpu().numpy(),
                (logits_TV.float().gather(1, best_TK) - total_T1).cpu().numpy(),
            ],
            axis=1,
        )

    def _head(self, rung: int, room: int) -> HeadAnswers:
        """The answers of a head that reads the token before."""
        full, depth = len(self.rungs.depths) - 1, self.rungs.depths[rung]

        def before(nodes: Sequence[int]) -> torch.Tensor:
            final_TH = self.model.normed(self.model.num_layers, self._states(full, nodes))
            slots_1T = self._slots(nodes)
            head = self.model.head(depth)
            states = {d: self._forest.hidden(("depth", d), slots_1T)[0] for d in head.reads}
            return head.before(final_TH, states)

        def trunk(nodes: Sequence[int]) -> torch.Tensor:
            return self._states(rung, nodes)

        return HeadAnswers(self.model, depth, self._parent, self._place, trunk, before, room)

    def _states(self, rung: int, nodes: Sequence[int], *, head: bool = False) -> torch.Tensor:
        """States [N, H] at a rung, of the trunk or behind the blocks of the head."""
        segments: list[Segment] = [("segment", r) for r in range(rung + 1)]
        segments += [("head", rung)] * head
        needed = self._make_room(nodes, segments[-1])
        for segment in segments:
            held_S = self._held.setdefault(segment, np.zeros(self._forest.capacity, dtype=bool))
            missing = [node for node in needed if not held_S[self._slot[node]]]
            for start in range(0, len(missing), PASS):
                self._run(segment, missing[start : start + PASS])
        return self._forest.hidden(segments[-1], self._slots(nodes))[0]

    def _run(self, segment: Segment, nodes: Sequence[int]) -> None:
        kind, rung = segment
        slots_1T = np.array([[self._slot[node] for node in nodes]])
        positions_1T = self._forest.place(slots_1T)
        if kind == "head":
            depth = self.rungs.depths[rung]
            hidden_1TH = self._forest.placed_hidden(("segment", rung))
            hidden_1TH = self.model.run_head(depth, hidden_1TH, positions_1T, self._forest)
        else:
            if rung:
                hidden_1TH = self._forest.placed_hidden(("segment", rung - 1))
            else:
                tokens_T = torch.tensor([self._token[node] for node in nodes])
                hidden_1TH = self.model.embed(tokens_T[None].to(self.model.device))
            hidden_1TH = self.rungs.run_layers(rung, hidden_1TH, positions_1T, self._forest)
        self._forest.store_hidden(segment, hidden_1TH)
        self._held[segment][slots_1T[0]] = True

    def _slots(self, nodes: Sequence[int]) -> torch.Tensor:
        return torch.tensor([[self._slot[node] for node in nodes]], device=self.model.device)

    def _make_room(self, nodes: Sequence[int], segment: Segment) -> list[int]:
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
