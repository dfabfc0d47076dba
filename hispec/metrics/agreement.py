"""How often two depths of a model agree on given text, and the speed that this promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from hispec.data.packing import Rows, next_tokens
from hispec.models.exit_model import ExitModel
from hispec.models.unrolled import unrolled
from hispec.utils.settings import check

CHUNK = 128  # tokens whose probabilities are in memory at one time, for two depths
LONGEST_RUN = 8
"""Longest run of equal tokens that is measured."""
STEPS = 4
"""Drafts of a chain that are computed for heads which read the token before."""


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
def agreement(
    model: ExitModel, rows: Rows, pairs: Sequence[tuple[int, int]], *, answers: bool = False
) -> list[Agreement]:
    """Measure pairs (shallower depth, deeper depth) on rows of documents, each a text of its own.

    A depth with a trained head is read through it, any other through the final norm. The shallower
    depth of a pair is read as a drafter: from the draft vocabulary if there is one. A head that
    reads the token before gets the full model's states of it; in `runs` from the second token on
    its own, as in a decode.

    Args:
        answers: count only the drafts of tokens that count in the loss: in a chat those that the
            assistant wrote, which are what a decode drafts.

    Returns:
        One `Agreement` per pair, in their order.

    Raises:
        ValueError: `answers`, and no token of the rows is one.
    """
    counted_RT = torch.ones_like(rows.loss_mask_RT)
    if answers:
        counted_RT = next_tokens(rows.tokens_RT, rows.loss_mask_RT, rows.positions_RT) != -100
        check(bool(counted_RT.any()), "answers", answers, "no token was written by an assistant")
    depths = sorted({depth for pair in pairs for depth in pair})
    drafts_of = {deep: [s for s, d in pairs if d == deep] for _, deep in pairs}
    acceptance = dict.fromkeys(pairs, 0.0)
    right: dict[tuple[int, int], list[torch.Tensor]] = {pair: [] for pair in pairs}
    for r, (tokens_1T, positions_1T) in enumerate(rows.one_by_one(model.device)):
        states = normed_states(model, tokens_1T, positions_1T, depths, STEPS)
        if r == 0:
            for pair in pairs:
                shape = len(states[pair[0]]), *rows.tokens_RT.shape
                right[pair] = list(torch.zeros(shape, dtype=torch.bool))
        for start in range(0, tokens_1T.shape[1], CHUNK):
            chunk = slice(start, start + CHUNK)
            for deep, shallows in drafts_of.items():
                p_NV = model.project(states[deep][0][0, chunk]).float().softmax(-1)
                top_N = p_NV.max(-1).indices  # three times as fast as argmax on a CPU
                for pair in ((shallow, deep) for shallow in shallows):
                    for step, normed_1TH in enumerate(states[pair[0]]):
                        q_NV = model.draft(pair[0], normed_1TH[0, chunk]).float()
                        right[pair][step][r, chunk] = (q_NV.max(-1).indices == top_N).cpu()
                        if step == 0:
                            both_N = torch.minimum(p_NV, q_NV.softmax(-1)).sum(-1).cpu()
                            acceptance[pair] += both_N[counted_RT[r, chunk]].sum().item()
    count = int(counted_RT.sum())
    return [
        Agreement(
            *pair,
            top1=right[pair][0][counted_RT].float().mean().item(),
            acceptance=min(acceptance[pair] / count, 1.0),  # sums of float32 may be a little above
            tokens=count,
            runs=run_shares(right[pair], rows.positions_RT, counted_RT),
        )
        for pair in pairs
    ]


def run_shares(
    right: Sequence[torch.Tensor],
    positions_RT: torch.Tensor,
    counted_RT: torch.Tensor | None = None,
) -> list[float]:
    """Share of the positions at which a run of at least 1, 2, ... `LONGEST_RUN` right drafts
    begins.

    Only positions with `LONGEST_RUN` (or the length of the longest document, if that is shorter)
    tokens left in their document count. Empty where there is none.

    Args:
        right: for the first draft of a chain, the second and so on, whether it is accepted where it
            is made, bool [R, T]; the last of them stands for all later ones too.
        positions_RT: positions of the tokens in their documents.
        counted_RT: where a run may begin; default: anywhere.
    """
    longest = min(LONGEST_RUN, int(positions_RT.max()) + 1)
    begins_RT = positions_RT[:, longest - 1 :] >= longest - 1
    starts = begins_RT.shape[1]
    if counted_RT is not None:
        begins_RT = begins_RT & counted_RT[:, :starts]
    drafts = [right[min(step, len(right) - 1)] for step in range(longest)]
    windows_ND = torch.stack(
        [draft_RT[:, step : step + starts][begins_RT] for step, draft_RT in enumerate(drafts)], -1
    )
    if not len(windows_ND):
        return []
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
        head = model.head(found.shallow)
        own = head.lm_head is not None  # counted with the head
        draft = found.shallow * layer + _size(head) + (0 if own else draft_head)
        for length in range(1, len(found.runs) + 1):
            tokens = 1 + sum(found.runs[:length])
            speed = tokens * target / (target + length * draft)
            options.append(ExpectedSpeed(found.shallow, length, tokens, speed))
    return max(options, key=lambda option: option.speed)


def _size(module: nn.Module) -> int:
    """Number of a module's parameters, also where DeepSpeed has partitioned them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


def normed_states(
    model: ExitModel,
    tokens_BT: torch.Tensor,
    positions_BT: torch.Tensor | None,
    depths: Sequence[int],
    steps: int = 1,
) -> dict[int, list[torch.Tensor]]:
    """States [B, T, H] of some depths and of the full depth after their norms, by depth.

    Those of an exit come as a list: what it says in the first draft of a chain, in the second and
    so on. A head that does not read the token before says the same in all of them: its list, as
    that of the full depth, has one element.

    Args:
        tokens_BT: whole sequences or packed documents.
        positions_BT: positions of the tokens in packed documents; None for whole sequences.
        steps: drafts of a chain.
    """
    full = model.num_layers
    read = {depth for exit in depths if exit < full for depth in model.head(exit).reads}
    states = model.states(tokens_BT, {*depths, *read, full}, positions_BT)
    final_BTH = model.normed(full, states[full])
    found = {full: [final_BTH]}
    for depth in depths:
        if depth < full:
            chain = unrolled(
                model, depth, states[depth], final_BTH, states, positions_BT, passes=steps
            )
            found[depth] = list(chain)
    return found


def ladder_pairs(depths: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """Pairs (shallower, deeper): each exit with the full model, then with the next exit."""
    final = [(depth, num_layers) for depth in depths]
    return final + list(pairwise(depths))
