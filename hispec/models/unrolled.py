"""The passes of an exit head over whole texts, each fed with what the one before said.

A head that reads the token before gets the full model's states in the first draft of a chain and
its own from then on. Pass k over a text computes the k-th draft of the chains that begin k - 1
tokens earlier, for all tokens at once: the training-time test of EAGLE-3 (2503.01840). A token of
pass k attends to the keys of the first pass up to k - 1 tokens before it, and to those of its own
chain after that, as in `Ladder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hispec.models.exit_model import ExitModel
from hispec.models.layer_inputs import (
    LayerInputs,
    additive_mask,
    all_positions,
    documents,
    of_token_before,
)


def unrolled(
    model: ExitModel,
    depth: int,
    hidden_BTH: torch.Tensor,
    final_BTH: torch.Tensor | None,
    states: Mapping[int, torch.Tensor],
    positions_BT: torch.Tensor | None = None,
    *,
    passes: int,
) -> Iterator[torch.Tensor]:
    """Normed states [B, T, H] of an exit, pass after pass.

    A head that does not read the token before says the same in every pass: it has one.

    Args:
        hidden_BTH: the trunk's states at `depth`; whole sequences or packed documents.
        final_BTH: normed states at full depth, for a head that reads them.
        states: those at the depths that the head reads, before any norm.
        positions_BT: positions of the tokens in packed documents; None for whole sequences.
        passes: how many.
    """
    head = model.head(depth)
    if not head.reads_before:
        yield model.normed(depth, model.run_head(depth, hidden_BTH, positions_BT))
        return
    keys, before_BTH = _Keys(), head.before(final_BTH, states)
    for number in range(passes):
        previous_BTH = of_token_before(before_BTH, positions_BT)
        inputs = {
            kind: _inputs(model, kind, hidden_BTH, positions_BT, number)
            for kind in dict.fromkeys(head.layer_types)
        }
        out_BTH = model.run_head(
            depth, hidden_BTH, positions_BT, previous_BTH=previous_BTH, inputs=inputs, keys=keys
        )
        normed_BTH = model.normed(depth, out_BTH)
        yield normed_BTH
        before_BTH = head.own(out_BTH, normed_BTH)


class _Keys:
    """The `past_key_values` of the passes: a layer sees its keys and values of all passes so
    far, one pass after another."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, keys_BATE: torch.Tensor, values_BATE: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new = keys_BATE, values_BATE
        if layer_idx in self._layers:
            keys, values = self._layers[layer_idx]
            new = torch.cat([keys, keys_BATE], dim=2), torch.cat([values, values_BATE], dim=2)
        self._layers[layer_idx] = new
        return new


def _inputs(
    model: ExitModel,
    kind: str,
    hidden_BTH: torch.Tensor,
    positions_BT: torch.Tensor | None,
    number: int,
) -> LayerInputs:
    """Mask over the keys of all passes up to `number`, and rotary embeddings."""
    length, device = hidden_BTH.shape[1], hidden_BTH.device
    places_T = torch.arange(length, device=device)
    back_TT = places_T[:, None] - places_T  # how far a key lies behind the token
    chain = [back_TT == number - path for path in range(1, number + 1)]
    seen_TS = torch.cat([back_TT >= number, *chain], dim=1)
    seen = seen_TS[None]
    if positions_BT is not None:
        document_BT = documents(positions_BT)
        same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
        seen = seen & same_BTT.repeat(1, 1, number + 1)
    else:
        positions_BT = all_positions(hidden_BTH)
    keys_BS = positions_BT.repeat(1, number + 1)
    seen = model.reach(kind).limit(seen, positions_BT, keys_BS[:, None])
    return LayerInputs(
        additive_mask(seen, hidden_BTH.dtype), model.rope(kind, hidden_BTH, positions_BT)
    )
