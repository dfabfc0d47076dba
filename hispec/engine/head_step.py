"""A step of a chain of drafts as one graph: everything that a head at depth 0 computes for a token.

Between two steps of a chain, the modules and the engine's other graphs need a hundred small
operators: masks, rotary embeddings, states kept and read again, logits of the whole vocabulary.
That takes longer than the step (docs/benchmarks.md). Here all of a step is in the graph, its inputs
stay where they are, and what changes from step to step is written into them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hispec.engine.graph import NAME, LayerGraph
from hispec.engine.lm_head import LMHead
from hispec.engine.openvino_graph import Graph
from hispec.models.attention import PassCache, attention_by


class HeadGraph(nn.Module):
    """An exit head that reads the token before, as a function of tensors alone.

    Inputs: embeddings and states of the tokens before, [1, T, H] each; then those of `LayerGraph`
    behind its first. Outputs: what the head reads of these tokens in the next step [1, T, H]; its
    states [1, T, H]; the probabilities [1, T] of the most probable tokens; logits [1, T, W] of the
    draft vocabulary, whose argmax OpenVINO takes 0.4 ms for and numpy 0.01; new keys and values as
    of `LayerGraph`.
    """

    def __init__(self, model: Any, depth: int, lm_head: nn.Module) -> None:
        super().__init__()
        self.head = head = model.head(depth)
        self.layers = LayerGraph(list(zip(head.blocks, head.layer_types, strict=True)))
        self.lm_head = lm_head

    def extra_repr(self) -> str:
        """What the weights do not tell."""
        return self.layers.extra_repr()

    def forward(
        self, embedding_1TH: torch.Tensor, before_1TH: torch.Tensor, *rest: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        entered = self.head.enter(embedding_1TH, before_1TH)
        hidden_1TH, *new = self.layers(entered, *rest)
        normed_1TH = self.head.norm(hidden_1TH)
        logits_1TW = self.lm_head(normed_1TH)
        others_1TW = logits_1TW - logits_1TW.amax(-1, keepdim=True)
        return (
            self.head.own(hidden_1TH, normed_1TH) + 0.0,  # an output of its own
            hidden_1TH,
            1 / others_1TW.exp().sum(-1),
            logits_1TW,
            *new,
        )


class Before(nn.Module):
    """What a head reads of tokens that the full model has run on [1, T, H], from their states
    [1, T, H] at the depths of `ExitHead.reads`."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, *states: torch.Tensor) -> torch.Tensor:
        before: torch.Tensor = self.head.before(
            None, dict(zip(self.head.reads, states, strict=True))
        )
        return before


class HeadStep:
    """A compiled `HeadGraph` for up to `tokens` tokens, with the tensors that it reads and writes.

    Where the head reads states at several depths, `Before` is compiled beside it.

    Args:
        engine: compiles it.
        depth: of the head.
        lm_head: from normed states to logits of the draft vocabulary.
        tokens: T.
    """

    def __init__(self, engine: Any, depth: int, lm_head: LMHead, tokens: int) -> None:
        self.tokens = tokens
        self._shape = shape = engine.shape
        module = HeadGraph(engine.model, depth, lm_head).eval()
        self._layers = layers = module.layers
        state = [1, tokens, shape.hidden]
        rest = layers.sizes(shape, 1, tokens)[1:]
        example = layers.example(shape, 1)[1:]
        given = [torch.randn(1, 3, shape.hidden) for _ in range(2)]
        with attention_by(engine.model.hf.config, NAME):
            traced = engine.traced(module, [*given, *example])
        self._paths = [traced.path]
        self.graph = traced.graph([state, state, *rest])
        self.kinds = layers.used_kinds
        self.embedding_1TH, self.before_1TH = torch.zeros(state), torch.zeros(state)
        size = 1, tokens, shape.head_size
        self.rope = {kind: (torch.zeros(size), torch.zeros(size)) for kind in self.kinds}
        self.mask: dict[str, torch.Tensor] = {}
        """Additive masks [heads per KV head, T, T + slots] by attention type; see `bind`."""
        self.own_1TH, self.hidden_1TH = torch.zeros(state), torch.zeros(state)
        self.sure_1T = torch.zeros(1, tokens)
        self.logits_1TW = torch.zeros(1, tokens, lm_head.words)
        indices = layers.indices
        new_size = 2 * len(indices), 1, shape.kv_heads, tokens, shape.head_size
        self.new_NBATE = torch.zeros(new_size)
        for i, tensor in enumerate((self.embedding_1TH, self.before_1TH)):
            self.graph.set_input(i, tensor)
        for i, kind in enumerate(self.kinds):
            for j, tensor in enumerate(self.rope[kind]):
                self.graph.set_input(2 + 3 * i + j, tensor)
        outputs = self.own_1TH, self.hidden_1TH, self.sure_1T, self.logits_1TW
        for i, tensor in enumerate((*outputs, *self.new_NBATE)):
            self.graph.set_output(i, tensor)
        self._bound: tuple[int, int] | None = None
        self.reads = list(module.head.reads)
        self.states = [torch.zeros(state) for _ in self.reads]
        self._before: Graph | None = None
        if self.reads:
            known = [torch.randn(1, 3, shape.hidden) for _ in self.reads]
            before = engine.traced(Before(module.head).eval(), known)
            self._paths.append(before.path)
            self._before = before.graph([state] * len(self.reads))
            for i, tensor in enumerate(self.states):
                self._before.set_input(i, tensor)
            self._before.set_output(0, self.before_1TH)

    def bind(self, cache: PassCache) -> None:
        """Read the keys and values of this cache, and make room for masks over its slots."""
        shape, indices = self._shape, self._layers.indices
        stack = cache.buffers(indices, shape.kv_heads, shape.head_size)
        bound = stack.data_ptr(), stack.shape[3]
        if bound == self._bound:
            return
        self._bound, first = bound, 2 + 3 * len(self.kinds)
        for i, buffer in enumerate(stack, first):
            self.graph.set_input(i, buffer)
        for i, kind in enumerate(self.kinds):
            size = shape.heads_per_kv, self.tokens, self.tokens + stack.shape[3]
            self.mask[kind] = torch.full(size, -torch.inf)
            self.graph.set_input(4 + 3 * i, self.mask[kind].view(1, 1, -1, size[2]))

    def load(self) -> list[Path]:
        """The files that keep it; it is compiled already."""
        return self._paths

    def run(self) -> None:
        """Compute the outputs from the inputs."""
        self.graph.infer()

    def fuse(self) -> None:
        """Compute `before_1TH` from `states`."""
        assert self._before is not None, "a head that reads states at several depths"
        self._before.infer()

    def keep(self, cache: PassCache, first: int, count: int) -> None:
        """Put the keys and values of the first `count` tokens into the slots from `first` on."""
        cache.put(self._layers.indices, first, self.new_NBATE[..., :count, :])
