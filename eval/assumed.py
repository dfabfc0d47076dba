"""Answers of a model that is not at hand: each exit is right as often as is assumed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

from hispec.config import ExitConfig
from hispec.models.exit_model import ExitModel
from hispec.planner.answers import Answers, Kind

_WORDS = 1000
_PROMPT = 16


def stand_in(layers: int, depths: Sequence[int]) -> ExitModel:
    """A model of so many layers, as narrow as can be, none of which is ever run."""
    config = LlamaConfig(
        vocab_size=_WORDS,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    return ExitModel(LlamaForCausalLM(config), ExitConfig.of(list(depths), "shared")).eval()


def prompts(count: int) -> list[list[int]]:
    """Unlike prompts for `stand_in`."""
    chance = random.Random(0)
    return [[chance.randrange(_WORDS) for _ in range(_PROMPT)] for _ in range(count)]


class AssumedAnswers(Answers):
    """Answers that agree with the full model as often as is assumed.

    After each prefix all depths see the same chance event, so a deeper exit is right wherever a
    shallower one is. Events of different prefixes are independent, so runs of right drafts are
    shorter than those of real exits with the same share.

    Args:
        share: for each exit, the share of prefixes after which its argmax is the full model's.
        same_mistakes: the share of the prefixes at which both are wrong where a deeper exit makes
            the mistake of the shallower one, and accepts its draft.
    """

    def __init__(
        self,
        model: ExitModel,
        prompt: Sequence[int],
        share: Mapping[int, float],
        same_mistakes: float = 0.5,
    ) -> None:
        super().__init__(model, prompt, [*share, model.num_layers], room=1)
        self.share, self.same_mistakes = dict(share), same_mistakes

    def _compute(self, kind: Kind, nodes: Sequence[int]) -> np.ndarray:
        found = np.zeros((len(nodes), 2 + 2 * self.candidates))
        found[:, 1] = 1.0
        found[:, 2 + self.candidates :] = -np.inf
        for row, node in enumerate(nodes):
            token = self._choice(kind[0], node)
            found[row, [0, 2]] = token
            found[row, 2 + self.candidates] = 0.0
        self.computed += len(nodes)
        return found

    def _choice(self, depth: int, node: int) -> int:
        chance = random.Random(f"{self.prompt} {self._path(node)}")
        right = chance.randrange(_WORDS)
        level, alike = chance.random(), chance.random() < self.same_mistakes
        if level < self.share.get(depth, 1.0):
            return right
        return (right + (1 if alike else 1 + list(self.share).index(depth))) % _WORDS

    def _path(self, node: int) -> list[int]:
        """The last tokens that lead to a node, and its place: what follows depends on them."""
        tokens, at = [self._place[node]], node
        while at >= 0 and len(tokens) < 6:
            tokens.append(self._token[at])
            at = self._parent[at]
        return tokens
