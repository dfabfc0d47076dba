"""What every depth says after every text that a decode may ask about, each computed once.

A decode asks its levels about prefixes of the text, about drafts that will be refused, and about
the branches of trees. Here all of these are nodes of one trie over one prompt, with one KV cache in
which a node sees its ancestors alone. What was asked by one setting of the decoder is known to the
next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from hispec.decoding.drafters.recycle import CANDIDATES
from hispec.decoding.kv_cache import Cache, round_up
from hispec.decoding.ladder import Ladder
from hispec.decoding.sampling import confidence, top_candidates
from hispec.models.exit_model import ExitModel

_PASS = 128  # nodes of one pass
Kind = tuple[int, bool]
"""A depth, and whether it is read as it drafts from a reduced vocabulary."""


class Contexts:
    """The trie of one prompt and the answers at its nodes; a node is the last token of a context.

    An answer is a row of numbers [2 + K]: the argmax of the logits, their top probability, and the
    ids of the best K candidates.

    Args:
        prompt: token ids, at least one.
        depths: increasing depths that may be asked, the last one that of the full model.
        room: nodes whose KV is held beyond the prompt. Where more are needed all of it is thrown
            away and computed anew as it is asked for; answers stay.

    Raises:
        ValueError: a head that reads the token before. What it says depends on how much the full
            model had seen when it was asked, and not on the context alone.
    """

    def __init__(
        self, model: ExitModel, prompt: Sequence[int], depths: Sequence[int], room: int = 2048
    ) -> None:
        if any(model.head(depth).mix is not None for depth in depths[:-1]):
            raise ValueError("heads that read the token before cannot be replayed")
        self.model = model
        self.prompt = list(prompt)
        self.tracks = Ladder(model, depths, 1, 0)  # tells segments and heads, and runs nothing
        self.candidates = min(CANDIDATES, model.vocab_size)
        self._forest = _Forest(len(self.prompt) + room, model.device)
        self._token: list[int] = []
        self._parent: list[int] = []
        self._slot: list[int] = []
        """Where the KV of each node lies; -1 for nowhere."""
        self._child: dict[tuple[int, int], int] = {}
        self._held: dict[Any, np.ndarray] = {}
        """For each track, the slots whose KV and states are there."""
        self._answers: dict[Kind, dict[int, np.ndarray]] = {}
        self.computed = 0
        """Answers that were computed so far."""
        self.root = -1
        for token in self.prompt:
            self.root = self.child(self.root, token)

    def child(self, node: int, token: int) -> int:
        """The node of the context that goes on with `token`."""
        found = self._child.get((node, token))
        if found is None:
            found = self._child[node, token] = len(self._token)
            self._token.append(token)
            self._parent.append(node)
            self._slot.append(-1)
        return found

    def follow(self, tokens: Iterable[int]) -> list[int]:
        """The nodes of a text that begins after the prompt, the prompt's last one first."""
        nodes = [self.root]
        for token in tokens:
            nodes.append(self.child(nodes[-1], token))
        return nodes

    def answers(self, kind: Kind, nodes: Sequence[int]) -> np.ndarray:
        """Answers [N, 2 + K] at some nodes; those that are not known yet are computed."""
        known = self._answers.setdefault(kind, {})
        unknown = [node for node in dict.fromkeys(nodes) if node not in known]
        for start in range(0, len(unknown), _PASS):
            part = unknown[start : start + _PASS]
            known.update(zip(part, self._compute(kind, part), strict=True))
        return np.stack([known[node] for node in nodes])

    def judge(self, depth: int, nodes: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Answers [N, 2 + K] of a depth at the nodes of a chain, as far as they count: up to the
        first one that is not for the token that comes next. It stands for those after it too.

        Args:
            tokens: after each node the token that the chain goes on with; none after the last one.
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
        """Make known what a depth drafts from some nodes on, greedily, up to `length` tokens."""
        kind = depth, self.model.draft_tokens is not None
        for _ in range(length):
            choices = self.answers(kind, nodes)[:, 0].astype(int).tolist()
            nodes = [self.child(*pair) for pair in zip(nodes, choices, strict=True)]

    @torch.inference_mode()
    def _compute(self, kind: Kind, nodes: Sequence[int]) -> np.ndarray:
        depth, drafting = kind
        rung = self.tracks.depths.index(depth)
        tracks: list[tuple[str, int]] = [("segment", r) for r in range(rung + 1)]
        if self.tracks.head_layers(rung):
            tracks.append(("head", rung))
        needed = self._place(nodes, tracks[-1])
        for track in tracks:
            held_S = self._held.setdefault(track, np.zeros(self._forest.capacity, dtype=bool))
            missing = [node for node in needed if not held_S[self._slot[node]]]
            for start in range(0, len(missing), _PASS):
                self._run(track, missing[start : start + _PASS])
        slots_1T = self._slots(nodes)
        normed_TH = self.model.normed(depth, self._forest.hidden(tracks[-1], slots_1T)[0])
        read = self.model.draft if drafting else self.model.project
        logits_TV = read(normed_TH)
        self.computed += len(nodes)
        return np.concatenate(
            [
                logits_TV.argmax(-1, keepdim=True).cpu().numpy(),  # of equals the first, not any
                confidence(logits_TV)[:, None],
                top_candidates(logits_TV, self.candidates).cpu().numpy(),
            ],
            axis=1,
        )

    def _run(self, track: tuple[str, int], nodes: Sequence[int]) -> None:
        kind, rung = track
        slots_1T = self._slots(nodes)
        depth = self.tracks.depths[rung]
        before = self.tracks.depths[rung - 1] if rung else 0
        positions_1T = self._forest.place(slots_1T)
        if kind == "head":
            hidden_1TH = self._forest.hidden(("segment", rung), slots_1T)
            hidden_1TH = self.model.run_head(depth, hidden_1TH, positions_1T, self._forest)
        else:
            if rung:
                hidden_1TH = self._forest.hidden(("segment", rung - 1), slots_1T)
            else:
                tokens_T = torch.tensor([self._token[node] for node in nodes])
                hidden_1TH = self.model.embed(tokens_T[None].to(self.model.device))
            hidden_1TH = self.model.run(hidden_1TH, before, depth, positions_1T, self._forest)
        self._forest.store_hidden(track, slots_1T, hidden_1TH)
        self._held[track][slots_1T[0].cpu().numpy()] = True

    def _slots(self, nodes: Sequence[int]) -> torch.Tensor:
        return torch.tensor([[self._slot[node] for node in nodes]], device=self.model.device)

    def _place(self, nodes: Sequence[int], track: tuple[str, int]) -> list[int]:
        """Give slots to some nodes; returns them and their ancestors that the track lacks, parents
        before children."""
        needed, new = self._lacking(nodes, track)
        if self._forest.used + len(new) > self._forest.capacity:
            self._forget()
            needed, new = self._lacking(nodes, track)
            assert self._forest.used + len(new) <= self._forest.capacity, "too little room"
        for node in new:
            parent = self._parent[node]
            self._slot[node] = self._forest.add(self._slot[parent] if parent >= 0 else None)
        return needed

    def _forget(self) -> None:
        """Throw away the KV of all nodes beyond the prompt, whose nodes and slots are the first."""
        kept = len(self.prompt)
        self._forest.used = kept
        self._slot[kept:] = [-1] * (len(self._slot) - kept)
        for held_S in self._held.values():
            held_S[kept:] = False

    def _lacking(self, nodes: Sequence[int], track: tuple[str, int]) -> tuple[list[int], list[int]]:
        """(these nodes and their ancestors as far as the track lacks them, parents before children;
        those of them that have no slot)."""
        held_S = self._held.get(track)
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


class _Forest(Cache):
    """A cache of one row whose slots are nodes: each sees itself and its ancestors."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(1, capacity, device)
        self.used = 0
        self._position_S = torch.zeros(self.capacity, dtype=torch.long, device=device)
        self._sees_SK = torch.zeros(self.capacity, self.capacity, dtype=torch.bool, device=device)

    def add(self, parent: int | None) -> int:
        """The slot of a new node."""
        slot = self.used
        self.used += 1
        if parent is None:
            self._sees_SK[slot] = False
            self._position_S[slot] = 0
        else:
            self._sees_SK[slot] = self._sees_SK[parent]
            self._position_S[slot] = self._position_S[parent] + 1
        self._sees_SK[slot, slot] = True
        return slot

    def place(self, slots_BT: torch.Tensor, proposal: Any = None, base_B: Any = None) -> Any:
        self._slots_BT = slots_BT
        self.visible = round_up(self.used)
        return self._position_S[slots_BT]

    def seen(self, window: int | None) -> torch.Tensor:
        assert self._slots_BT is not None, "place() comes before the first layer of a pass"
        seen_BTK = self._sees_SK[self._slots_BT][..., : self.visible]
        if window is not None:
            positions_BT = self._position_S[self._slots_BT]
            seen_BTK = seen_BTK & (
                self._position_S[: self.visible] > positions_BT[..., None] - window
            )
        return seen_BTK
