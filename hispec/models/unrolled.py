"""The passes of an exit head over whole texts, each fed with what the one before said.

A head that reads the token before gets the full model's states in the first draft of a chain and
its own from then on. Pass k over a text computes the k-th draft of the chains that begin k - 1
tokens earlier, for all tokens at once: the training-time test of EAGLE-3 (2503.01840). A token of
pass k attends to the keys of the first pass up to k - 1 tokens before it, and to those of its own
chain after that, as in `Ladder`: one key of each later pass, so their scores are no matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from hispec.models.attention import attention_by
from hispec.models.exit_model import ExitModel
from hispec.models.layer_inputs import (
    LayerInputs,
    additive_mask,
    all_positions,
    documents,
    of_token_before,
)

NAME = "hispec-unrolled"
"""The attention function of the passes after the first, in a model's config."""


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
        with attention_by(model.hf.config, NAME) if number else nullcontext():
            out_BTH = model.run_head(
                depth, hidden_BTH, positions_BT, previous_BTH=previous_BTH, inputs=inputs, keys=keys
            )
        normed_BTH = model.normed(depth, out_BTH)
        yield normed_BTH
        before_BTH = head.own(out_BTH, normed_BTH)


class _Keys:
    """The `past_key_values` of the passes: a layer sees the keys and values of all passes so far.

    In the first pass they are tensors, as for any attention function; from then on lists of them,
    for `_chain_attention`.
    """

    def __init__(self) -> None:
        self._layers: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def update(
        self, keys_BATE: torch.Tensor, values_BATE: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Any, Any]:
        keys, values = self._layers.setdefault(layer_idx, ([], []))
        keys.append(keys_BATE)
        values.append(values_BATE)
        return (keys_BATE, values_BATE) if len(keys) == 1 else (keys, values)


def _chain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: Sequence[torch.Tensor],
    value: Sequence[torch.Tensor],
    attention_mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention [B, T, A, E] to keys of the first pass and to one key of each later pass.

    Args:
        query: [B, A, T, E].
        key, value: of each pass, [B, KV heads, T, E].
        attention_mask: [B or 1, 1, T, T + later passes], see `_inputs`.
    """
    B, A, T, E = query.shape
    heads, later = key[0].shape[1], len(key) - 1
    query_BGRTE = (query * scaling).view(B, heads, A // heads, T, E)
    room = (0, 0, 0, later)  # one column more for each later pass, filled below
    scores = query_BGRTE.flatten(2, 3) @ F.pad(key[0], room).transpose(-1, -2)
    scores_BGRTS = scores.view(B, heads, A // heads, T, T + later)
    scores_BGRTS += attention_mask[:, :, None]
    for path in range(later):
        moved_BG1TE = _moved(key[path + 1], later - 1 - path)[:, :, None]
        scores_BGRTS[..., T + path] += (query_BGRTE * moved_BG1TE.float()).sum(-1)
    weights_BGRTS = scores_BGRTS.softmax(-1)
    out = (weights_BGRTS.flatten(2, 3) @ F.pad(value[0], room)).view(query_BGRTE.shape)
    for path in range(later):
        moved_BG1TE = _moved(value[path + 1], later - 1 - path)[:, :, None]
        out = out + weights_BGRTS[..., T + path, None] * moved_BG1TE
    return out.view(B, A, T, E).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _chain_attention)


def _moved(tensor_BGTE: torch.Tensor, tokens: int) -> torch.Tensor:
    """What belongs to a token goes to the one that lies so many further on; 0 for the first."""
    if not tokens:
        return tensor_BGTE
    return F.pad(tensor_BGTE[:, :, :-tokens], (0, 0, tokens, 0))


def _inputs(
    model: ExitModel,
    kind: str,
    hidden_BTH: torch.Tensor,
    positions_BT: torch.Tensor | None,
    number: int,
) -> LayerInputs:
    """Mask [B or 1, 1, T, T + number] over the keys of the first pass and one of each later pass,
    and rotary embeddings."""
    length, device = hidden_BTH.shape[1], hidden_BTH.device
    places_T = torch.arange(length, device=device)
    back_P = torch.arange(number - 1, -1, -1, device=device)  # to the key of each later pass
    seen = (places_T[:, None] - places_T >= number)[None]
    if positions_BT is None:
        positions_BT = all_positions(hidden_BTH)
    else:
        document_BT = documents(positions_BT)
        seen = seen & (document_BT[:, :, None] == document_BT[:, None, :])
    # Positions count from the beginning of a document: one below 0 lies in another.
    chain_BTP = positions_BT[..., None] - back_P
    in_chain = (chain_BTP >= 0) & (places_T[:, None] >= back_P)
    seen = torch.cat([seen.expand(len(positions_BT), -1, -1), in_chain], -1)
    keys_BTS = torch.cat([positions_BT[:, None].expand(-1, length, -1), chain_BTP], -1)
    seen = model.reach(kind).limit(seen, positions_BT, keys_BTS)
    return LayerInputs(
        additive_mask(seen, hidden_BTH.dtype), model.rope(kind, hidden_BTH, positions_BT)
    )
