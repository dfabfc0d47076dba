"""The truth while training: what the exits are worth on held-out text, and how far a trained trunk
has gone from its base."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from hispec.measure import agreement, expected_speed, ladder_pairs
from hispec.model import ExitModel

from .processes import gather
from .trunk import Trunk


class Judge:
    """Measures a model in training on the same rows of text every time.

    Args:
        rows_RT: held-out token ids.
    """

    def __init__(self, rows_RT: torch.Tensor, trunk: Trunk) -> None:
        self.rows_RT = rows_RT
        self.trunk = trunk
        self._base_normed: list[torch.Tensor] = []
        self._base_head: torch.Tensor | None = None

    @torch.no_grad()
    def remember_base(self, model: ExitModel) -> None:
        """Note what the untouched base says, before the first step changes it."""
        if self.trunk.trained:
            self._base_normed = [
                model.final(row_T[None].to(model.device)) for row_T in self.rows_RT
            ]
            with gather(model.hf.lm_head):
                self._base_head = model.hf.lm_head.weight.detach().clone()

    def __call__(self, model: ExitModel) -> dict[str, Any]:
        """Figures by name, for the history and the checkpoint."""
        pairs = ladder_pairs(model.exits.depths, model.num_layers)
        measured = agreement(model, self.rows_RT, pairs)
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
        for row_T, base_1TH in zip(self.rows_RT.to(model.device), self._base_normed, strict=True):
            log_q_TV = model.project(model.final(row_T[None]))[0].float().log_softmax(-1)
            log_p_TV = model.project(base_1TH, self._base_head)[0].float().log_softmax(-1)
            kl += (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum().item()
            loss -= log_q_TV[:-1].gather(1, row_T[1:, None]).sum().item()
            tokens, labels = tokens + len(row_T), labels + len(row_T) - 1
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
