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
    Costs,
    chain,
    head,
    reading,
    segment,
)


@dataclass
class Clock:
    """Seconds that the model's work would have taken, and those that looking it up took."""

    latency: Costs | None
    prefill: float = 0.0
    """Seconds that reading the prompts takes, until it is added."""
    modelled: float = 0.0
    spent: float = 0.0
    length: int = 0
    """Tokens of the longest text so far."""

    def add(self, part: str, tokens: int) -> None:
        """Some part of the model runs over so many tokens of every row."""
        if self.latency is not None:
            self.modelled += self.latency.of(part, tokens, self.length)


def can_replay(model: ExitModel, ladder: Sequence[int]) -> bool:
    """Whether the answers of all rungs are known by the text and by how far the full model had run.

    An exit that reads the token before and is not the shallowest reads what that one has said.
    """
    return not any(model.reads_before(depth) for depth in ladder[1:])


class Replay(Decode):
    """A greedy decode of one or more prompts that runs no layer that was run before.

    Rows decode together as they really do: a pass runs all rows, and takes what it takes for the
    row that needs most. A row whose text has ended stays idle until `admit` puts another prompt
    there.

    Args:
        answers: of each prompt. Equal prompts may share theirs.
        latency: the cost of each part for so many rows; None to count only.
        prefill: seconds that reading the prompts takes on the config's ladder.
        later: answers of the prompts that will be admitted; reading them takes no time.

    Raises:
        ValueError: a config that is not greedy, or whose scores depend on the text in other ways;
            an exit that reads the token before and is not the shallowest of the ladder: what it
            says depends on what the shallower one has said.
    """

    def __init__(
        self,
        answers: Sequence[Answers],
        config: DecodeConfig,
        latency: Costs | None = None,
        prefill: float = 0.0,
        later: Sequence[Answers] = (),
    ) -> None:
        plain = config.temperature == 0 and config.repetition_penalty == 1
        if not plain or config.no_repeat_ngram_size:
            raise ValueError("only greedy decodes without processors can be replayed")
        if config.adaptive:
            raise ValueError("adaptive drafts follow the clock, so they cannot be replayed")
        model = answers[0].model
        if not can_replay(model, config.ladder):
            raise ValueError("a deeper exit that reads the token before cannot be replayed")
        self.answers = {tuple(known.prompt): known for known in (*answers, *later)}
        self.clock = Clock(latency, prefill)
        longest = max(map(len, self.answers))
        super().__init__(model, [known.prompt for known in answers], config, max_prompt=longest)

    def _build_ladder(self, capacity: int) -> Ladder:
        observed = self.drafter.observes > 0
        state = self.state
        answers = [
            self.answers[tuple(state.tokens_BN[row, : state.prompt_B[row]].tolist())]
            for row in range(state.rows)
        ]
        return _KnownLadder(answers, self.config, capacity, self.clock, observed=observed)

    def _build_sampler(self, seeds: Any) -> Sampler:
        return _KnownSampler(self.config, self.clock, self.state.rows)

    def build_chain(self) -> Chain | None:
        possible = HeadChain.possible(self.ladder)
        return _KnownChain(self.ladder, self.clock) if possible else None

    @property
    def seconds(self) -> float:
        """Seconds of the decode: the model's parts by their costs, and the loop as it just ran,
        unless the costs are those of another machine."""
        clock = self.clock
        if clock.latency is not None and clock.latency.simulated:
            return clock.modelled
        return self.stats.seconds - clock.spent + clock.modelled


class _KnownLadder(Ladder):
    """A ladder that keeps the lengths of its rungs like any other, and looks their logits up.

    Args:
        answers: of each row.
        observed: whether the drafter sees every logit, so that those after the first rejected
            draft token are needed too.
    """

    def __init__(
        self,
        answers: Sequence[Answers],
        config: DecodeConfig,
        capacity: int,
        clock: Clock,
        *,
        observed: bool,
    ) -> None:
        model, rows = answers[0].model, len(answers)
        super().__init__(model, config.ladder, rows, 0, draft_vocab=config.draft_vocab)
        self.cache = _NoCache(rows, capacity, model.device, torch.float32)
        self.cache.clock = self.clock = clock
        self.answers = list(answers)
        self.observed = observed
        self._nodes_BN = np.zeros((rows, self.cache.capacity), dtype=np.int64)
        """For each slot of a text, its node in the trie."""
        self._known_B = np.zeros(rows, dtype=np.int64)
        """Slots whose token is still the one that its node stands for."""

    def prefill(self, tokens_BN: np.ndarray, upto_B: np.ndarray) -> None:
        began = time.perf_counter()
        for rung in range(len(self.depths)):
            self.cache.lengths["segment", rung] = upto_B
            self.segment_tokens[rung] += int(upto_B.sum())
            if self.head_layers(rung):
                self.cache.lengths["head", rung] = upto_B
                self.head_tokens[rung] += int(upto_B.sum())
        self._known_B = upto_B.copy()
        self._nodes_BN[:] = np.arange(self.cache.capacity)  # the first nodes are the prompt's
        self.clock.modelled += self.clock.prefill
        self.clock.prefill = 0.0
        self.clock.spent += time.perf_counter() - began

    def take(self, rows: Sequence[int], other: Ladder, source: Sequence[int]) -> None:
        assert isinstance(other, _KnownLadder)
        super().take(rows, other, source)
        longest = int(other._known_B[source].max())
        self._nodes_BN[rows, :longest] = other._nodes_BN[source, :longest]
        self._known_B[rows] = other._known_B[source]
        for row, theirs in zip(rows, source, strict=True):
            self.answers[row] = other.answers[theirs]

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
        """Answers [B, C, 2 + 2 K] in place of logits, see `Answers`; 0 where a row has fewer."""
        began = time.perf_counter()
        self.clock.length = int(first_B.max())
        self.bring_all(rung, tokens_BN, upto_B, tree, first_B + 1)
        columns = int((upto_B - first_B).max()) - skip
        self.clock.add(reading(self.depths[rung], self._reduced(drafting)), columns)
        known_BCK = np.zeros((len(self.answers), columns, 2 + 2 * self.answers[0].candidates))
        for row, (first, upto) in enumerate(zip(first_B.tolist(), upto_B.tolist(), strict=True)):
            if (count := upto - first - skip) > 0:
                known_BCK[row, :count] = self._looked_up(
                    row, rung, tokens_BN[row], first, upto, tree, skip, drafting
                )
        self.clock.spent += time.perf_counter() - began
        return torch.from_numpy(known_BCK)

    def _looked_up(
        self,
        row: int,
        rung: int,
        tokens_N: np.ndarray,
        first: int,
        upto: int,
        tree: DraftTree | None,
        skip: int,
        drafting: bool,
    ) -> np.ndarray:
        """Answers [C, 2 + 2 K] of one row."""
        answers, depth = self.answers[row], self.depths[rung]
        nodes = self._nodes_of(row, tokens_N, first, upto, tree)
        if drafting or self.observed or self.model.reads_before(depth):
            read = int(self.cache.length(("segment", len(self.depths) - 1))[row])
            return answers.answers((depth, self._reduced(drafting)), nodes[skip:], read)
        if tree is not None:
            return answers.verify_tree(depth, nodes, tree.tokens_BN[row], tree.parent_BN[row])
        return answers.verify(depth, nodes, tokens_N[first + 1 : upto].tolist())

    def _reduced(self, drafting: bool) -> bool:
        """Whether the reduced draft vocabulary is read."""
        return drafting and self.draft_vocab and self.model.draft_tokens is not None

    def truncate(self, length_B: np.ndarray) -> None:
        super().truncate(length_B)
        self._known_B = np.minimum(self._known_B, length_B)

    def _nodes_of(
        self, row: int, tokens_N: np.ndarray, first: int, upto: int, tree: DraftTree | None
    ) -> list[int]:
        """The nodes of the tokens in slots `first` to `upto - 1` of a row."""
        answers, nodes_N = self.answers[row], self._nodes_BN[row]
        stop = first + 1 if tree is not None else upto
        for slot in range(int(self._known_B[row]), stop):
            nodes_N[slot] = answers.child(int(nodes_N[slot - 1]), int(tokens_N[slot]))
        self._known_B[row] = max(self._known_B[row], stop)
        if tree is None:
            return nodes_N[first:upto].tolist()
        nodes = [int(nodes_N[first])]
        for parent, token in zip(
            tree.parent_BN[row, : upto - first - 1].tolist(),
            tree.tokens_BN[row, : upto - first - 1].tolist(),
            strict=True,
        ):
            nodes.append(answers.child(nodes[parent], token))
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


_EMBEDDED = "segment", 0
"""The segment of no layers below a head at depth 0."""


class _KnownChain:
    """Drafts as `HeadChain` does, token by token and from the answers."""

    def __init__(self, ladder: Ladder, clock: Clock) -> None:
        self.ladder, self.clock = ladder, clock
        self._in_tree = False

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

    def level(
        self, tokens_N: np.ndarray, length: int, tree: DraftTree, last: int, most: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        width, engine = tree.parent_BN.shape[1], self.ladder.model.engine
        if width == 0:
            self._in_tree = HeadChain.ready(self.ladder, length)
        self._in_tree = self._in_tree and engine is not None and last <= engine.few
        if not self._in_tree:
            return None
        began, text_BN, first_B = time.perf_counter(), tokens_N[None], np.array([length - 1])
        modelled, spent = self.clock.modelled, self.clock.spent
        skip = width + 1 - last
        shape = None if tree.chain else tree
        embedded_B, embedded = self.ladder.cache.length(_EMBEDDED), self.ladder.segment_tokens[0]
        answers_BCK = self.ladder.logits(
            0, text_BN, first_B, first_B + 1 + width, shape, skip=skip, drafting=True
        )
        self.ladder.cache.lengths[_EMBEDDED] = embedded_B  # the graph embeds tokens itself
        self.ladder.segment_tokens[0] = embedded
        self.clock.modelled = modelled
        self.clock.add(chain(self.ladder.depths[0]), 1)
        self.clock.add(RANKING, last)
        self.clock.spent = spent + time.perf_counter() - began
        return _best(answers_BCK, most)


class _NoCache(KVCache):
    """A cache of lengths alone."""

    clock: Clock

    def keep(self, base_B: np.ndarray, path_BD: np.ndarray) -> None:
        self.clock.add(KEEPING, path_BD.shape[1])


class _KnownSampler(MatchSampler):
    """Reads answers as `MatchSampler` reads logits."""

    def __init__(self, config: DecodeConfig, clock: Clock, rows: int) -> None:
        super().__init__(config)
        self.clock, self.rows = clock, rows

    def of(self, rows: Sequence[int]) -> Sampler:
        return _KnownSampler(self.config, self.clock, len(rows))

    def _choose(self, scores_NV: torch.Tensor, positions_N: Any, rows_N: Any) -> np.ndarray:
        return scores_NV[:, 0].numpy().astype(np.int64)

    def confidence(self, scores: torch.Tensor) -> np.ndarray:
        self.clock.add(CONFIDENCE, scores[..., 0].numel() // self.rows)
        return scores[..., 1].numpy()

    def candidates(self, scores_NV: torch.Tensor, k: int) -> np.ndarray:
        self.clock.add(RANKING, len(scores_NV) // self.rows)
        return scores_NV[:, 2 : 2 + k].numpy().astype(np.int64)

    def best(
        self, scores_BCV: torch.Tensor, positions_BC: Any, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        self.clock.add(RANKING, scores_BCV.shape[1])
        return _best(scores_BCV, count)


def _best(answers_BCK: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, log-probabilities) [B, C, K] of the best candidates among answers."""
    numbers = answers_BCK.numpy()
    most = (numbers.shape[-1] - 2) // 2
    ids_BCK = numbers[..., 2 : 2 + count].astype(np.int64)
    return ids_BCK, numbers[..., 2 + most : 2 + most + count].copy()
