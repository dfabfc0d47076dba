"""The decode loop: draft, verify, validate. One loop for every ladder and drafter.

A decode has *levels*: level 0 is the drafter, the others are the verifying rungs, the last one is
the full model. Each level has *agreed* to a number of leading tokens of the text; these numbers
never increase with the level. One step makes a level judge what the level before it has proposed:
it keeps what its law accepts, adds one token of its own (the correction, or the bonus token where
all was right), and everybody before it goes on from there. What the last level has agreed to is
committed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from hispec.config import DecodeConfig
from hispec.decoding.draft_tree import Proposal, chain_parents
from hispec.decoding.drafters.build import build_drafter
from hispec.decoding.ladder import Ladder
from hispec.decoding.sampling import processors
from hispec.decoding.stats import DecodeStats
from hispec.decoding.verification import Match, Rejection, Sampler, Verdict
from hispec.models.exit_model import ExitModel
from hispec.utils.settings import check


@dataclass
class Committed:
    """Tokens that one validation by the full model added to one row."""

    row: int
    tokens: list[int]
    depths: list[int]
    """For each token, the depth of the rung that produced it; 0 for a free draft."""


class Decode:
    """One decode of one or more prompts; iterate `run()` for committed tokens.

    Args:
        model: the model; its exits draft and verify.
        prompts: token ids of each prompt, none of them empty.
        config: see `DecodeConfig`.
        seeds: one of each row, in place of the config's; with law `match` a row's text then depends
            on its prompt and its seed alone.
        logits_processor: more transformers processors, after the config's own. They see the full
            prefix of each position and must depend on nothing else.
        stopping_criteria: transformers criteria that see every committed prefix, ids alone.

    Raises:
        ValueError: an empty prompt, a config that this model cannot decode with, or seeds that are
            not one per row.
    """

    def __init__(
        self,
        model: ExitModel,
        prompts: Sequence[Sequence[int]],
        config: DecodeConfig,
        *,
        seeds: Sequence[int] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
    ) -> None:
        config.validate(model.num_layers)
        check(len(prompts) > 0, "prompts", prompts, "give at least one prompt")
        for row, prompt in enumerate(prompts):
            check(len(prompt) > 0, f"prompts[{row}]", prompt, "a prompt needs at least one token")
        if seeds is not None:
            check(len(seeds) == len(prompts), "seeds", seeds, f"one per prompt, {len(prompts)}")
            same_text = config.verification == "match"
            check(same_text, "seeds", seeds, "one per row needs verification 'match'")
        lengths_B = np.array([len(prompt) for prompt in prompts])
        self.end_B = lengths_B + config.max_new_tokens
        longest, rows, vocab = int(self.end_B.max()), len(prompts), model.vocab_size
        check(
            model.longest_text is None or longest <= model.longest_text,
            "max_new_tokens",
            config.max_new_tokens,
            f"prompt and output are up to {longest} tokens, and from {model.longest_text} on this "
            "model rotates all positions otherwise",
        )

        self.config = config
        self.drafter = build_drafter(config, rows, vocab)
        verifying = len(config.ladder) - self.drafter.rungs
        self.thresholds = [1] + [config.buffer] * (verifying - 1)
        """Pending tokens at which each verifying level steps; the first one does in every round."""

        # A pass reads at most what the levels may hold back, and one token of its own on top.
        chain = max(config.draft_length, config.max_draft_length or 0)
        draft = max(chain, config.lookup_length, config.tree_tokens)
        reach = draft + config.buffer * verifying + verifying + 1
        self.tokens_BN = np.zeros((rows, longest + reach), dtype=np.int64)
        self.depth_of_BN = np.zeros_like(self.tokens_BN)
        for row, prompt in enumerate(prompts):
            self.tokens_BN[row, : len(prompt)] = prompt
        self.prompt_B = lengths_B
        self.agreed = [lengths_B] * (verifying + 1)
        """Per level, the number of leading tokens [B] that it has agreed to, prompt included."""
        self.tree: Proposal | None = None
        """What the drafter put to level 1 if it is not a chain of tokens that level 0 agreed to."""
        self.free_B = np.zeros(rows, dtype=bool)
        """Rows whose draft no rung made."""
        self.unsure = [np.zeros(rows, dtype=bool) for _ in range(verifying + 1)]
        """Per level, the rows [B] in which it was not sure of a pending token."""
        self.stopped_B = np.zeros(rows, dtype=bool)
        """Rows that a stopping criterion or the clock has ended."""

        self.ladder = Ladder(
            model, config.ladder, rows, longest + reach, draft_vocab=config.draft_vocab
        )
        self.sampler: Sampler = Match(config, seeds)
        if config.verification == "rejection" and config.temperature > 0:
            self.sampler = Rejection(config, (rows, reach, vocab), model.device)
        self.processors = processors(config)
        self.processors.extend(logits_processor or [])
        self.stopping = stopping_criteria or StoppingCriteriaList()
        self.eos = np.array(config.eos, dtype=np.int64)
        self.stats = DecodeStats.of(self.ladder, rows, int(lengths_B.sum()))

    @torch.inference_mode()
    def run(self) -> Iterator[list[Committed]]:
        """Decode to the end; yields what every validation by the full model commits."""
        before_B = self.prompt_B
        for _ in self._rounds():
            if (self.agreed[-1] > before_B).any():
                yield self._committed_since(before_B)
                before_B = self.agreed[-1]

    @torch.inference_mode()
    def finish(self) -> list[list[int]]:
        """Decode to the end; returns the new tokens of every row."""
        for _ in self._rounds():
            pass
        spans = zip(self.tokens_BN, self.prompt_B, self.agreed[-1], strict=True)
        return [tokens_N[start:stop].tolist() for tokens_N, start, stop in spans]

    def _rounds(self) -> Iterator[None]:
        """Round after round, until the committed text of every row has ended."""
        if self.done:  # it has been run before
            return
        last = len(self.agreed) - 1
        began = time.perf_counter()
        self.ladder.prefill(self.tokens_BN, self.prompt_B)
        self.advance(last)  # the full model has read the prompt, so the first token needs no draft
        while True:
            self._account(time.perf_counter() - began)
            if self.config.max_time is not None and self.stats.seconds >= self.config.max_time:
                self.stopped_B = np.ones_like(self.stopped_B)
            paused = time.perf_counter()
            yield
            began += time.perf_counter() - paused  # the consumer's time is not ours
            if self.done:
                return
            self.drafter.propose(self, self.room())
            for level in range(1, last + 1):
                self.advance(level)
                if level < last and not self.due(level + 1):
                    break

    def advance(self, level: int) -> None:
        """Let `level` judge what the level before it proposed, and add one token of its own."""
        began = time.perf_counter()
        rung = self._rung(level)
        base_B = self.agreed[level]
        proposal = self._proposal(level)
        # The last token of a finished chain is judged, but nothing is asked after it: no input.
        # A tree's row is finished only if it has no proposals.
        idle_B = self.ends(base_B + proposal.count_B if proposal.chain else base_B)
        upto_B = base_B + proposal.count_B - idle_B
        scores_BCV = self._scores(rung, base_B, upto_B, proposal)
        positions_BC = base_B[:, None] + proposal.depth_BC[:, : scores_BCV.shape[1]]

        verdict = self.sampler.judge(scores_BCV, positions_BC, proposal)
        self._observe(base_B, upto_B, scores_BCV, verdict)
        if not proposal.chain:
            self._keep(base_B, verdict)
        agreed_B = base_B + verdict.accepted_B
        own = np.flatnonzero(~self.ends(agreed_B))
        self._write(own, agreed_B[own], verdict.token_B[own], self.ladder.depths[rung])
        agreed_B[own] += 1
        self.agreed[: level + 1] = [agreed_B] * (level + 1)
        self.ladder.truncate(agreed_B - 1)  # the token that was just added has been run by nobody

        self._count(level, proposal.count_B, verdict.accepted_B, time.perf_counter() - began)
        self.unsure[:level] = [np.zeros_like(self.stopped_B)] * level
        if level == len(self.agreed) - 1:
            self._stop(base_B)
        elif self.config.buffer_threshold:
            self.unsure[level] = self.unsure[level] | self._unsure(scores_BCV, verdict)
        if level == 1:
            self.drafter.judged(verdict.accepted_B, np.where(self.free_B, 0, proposal.count_B))
            self.free_B = np.zeros_like(self.free_B)
            self.tree = None

    def extend(self, rows_B: np.ndarray, threshold: float = 0.0) -> np.ndarray:
        """Let the shallowest rung add one token to the draft of some rows.

        Returns:
            Rows [B] whose law had a top probability of `threshold` or more.
        """
        began = time.perf_counter()
        base_B = self.agreed[0]
        nothing = Proposal.chain_of(self.tokens_BN[:, :0], np.zeros_like(base_B))
        scores_BCV = self._scores(0, base_B, base_B - ~rows_B, nothing, drafting=True)
        self._observe(base_B, base_B - ~rows_B, scores_BCV)
        scores_BV = scores_BCV[:, 0]
        rows = np.flatnonzero(rows_B)
        token_B = self.sampler.draw(scores_BV, base_B)
        self._write(rows, base_B[rows], token_B[rows], self.ladder.depths[0])
        self.agreed[0] = base_B + rows_B
        self._count(0, 0, 0, time.perf_counter() - began)
        return (
            self.sampler.confidence(scores_BV) >= threshold if threshold else np.ones_like(rows_B)
        )

    def offer_chain(self, tokens_BN: np.ndarray, rows_B: np.ndarray) -> None:
        """Put free drafts [B, N] to some rows, as far as the texts may go on."""
        base_B = self.agreed[0]
        columns = np.arange(tokens_BN.shape[1])
        ended_BN = np.isin(tokens_BN, self.eos)
        after_end_BN = np.cumsum(ended_BN, axis=1) - ended_BN > 0
        inside_BN = columns < (self.end_B - 1 - base_B)[:, None]
        open_BN = rows_B[:, None] & inside_BN & ~after_end_BN
        rows_N, columns_N = np.nonzero(open_BN)
        positions_N = base_B[rows_N] + columns_N
        self._write(rows_N, positions_N, tokens_BN[rows_N, columns_N], 0)
        self.sampler.offered(rows_N, positions_N, tokens_BN[rows_N, columns_N])
        self.agreed[0] = base_B + open_BN.sum(1)
        self.free_B = self.free_B | rows_B

    def offer_tree(self, tree: Proposal, rows_B: np.ndarray) -> None:
        """Put a free tree to some rows; it has no proposals in the others."""
        rows_N, columns_N = np.nonzero(tree.parent_BN >= 0)
        slots_N = self.agreed[0][rows_N] + columns_N
        self._write(rows_N, slots_N, tree.tokens_BN[rows_N, columns_N], 0)
        self.tree = tree
        self.free_B = self.free_B | rows_B

    def due(self, level: int) -> bool:
        """Whether some row has enough pending tokens for `level`, or cannot get more, or is unsure
        of one."""
        pending_B = self.agreed[level - 1] - self.agreed[level]
        enough_B = pending_B >= self.thresholds[level - 1]
        now_B = enough_B | self.ends(self.agreed[level - 1]) | self.unsure[level - 1]
        return bool((now_B & (pending_B > 0)).any())

    def ends(self, length_B: np.ndarray) -> np.ndarray:
        """Rows [B] whose text ends if `length` tokens of it are agreed to."""
        tail_B = self.tokens_BN[np.arange(len(length_B)), length_B - 1]
        ended_B = np.isin(tail_B, self.eos) & (length_B > self.prompt_B)
        return ended_B | (length_B >= self.end_B) | self.stopped_B

    @property
    def done(self) -> bool:
        """Whether the committed text of every row has ended."""
        return bool(self.ends(self.agreed[-1]).all())

    def room(self) -> np.ndarray:
        """Rows [B] where one more draft may help: the full model adds the last token itself."""
        return ~self.ends(self.agreed[0]) & (self.agreed[0] < self.end_B - 1)

    def _rung(self, level: int) -> int:
        """The ladder's rung that acts at a level."""
        return level if self.drafter.rungs else level - 1

    def _proposal(self, level: int) -> Proposal:
        """What `level` has to judge: the pending tokens of every row, or the drafter's tree."""
        base_B = self.agreed[level]
        count_B = self.agreed[level - 1] - base_B
        tree = self.tree if level == 1 else None
        width = max(int(count_B.max()), tree.parent_BN.shape[1] if tree else 0)
        slots_BN = base_B[:, None] + np.arange(width)
        tokens_BN = np.take_along_axis(self.tokens_BN, slots_BN, axis=1)
        if tree is None:
            return Proposal.chain_of(tokens_BN, count_B)
        parent_BN = chain_parents(count_B, width)  # of the rows without a tree
        in_tree_BN = tree.parent_BN >= 0
        parent_BN[:, : in_tree_BN.shape[1]][in_tree_BN] = tree.parent_BN[in_tree_BN]
        return Proposal(tokens_BN, parent_BN, chain=False)

    def _scores(
        self,
        rung: int,
        base_B: np.ndarray,
        upto_B: np.ndarray,
        proposal: Proposal,
        drafting: bool = False,
    ) -> torch.Tensor:
        """Logits [B, C, V] of a rung after the last agreed token and each proposal, processed."""
        tree = None if proposal.chain else proposal
        logits_BCV = self.ladder.logits(
            rung, self.tokens_BN, base_B - 1, upto_B, tree, drafting=drafting
        )
        if not self.processors:
            return logits_BCV
        rows_N, columns_N = _asked(logits_BCV, upto_B - base_B)
        scores_BCV = logits_BCV.float()
        length_N = base_B[rows_N] + proposal.depth_BC[rows_N, columns_N]
        for length in np.unique(length_N):  # processors take prefixes of one length at a time
            at = rows_N[length_N == length], columns_N[length_N == length]
            slots_NT = proposal.slots_before(*at, int(length), base_B)
            prefix_NT = torch.from_numpy(self.tokens_BN[at[0][:, None], slots_NT])
            scores_BCV[at] = self.processors(prefix_NT.to(scores_BCV.device), scores_BCV[at])
        return scores_BCV

    def _observe(
        self,
        base_B: np.ndarray,
        upto_B: np.ndarray,
        scores_BCV: torch.Tensor,
        verdict: Verdict | None = None,
    ) -> None:
        """Show the drafter what a level said. Where it said something after the same token more
        than once, it is what it said on the accepted path that comes last, and stays."""
        if not self.drafter.observes:
            return
        rows_N, columns_N = _asked(scores_BCV, upto_B - base_B)
        if verdict is not None:
            on_path_N = verdict.on_path(scores_BCV.shape[1])[rows_N, columns_N]
            order_N = np.argsort(on_path_N, kind="stable")
            rows_N, columns_N = rows_N[order_N], columns_N[order_N]
        tokens_N = self.tokens_BN[rows_N, base_B[rows_N] - 1 + columns_N]
        candidates_NK = self.sampler.candidates(
            scores_BCV[rows_N, columns_N], self.drafter.observes
        )
        self.drafter.observe(tokens_N, candidates_NK)

    def _write(
        self, rows_N: np.ndarray, slots_N: np.ndarray, tokens_N: np.ndarray, depth: int
    ) -> None:
        self.tokens_BN[rows_N, slots_N] = tokens_N
        self.depth_of_BN[rows_N, slots_N] = depth

    def _keep(self, base_B: np.ndarray, verdict: Verdict) -> None:
        """Move what was accepted of a tree to where it belongs, in the text and in the cache."""
        columns = np.arange(1, verdict.path_BD.shape[1] + 1)
        moved_BD = (verdict.path_BD != columns) & (columns <= verdict.accepted_B[:, None])
        if not moved_BD.any():
            return
        to_BD = base_B[:, None] + columns - 1
        from_BD = base_B[:, None] + verdict.path_BD - 1
        for buffer_BN in (self.tokens_BN, self.depth_of_BN):
            np.put_along_axis(buffer_BN, to_BD, np.take_along_axis(buffer_BN, from_BD, 1), 1)
        self.ladder.cache.keep(base_B, verdict.path_BD)

    def _unsure(self, scores_BCV: torch.Tensor, verdict: Verdict) -> np.ndarray:
        """Rows [B] with a token, accepted or added, of which the level was not sure."""
        sure_BC = self.sampler.confidence(scores_BCV) >= self.config.buffer_threshold
        return (verdict.on_path(sure_BC.shape[1]) & ~sure_BC).sum(1) > 0

    def _stop(self, before_B: np.ndarray) -> None:
        """Cut the committed texts where a stopping criterion says so, token by token."""
        if not self.stopping:
            return
        after_B = self.agreed[-1].copy()
        for step in range(1, int((after_B - before_B).max()) + 1):
            length_B = before_B + step
            asked_B = (length_B <= after_B) & ~self.stopped_B
            for length in np.unique(length_B[asked_B]):
                rows = np.flatnonzero(asked_B & (length_B == length))
                prefix_NT = torch.from_numpy(self.tokens_BN[rows, :length])
                stop_N = self.stopping(prefix_NT.to(self.ladder.model.device), None)
                cut = rows[stop_N.cpu().numpy()]
                after_B[cut] = length
                self.stopped_B[cut] = True
        self.agreed = [after_B] * len(self.agreed)

    def _committed_since(self, before_B: np.ndarray) -> list[Committed]:
        return [
            Committed(
                row,
                self.tokens_BN[row, start:stop].tolist(),
                self.depth_of_BN[row, start:stop].tolist(),
            )
            for row, (start, stop) in enumerate(zip(before_B, self.agreed[-1], strict=True))
            if stop > start
        ]

    def _count(self, level: int, proposed_B: Any, accepted_B: Any, seconds: float) -> None:
        rung = self._rung(level)
        self.stats.rungs[rung].passes += 1
        self.stats.rungs[rung].seconds += seconds
        if level == 0:
            return
        if level == 1:
            free_B = self.free_B
            self.stats.free.add(proposed_B[free_B], accepted_B[free_B])
            proposed_B, accepted_B = proposed_B[~free_B], accepted_B[~free_B]
        if rung > 0:
            self.stats.rungs[rung - 1].add(proposed_B, accepted_B)

    def _account(self, seconds: float) -> None:
        new_tokens = int((self.agreed[-1] - self.prompt_B).sum())
        self.stats.account(self.ladder, seconds, new_tokens)


def _asked(scores_BCV: torch.Tensor, count_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) [N] of scores after the last agreed token and `count` more; others are
    padding."""
    rows_N, columns_N = np.nonzero(np.arange(scores_BCV.shape[1]) <= count_B[:, None])
    return rows_N, columns_N
