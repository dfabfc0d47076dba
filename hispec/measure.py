"""How well two depths of a model agree on given text, at temperature 1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from .model import ExitModel
from .packing import Rows

_CHUNK = 128  # tokens whose laws are in memory at one time, for two depths
LONGEST_RUN = 8


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
    runs: list[float] = field(default_factory=list)
    """Share of the tokens from which on 1, 2, ... argmaxes in a row are the same: greedily, a draft
    of n tokens has the sum of the first n accepted on average."""


@torch.inference_mode()
def agreement(model: ExitModel, rows: Rows, pairs: Sequence[tuple[int, int]]) -> list[Agreement]:
    """Measure pairs (shallower depth, deeper depth) on rows of documents, each a text of its own.

    Depths with a trained head are read through it, all others through the final norm.
    """
    depths = sorted({depth for pair in pairs for depth in pair})
    judged_by = {deep: [s for s, d in pairs if d == deep] for _, deep in pairs}
    acceptance = dict.fromkeys(pairs, 0.0)
    same_RT = {pair: torch.zeros_like(rows.tokens_RT, dtype=torch.bool) for pair in pairs}
    for r, (tokens_1T, positions_1T) in enumerate(rows.one_by_one(model.device)):
        states = dict(_normed_states(model, tokens_1T, positions_1T, depths))
        for start in range(0, tokens_1T.shape[1], _CHUNK):
            part = slice(start, start + _CHUNK)
            for deep, shallows in judged_by.items():
                p_NV = model.project(states[deep][part]).float().softmax(-1)
                top_N = p_NV.max(-1).indices  # three times as fast as argmax on a CPU
                for shallow in shallows:
                    q_NV = model.project(states[shallow][part]).float().softmax(-1)
                    same_RT[shallow, deep][r, part] = (q_NV.max(-1).indices == top_N).cpu()
                    acceptance[shallow, deep] += torch.minimum(p_NV, q_NV).sum().item()
    count = rows.tokens_RT.numel()
    return [
        Agreement(
            *pair,
            top1=same_RT[pair].float().mean().item(),
            acceptance=acceptance[pair] / count,
            tokens=count,
            runs=run_shares(same_RT[pair], rows.positions_RT),
        )
        for pair in pairs
    ]


def run_shares(same_RT: torch.Tensor, positions_RT: torch.Tensor) -> list[float]:
    """Share of the places from which on at least 1, 2, ... `LONGEST_RUN` are true in a row.

    Only places count that have that many behind them in their document, and no run is longer than
    the longest document.
    """
    longest = min(LONGEST_RUN, int(positions_RT.max()) + 1)
    inside_RP = positions_RT[:, longest - 1 :] >= longest - 1
    windows_NK = same_RT.unfold(1, longest, 1)[inside_RP.to(same_RT.device)]
    return windows_NK.int().cumprod(-1).float().mean(0).tolist()


@dataclass
class ExpectedSpeed:
    """What a ladder of one exit and the full model would gain in greedy decoding."""

    depth: int
    draft_length: int
    tokens_per_target_pass: float
    speed: float
    """Against plain decoding, if a pass costs what its weights weigh, as where memory is the
    bottleneck; the drafts' own cost included."""


def expected_speed(model: ExitModel, measured: Sequence[Agreement]) -> ExpectedSpeed:
    """The fastest two rungs that the measured agreement with the full model promises."""
    layer = _size(model.hf.model.layers) / model.num_layers
    lm_head = _size(model.hf.lm_head)
    target = model.num_layers * layer + lm_head
    found = []
    for judged in measured:
        if judged.deep != model.num_layers:
            continue
        draft = judged.shallow * layer + _size(model.head(judged.shallow)) + lm_head
        for length in range(1, len(judged.runs) + 1):
            tokens = 1 + sum(judged.runs[:length])
            speed = tokens * target / (target + length * draft)
            found.append(ExpectedSpeed(judged.shallow, length, tokens, speed))
    return max(found, key=lambda e: e.speed)


def _size(module: nn.Module) -> int:
    """Parameters of a module, counted whole where DeepSpeed has spread them over processes."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def _normed_states(
    model: ExitModel,
    tokens_1T: torch.Tensor,
    positions_1T: torch.Tensor | None,
    depths: Iterable[int],
) -> Iterable[tuple[int, torch.Tensor]]:
    """(depth, states [T, H] as the LM head reads them) of one row."""
    hidden_1TH, at = model.embed(tokens_1T), 0
    for depth in depths:
        hidden_1TH, at = model.run(hidden_1TH, at, depth, positions_1T), depth
        own_1TH = hidden_1TH
        if depth < model.num_layers:
            own_1TH = model.run_head(depth, hidden_1TH, positions_1T)
        yield depth, model.normed(depth, own_1TH)[0]


def ladder_pairs(depths: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """Pairs worth measuring for exits at `depths`: each with the final rung, then neighbours."""
    final = [(depth, num_layers) for depth in depths]
    return final + list(pairwise(depths))
