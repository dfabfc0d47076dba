"""Evaluation during training: what the exits are worth on held-out text, and how far a trained
trunk has drifted from its base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from hispec.data.packing import Rows
from hispec.metrics.agreement import agreement, expected_speed, ladder_pairs
from hispec.metrics.perplexity import ReferenceStates, final_states, perplexity
from hispec.models.exit_model import ExitModel
from train.distributed import gather
from train.trunk import Trunk

_CHAIN = 4  # drafts of the chain whose right runs are shown


class Evaluator:
    """Evaluates a model in training, on the same rows of text every time.

    Args:
        rows: held-out documents.
    """

    def __init__(self, rows: Rows, trunk: Trunk) -> None:
        self.rows = rows
        self.trunk = trunk
        self._base: ReferenceStates | None = None

    @torch.no_grad()
    def remember_base(self, model: ExitModel) -> None:
        """Keep the predictions of the base; called before the first step changes the trunk."""
        if self.trunk.trained:
            normed = final_states(model, self.rows)
            with gather(model.hf.lm_head):
                self._base = ReferenceStates(normed, model.hf.lm_head.weight.detach().clone())

    def __call__(self, model: ExitModel) -> dict[str, Any]:
        """Measure the model.

        Returns:
            `agreement` (one dict per pair of depths), `expected` (the fastest two-level ladder)
            and, for a trained trunk, `drift` (KL to the base in nats) and `loss` of the full model.
        """
        pairs = ladder_pairs(model.exits.depths, model.num_layers)
        measured = agreement(model, self.rows, pairs)
        speed = expected_speed(model, measured)
        found = {"agreement": [asdict(m) for m in measured], "expected": asdict(speed)}
        if self.trunk.trained:
            (final,) = perplexity(model, self.rows, [model.num_layers], self._base)
            found["drift"], found["loss"] = final.kl, final.loss
        return found


def shown(found: dict[str, Any]) -> str:
    """An evaluation as one line."""
    parts = [
        f"{m['shallow']}->{m['deep']} agreement {m['top1']:.3f} acceptance {m['acceptance']:.3f}"
        + _chain(m["runs"])
        for m in found["agreement"]
    ]
    best = found["expected"]
    parts.append(
        f"exit {best['depth']} drafting {best['draft_length']}: "
        f"{best['tokens_per_target_pass']:.2f} tokens per target pass, "
        f"expected {best['speed']:.2f}x"
    )
    if "drift" in found:
        parts.append(f"full model: loss {found['loss']:.3f}, KL to the base {found['drift']:.4f}")
    return "  ".join(parts)


def _chain(runs: Sequence[float]) -> str:
    """What a chain of drafts would gain, in words: how often all of its first drafts are right, and
    the tokens per verifying pass, its own included."""
    first = runs[:_CHAIN]
    shares = " / ".join(f"{share:.2f}" for share in first)
    return f" (runs of 1 to {len(first)}: {shares}; acceptance length {1 + sum(first):.2f})"


def logged(found: dict[str, Any]) -> dict[str, float]:
    """An evaluation as the values that a tracker gets, by name."""
    values = {f"held out {name}": value for name, value in found["expected"].items()}
    for pair in found["agreement"]:
        for key, name in (("top1", "agreement"), ("acceptance", "acceptance")):
            values[f"held out {pair['shallow']}->{pair['deep']} {name}"] = pair[key]
    values.update({f"held out {key}": found[key] for key in ("drift", "loss") if key in found})
    return values
