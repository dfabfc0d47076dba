"""Attention over the cache, so that a token's bits do not depend on the pass it is part of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "hispec"
"""The name of this attention function in a model's config."""

# On a CPU in bf16, from one more on: `F.linear` and attention round a row otherwise (decisions.md).
_ALIKE_TOKENS = 27
_ALIKE_ROWS = 32
# Without AMX, attention rounds the last rows of a pass differently unless rows come in fours.
_ROWS_AT_ONCE = 4
# With AVX-512 but no AMX, `F.linear` of more than 1,024 inputs rounds a single row differently.
FEWEST_TOKENS = 2


def rounds_alike(tokens: int, like: torch.Tensor) -> bool:
    """Whether the tokens of a pass of that size get the same bits as in any other small pass."""
    return tokens <= _ALIKE_TOKENS and like.dtype == torch.bfloat16 and like.device.type == "cpu"


def needs_company(states: torch.Tensor) -> bool:
    """Whether states [..., H] are those of one token, which gets the bits that it has in any small
    pass only beside another row: see `FEWEST_TOKENS`."""
    return states.numel() == states.shape[-1] and rounds_alike(1, states)


@dataclass(frozen=True)
class Reach:
    """Which of the tokens before it a token attends to."""

    window: int | None = None
    """With sliding attention, how many of the last positions, its own included."""
    first: int = 0
    """Tokens at the beginning of a text that no other token attends to."""

    def limit(
        self, seen: torch.Tensor, positions: torch.Tensor, keys_S: torch.Tensor
    ) -> torch.Tensor:
        """`seen` [..., T, S] without what lies out of reach of the tokens at `positions` [..., T].

        Args:
            keys_S: positions [..., S] of the keys.
        """
        if self.window is not None:
            seen = seen & (keys_S > positions[..., None] - self.window)
        if self.first:
            seen = seen & ((keys_S >= self.first) | (keys_S == positions[..., None]))
        return seen


def causal(positions: torch.Tensor, slots_S: torch.Tensor, reach: Reach) -> torch.Tensor:
    """Which slots the tokens at `positions` [..., T] attend to, bool [..., T, S]."""
    return reach.limit(slots_S <= positions[..., None], positions, slots_S)


@dataclass
class Branch:
    """Tokens of a tree that follow each other, computed as if they and their ancestors were alone.

    Kernels add up the keys in lanes and tiles. A token gets the bits of plain decoding only if its
    ancestors lie in the slots that they would have in plain decoding.
    """

    row: int
    tokens: slice
    """Which tokens of the pass."""
    slots: slice
    """Where their KV was written."""
    places: slice
    """Where it belongs in plain decoding: the slots of their positions."""
    drafts: slice
    """Slots of all draft tokens of the row."""
    mask: torch.Tensor
    """[1, 1, query heads per KV head * tokens, slots]."""


@dataclass(frozen=True)
class RowTree:
    """A draft tree among the tokens of a pass of one row, or all of them."""

    depth_T: np.ndarray
    """Tokens between the first one of the pass and each."""
    sees_TT: np.ndarray
    """Which of the tokens each one attends to: itself and those that lead to it."""


class PassCache(Protocol):
    """What a cached pass asks of the cache, besides the `update` that transformers' layers call."""

    visible: int
    """Slots of a row that the announced pass may see."""
    of_prompts: bool
    """Whether passes read prompts: an engine may compute them in the dtype of the weights."""
    counts: list[int]
    """Tokens of each row in the announced pass; what follows them is padding."""
    first: int | None
    """Slot of the first token, if the announced pass is of one row and sees all tokens before; the
    others lie in the slots behind it."""
    row_tree: RowTree | None
    """The draft tree of such a pass; None if its tokens follow each other."""

    def buffers(self, layers: Sequence[int], heads: int, size: int) -> torch.Tensor:
        """Keys and values of some layers in turn, [2 * layers, B, heads, S, size], for an engine:
        the cache's own memory."""

    def write(self, layers: Sequence[int], new_NBATE: torch.Tensor) -> None:
        """Store the KV of the announced tokens, in the order of `buffers`."""

    def put(self, layers: Sequence[int], first: int, new_N1ATE: torch.Tensor, row: int = 0) -> None:
        """Store the KV of a row's tokens in the slots from `first` on."""

    def seen_apart(self, reach: Reach) -> tuple[torch.Tensor, torch.Tensor]:
        """Which slots the tokens attend to besides those of the pass, bool [B, T, S], and which
        tokens of the pass, bool [B, T, T]."""

    def whole_texts(self, reach: Reach) -> list[int] | None:
        """Lengths of the texts that the announced pass reads from their first tokens on, where
        plain causal attention over each is enough; None for any other pass."""

    def seen(self, reach: Reach) -> torch.Tensor:
        """Which slots the tokens of the announced pass attend to, bool [B, T, S]."""

    def branches(self, reach: Reach, mask: Callable[[torch.Tensor], torch.Tensor]) -> list[Branch]:
        """The announced tree branch by branch; nothing if none was announced."""


def masked_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    branches: Sequence[Branch] = (),
    lengths: Sequence[int] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over the cache, with an explicit mask [B, 1, heads per KV head * T, S].

    With `branches` they are computed one by one, with the masks that they bring. With `lengths` the
    rows are whole texts, which get transformers' own causal attention: it skips the keys ahead.
    Each text is computed alone, so its bits do not depend on the length of the others.
    """
    if lengths is not None:
        return _whole_texts(module, query, key, value, scaling, lengths), None
    if branches:
        out = _branch_by_branch(query, key, value, scaling, branches)
    else:
        out = _grouped(query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, masked_attention)


@contextmanager
def attention_by(config: Any, name: str) -> Iterator[None]:
    """Switch a model's layers to the attention function of that name, and back again.

    `hf.generate` after the block finds the model as it was loaded.
    """
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _whole_texts(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    lengths: Sequence[int],
) -> torch.Tensor:
    """Causal attention [B, T, A, E] of rows that are whole texts; 0 for their padding."""
    B, A, T, E = query.shape
    if min(lengths) == T:
        out, _ = sdpa_attention_forward(
            module, query, key[:, :, :T], value[:, :, :T], None, scaling=scaling
        )
        return out
    out = query.new_zeros(B, T, A, E)
    for row, length in enumerate(lengths):
        part = slice(row, row + 1), slice(None), slice(0, length)
        out[row : row + 1, :length], _ = sdpa_attention_forward(
            module, query[part], key[part], value[part], None, scaling=scaling
        )
    return out


def _grouped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """Attention [B, A, T, E] with the query heads that share a KV head as rows of one problem.

    So the keys are not copied per head. A query that has fewer rows than its mask is padded, see
    `padded_rows`.
    """
    B, A, T, E = query.shape
    kv_heads = key.shape[1]
    most = max(1, _ALIKE_ROWS // (A // kv_heads))
    if most < T and rounds_alike(B * T, query):
        assert mask is not None
        mask_BGTS = mask[:, :, : A // kv_heads * T].view(B, A // kv_heads, T, -1)
        parts = [
            _grouped(
                query[:, :, start : start + most],
                key,
                value,
                padded_rows(mask_BGTS[:, :, start : start + most].flatten(1, 2)[:, None]),
                scaling,
            )
            for start in range(0, T, most)
        ]
        return torch.cat(parts, dim=2)
    rows = A // kv_heads * T
    packed = query.reshape(B, kv_heads, rows, E)
    if mask is not None and mask.shape[2] > rows:
        packed = F.pad(packed, (0, 0, 0, mask.shape[2] - rows))
    out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out[:, :, :rows].reshape(B, A, T, E)


def padded_rows(mask_B1RS: torch.Tensor) -> torch.Tensor:
    """A mask with rows for padding of the query, so that a token gets the same bits in any small
    pass. The rows added see every slot."""
    missing = -mask_B1RS.shape[2] % _ROWS_AT_ONCE
    return F.pad(mask_B1RS, (0, 0, 0, missing)) if missing else mask_B1RS


def _branch_by_branch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    branches: Sequence[Branch],
) -> torch.Tensor:
    """Attention [B, A, T, E]; each branch lies in its places while it is computed.

    Branches come depth first, so the ancestors of each are in place from those before it.
    """
    out = torch.zeros_like(query)
    written = {}
    for branch in branches:
        row = slice(branch.row, branch.row + 1)
        if branch.row not in written:
            all_of_it = row, slice(None), branch.drafts
            written[branch.row] = all_of_it, key[all_of_it].clone(), value[all_of_it].clone()
        if branch.slots != branch.places:
            _, keys, values = written[branch.row]
            first = branch.drafts.start
            source = slice(branch.slots.start - first, branch.slots.stop - first)
            key[row, :, branch.places] = keys[:, :, source]
            value[row, :, branch.places] = values[:, :, source]
        visible = branch.mask.shape[-1]
        out[row, :, branch.tokens] = _grouped(
            query[row, :, branch.tokens],
            key[row, :, :visible],
            value[row, :, :visible],
            branch.mask,
            scaling,
        )
    for all_of_it, keys, values in written.values():
        key[all_of_it], value[all_of_it] = keys, values
    return out
