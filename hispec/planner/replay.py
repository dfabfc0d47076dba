"""Replay: the decode loop itself, on known answers, with measured seconds added up.

Loop, drafters and ladder are those that decode. Only the model's arithmetic is looked up
(`answers`) and its time added up (`latency`), so the counts of passes, draft tokens and accepted
tokens are those of the real decode, and trying a setting takes milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.decoding.draft_steps import Chain
from hispec.decoding.draft_tree import DraftTree
from hispec.decoding.head_chain import HeadChain
from hispec.decoding.kv_cache import KVCache
from hispec.decoding.ladder import Ladder
from hispec.decoding.verification import MatchSampler, Sampler
from hispec.models.exit_model import ExitModel
from hispec.planner.answers import Answers
from hispec.planner.latency import (
    CONFIDENCE,
    KEEPING,
    RANKING,
    Latency,
    chain,
    head,
    reading,
    segment,
)


@dataclass
class Clock:
    """Seconds that the model's work would have taken, and those that looking it up took."""

    latency: Latency | None
    prefill: float = 0.0
    """Seconds that reading the prompt takes."""
    modelled: float = 0.0
    spent: float = 0.0
    length: int = 0
    """Tokens of the text so far."""

    def add(self, part: str, tokens: int) -> None:
        """Some part of the model runs."""
        if self.latency is not None:
            self.modelled += self.latency.of(part, tokens, self.length)


def can_replay(model: ExitModel, ladder: Sequence[int]) -> bool:
    """Whether the answers of all rungs are known by the text and by how far the full model had run.

    An exit that reads the token before and is not the shallowest reads what that one has said.
    """
    return not any(model.reads_before(depth) for depth in ladder[1:])


class Replay(Decode):
    """A greedy decode of one prompt that runs no layer that was run before.

    Args:
        answers: of the prompt.
        latency: the cost of each part; None to count only.
        prefill: seconds that reading the prompt takes on the config's ladder.

    Raises:
        ValueError: a config that is not greedy, or whose scores depend on the text in other ways;
            an exit that reads the token before and is not the shallowest of the ladder: what it
            says depends on what the shallower one has said.
    """

    def __init__(
        self,
        answers: Answers,
        config: DecodeConfig,
        latency: Latency | None = None,
        prefill: float = 0.0,
    ) -> None:
        plain = config.temperature == 0 and config.repetition_penalty == 1
        if not plain or config.no_repeat_ngram_size:
            raise ValueError("only greedy decodes without processors can be replayed")
        if config.adaptive:
            raise ValueError("adaptive drafts follow the clock, so they cannot be replayed")
        if not can_replay(answers.model, config.ladder):
            raise ValueError("a deeper exit that reads the token before cannot be replayed")
        self.answers = answers
        self.clock = Clock(latency, prefill)
        super().__init__(answers.model, [answers.prompt], config)

    def _build_ladder(self, capacity: int) -> Ladder:
        observed = self.drafter.observes > 0
        return _KnownLadder(self.answers, self.config, capacity, self.clock, observed=observed)

    def _build_sampler(self, seeds: Any) -> Sampler:
        return _KnownSampler(self.config, self.clock)

    def build_chain(self) -> Chain | None:
        possible = HeadChain.possible(self.ladder)
        return _KnownChain(self.ladder, self.clock) if possible else None

    @property
    def seconds(self) -> float:
        """Seconds of the decode: the model's parts as measured, the loop as it just ran."""
        return self.stats.seconds - self.clock.spent + self.clock.modelled


class _KnownLadder(Ladder):
    """A ladder that keeps the lengths of its rungs like any other, and looks their logits up.

    Args:
        observed: whether the drafter sees every logit, so that those after the first rejected
            draft token are needed too.
    """

    def __init__(
        self,
        answers: Answers,
        config: DecodeConfig,
        capacity: int,
        clock: Clock,
        *,
        observed: bool,
    ) -> None:
        super().__init__(answers.model, config.ladder, 1, 0, draft_vocab=config.draft_vocab)
        self.cache = _NoCache(1, capacity, answers.model.device, torch.float32)
        self.cache.clock = self.clock = clock
        self.answers = answers
        self.observed = observed
        self._nodes = np.zeros(self.cache.capacity, dtype=np.int64)
        """For each slot of the text, its node in the trie."""
        self._known = 0
        """Slots whose token is still the one that its node stands for."""

    def prefill(self, tokens_BN: np.ndarray, upto_B: np.ndarray) -> None:
        began = time.perf_counter()
        for rung in range(len(self.depths)):
            self.cache.lengths["segment", rung] = upto_B
            self.segment_tokens[rung] = int(upto_B[0])
            if self.head_layers(rung):
                self.cache.lengths["head", rung] = upto_B
                self.head_tokens[rung] = int(upto_B[0])
        self._known = len(self.answers.prompt)
        self._nodes[: self._known] = np.arange(self._known)  # the first nodes are the prompt's
        self.clock.modelled += self.clock.prefill
        self.clock.spent += time.perf_counter() - began

    def logits(
        self,
        rung: int,
        tokens_BN: np.ndarray,
        first_B: np.ndarray,
        upto_B: np.ndarray,
        tree: DraftTree | None = None,
        *,
        skip: int = 0,
        drafting: bool = False,
    ) -> torch.Tensor:
        """Answers [1, C, 2 + 2 K] in place of logits, see `Answers`."""
        began = time.perf_counter()
        first, upto = int(first_B[0]), int(upto_B[0])
        self.clock.length = first
        self.bring_all(rung, tokens_BN, upto_B, tree, first_B + 1)
        read = int(self.cache.length(("segment", len(self.depths) - 1))[0])
        reduced = drafting and self.draft_vocab and self.model.draft_tokens is not None
        depth = self.depths[rung]
        self.clock.add(reading(depth, reduced), upto - first - skip)
        nodes = self._nodes_of(tokens_BN[0], first, upto, tree)
        if drafting or self.observed or self.model.reads_before(depth):
            known_CK = self.answers.answers((depth, reduced), nodes[skip:], read)
        elif tree is not None:
            known_CK = self.answers.verify_tree(depth, nodes, tree)
        else:
            known_CK = self.answers.verify(depth, nodes, tokens_BN[0, first + 1 : upto].tolist())
        self.clock.spent += time.perf_counter() - began
        return torch.from_numpy(known_CK)[None]

    def truncate(self, length_B: np.ndarray) -> None:
        super().truncate(length_B)
        self._known = min(self._known, int(length_B[0]))

    def _nodes_of(
        self, tokens_N: np.ndarray, first: int, upto: int, tree: DraftTree | None
    ) -> list[int]:
        """The nodes of the tokens in slots `first` to `upto - 1`."""
        stop = first + 1 if tree is not None else upto
        for slot in range(self._known, stop):
            self._nodes[slot] = self.answers.child(int(self._nodes[slot - 1]), int(tokens_N[slot]))
        self._known = max(self._known, stop)
        if tree is None:
            return self._nodes[first:upto].tolist()
        nodes = [int(self._nodes[first])]
        for parent, token in zip(
            tree.parent_BN[0, : upto - first - 1].tolist(),
            tree.tokens_BN[0, : upto - first - 1].tolist(),
            strict=True,
        ):
            nodes.append(self.answers.child(nodes[parent], token))
        return nodes

    def _place(self, slots_BT: Any, start_B: Any, upto_B: Any, tree: Any, base_B: Any) -> Any:
        self._in_tree = tree is not None
        self._width = slots_BT.shape[1]
        return None

    def _run_segment(self, rung: int, tokens_BN: Any, slots_BT: Any, positions_BT: Any) -> None:
        low = self.depths[rung - 1] if rung else 0
        self.clock.add(segment(low, self.depths[rung], self._in_tree), self._width)

    def _run_head(self, rung: int, positions_BT: Any) -> None:
        self.clock.add(head(self.depths[rung], self._in_tree), self._width)


class _KnownChain:
    """Drafts as `HeadChain` does, token by token and from the answers."""

    def __init__(self, ladder: Ladder, clock: Clock) -> None:
        self.ladder, self.clock = ladder, clock

    def draft(
        self, tokens_N: np.ndarray, length: int, most: int, threshold: float, eos: np.ndarray
    ) -> list[int] | None:
        if not HeadChain.ready(self.ladder, length):
            return None
        began, text_BN = time.perf_counter(), tokens_N[None].copy()
        modelled, spent = self.clock.modelled, self.clock.spent
        drafts: list[int] = []
        while True:
            at_B = np.array([length + len(drafts) - 1])
            answer = self.ladder.logits(0, text_BN, at_B, at_B + 1, drafting=True)[0, 0]
            drafts.append(int(answer[0]))
            if len(drafts) == most or float(answer[1]) < threshold or drafts[-1] in eos:
                break
            text_BN[0, length + len(drafts) - 1] = drafts[-1]
        self.clock.modelled = modelled  # a step takes less than its parts
        self.clock.add(chain(self.ladder.depths[0]), len(drafts))
        self.clock.spent = spent + time.perf_counter() - began
        return drafts


class _NoCache(KVCache):
    """A cache of lengths alone."""

    clock: Clock

    def keep(self, base_B: np.ndarray, path_BD: np.ndarray) -> None:
        self.clock.add(KEEPING, path_BD.shape[1])


class _KnownSampler(MatchSampler):
    """Reads answers as `MatchSampler` reads logits."""

    def __init__(self, config: DecodeConfig, clock: Clock) -> None:
        super().__init__(config)
        self.clock = clock

    def _choose(self, scores_NV: torch.Tensor, positions_N: Any, rows_N: Any) -> np.ndarray:
        return scores_NV[:, 0].numpy().astype(np.int64)

    def confidence(self, scores: torch.Tensor) -> np.ndarray:
        self.clock.add(CONFIDENCE, scores[..., 0].numel())
        return scores[..., 1].numpy()

    def candidates(self, scores_NV: torch.Tensor, k: int) -> np.ndarray:
        self.clock.add(RANKING, len(scores_NV))
        return scores_NV[:, 2 : 2 + k].numpy().astype(np.int64)

    def best(
        self, scores_BCV: torch.Tensor, positions_BC: Any, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        self.clock.add(RANKING, scores_BCV.shape[1])
        numbers = scores_BCV.numpy()
        most = (numbers.shape[-1] - 2) // 2
        ids_BCK = numbers[..., 2 : 2 + count].astype(np.int64)
        return ids_BCK, numbers[..., 2 + most : 2 + most + count].copy()
