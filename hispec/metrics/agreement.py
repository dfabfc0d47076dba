"""How well two depths of a model agree on given text, and how well a depth predicts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from hispec.data.packing import Rows
from hispec.models.exit_model import ExitModel, of_token_before

CHUNK = 128  # tokens whose laws are in memory at one time, for two depths
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


@torch.no_grad()  # sharded weights cannot be gathered in inference mode
def agreement(model: ExitModel, rows: Rows, pairs: Sequence[tuple[int, int]]) -> list[Agreement]:
    """Measure pairs (shallower depth, deeper depth) on rows of documents, each a text of its own.

    Depths with a trained head are read through it, all others through the final norm. The
    shallower one of a pair says what it would draft: from the reduced vocabulary if there is one,
    and where it reads the token before too, with that of the full model.
    """
    depths = sorted({depth for pair in pairs for depth in pair})
    judged_by = {deep: [s for s, d in pairs if d == deep] for _, deep in pairs}
    acceptance = dict.fromkeys(pairs, 0.0)
    first_RT, later_RT = (
        {pair: torch.zeros_like(rows.tokens_RT, dtype=torch.bool) for pair in pairs}
        for _ in range(2)
    )
    for r, (tokens_1T, positions_1T) in enumerate(rows.one_by_one(model.device)):
        states = normed_states(model, tokens_1T, positions_1T, depths)
        for start in range(0, tokens_1T.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            for deep, shallows in judged_by.items():
                p_NV = model.project(states[deep].first_BTH[0, part]).float().softmax(-1)
                top_N = p_NV.max(-1).indices  # three times as fast as argmax on a CPU
                for pair in ((shallow, deep) for shallow in shallows):
                    read = states[pair[0]]
                    q_NV = model.draft(read.first_BTH[0, part]).float().softmax(-1)
                    first_RT[pair][r, part] = (q_NV.max(-1).indices == top_N).cpu()
                    acceptance[pair] += torch.minimum(p_NV, q_NV).sum().item()
                    later_RT[pair][r, part] = first_RT[pair][r, part]
                    if read.later_BTH is not None:
                        again_NV = model.draft(read.later_BTH[0, part])
                        later_RT[pair][r, part] = (again_NV.max(-1).indices == top_N).cpu()
    count = rows.tokens_RT.numel()
    return [
        Agreement(
            *pair,
            top1=first_RT[pair].float().mean().item(),
            acceptance=acceptance[pair] / count,
            tokens=count,
            runs=run_shares(first_RT[pair], later_RT[pair], rows.positions_RT),
        )
        for pair in pairs
    ]


def run_shares(
    first_RT: torch.Tensor, later_RT: torch.Tensor, positions_RT: torch.Tensor
) -> list[float]:
    """Share of the places from which on at least 1, 2, ... `LONGEST_RUN` are true in a row.

    Only places count that have that many behind them in their document, and no run is longer than
    the longest document.

    Args:
        first_RT: whether a draft that begins here begins well.
        later_RT: whether one that has got here goes on well.
    """
    longest = min(LONGEST_RUN, int(positions_RT.max()) + 1)
    inside_RP = (positions_RT[:, longest - 1 :] >= longest - 1).to(first_RT.device)
    windows_NK = later_RT.unfold(1, longest, 1)[inside_RP]
    windows_NK[:, 0] = first_RT[:, : inside_RP.shape[1]][inside_RP]
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
    draft_head = lm_head * (model.exits.draft_vocab or model.vocab_size) / model.vocab_size
    target = model.num_layers * layer + lm_head
    found = []
    for judged in measured:
        if judged.deep != model.num_layers:
            continue
        draft = judged.shallow * layer + _size(model.head(judged.shallow)) + draft_head
        for length in range(1, len(judged.runs) + 1):
            tokens = 1 + sum(judged.runs[:length])
            speed = tokens * target / (target + length * draft)
            found.append(ExpectedSpeed(judged.shallow, length, tokens, speed))
    return max(found, key=lambda e: e.speed)


def _size(module: nn.Module) -> int:
    """Parameters of a module, counted whole where DeepSpeed has spread them over processes."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


@dataclass
class Read:
    """States [B, T, H] of one depth as the LM head reads them."""

    first_BTH: torch.Tensor
    later_BTH: torch.Tensor | None = None
    """For a head that reads the token before: with its own state in place of the full model's, as
    from the second token of a draft on."""


def normed_states(
    model: ExitModel,
    tokens_BT: torch.Tensor,
    positions_BT: torch.Tensor | None,
    depths: Sequence[int],
) -> dict[int, Read]:
    """What is read at some depths, and at the full one, of whole sequences or packed documents."""
    states = model.states(tokens_BT, {*depths, model.num_layers}, positions_BT)
    final_BTH = model.normed(model.num_layers, states[model.num_layers])
    found = {model.num_layers: Read(final_BTH)}

    def read(depth: int, normed_BTH: torch.Tensor) -> torch.Tensor:
        """What the head makes of it if these are the states that it reads of the token before."""
        before_BTH = of_token_before(normed_BTH, positions_BT)
        head_BTH = model.run_head(depth, states[depth], positions_BT, previous_BTH=before_BTH)
        return model.normed(depth, head_BTH)

    for depth in depths:
        if depth < model.num_layers:
            first_BTH = read(depth, final_BTH)
            found[depth] = Read(first_BTH)
            if model.head(depth).mix is not None:
                found[depth].later_BTH = read(depth, first_BTH)
    return found


def ladder_pairs(depths: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """Pairs worth measuring for exits at `depths`: each with the final rung, then neighbours."""
    final = [(depth, num_layers) for depth in depths]
    return final + list(pairwise(depths))
