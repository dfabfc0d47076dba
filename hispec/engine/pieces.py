"""Pieces of a trunk as OpenVINO graphs, and what they are given from pass to pass."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hispec.engine.graph import NAME, PROMPTS, LayerGraph, layer_index
from hispec.engine.openvino_graph import AT_ONCE, Graph
from hispec.models.attention import PassCache, attention_by

Layers = Sequence[tuple[nn.Module, str]]
FEW, MORE, ANY, PROMPT = (1, AT_ONCE), (1, 2 * AT_ONCE), (-1, -1), (1, -1)
"""(rows, tokens) that a graph is compiled for."""


class Piece:
    """A run of layers, compiled for up to four and eight tokens of one row, for any number of rows
    and tokens, and for prompts.

    Args:
        engine: compiles it.
    """

    def __init__(self, layers: Layers, engine: Any) -> None:
        config = engine.model.hf.config
        self.shape = engine.shape
        first = layer_index(layers[0][0])
        reads = [depth - first for depth in engine.model.read_depths()]
        inside = [n for n in reads if 0 < n < len(layers)]
        self.layers = LayerGraph(layers, inside).eval()
        self.depths = [first + n for n in (len(layers), *self.layers.reads)]
        """Of its first outputs."""
        example = self.layers.example(self.shape)
        prompts = LayerGraph(layers, inside, PROMPTS).eval()
        with attention_by(config, NAME):
            few = engine.traced(self.layers, example)
        with attention_by(config, PROMPTS):
            many = engine.traced(prompts, example, join=False)
        self._traced = {FEW: few, MORE: few, ANY: few, PROMPT: many}
        self._dtypes = dict.fromkeys((FEW, MORE, ANY), engine.dtype)
        self._dtypes[PROMPT] = engine.prompt_dtype
        self._bound: dict[tuple[int, int], Bound] = {}

    def bound(self, size: tuple[int, int]) -> Bound:
        """The graph of a size, compiled when it is first asked for."""
        if size not in self._bound:
            sizes = self.layers.sizes(self.shape, *size)
            self._bound[size] = Bound(self._traced[size].graph(sizes, self._dtypes[size]))
        return self._bound[size]

    def load(self) -> list[Path]:
        """Compile it for passes of all kinds; returns the files that keep it."""
        for size in self._dtypes:
            self.bound(size)
        return [traced.path for traced in self._traced.values()]

    def run(
        self,
        hidden_BTH: torch.Tensor,
        inputs: Mapping[str, Sequence[torch.Tensor]],
        cache: PassCache,
        real: int,
    ) -> dict[int, torch.Tensor]:
        """Hidden states [B, T, H] by depth: those after the layers and those that are read on the
        way. The KV of the `real` first tokens goes to the cache."""
        size = hidden_BTH.shape[0], hidden_BTH.shape[1]
        bound = self.bound(size if size in (FEW, MORE) else ANY)
        first = self._give(bound.graph, hidden_BTH, inputs)
        if not bound.holds(cache):
            for i, buffer in enumerate(self._buffers(cache), first):
                bound.graph.set_input(i, buffer)
        states, new_NBATE = self._infer(bound, *size)
        cache.write(self.layers.indices, new_NBATE[..., :real, :])
        return states

    def read(
        self,
        hidden_1TH: torch.Tensor,
        inputs: Mapping[str, Sequence[torch.Tensor]],
        cache: PassCache,
        row: int,
        start: int,
        real: int,
    ) -> dict[int, torch.Tensor]:
        """As `run`, for tokens of one row's prompt from position `start` on, in the dtype for
        prompts."""
        bound = self.bound(PROMPT)
        first = self._give(bound.graph, hidden_1TH, inputs)
        past = self._buffers(cache)[:, row : row + 1, :, :start].contiguous()
        for i, buffer in enumerate(past, first):
            bound.graph.set_input(i, buffer)
        states, new_N1ATE = self._infer(bound, 1, hidden_1TH.shape[1])
        cache.put(self.layers.indices, start, new_N1ATE[..., :real, :], row)
        return states

    def _buffers(self, cache: PassCache) -> torch.Tensor:
        return cache.buffers(self.layers.indices, self.shape.kv_heads, self.shape.head_size)

    def _give(
        self,
        graph: Graph,
        hidden_BTH: torch.Tensor,
        inputs: Mapping[str, Sequence[torch.Tensor]],
    ) -> int:
        """Copy all inputs but keys and values; returns the number of the first of these."""
        given = [hidden_BTH, *(part for kind in self.layers.used_kinds for part in inputs[kind])]
        for i, tensor in enumerate(given):
            graph.copy_input(i, tensor)
        return len(given)

    def _infer(
        self, bound: Bound, rows: int, tokens: int
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """(hidden states [B, T, H] by depth, new keys and values)."""
        shape = self.shape
        states = {
            depth: bound.graph.output(i, rows, tokens, shape.hidden)
            for i, depth in enumerate(self.depths)
        }
        size = 2 * len(self.layers.indices), rows, shape.kv_heads, tokens, shape.head_size
        new_NBATE = bound.outputs(len(states), size)
        bound.graph.infer()
        return states, new_NBATE


class PassInputs:
    """Rotary embeddings and masks of one announced pass, by attention type; the pieces of a trunk
    share them."""

    def __init__(self, cache: PassCache, positions_BT: torch.Tensor, padding: int) -> None:
        self._cache = weakref.ref(cache)
        self._positions_BT, self._padding = positions_BT, padding
        self.by_kind: dict[str, tuple[torch.Tensor, ...]] = {}

    def of(self, cache: PassCache, positions_BT: torch.Tensor, padding: int) -> bool:
        """Whether they are those of this pass: every pass has its own tensor of positions."""
        same = self._cache() is cache and self._positions_BT is positions_BT
        return same and self._padding == padding


class Bound:
    """A graph and the tensors that it stays bound to from pass to pass."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._cache: weakref.ref[Any] | None = None
        self._visible = 0
        self._new: torch.Tensor | None = None

    def holds(self, cache: PassCache) -> bool:
        """Whether the graph reads the slots that the pass may see; if not, it is about to."""
        if self._cache is not None and self._cache() is cache and self._visible == cache.visible:
            return True
        self._cache, self._visible = weakref.ref(cache), cache.visible
        return False

    def outputs(self, first: int, size: tuple[int, ...]) -> torch.Tensor:
        """A tensor of that size that the new keys and values are written to, the outputs from
        `first` on."""
        if self._new is None or self._new.shape != size:
            self._new = torch.empty(size)
            for i, part in enumerate(self._new, first):
                self.graph.set_output(i, part)
        return self._new
