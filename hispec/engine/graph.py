"""Layers as functions of tensors alone, for compilers to trace.

The layers are transformers' own. Only what reaches outside is replaced: the KV cache by tensors
that go in and come out, and attention by one call over them with an explicit mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

NAME, PROMPTS = "hispec_graph", "hispec_prompts"
"""The names of `graph_attention` and `prompt_attention` in a model's config."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that its graphs need."""

    hidden: int
    heads_per_kv: int
    kv_heads: int
    head_size: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The sizes in a transformers config."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.hidden_size, heads // kv_heads, kv_heads, size)


class TracedCache:
    """The `past_key_values` of a traced pass: keys and values of each layer come as tensors.

    Args:
        buffers: keys and values [B, kv heads, S, head size] by layer index.
    """

    def __init__(self, buffers: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.buffers = buffers
        self.new: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, keys_BATE: torch.Tensor, values_BATE: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Returns (keys of the slots, keys of the pass), and the values likewise."""
        self.new[layer_idx] = keys_BATE, values_BATE
        keys, values = self.buffers[layer_idx]
        return (keys, keys_BATE), (values, values_BATE)


def graph_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: tuple[torch.Tensor, torch.Tensor],
    value: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over the slots and, apart from them, over the pass itself.

    So the keys of a long text are read where they lie, and not copied to make room for a few new
    ones: at 4,096 tokens that takes 59 ms for all layers of SmolLM2-135M, a copy 149 ms. The query
    heads that share a KV head are rows of one problem.

    Args:
        key: (those of the slots [B, kv heads, S, size], those of the pass [B, kv heads, T, size]).
        attention_mask: [B, 1, heads per KV head * T, T + S], added to the scores: the pass itself
            comes first. Its length is fixed in a graph for few tokens, so probabilities are cut at
            a fixed place.
    """
    rows, heads, tokens, size = query.shape
    (keys, new_keys), (values, new_values) = key, value
    kv_heads = keys.shape[1]
    query = query * (size**-0.5 if scaling is None else scaling)
    packed = query.reshape(rows, kv_heads, heads // kv_heads * tokens, size)
    scores = torch.cat([packed @ new_keys.transpose(2, 3), packed @ keys.transpose(2, 3)], dim=-1)
    probs = F.softmax(scores + attention_mask, dim=-1)
    out = probs[..., :tokens] @ new_values + probs[..., tokens:] @ values
    return out.reshape(rows, heads, tokens, size).transpose(1, 2).contiguous(), None


def prompt_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: tuple[torch.Tensor, torch.Tensor],
    value: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As `graph_attention`, by one operator, which OpenVINO runs without storing scores.

    It needs the keys in one tensor. For passes of many tokens the copy is little, for passes of a
    few over a long text it takes longer than the attention.
    """
    rows, heads, tokens, size = query.shape
    kv_heads = key[0].shape[1]
    packed = query.reshape(rows, kv_heads, heads // kv_heads * tokens, size)
    out = F.scaled_dot_product_attention(
        packed,
        torch.cat(key[::-1], dim=2),
        torch.cat(value[::-1], dim=2),
        attn_mask=attention_mask,
        scale=scaling,
    )
    return out.reshape(rows, heads, tokens, size).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, graph_attention)
AttentionInterface.register(PROMPTS, prompt_attention)


class LayerGraph(nn.Module):
    """A run of layers as a function of tensors alone.

    Inputs: hidden states [B, T, H], `parts` times as wide; for every attention type among the
    layers cos and sin [B, T, head size] and the mask [B, 1, heads per KV head * T, T + S]; for
    every layer its keys and values [B, kv heads, S, head size]. Outputs: hidden states [B, T, H],
    those before each of `reads` [B, T, H]; for every layer the new keys and values [B, kv heads, T,
    head size].

    Args:
        layers: each with its attention type.
        reads: numbers of layers whose input is an output too.
        attention: the name of the function to trace it with.
    """

    def __init__(
        self,
        layers: Sequence[tuple[nn.Module, str]],
        reads: Sequence[int] = (),
        attention: str = NAME,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.reads = list(reads)
        self.layers = nn.ModuleList(layer for layer, _ in layers)
        self.kinds = [kind for _, kind in layers]
        self.indices = [layer_index(layer) for layer, _ in layers]
        self.parts = int(getattr(layers[0][0], "input_parts", 1))
        """States that the first layer reads of a token, beside each other."""

    @property
    def used_kinds(self) -> list[str]:
        """Attention types among the layers, each once."""
        return list(dict.fromkeys(self.kinds))

    def extra_repr(self) -> str:
        """What the weights do not tell: where the layers lie, and their attention."""
        return f"{self.indices} {self.kinds} {self.reads} {self.attention}"

    def forward(self, hidden_BTH: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kinds = self.used_kinds
        per_kind = {kind: rest[3 * i : 3 * i + 3] for i, kind in enumerate(kinds)}
        buffers = rest[3 * len(kinds) :]
        cache = TracedCache(
            {index: (buffers[2 * i], buffers[2 * i + 1]) for i, index in enumerate(self.indices)}
        )
        read = []
        for number, (layer, kind) in enumerate(zip(self.layers, self.kinds, strict=True)):
            if number in self.reads:
                read.append(hidden_BTH + 0.0)  # an output of its own
            cos, sin, mask = per_kind[kind]
            hidden_BTH = layer(
                hidden_BTH,
                attention_mask=mask,
                position_embeddings=(cos, sin),
                past_key_values=cache,
                use_cache=True,
            )
        new = [tensor for index in self.indices for tensor in cache.new[index]]
        return (hidden_BTH, *read, *new)

    def example(self, shape: Shape, rows: int = 2) -> list[torch.Tensor]:
        """Inputs to trace with."""
        tokens, slots = 3, 32
        inputs = [torch.randn(rows, tokens, self.parts * shape.hidden)]
        for _ in self.used_kinds:
            inputs += [torch.randn(rows, tokens, shape.head_size) for _ in range(2)]
            inputs += [torch.zeros(rows, 1, shape.heads_per_kv * tokens, tokens + slots)]
        size = rows, shape.kv_heads, slots, shape.head_size
        return inputs + [torch.randn(size) for _ in range(2 * len(self.indices))]

    def sizes(self, shape: Shape, rows: int, tokens: int) -> list[list[int]]:
        """Sizes of the inputs for so many rows and tokens, -1 where they vary, as slots do."""
        queries = tokens if tokens < 0 else shape.heads_per_kv * tokens
        rope, mask = [rows, tokens, shape.head_size], [rows, 1, queries, -1]
        buffer = [rows, shape.kv_heads, -1, shape.head_size]
        return [
            [rows, tokens, self.parts * shape.hidden],
            *([rope, rope, mask] * len(self.used_kinds)),
            *([buffer] * (2 * len(self.indices))),
        ]


def layer_index(layer: nn.Module) -> int:
    """The index under which a decoder layer calls the cache."""
    attention: Any = layer.self_attn
    return int(attention.layer_idx)
