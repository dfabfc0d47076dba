"""The truth while training: what the exits are worth on held-out text, and how far a trained trunk
has gone from its base."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

from hispec.measure import agreement, expected_speed, ladder_pairs
from hispec.model import ExitModel
from hispec.packing import Rows

from .data import next_tokens
from .processes import gather
from .trunk import Trunk


class Judge:
    """Measures a model in training on the same rows of text every time.

    Args:
        rows: held-out documents.
    """

    def __init__(self, rows: Rows, trunk: Trunk) -> None:
        self.rows = rows
        self.trunk = trunk
        self._base_normed: list[torch.Tensor] = []
        self._base_head: torch.Tensor | None = None

    @torch.no_grad()
    def remember_base(self, model: ExitModel) -> None:
        """Note what the untouched base says, before the first step changes it."""
        if self.trunk.trained:
            self._base_normed = [model.final(*row) for row in self.rows.one_by_one(model.device)]
            with gather(model.hf.lm_head):
                self._base_head = model.hf.lm_head.weight.detach().clone()

    def __call__(self, model: ExitModel) -> dict[str, Any]:
        """Figures by name, for the history and the checkpoint."""
        pairs = ladder_pairs(model.exits.depths, model.num_layers)
        measured = agreement(model, self.rows, pairs)
        speed = expected_speed(model, measured)
        found = {"agreement": [asdict(m) for m in measured], "expected": asdict(speed)}
        if self.trunk.trained:
            found["drift"], found["loss"] = self._final_rung(model)
        return found

    @torch.no_grad()
    def _final_rung(self, model: ExitModel) -> tuple[float, float]:
        """(KL of the final rung's law to the base's, its cross-entropy), nats per token."""
        kl = loss = 0.0
        tokens = labels = 0
        labels_RT = next_tokens(self.rows.tokens_RT, positions_RT=self.rows.positions_RT)
        labels_RT = labels_RT.to(model.device)
        rows = zip(self.rows.one_by_one(model.device), labels_RT, self._base_normed, strict=True)
        for (row_1T, positions_1T), labels_T, base_1TH in rows:
            normed_1TH = model.final(row_1T, positions_1T)
            log_q_TV = model.project(normed_1TH)[0].float().log_softmax(-1)
            log_p_TV = model.project(base_1TH, self._base_head)[0].float().log_softmax(-1)
            kl += (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum().item()
            loss += F.nll_loss(log_q_TV, labels_T, ignore_index=-100, reduction="sum").item()
            tokens, labels = tokens + len(labels_T), labels + int((labels_T >= 0).sum())
        return kl / tokens, loss / labels


def shown(found: dict[str, Any]) -> str:
    """One line of the figures."""
    parts = [
        f"{m['shallow']}->{m['deep']} agreement {m['top1']:.3f} acceptance {m['acceptance']:.3f}"
        for m in found["agreement"]
    ]
    best = found["expected"]
    parts.append(
        f"exit {best['depth']} drafting {best['draft_length']}: "
        f"{best['tokens_per_target_pass']:.2f} tokens per target pass, "
        f"expected {best['speed']:.2f}x"
    )
    if "drift" in found:
        parts.append(f"final rung: loss {found['loss']:.3f}, KL to the base {found['drift']:.4f}")
    return "  ".join(parts)
