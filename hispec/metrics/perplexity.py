"""How well a depth predicts given text, and how far its probabilities are from another model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hispec.data.packing import Rows, next_tokens
from hispec.metrics.agreement import CHUNK, normed_states
from hispec.models.exit_model import ExitModel


@dataclass
class ReferenceStates:
    """What gives a reference model's logits of rows of text, kept to compare another model with.

    States take far less memory than logits; the logits are computed again chunk by chunk.
    """

    normed: list[torch.Tensor]
    """States [1, T, H] at full depth after the final norm, one tensor per row."""
    head_VH: torch.Tensor
    """Weights of the LM head."""


@torch.no_grad()
def final_states(model: ExitModel, rows: Rows) -> list[torch.Tensor]:
    """States [1, T, H] of each row at full depth, after the final norm."""
    return [model.final(*row) for row in rows.one_by_one(model.device)]


@dataclass
class Perplexity:
    """How well a depth predicts given text, and its divergence from a reference model."""

    depth: int
    loss: float
    """Cross-entropy of the next token within its document, nats per token."""
    kl: float | None
    """KL(reference || this depth), nats per token; None without a reference."""
    tokens: int
    """Tokens of the text."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def perplexity(
    model: ExitModel,
    rows: Rows,
    depths: Sequence[int],
    reference: ReferenceStates | None = None,
) -> list[Perplexity]:
    """Measure depths on rows of documents; an exit is read with the whole LM head.

    Args:
        reference: of the same rows, from a model with the same vocabulary.
    """
    loss, kl = dict.fromkeys(depths, 0.0), dict.fromkeys(depths, 0.0)
    labels_RT = next_tokens(rows.tokens_RT, positions_RT=rows.positions_RT).to(model.device)
    for r, (tokens_1T, positions_1T) in enumerate(rows.one_by_one(model.device)):
        states = normed_states(model, tokens_1T, positions_1T, depths)
        for start in range(0, tokens_1T.shape[1], CHUNK):
            chunk = slice(start, start + CHUNK)
            if reference is not None:
                logits_NV = model.project(reference.normed[r][0, chunk], reference.head_VH)
                log_p_NV = logits_NV.float().log_softmax(-1)
            for depth in depths:
                logits_NV = model.project(states[depth][0][0, chunk])
                log_q_NV = logits_NV.float().log_softmax(-1)
                labels_N = labels_RT[r, chunk]
                loss[depth] += F.nll_loss(
                    log_q_NV, labels_N, ignore_index=-100, reduction="sum"
                ).item()
                if reference is not None:
                    kl[depth] += (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum().item()
    count, labels = rows.tokens_RT.numel(), int((labels_RT >= 0).sum())
    return [
        Perplexity(
            depth,
            loss=loss[depth] / labels,
            kl=None if reference is None else kl[depth] / count,
            tokens=count,
        )
        for depth in depths
    ]
