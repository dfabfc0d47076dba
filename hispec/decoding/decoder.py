"""The decode loop: draft, verify, validate. One loop for every ladder and drafter.

A round begins with a draft. The first verifying rung verifies it: it keeps the tokens that its rule
accepts and adds one token of its own, the correction or, where all were right, the bonus token.
Once enough tokens are pending, the next deeper rung verifies those in the same way, and so on up to
the full model, the last rung. What the full model has verified is committed. After every step the
shallower rungs go on from the deeper one's tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace

import numpy as np
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from hispec.config import DecodeConfig
from hispec.decoding.draft_steps import Chain, DraftSteps
from hispec.decoding.draft_tree import DraftTree, real_columns
from hispec.decoding.drafters.build import build_drafter
from hispec.decoding.drafters.control import Pace
from hispec.decoding.head_chain import HeadChain
from hispec.decoding.inputs import check_admission, check_inputs, check_limit, check_seed
from hispec.decoding.ladder import Ladder, similar
from hispec.decoding.sampling import processors
from hispec.decoding.state import FREE, Committed, DecodeState
from hispec.decoding.stats import DecodeStats, RowStats, Stopwatch
from hispec.decoding.verification import Sampler, Verified, build_sampler
from hispec.models.exit_model import ExitModel


class Decode:
    """One decode of one or more prompts; iterate `run()` for committed tokens.

    Rows do not touch each other. When the text of a row has ended, `admit` puts a new prompt there,
    so the rows of a long queue are never idle.

    Args:
        model: the model; its exits draft and verify.
        prompts: token ids of each prompt, none of them empty.
        config: see `DecodeConfig`.
        seeds: one per row, instead of the config's; with verification `match` a row's text then
            depends on its prompt and its seed alone.
        logits_processor: more transformers processors, after the config's own. They see the full
            prefix of each position and must depend on nothing else.
        stopping_criteria: transformers criteria that see every committed prefix, ids alone.
        max_prompt: tokens of the longest prompt that will be admitted; default: of the longest of
            `prompts`. The cache has room for it from the start.

    Raises:
        ValueError: an empty prompt or one longer than `max_prompt`, a config that this model cannot
            decode with, or seeds that are not one per row.
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
        max_prompt: int | None = None,
    ) -> None:
        check_inputs(model, prompts, config, seeds, max_prompt)
        self.model = model
        self.config = config
        rows = len(prompts)
        self.drafter = build_drafter(config, rows, model.vocab_size, DraftSteps(self))
        self.max_prompt = max(map(len, prompts)) if max_prompt is None else max_prompt
        first = self.drafter.rungs
        self.state = DecodeState(prompts, config, first=first, max_prompt=self.max_prompt)
        self.ladder = self._build_ladder(self.state.tokens_BN.shape[1])
        self.sampler = self._build_sampler(seeds)
        self.processors = processors(config)
        self.processors.extend(logits_processor or [])
        self.stopping = stopping_criteria or StoppingCriteriaList()
        self.stats = DecodeStats.of(self.ladder, rows, int(self.state.prompt_B.sum()))
        self.by_row = RowStats(self.ladder.depths, rows)
        watched = config.adaptive and len(config.ladder) <= 2
        self.pace = Pace.of(model, config) if watched else None
        self.unread = list(range(rows))
        """Rows whose prompts no rung has read."""

    def _build_ladder(self, capacity: int) -> Ladder:
        """The rungs, with room for `capacity` tokens per row."""
        return Ladder(
            self.model,
            self.config.ladder,
            self.state.rows,
            capacity,
            draft_vocab=self.config.draft_vocab,
        )

    def _build_sampler(self, seeds: Sequence[int] | None) -> Sampler:
        """The rule of verification."""
        shape = (self.state.rows, self.state.reach, self.model.vocab_size)
        return build_sampler(self.config, shape, self.model.device, seeds)

    def build_chain(self) -> Chain | None:
        """What drafts whole chains of the shallowest rung at once, if it can."""
        return HeadChain.of(self.ladder)

    @property
    def done(self) -> bool:
        """Whether the committed text of every row has ended."""
        return self.state.done

    def run(self) -> Iterator[list[Committed]]:
        """Decode to the end; yields what every pass of the full model commits."""
        while not self.done:
            if committed := self.step():
                yield committed

    def finish(self) -> list[list[int]]:
        """Decode to the end; returns the new tokens of every row."""
        while not self.done:
            self.step()
        return [tokens for tokens, _ in self.outputs()]

    def outputs(self) -> list[tuple[list[int], list[int]]]:
        """(new tokens, depths of the rungs that made them) of every row, as far as committed."""
        return [self.output(row) for row in range(self.state.rows)]

    def output(self, row: int) -> tuple[list[int], list[int]]:
        """What `outputs` has of one row."""
        state = self.state
        new = slice(state.prompt_B[row], state.committed_B[row])
        return state.tokens_BN[row, new].tolist(), state.depth_BN[row, new].tolist()

    def ended_rows(self) -> list[int]:
        """The rows whose committed text has ended: `admit` may replace them."""
        return np.flatnonzero(self.state.ends(self.state.committed_B)).tolist()

    def stop(self, row: int) -> None:
        """End the text of a row where it is committed; nothing of it is run any more."""
        if row in self.unread:
            self.unread.remove(row)
            self.state.begin(row, [0])  # a prompt that nobody will read
        self.state.stop(row)

    def admit(
        self,
        row: int,
        prompt: Sequence[int],
        *,
        seed: int | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        """Replace a text that has ended by a new prompt; take its output before.

        The next `step` reads it, together with all others that were admitted. Its text is the one
        that it would have alone.

        Args:
            prompt: token ids.
            seed: instead of the config's, as in `seeds`.
            max_new_tokens: instead of the config's, and not more.

        Raises:
            ValueError: there is no such row or its text has not ended, the prompt is empty or
                longer than `max_prompt`, too many new tokens, or a seed with verification
                `rejection`.
        """
        state = self.state
        check_admission(row, state.ends(state.committed_B), prompt, self.max_prompt)
        check_seed(seed, self.config)
        check_limit(max_new_tokens, self.config)
        state.begin(row, prompt, max_new_tokens)
        self.by_row.begin(row)
        self.sampler.reseed(row, seed)
        self.stats.add_text(len(prompt))
        self.unread.append(row)

    @torch.inference_mode()
    def step(self) -> list[Committed]:
        """Run one round, the first time over the prompts; returns what was committed in it.

        Prompts that were admitted since the last round are read before it.
        """
        began = time.perf_counter()
        state = self.state
        before_B = state.committed_B
        self.by_row.latest = {}
        all_new = len(self.unread) == state.rows
        with self.model.between_passes():
            if self.unread:
                self._read_prompts()
            if not (all_new or self.done):
                self._round()
        committed = state.committed_since(before_B)
        new_tokens = sum(len(part.tokens) for part in committed)
        self.stats.add_round(self.ladder, time.perf_counter() - began, new_tokens)
        if self.config.max_time is not None and self.stats.seconds >= self.config.max_time:
            state.stopped_B = np.ones_like(state.stopped_B)
        return committed

    def _round(self) -> None:
        """Draft, verify, and validate where it is due."""
        state, watch = self.state, Stopwatch(self.model)
        before_B = state.committed_B
        drafts = self.pace is None or self.pace.drafts(state.rows)
        draft = self._draft() if drafts else DraftTree.empty(state.rows)
        self._verify(state.first, draft)
        for rung in range(state.first + 1, state.last + 1):
            if not state.due(rung):
                break
            self._verify(rung, state.pending(rung))
        if self.pace is not None:
            seconds, new_tokens = watch.seconds, int((state.committed_B - before_B).sum())
            drafted = bool(draft.count_B.any())
            self.pace.observe(state.rows, seconds, new_tokens, drafted, watch.cold)

    def _read_prompts(self) -> None:
        """Let all rungs read the new prompts, and the full model add the first token of each, which
        needs no draft: new rows then stand as the others do after a pass of the full model."""
        rows, self.unread = self.unread, []
        state = self.state
        groups = similar(state.prompt_B[rows].tolist())
        if len(groups) == 1 and len(rows) == state.rows:
            self.ladder.truncate(np.zeros_like(state.prompt_B))
            self._read_first()
        else:
            for group in groups:
                some = [rows[number] for number in group]
                new = self._newcomers(some)
                new._read_first()
                every = range(len(some))
                state.take(some, new.state, every)
                self.ladder.take(some, new.ladder, every)
                self.by_row.take(some, new.by_row, every)
        self.drafter.begin(state.view(), rows)

    def _read_first(self) -> None:
        """Read the prompts of all rows; the full model adds the first token."""
        state = self.state
        self.ladder.prefill(state.tokens_BN, state.prompt_B)
        self._verify(state.last, state.pending(state.last))

    def _newcomers(self, rows: Sequence[int]) -> Decode:
        """The decode of some rows alone up to their first token: it shares all but texts, cache and
        noise with this one."""
        new, state = copy(self), self.state
        prompts = [state.tokens_BN[row, : state.prompt_B[row]].tolist() for row in rows]
        new.state = DecodeState(prompts, replace(self.config, max_new_tokens=1), first=state.first)
        new.ladder = new._build_ladder(new.state.tokens_BN.shape[1])
        new.sampler = self.sampler.of(rows)
        new.by_row = RowStats(self.ladder.depths, len(rows))
        return new

    def _draft(self) -> DraftTree:
        """Let the drafter propose, and write its draft tokens behind the verified ones."""
        text = self.state.view()
        draft = self.drafter.propose(text, text.room_B > 0)
        if self.config.exit_trees:  # its tokens lie in other slots than those of the draft
            self.ladder.truncate(text.length_B)
        if not draft.count_B.any():
            return draft
        rows_N, columns_N = np.nonzero(draft.parent_BN >= 0)
        slots_N = text.length_B[rows_N] + columns_N
        tokens_N = draft.tokens_BN[rows_N, columns_N]
        free_N = draft.free_BN[rows_N, columns_N]
        depth_N = np.where(free_N, FREE, self.config.ladder[0])
        self.state.write(rows_N, slots_N, tokens_N, depth_N)
        self.sampler.record_free(rows_N[free_N], slots_N[free_N], tokens_N[free_N])
        return draft

    def _verify(self, rung: int, draft: DraftTree) -> None:
        """Let `rung` verify draft tokens, and add one token of its own to every row."""
        watch = Stopwatch(self.model)
        state, tokens_BN = self.state, self.state.tokens_BN
        base_B = state.verified[rung]
        # The last token of a chain that ends its text is verified, but no token follows it, so it
        # is no input. A tree is run as a whole; its row has ended only if there are no drafts.
        idle_B = state.ends(base_B + draft.count_B if draft.chain else base_B)
        upto_B = base_B + draft.count_B - idle_B
        scores_BCV = self.scores(rung, tokens_BN, base_B, upto_B, draft)
        positions_BC = base_B[:, None] + draft.depth_BC[:, : scores_BCV.shape[1]]
        verified = self.sampler.verify(scores_BCV, positions_BC, draft)
        if rung == state.last:
            made_BN = state.made(base_B, draft.parent_BN.shape[1])
            self.by_row.add_target(~state.ends(base_B), made_BN, draft, verified)
        self.observe(tokens_BN, base_B, upto_B, scores_BCV, verified)
        if not draft.chain:
            self._keep(base_B, verified)

        length_B = base_B + verified.accepted_B
        own = np.flatnonzero(~state.ends(length_B))
        depth_N = np.full(len(own), self.config.ladder[rung])
        state.write(own, length_B[own], verified.token_B[own], depth_N)
        length_B[own] += 1
        state.advance(rung, length_B)
        self.ladder.truncate(length_B - 1)  # no rung has run the token that was just added
        self.stats.rungs[rung].add_pass(watch)
        self._count(rung, draft, verified)

        if rung == state.last:
            state.stop_where(self.stopping, base_B, self.model.device)
        elif self.config.buffer_threshold:
            state.unsure[rung] = state.unsure[rung] | self._unsure(scores_BCV, verified)
        if rung == state.first and draft.count_B.any():
            free_B = draft.free_BN.sum(1)
            self.drafter.verified(verified.accepted_B, draft.count_B - free_B, free_B)

    def scores(
        self,
        rung: int,
        tokens_BN: np.ndarray,
        base_B: np.ndarray,
        upto_B: np.ndarray,
        draft: DraftTree,
        *,
        skip: int = 0,
        drafting: bool = False,
    ) -> torch.Tensor:
        """Logits [B, C, V] of a rung, processed, after the last verified token and each draft
        token; the first `skip` columns are left out.

        Processors get the prefix of each column, not the tokens of the pass.
        """
        tree = None if draft.chain else draft
        logits_BCV = self.ladder.logits(
            rung, tokens_BN, base_B - 1, upto_B, tree, skip=skip, drafting=drafting
        )
        if not self.processors:
            return logits_BCV
        rows_N, columns_N = real_columns(logits_BCV, upto_B - base_B - skip)
        scores_BCV = logits_BCV.float()
        length_N = base_B[rows_N] + draft.depth_BC[rows_N, columns_N + skip]
        for length in np.unique(length_N):  # processors take prefixes of one length at a time
            rows, columns = rows_N[length_N == length], columns_N[length_N == length]
            slots_NT = draft.prefix_slots(rows, columns + skip, int(length), base_B)
            prefix_NT = torch.from_numpy(tokens_BN[rows[:, None], slots_NT])
            scores_NV = scores_BCV[rows, columns]
            scores_BCV[rows, columns] = self.processors(prefix_NT.to(scores_BCV.device), scores_NV)
        return scores_BCV

    def observe(
        self,
        tokens_BN: np.ndarray,
        base_B: np.ndarray,
        upto_B: np.ndarray,
        scores_BCV: torch.Tensor,
        verified: Verified | None = None,
        skip: int = 0,
    ) -> None:
        """Show the drafter the top candidates of a pass, as from `scores`.

        Where the same token occurs more than once, the one on the accepted path comes last, and
        stays in the drafter's table.
        """
        if not self.drafter.observes:
            return
        rows_N, columns_N = real_columns(scores_BCV, upto_B - base_B - skip)
        if verified is not None:
            on_path_N = verified.on_path(scores_BCV.shape[1])[rows_N, columns_N]
            order_N = np.argsort(on_path_N, kind="stable")
            rows_N, columns_N = rows_N[order_N], columns_N[order_N]
        tokens_N = tokens_BN[rows_N, base_B[rows_N] - 1 + skip + columns_N]
        candidates_NK = self.sampler.candidates(scores_BCV.flatten(0, 1), self.drafter.observes)
        self.drafter.observe(tokens_N, candidates_NK[rows_N * scores_BCV.shape[1] + columns_N])

    def _keep(self, base_B: np.ndarray, verified: Verified) -> None:
        """Move the accepted tokens of a tree to their positions, in the text and in the cache."""
        columns = np.arange(1, verified.path_BD.shape[1] + 1)
        moved_BD = (verified.path_BD != columns) & (columns <= verified.accepted_B[:, None])
        if moved_BD.any():
            self.state.move(base_B, verified.path_BD)
            self.ladder.cache.keep(base_B, verified.path_BD)

    def _unsure(self, scores_BCV: torch.Tensor, verified: Verified) -> np.ndarray:
        """Rows [B] with a token, accepted or added, that the rung has low confidence in."""
        sure_BC = self.sampler.confidence(scores_BCV) >= self.config.buffer_threshold
        return (verified.on_path(sure_BC.shape[1]) & ~sure_BC).sum(1) > 0

    def _count(self, rung: int, draft: DraftTree, verified: Verified) -> None:
        """Count draft tokens for the rung, or the free drafter, that proposed them."""
        if not draft.count_B.any():
            return
        free_B = draft.free_BN.sum(1)
        on_path_BN = verified.on_path(draft.free_BN.shape[1] + 1)[:, 1:]
        accepted_free_B = (draft.free_BN & on_path_BN).sum(1)
        self.stats.free.add(free_B, accepted_free_B)
        rest_B, accepted_B = draft.count_B - free_B, verified.accepted_B - accepted_free_B
        if rung > 0:
            self.stats.rungs[rung - 1].add(rest_B, accepted_B)
        self.by_row.add(rung, rest_B, accepted_B, free_B, accepted_free_B)
