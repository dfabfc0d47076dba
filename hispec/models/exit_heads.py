"""Exit heads: they turn the hidden state of an exit into one that the shared LM head reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hispec.config import Eagle3, Exit
from hispec.models import eagle3
from hispec.models.sharding import whole


class LowRank(nn.Module):
    """`h + up(silu(down(h)))`; a fresh one is the identity."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        low = F.silu(self.down(hidden.to(self.down.weight.dtype)))
        out: torch.Tensor = hidden + self.up(low).to(hidden.dtype)
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

    reads: Sequence[int] = ()
    """Depths whose states of the token before it reads besides the final one."""

    def __init__(
        self,
        blocks: Sequence[nn.Module] = (),
        norm: nn.Module | None = None,
        layer_types: Sequence[str] = (),
        adapter: LowRank | None = None,
        mix: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.lm_head: nn.Linear | None = None
        """An LM head of its own, over the draft vocabulary if there is one."""
        self.rotary: nn.Module | None = None
        """A rotary embedding of its own."""
        self.mix = mix
        self.adapter = adapter
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.layer_types = list(layer_types)

    @property
    def reads_before(self) -> bool:
        """Whether it reads states of the token before."""
        return self.mix is not None

    def before(
        self, final: torch.Tensor | None, states: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        """What the head reads of a token before that the full model has run on, [..., H].

        Args:
            final: the normed states [..., H] at full depth.
            states: [..., H] at the depths of `reads`, before any norm.
        """
        assert final is not None
        return final

    def own(self, hidden: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """What it reads of a token before that it alone has run on, [..., H].

        Args:
            hidden: its own states after the blocks.
            normed: the same after its norm.
        """
        return normed

    def enter(self, hidden_BTH: torch.Tensor, previous_BTH: torch.Tensor | None) -> torch.Tensor:
        """The input of the blocks.

        Args:
            hidden_BTH: the trunk's states at the exit.
            previous_BTH: what `before` or `own` gave of the token before; None is 0 everywhere.
        """
        if self.mix is None:
            return hidden_BTH
        if previous_BTH is None:
            previous_BTH = torch.zeros_like(hidden_BTH)
        both = torch.cat([hidden_BTH, previous_BTH], -1)
        mixed = self.mix(both.to(self.mix.weight.dtype))  # a cache may keep states in another one
        out: torch.Tensor = hidden_BTH + mixed.to(hidden_BTH.dtype)
        return out


class Eagle3Head(ExitHead):
    """The EAGLE-3 head, see `models.eagle3`.

    Args:
        hf: the base model.
        exit: its description.
        index: cache index of its layer.
        outputs: rows of its LM head.
    """

    def __init__(self, hf: PreTrainedModel, exit: Exit, index: int, outputs: int) -> None:
        base, settings = hf.config, exit.eagle3 or Eagle3()
        width, eps = base.hidden_size, base.rms_norm_eps
        layer = eagle3.Eagle3Layer(base, settings, index)
        super().__init__([layer], LlamaRMSNorm(width, eps), [eagle3.KIND])
        self.reads = tuple(exit.aux_depths)
        self.fc = nn.Linear(len(self.reads) * width, width, bias=False)
        norms = [LlamaRMSNorm(width, eps) for _ in self.reads] if settings.fc_norm else []
        self.aux_norms = nn.ModuleList(norms)
        self.lm_head = nn.Linear(width, outputs, bias=False)
        self.rotary = eagle3.own_rotary(base, settings)
        self._norm_output = settings.norm_output

    @property
    def reads_before(self) -> bool:
        return True

    def before(
        self, final: torch.Tensor | None, states: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        return eagle3.fuse([states[depth] for depth in self.reads], self.fc, self.aux_norms)

    def own(self, hidden: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        return normed if self._norm_output else hidden

    def enter(self, hidden_BTH: torch.Tensor, previous_BTH: torch.Tensor | None) -> torch.Tensor:
        if previous_BTH is None:
            previous_BTH = torch.zeros_like(hidden_BTH)
        return torch.cat([hidden_BTH, previous_BTH], -1)


Gather = Callable[[nn.Module], AbstractContextManager[Any]]
"""Gathers the parameters of a module that are partitioned over processes, for a `with` block."""


def build_head(
    hf: PreTrainedModel,
    exit: Exit,
    layer_types: Sequence[str],
    first_index: int,
    gather: Gather = nullcontext,
    draft_vocab: int = 0,
) -> ExitHead:
    """A fresh head for a base model `hf`.

    `block` heads start as copies of the last layers and of the final norm, which in the base model
    turn hidden states into input of the LM head. At depth 0 the last layers read the sum of the
    embedding and the state of the token before. An `adapter` head starts as a copy of the final
    norm.

    Args:
        layer_types: attention type of every layer of the base model.
        first_index: cache index of the first block; no other layer may have it.
        gather: entered around every copy.
        draft_vocab: tokens that the exits draft from, 0 for all.
    """
    if exit.head == "shared":
        return ExitHead()
    trunk = hf.model
    if exit.head == "eagle3":
        return _build_eagle3(hf, exit, first_index, gather, draft_vocab)
    norm = type(trunk.norm)(hf.config.hidden_size, eps=hf.config.rms_norm_eps)
    norm.to(_place(trunk.norm))
    with gather(trunk.norm):
        norm.load_state_dict(trunk.norm.state_dict())
    if exit.head == "adapter":
        adapter = LowRank(hf.config.hidden_size, exit.rank).to(_place(trunk.norm))
        return ExitHead([], norm, [], adapter)
    blocks = []
    for offset, layer in enumerate(trunk.layers[-exit.blocks :]):
        source = layer.self_attn.layer_idx
        # Built, not deep-copied: a deep copy would carry a copy of the config with it.
        block = type(layer)(hf.config, source).to(_place(layer))
        with gather(layer):
            block.load_state_dict({key: whole(part) for key, part in layer.state_dict().items()})
        block.self_attn.layer_idx = first_index + offset
        blocks.append(block)
    mix = None
    if exit.previous:
        mix = nn.Linear(2 * hf.config.hidden_size, hf.config.hidden_size, bias=False)
        nn.init.zeros_(mix.to(_place(trunk.norm)).weight)  # it adds nothing
        if exit.depth == 0:
            _read_previous(mix)
    return ExitHead(blocks, norm, layer_types[-exit.blocks :], mix=mix)


@torch.no_grad()
def _read_previous(mix: nn.Linear) -> None:
    """Let the input be the sum of embedding and state of the token before: `h + W [h, p] = h + p`.

    The state alone would be 0 for the first token of a text, where a norm's gradient has no bound.
    """
    width = mix.out_features
    mix.weight[:, width:] = torch.eye(width).to(mix.weight)


def _build_eagle3(
    hf: PreTrainedModel, exit: Exit, index: int, gather: Gather, draft_vocab: int
) -> Eagle3Head:
    """A fresh EAGLE-3 head; its LM head starts with rows of the base model's."""
    head = Eagle3Head(hf, exit, index, draft_vocab or hf.lm_head.out_features)
    head.to(_place(hf.model.norm))
    layer = head.blocks[0]
    assert isinstance(layer, eagle3.Eagle3Layer)
    source = hf.model.layers[-1]
    with gather(source):
        eagle3.start(layer, head.fc, source, hf.config.initializer_range)
    with torch.no_grad(), gather(hf.model.norm), gather(hf.lm_head):
        # families store the gain of a norm differently; ones show what it is
        ones = torch.ones(1, hf.config.hidden_size).to(_place(hf.model.norm))
        assert head.lm_head is not None
        assert head.norm is not None
        head.norm.load_state_dict({"weight": hf.model.norm(ones)[0]})
        head.lm_head.weight.copy_(whole(hf.lm_head.weight)[: head.lm_head.out_features])
    return head


def _place(module: nn.Module) -> torch.Tensor:
    """A tensor with the module's dtype and device, as `Module.to` takes one."""
    return next(module.parameters())
