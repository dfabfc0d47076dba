"""Exit heads: they turn the hidden state of an exit into one that the shared LM head reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hispec.config import ExitConfig


class LowRank(nn.Module):
    """`h + up(silu(down(h)))`; a fresh one is the identity."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = hidden + self.up(F.silu(self.down(hidden)))
        return out


class ExitHead(nn.Module):
    """Transformer blocks, a norm and an adapter; which of them it has depends on the kind of head.

    The blocks attend over the states of their own exit, so they have KV and a length of their own:
    a side segment of the ladder.

    Args:
        blocks: decoder layers of the base model's own class.
        norm: the exit's own norm, or None where the final norm of the base model is used.
        layer_types: for each block, the attention type of the layer it was copied from.
        adapter: comes after the norm, or None.
        mix: adds the state of the token before to the input of the blocks, [2 H] -> [H], or None.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        norm: nn.Module | None,
        layer_types: Sequence[str],
        adapter: LowRank | None = None,
        mix: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.mix = mix
        self.adapter = adapter
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.layer_types = list(layer_types)


Gather = Callable[[nn.Module], AbstractContextManager[Any]]
"""Gathers the parameters of a module that are partitioned over processes, for a `with` block."""


def build_head(
    hf: PreTrainedModel,
    config: ExitConfig,
    layer_types: Sequence[str],
    first_index: int,
    gather: Gather = nullcontext,
) -> ExitHead:
    """A fresh head for a base model `hf`.

    `block` heads start as copies of the last layers and of the final norm, which in the base model
    turn hidden states into input of the LM head. An `adapter` head
    starts as a copy of the final norm.

    Args:
        layer_types: attention type of every layer of the base model.
        first_index: cache index of the first block; no other layer may have it.
        gather: entered around every copy.
    """
    if config.head == "shared":
        return ExitHead([], None, [])
    trunk = hf.model
    norm = type(trunk.norm)(hf.config.hidden_size, eps=hf.config.rms_norm_eps)
    norm.to(_place(trunk.norm))
    with gather(trunk.norm):
        norm.load_state_dict(trunk.norm.state_dict())
    if config.head == "adapter":
        adapter = LowRank(hf.config.hidden_size, config.rank).to(_place(trunk.norm))
        return ExitHead([], norm, [], adapter)
    blocks = []
    for offset, layer in enumerate(trunk.layers[-config.blocks :]):
        source = layer.self_attn.layer_idx
        # Built, not deep-copied: a deep copy would carry a copy of the config with it.
        block = type(layer)(hf.config, source).to(_place(layer))
        with gather(layer):
            block.load_state_dict(layer.state_dict())
        block.self_attn.layer_idx = first_index + offset
        blocks.append(block)
    mix = None
    if config.previous:  # fresh, it adds nothing
        mix = nn.Linear(2 * hf.config.hidden_size, hf.config.hidden_size, bias=False)
        nn.init.zeros_(mix.to(_place(trunk.norm)).weight)
    return ExitHead(blocks, norm, layer_types[-config.blocks :], mix=mix)


def _place(module: nn.Module) -> torch.Tensor:
    """A tensor with the module's dtype and device, as `Module.to` takes one."""
    return next(module.parameters())
