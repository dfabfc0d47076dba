"""Layers as functions of tensors alone, for compilers to trace.

The layers are transformers' own. Only what reaches outside is replaced: the KV cache by tensors
that go in and come out, and attention by one call over them with an explicit mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

NAME = "hispec_graph"
"""The name of `graph_attention` in a model's config."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that its graphs need."""

    hidden: int
    heads_per_kv: int
    kv_width: int
    """Key-value heads times their size: the width of a key of all heads."""
    head_size: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The sizes in a transformers config."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.hidden_size, heads // kv_heads, kv_heads * size, size)


class TracedCache:
    """The `past_key_values` of a traced pass: keys and values of each layer come as tensors.

    Args:
        buffers: keys and values [B * S, kv heads * head size] by layer index.
        index_N: the slots [B * T] that the tokens of the pass are written to, over all rows.
    """

    def __init__(
        self, buffers: dict[int, tuple[torch.Tensor, torch.Tensor]], index_N: torch.Tensor
    ) -> None:
        self.buffers = buffers
        self.index_N = index_N
        self.new: dict[int, list[torch.Tensor]] = {}

    def update(
        self, keys_BATE: torch.Tensor, values_BATE: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values into their slots; returns those of all slots."""
        self.new[layer_idx] = []
        found = [
            self._write(buffer, new, layer_idx)
            for buffer, new in zip(self.buffers[layer_idx], (keys_BATE, values_BATE), strict=True)
        ]
        return found[0], found[1]

    def _write(self, buffer: torch.Tensor, new_BATE: torch.Tensor, layer: int) -> torch.Tensor:
        rows, heads, _, size = new_BATE.shape
        flat = new_BATE.transpose(1, 2).reshape(-1, heads * size)
        self.new[layer].append(flat)
        written = buffer.index_copy(0, self.index_N, flat)
        return written.view(rows, -1, heads, size).transpose(1, 2)


def graph_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with a mask [B, 1, heads per KV head * T, S]: as `masked_attention`, in one call.

    The query heads that share a KV head are rows of one problem, so keys are not copied per head.
    """
    rows, heads, tokens, size = query.shape
    kv_heads = key.shape[1]
    packed = query.reshape(rows, kv_heads, heads // kv_heads * tokens, size)
    out = F.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, scale=scaling
    )
    return out.reshape(rows, heads, tokens, size).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, graph_attention)


class LayerGraph(nn.Module):
    """A run of layers as a function of tensors alone.

    Inputs: hidden states [B, T, H]; slots [B * T] to write to; for every attention type among the
    layers cos and sin [B, T, head size] and the additive mask [B, 1, heads per KV head * T, S];
    for every layer its keys and values [B * S, kv heads * head size]. Outputs: hidden states
    [B, T, H]; for every layer the new keys and values [B * T, kv heads * head size].
    """

    def __init__(self, layers: Sequence[tuple[nn.Module, str]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer for layer, _ in layers)
        self.kinds = [kind for _, kind in layers]
        self.indices = [layer_index(layer) for layer, _ in layers]

    @property
    def used_kinds(self) -> list[str]:
        """Attention types among the layers, each once."""
        return list(dict.fromkeys(self.kinds))

    def forward(
        self, hidden_BTH: torch.Tensor, index_N: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        kinds = self.used_kinds
        per_kind = {kind: rest[3 * i : 3 * i + 3] for i, kind in enumerate(kinds)}
        buffers = rest[3 * len(kinds) :]
        cache = TracedCache(
            {index: (buffers[2 * i], buffers[2 * i + 1]) for i, index in enumerate(self.indices)},
            index_N,
        )
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            cos, sin, mask = per_kind[kind]
            hidden_BTH = layer(
                hidden_BTH,
                attention_mask=mask,
                position_embeddings=(cos, sin),
                past_key_values=cache,
                use_cache=True,
            )
        return (hidden_BTH, *(new for index in self.indices for new in cache.new[index]))

    def example(self, shape: Shape, dtype: torch.dtype, rows: int = 2) -> list[torch.Tensor]:
        """Inputs to trace with."""
        tokens, slots = 3, 32
        inputs = [
            torch.randn(rows, tokens, shape.hidden).to(dtype),
            (torch.arange(rows)[:, None] * slots + torch.arange(tokens)).flatten(),
        ]
        for _ in self.used_kinds:
            inputs += [torch.randn(rows, tokens, shape.head_size).to(dtype) for _ in range(2)]
            inputs += [torch.zeros(rows, 1, shape.heads_per_kv * tokens, slots, dtype=dtype)]
        width = rows * slots, shape.kv_width
        return inputs + [torch.randn(width).to(dtype) for _ in range(2 * len(self.indices))]


def layer_index(layer: nn.Module) -> int:
    """The index under which a decoder layer calls the cache."""
    attention: Any = layer.self_attn
    return int(attention.layer_idx)


@contextmanager
def traced_attention(config: Any) -> Iterator[None]:
    """Switch a model's layers to `graph_attention`, and back again."""
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
