"""What decoder layers get besides hidden states: positions, masks, rotary embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hispec.models.attention import Branch, PassCache, Reach, padded_rows, rounds_alike


@dataclass
class LayerInputs:
    """Inputs of the decoder layers of one attention type, besides the hidden states."""

    attention_mask: torch.Tensor | None
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    branches: list[Branch] = field(default_factory=list)
    """Of a tree whose branches are computed one by one, each with a mask of its own."""
    lengths: list[int] | None = None
    """Of whole texts, which get plain causal attention."""

    def of_cache(self) -> dict[str, Any]:
        """What `masked_attention` gets besides the arguments that all attention functions get."""
        return {"branches": self.branches, "lengths": self.lengths}

    def rows(self, rows_K: torch.Tensor) -> LayerInputs:
        """The inputs for some of the rows of the batch, without a cache."""

        def select(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if len(tensor) == 1 else tensor.index_select(0, rows_K)

        mask = self.attention_mask
        cos, sin = self.position_embeddings
        return LayerInputs(None if mask is None else select(mask), (select(cos), select(sin)))


def all_positions(hidden_BTH: torch.Tensor) -> torch.Tensor:
    """Positions [1, T] of whole sequences."""
    return torch.arange(hidden_BTH.shape[1], device=hidden_BTH.device)[None]


def documents(positions_BT: torch.Tensor) -> torch.Tensor:
    """The number of each token's document in its row, [B, T]."""
    return (positions_BT == 0).cumsum(1)


def of_token_before(
    normed_BTH: torch.Tensor, positions_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """The states [B, T, H] of whole sequences or packed documents, each moved to the next token;
    0 where a text begins."""
    moved_BTH = torch.zeros_like(normed_BTH)
    moved_BTH[:, 1:] = normed_BTH[:, :-1]
    return moved_BTH if positions_BT is None else moved_BTH * (positions_BT > 0)[..., None]


def text_mask(
    hidden_BTH: torch.Tensor,
    positions_BT: torch.Tensor,
    document_BT: torch.Tensor | None,
    reach: Reach,
) -> torch.Tensor | None:
    """The mask [B, 1, T, T] of whole sequences or packed documents; None where plain causal
    attention is enough.

    Args:
        document_BT: the number of each token's document in its row; None for whole sequences.
    """
    length = hidden_BTH.shape[1]
    near = reach.window is None or length <= reach.window
    if document_BT is None and near and not reach.first:
        return None
    places_T = torch.arange(length, device=hidden_BTH.device)
    seen = (places_T <= places_T[:, None])[None]
    seen = reach.limit(seen, positions_BT, positions_BT[:, None])
    if document_BT is not None:
        seen = seen & (document_BT[:, :, None] == document_BT[:, None, :])
    return additive_mask(seen, hidden_BTH.dtype)


def cached_inputs(
    hidden_BTH: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    cache: PassCache,
    reach: Reach,
    heads_per_kv: int,
) -> LayerInputs:
    """The inputs of a pass that was announced to the cache.

    Args:
        hidden_BTH: size and dtype matter; one announced token may stand twice, see
            `needs_company`.
    """
    if (lengths := cache.whole_texts(reach)) is not None:
        return LayerInputs(None, rope, lengths=lengths)

    def mask(seen_BTS: torch.Tensor) -> torch.Tensor:
        return padded_rows(additive_mask(seen_BTS, hidden_BTH.dtype, heads_per_kv))

    rows, tokens, _ = hidden_BTH.shape
    if rounds_alike(rows * tokens, hidden_BTH):
        branches = cache.branches(reach, mask)
        if branches:
            return LayerInputs(None, rope, branches)
    return LayerInputs(mask(cache.seen(reach).expand(-1, tokens, -1)), rope)


def additive_mask(seen_BTS: torch.Tensor, dtype: torch.dtype, repeats: int = 1) -> torch.Tensor:
    """The additive mask [B, 1, repeats * T, S] of which slots may be seen."""
    mask_BTS = torch.zeros(seen_BTS.shape, dtype=dtype, device=seen_BTS.device)
    mask_BTS.masked_fill_(~seen_BTS, float("-inf"))
    return mask_BTS.repeat(1, repeats, 1)[:, None]
