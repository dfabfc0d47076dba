"""Texts join a running decode and leave it: it goes on with more or fewer rows, and prompts are
read pass by pass beside its rounds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from hispec.decoding.decoder import Decode
from hispec.decoding.state import Committed
from hispec.utils.settings import check


@torch.inference_mode()
def resized(run: Decode, keep: Sequence[int], rows: int) -> Decode:
    """A decode of `rows` rows that goes on with some rows of another, which must not be run after.

    The texts that are kept lie in its first rows, in the order of `keep`; each is the one that it
    would have been. The other rows have ended: `admit` puts prompts there. Drafters begin anew with
    what the texts hold, which changes no text.

    Args:
        keep: rows of `run`, none of whose prompts is still unread.

    Raises:
        ValueError: fewer rows than are kept, an unread prompt among them, or verification
            `rejection`, whose stream of random numbers belongs to all rows of a decode.
    """
    match = run.config.verification
    check(match == "match", "verification", match, "a decode can be resized with 'match' alone")
    check(rows >= max(1, len(keep)), "rows", rows, f"{max(1, len(keep))} or more")
    unread = sorted(set(run.unread) & set(keep))
    check(not unread, "keep", unread, "rows whose prompts have been read; run `step` before")
    state = run.state
    prompts = [state.tokens_BN[row, : state.prompt_B[row]].tolist() for row in keep]
    prompts += [[0]] * (rows - len(keep))
    new = Decode(
        run.model,
        prompts,
        run.config,
        stopping_criteria=run.stopping,
        max_prompt=run.max_prompt,
    )
    for row in range(len(keep), rows):
        new.stop(row)
    new.processors, new.pace = run.processors, run.pace
    if not keep:
        return new
    mine = list(range(len(keep)))
    new.unread = []
    new.sampler = run.sampler.of(keep)
    new.state.end_B[mine] = state.end_B[keep]
    new.state.take(mine, state, keep)
    new.ladder.take(mine, run.ladder, keep)
    new.by_row.take(mine, run.by_row, keep)
    new.drafter.begin(new.state.view(), mine)
    return new


class Reading:
    """A prompt on its way into a decode.

    The passes are those that read the prompt alone, so its text is the one that it has alone.
    Between two of them the decode may run rounds, let other texts come and go, and be resized.

    Args:
        run: the decode; that of `join` must have its settings.
        prompt: token ids, at most the decode's `max_prompt`.
        seed: instead of the config's.
    """

    def __init__(self, run: Decode, prompt: Sequence[int], *, seed: int) -> None:
        self.prompt, self.seed = prompt, seed
        alone = replace(run.config, max_new_tokens=1)
        self._alone = Decode(run.model, [prompt], alone, seeds=[seed])
        self._alone.processors, self._alone.stopping = run.processors, run.stopping
        state = self._alone.state
        self._passes = self._alone.ladder.prefill_passes(state.tokens_BN, state.prompt_B)

    @torch.inference_mode()
    def step(self) -> bool:
        """Run one pass over the prompt; returns whether that was the last."""
        alone = self._alone
        with alone.model.between_passes():
            if next(self._passes, _END) is not _END:
                return False
            alone._verify(alone.state.last, alone.state.pending(alone.state.last))
        alone.unread = []
        return True

    @torch.inference_mode()
    def join(self, run: Decode, row: int, *, max_new_tokens: int | None = None) -> Committed:
        """Put the text, whose prompt has been read, into a row that has ended; returns its first
        token, which the full model has added.

        Args:
            max_new_tokens: see `Decode.admit`.

        Raises:
            ValueError: see `Decode.admit`.
        """
        began = time.perf_counter()
        run.admit(row, self.prompt, seed=self.seed, max_new_tokens=max_new_tokens)
        run.unread.remove(row)
        state = self._alone.state
        run.state.take([row], state, [0])
        run.ladder.take([row], self._alone.ladder, [0])
        run.by_row.take([row], self._alone.by_row, [0])
        run.drafter.begin(run.state.view(), [row])
        (committed,) = state.committed_since(state.prompt_B)
        run.stats.add_round(run.ladder, time.perf_counter() - began, len(committed.tokens))
        return replace(committed, row=row)


_END = object()
