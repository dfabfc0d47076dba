"""A decode with more or fewer rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hispec.decoding.decoder import Decode
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
    new.processors = run.processors
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
