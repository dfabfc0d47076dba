"""Scripted models: what each depth says after each prefix is written by the test, in letters.

Tokens are characters. The layers do no arithmetic but are honest about the cache: each of them
writes the token and its position where `KVCache.update` puts keys, and sees the prefix that
`KVCache.seen` lets it see. So an exit answers to the prefix that its own cache holds; a rollback, a
moved branch or a mask that is wrong gives it another prefix, and the text or the counts change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.models.attention import Reach
from hispec.models.exit_heads import ExitHead

VOCAB = 128
FILLERS = "~}|{"  # the candidates after those that are said, best first; they are in no text
LONGEST = 64

Says = Callable[[str], str]
"""Candidates after a prefix, best first; with a `?` at the end, said without confidence."""


def follows(
    *texts: str,
    wrong: Sequence[int] = (),
    unsure: Sequence[int] = (),
    second: dict[str, str] | None = None,
    lost: dict[str, str] | None = None,
) -> Says:
    """Says the token that comes next in the text that the prefix begins.

    Args:
        wrong: positions for which it says `#` instead.
        unsure: positions for which it has no confidence.
        second: for a right token, the next best candidate.
        lost: for the last token of a prefix that begins no text, the candidates; `!` if not given.
    """

    def says(prefix: str) -> str:
        text = next((text for text in texts if text.startswith(prefix) and text != prefix), None)
        if text is None:
            return (lost or {}).get(prefix[-1:], "!")
        position = len(prefix)
        token = "#" if position in wrong else text[position]
        return token + (second or {}).get(token, "") + "?" * (position in unsure)

    return says


class ScriptedModel:
    """As much of an `ExitModel` as a decode asks for; a state is (token, visible prefix...)."""

    longest_text = None
    vocab_size = VOCAB
    device = torch.device("cpu")

    backend = "eager"
    cold_passes = 0
    weights = "full"
    engine = None
    hf = SimpleNamespace(dtype=torch.float32)

    def __init__(self, *says: Says) -> None:
        self.says = says
        self.num_layers = len(says)

    def cache_layout(self):
        return self.hf.dtype, None

    def head(self, depth):
        return ExitHead()

    def draft_head(self):
        return None

    def embed(self, tokens_BT):
        return torch.nn.functional.pad(tokens_BT[..., None].float(), (0, LONGEST))

    def run(self, hidden_BTH, from_depth, to_depth, positions_BT, cache):
        for layer in range(from_depth, to_depth):
            tokens_BT = hidden_BTH[..., 0]
            written_BHTD = torch.stack([tokens_BT, positions_BT.float()], -1)[:, None]
            kept_BHKD, _ = cache.update(written_BHTD, written_BHTD, layer)
            tokens_BK, positions_BK = kept_BHKD[:, 0].unbind(-1)
            seen_BTK = tokens_BK[:, None] * cache.seen(Reach())
            places_BTK = positions_BK.long()[:, None].expand_as(seen_BTK)
            prefix_BTP = torch.zeros(*tokens_BT.shape, LONGEST).scatter_add(2, places_BTK, seen_BTK)
            hidden_BTH = torch.cat([tokens_BT[..., None], prefix_BTP], -1)
        return hidden_BTH

    def between_passes(self):
        return nullcontext()

    def run_each(self, hidden_BTH, from_depth, depths, positions_BT, cache):
        found = []
        for depth in depths:
            hidden_BTH = self.run(hidden_BTH, from_depth, depth, positions_BT, cache)
            found.append(hidden_BTH)
            from_depth = depth
        return found

    def read(self, depth, hidden):
        prefixes = hidden[..., 1:].reshape(-1, LONGEST).long().tolist()
        texts = ["".join(chr(min(token, 255)) for token in prefix) for prefix in prefixes]
        rows = [self._logits(self.says[depth - 1](text.rstrip("\0"))) for text in texts]
        return torch.tensor(rows).view(*hidden.shape[:-1], VOCAB)

    @staticmethod
    def _logits(said: str) -> list[float]:
        row = [-100.0] * VOCAB
        ranked = said.removesuffix("?") + FILLERS
        for rank, token in reversed(list(enumerate(ranked))):  # of a token said twice, the better
            row[ord(token)] = -10.0 * rank
        return [score / 1000 for score in row] if said.endswith("?") else row


class Counts(NamedTuple):
    """What a decode did; the pairs are (proposed, accepted)."""

    passes: list[int]
    """Of every rung."""
    free: tuple[int, int]
    judged: list[tuple[int, int]]
    """Of every rung but the last."""
    ran: list[int]
    """Tokens run through every segment."""


class EndsWith(StoppingCriteria):
    """A stopping criterion: a text ends once its last tokens, prompt included, are these."""

    def __init__(self, stop: str) -> None:
        self.stop = stop

    def __call__(self, input_ids, scores, **kwargs):
        texts = ["".join(map(chr, row)) for row in input_ids.tolist()]
        return torch.tensor([text.endswith(self.stop) for text in texts])


def play(prompts: str | list[str], says: Sequence[Says], ladder, eos="", stop="", **config):
    """The new text of one prompt (a list for a list), and the counts."""
    rows = [prompts] if isinstance(prompts, str) else prompts
    run = Decode(
        ScriptedModel(*says),
        [[ord(letter) for letter in prompt] for prompt in rows],
        DecodeConfig(list(ladder), eos=tuple(map(ord, eos)), **config),
        stopping_criteria=StoppingCriteriaList([EndsWith(stop)] if stop else []),
    )
    texts = ["".join(map(chr, row)) for row in run.finish()]
    stats = run.stats
    assert stats.new_tokens == sum(map(len, texts))
    counts = Counts(
        [rung.passes for rung in stats.rungs],
        (stats.free.proposed, stats.free.accepted),
        [(rung.proposed, rung.accepted) for rung in stats.rungs[:-1]],
        [rung.tokens_run for rung in stats.rungs],
    )
    return (texts[0] if isinstance(prompts, str) else texts), counts
