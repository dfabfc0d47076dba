"""How often two depths of a model agree on given text, and the speed that this promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from hispec.data.packing import Rows
from hispec.models.exit_model import ExitModel
from hispec.models.layer_inputs import of_token_before

CHUNK = 128  # tokens whose probabilities are in memory at one time, for two depths
LONGEST_RUN = 8
"""Longest run of equal tokens that is measured."""


@dataclass
class Agreement:
    """Agreement of a shallower depth with a deeper one, averaged over the tokens of the text."""

    shallow: int
    deep: int
    top1: float
    """Share of tokens at which both have the same argmax: greedy acceptance of one draft."""
    acceptance: float
    """Mean of sum_v min(p(v), q(v)), 1 - total variation: what rejection sampling accepts."""
    tokens: int
    runs: list[float] = field(default_factory=list)
    """Share of the tokens at which a run of at least 1, 2, ... equal argmaxes begins. In greedy
    decoding the first n of them add up to the mean number of accepted tokens of a draft of n."""


@torch.no_grad()  # sharded weights cannot be gathered in inference mode
def agreement(model: ExitModel, rows: Rows, pairs: Sequence[tuple[int, int]]) -> list[Agreement]:
    """Measure pairs (shallower depth, deeper depth) on rows of documents, each a text of its own.

    A depth with a trained head is read through it, any other through the final norm. The shallower
    depth of a pair is read as a drafter: from the draft vocabulary if there is one, and a head that
    also reads the token before gets the full model's state of it.

    Returns:
        One `Agreement` per pair, in their order.
    """
    depths = sorted({depth for pair in pairs for depth in pair})
    drafts_of = {deep: [s for s, d in pairs if d == deep] for _, deep in pairs}
    acceptance = dict.fromkeys(pairs, 0.0)
    first_RT, later_RT = (
        {pair: torch.zeros_like(rows.tokens_RT, dtype=torch.bool) for pair in pairs}
        for _ in range(2)
    )
    for r, (tokens_1T, positions_1T) in enumerate(rows.one_by_one(model.device)):
        states = normed_states(model, tokens_1T, positions_1T, depths)
        for start in range(0, tokens_1T.shape[1], CHUNK):
            chunk = slice(start, start + CHUNK)
            for deep, shallows in drafts_of.items():
                p_NV = model.project(states[deep].first_BTH[0, chunk]).float().softmax(-1)
                top_N = p_NV.max(-1).indices  # three times as fast as argmax on a CPU
                for pair in ((shallow, deep) for shallow in shallows):
                    draft = states[pair[0]]
                    q_NV = model.draft(pair[0], draft.first_BTH[0, chunk]).float().softmax(-1)
                    first_RT[pair][r, chunk] = (q_NV.max(-1).indices == top_N).cpu()
                    acceptance[pair] += torch.minimum(p_NV, q_NV).sum().item()
                    later_RT[pair][r, chunk] = first_RT[pair][r, chunk]
                    if draft.later_BTH is not None:
                        again_NV = model.draft(pair[0], draft.later_BTH[0, chunk])
                        later_RT[pair][r, chunk] = (again_NV.max(-1).indices == top_N).cpu()
    count = rows.tokens_RT.numel()
    return [
        Agreement(
            *pair,
            top1=first_RT[pair].float().mean().item(),
            acceptance=min(acceptance[pair] / count, 1.0),  # sums of float32 may be a little above
            tokens=count,
            runs=run_shares(first_RT[pair], later_RT[pair], rows.positions_RT),
        )
        for pair in pairs
    ]


def run_shares(
    first_RT: torch.Tensor, later_RT: torch.Tensor, positions_RT: torch.Tensor
) -> list[float]:
    """Share of the positions at which a run of at least 1, 2, ... `LONGEST_RUN` true values begins.

    Only positions with `LONGEST_RUN` (or the length of the longest document, if that is shorter)
    tokens left in their document count.

    Args:
        first_RT: whether the first token of a draft that begins here is accepted, bool [R, T].
        later_RT: whether a later token of a draft is accepted here, bool [R, T].
        positions_RT: positions of the tokens in their documents.
    """
    longest = min(LONGEST_RUN, int(positions_RT.max()) + 1)
    counted_RT = (positions_RT[:, longest - 1 :] >= longest - 1).to(first_RT.device)
    windows_ND = later_RT.unfold(1, longest, 1)[counted_RT]
    windows_ND[:, 0] = first_RT[:, : counted_RT.shape[1]][counted_RT]
    return windows_ND.int().cumprod(-1).float().mean(0).tolist()


@dataclass
class ExpectedSpeed:
    """Predicted gain of greedy decoding with one exit as the drafter of the full model."""

    depth: int
    draft_length: int
    tokens_per_target_pass: float
    speed: float
    """Speed relative to plain decoding if the time of a pass is proportional to its number of
    weights, as where memory bandwidth is the bottleneck; the cost of drafting is included."""


def expected_speed(model: ExitModel, measured: Sequence[Agreement]) -> ExpectedSpeed:
    """The exit and draft length with the highest predicted speed.

    Args:
        measured: agreement of exits, those with the full model among them.
    """
    layer = _size(model.hf.model.layers) / model.num_layers
    lm_head = _size(model.hf.lm_head)
    draft_head = lm_head * (model.exits.draft_vocab or model.vocab_size) / model.vocab_size
    target = model.num_layers * layer + lm_head
    options = []
    for found in measured:
        if found.deep != model.num_layers:
            continue
        draft = found.shallow * layer + _size(model.head(found.shallow)) + draft_head
        for length in range(1, len(found.runs) + 1):
            tokens = 1 + sum(found.runs[:length])
            speed = tokens * target / (target + length * draft)
            options.append(ExpectedSpeed(found.shallow, length, tokens, speed))
    return max(options, key=lambda option: option.speed)


def _size(module: nn.Module) -> int:
    """Number of a module's parameters, also where DeepSpeed has partitioned them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


@dataclass
class NormedStates:
    """States [B, T, H] of one depth after its norm, which the LM head turns into logits."""

    first_BTH: torch.Tensor
    later_BTH: torch.Tensor | None = None
    """For a head that reads the token before: computed with the head's own state of that token
    instead of the full model's, as from the second token of a draft on."""


def normed_states(
    model: ExitModel,
    tokens_BT: torch.Tensor,
    positions_BT: torch.Tensor | None,
    depths: Sequence[int],
) -> dict[int, NormedStates]:
    """Normed states of some depths and of the full depth, by depth.

    Args:
        tokens_BT: whole sequences or packed documents.
        positions_BT: positions of the tokens in packed documents; None for whole sequences.
    """
    states = model.states(tokens_BT, {*depths, model.num_layers}, positions_BT)
    final_BTH = model.normed(model.num_layers, states[model.num_layers])
    found = {model.num_layers: NormedStates(final_BTH)}

    def through_head(depth: int, normed_BTH: torch.Tensor) -> torch.Tensor:
        """Normed states of a head that reads `normed_BTH` of the tokens before."""
        before_BTH = of_token_before(normed_BTH, positions_BT)
        head_BTH = model.run_head(depth, states[depth], positions_BT, previous_BTH=before_BTH)
        return model.normed(depth, head_BTH)

    for depth in depths:
        if depth < model.num_layers:
            first_BTH = through_head(depth, final_BTH)
            found[depth] = NormedStates(first_BTH)
            if model.head(depth).mix is not None:
                found[depth].later_BTH = through_head(depth, first_BTH)
    return found


def ladder_pairs(depths: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """Pairs (shallower, deeper): each exit with the full model, then with the next exit."""
    final = [(depth, num_layers) for depth in depths]
    return final + list(pairwise(depths))
