"""The published EAGLE-3 head (2503.01840), as an exit at depth 0.

It reads the embedding of a token and the full model's states of the token before at three depths,
and has one decoder layer and an LM head of its own. What vLLM, SGLang and llama.cpp load is this
architecture; `hispec.export.eagle3` writes and reads their files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from hispec.config import Eagle3
from hispec.models.sharding import whole

KIND = "eagle3"
"""The attention type of its layer: all tokens before but the first, and its own rotary embedding
where it has one."""


def eagle3_config(base: Any, settings: Eagle3) -> LlamaConfig:
    """The config of the head's layer for a base model with the config `base`."""
    size = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    theta = {} if settings.rope_theta is None else {"rope_theta": settings.rope_theta}
    config = LlamaConfig(
        hidden_size=base.hidden_size,
        intermediate_size=settings.intermediate_size or base.intermediate_size,
        num_attention_heads=base.num_attention_heads,
        num_key_value_heads=base.num_key_value_heads,
        head_dim=size,
        rms_norm_eps=base.rms_norm_eps,
        num_hidden_layers=1,
        vocab_size=base.vocab_size,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, **theta},
    )
    config._attn_implementation = base._attn_implementation
    return config


class Eagle3Layer(nn.Module):
    """One decoder layer whose attention reads `[norm(embedding), norm(state)]`, [2 H] to [H].

    Args:
        base: config of the base model; its attention function is followed when it is switched.
        index: cache index of the layer.
    """

    input_parts = 2
    """States that it reads of a token, beside each other."""

    def __init__(self, base: Any, settings: Eagle3, index: int) -> None:
        super().__init__()
        config = eagle3_config(base, settings)
        width, eps = config.hidden_size, config.rms_norm_eps
        self._base = (base,)  # in a tuple: a config is no submodule, and is not copied
        self.norm_before_residual = settings.norm_before_residual
        self.self_attn = LlamaAttention(config, index)
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = getattr(self.self_attn, name).out_features
            setattr(self.self_attn, name, nn.Linear(2 * width, rows, bias=False))
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(width, eps)
        self.hidden_norm = LlamaRMSNorm(width, eps)
        self.post_attention_layernorm = LlamaRMSNorm(width, eps)

    def extra_repr(self) -> str:
        return f"norm_before_residual={self.norm_before_residual}"

    def forward(self, both_BTH: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Args: both_BTH: embedding and state, [B, T, 2 H]; inputs: those of a Llama layer."""
        self.self_attn.config._attn_implementation = self._base[0]._attn_implementation
        embedding_BTH, state_BTH = both_BTH.chunk(2, -1)
        residual_BTH = state_BTH
        state_BTH = self.hidden_norm(state_BTH)
        if self.norm_before_residual:
            residual_BTH = state_BTH
        both_BTH = torch.cat([self.input_layernorm(embedding_BTH), state_BTH], -1)
        hidden_BTH = residual_BTH + self.self_attn(hidden_states=both_BTH, **inputs)[0]
        normed_BTH = self.post_attention_layernorm(hidden_BTH)
        out_BTH: torch.Tensor = hidden_BTH + self.mlp(normed_BTH)
        return out_BTH


def own_rotary(base: Any, settings: Eagle3) -> LlamaRotaryEmbedding | None:
    """The rotary embedding of a head that does not use the base model's."""
    if settings.rope_theta is None:
        return None
    return LlamaRotaryEmbedding(eagle3_config(base, settings))


def start(layer: Eagle3Layer, fc: nn.Linear, source: nn.Module, std: float) -> None:
    """Weights of a fresh head: those of a decoder layer of the base where shapes allow it.

    The state goes where that layer has its input, and the embedding adds nothing at first. `fc`
    passes the deepest of the three states on.
    """
    width = fc.out_features
    with torch.no_grad():
        nn.init.zeros_(fc.weight)
        fc.weight[:, -width:] = torch.eye(width).to(fc.weight)
        given = {name: whole(weight) for name, weight in source.named_parameters()}
        for name, weight in layer.named_parameters():
            like = given.get(name)
            if like is not None and like.shape == weight.shape:
                weight.copy_(like)
            elif like is not None and weight.dim() == 2 and 2 * like.shape[1] == weight.shape[1]:
                weight.zero_()
                weight[:, width:] = like
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=std)
        if (like := given.get("input_layernorm.weight")) is not None:
            layer.hidden_norm.weight.copy_(like)


def fuse(states: Sequence[torch.Tensor], fc: nn.Linear, norms: nn.ModuleList) -> torch.Tensor:
    """What the head reads of the token before, [..., H], from its states at three depths."""
    if len(norms):
        states = [norm(state) for norm, state in zip(norms, states, strict=True)]
    both = torch.cat(list(states), -1)
    out: torch.Tensor = fc(both.to(fc.weight.dtype)).to(both.dtype)
    return out
