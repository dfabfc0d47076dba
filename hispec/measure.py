"""How well two depths of a model agree on given text, at temperature 1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .model import ExitModel

_CHUNK = 128  # tokens whose laws are in memory at one time, for two depths


@dataclass
class Agreement:
    """A shallower depth judged by a deeper one, averaged over the tokens of the text."""

    shallow: int
    deep: int
    top1: float
    """Share of tokens at which both have the same argmax: greedy acceptance of one draft."""
    acceptance: float
    """Mean of sum_v min(p(v), q(v)), 1 - total variation: what rejection sampling accepts."""
    tokens: int


@torch.inference_mode()
def agreement(
    model: ExitModel, rows_RT: torch.Tensor, pairs: Sequence[tuple[int, int]]
) -> list[Agreement]:
    """Measure pairs (shallower depth, deeper depth) on rows of token ids, each a text of its own.

    Depths with a trained head are read through it, all others through the final norm.
    """
    depths = sorted({depth for pair in pairs for depth in pair})
    judged_by = {deep: [s for s, d in pairs if d == deep] for _, deep in pairs}
    top1, acceptance = dict.fromkeys(pairs, 0.0), dict.fromkeys(pairs, 0.0)
    for row_T in rows_RT:
        states = dict(_normed_states(model, row_T[None].to(model.device), depths))
        for start in range(0, rows_RT.shape[1], _CHUNK):
            part = slice(start, start + _CHUNK)
            for deep, shallows in judged_by.items():
                p_NV = model.project(states[deep][part]).float().softmax(-1)
                top_N = p_NV.max(-1).indices  # three times as fast as argmax on a CPU
                for shallow in shallows:
                    q_NV = model.project(states[shallow][part]).float().softmax(-1)
                    top1[shallow, deep] += (q_NV.max(-1).indices == top_N).sum().item()
                    acceptance[shallow, deep] += torch.minimum(p_NV, q_NV).sum().item()
    count = rows_RT.numel()
    return [Agreement(*pair, top1[pair] / count, acceptance[pair] / count, count) for pair in pairs]


def _normed_states(
    model: ExitModel, tokens_1T: torch.Tensor, depths: Iterable[int]
) -> Iterable[tuple[int, torch.Tensor]]:
    """(depth, states [T, H] as the LM head reads them) of one text."""
    hidden_1TH, at = model.embed(tokens_1T), 0
    for depth in depths:
        hidden_1TH, at = model.run(hidden_1TH, at, depth), depth
        own_1TH = model.run_head(depth, hidden_1TH) if depth < model.num_layers else hidden_1TH
        yield depth, model.normed(depth, own_1TH)[0]


def ladder_pairs(depths: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """Pairs worth measuring for exits at `depths`: each with the final rung, then neighbours."""
    final = [(depth, num_layers) for depth in depths]
    return final + list(pairwise(depths))
