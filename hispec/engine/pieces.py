"""Pieces of a trunk as OpenVINO graphs, and what they are given from pass to pass."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hispec.engine.graph import NAME, PROMPTS, LayerGraph, layer_index
from hispec.engine.inputs import Inputs
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
        inputs: dict[str, Inputs],
        cache: PassCache,
        real: int,
        tokens: int,
    ) -> dict[int, torch.Tensor]:
        """Hidden states [B, T, H] by depth: those after the layers and those that are read on the
        way, valid until the next pass. The KV of the `real` first tokens goes to the cache.

        Args:
            hidden_BTH: of the real tokens at least.
            tokens: T, padding included.
        """
        size = hidden_BTH.shape[0], tokens
        bound = self.bound(size if size in (FEW, MORE) else ANY)
        first = self._give(bound.graph, hidden_BTH, inputs, tokens)
        if not bound.holds(cache):
            for i, buffer in enumerate(self._buffers(cache), first):
                bound.graph.set_input(i, buffer)
        states, new_NBATE = self._infer(bound, *size)
        cache.write(self.layers.indices, new_NBATE[..., :real, :])
        return states

    def read(
        self,
        hidden_1TH: torch.Tensor,
        inputs: dict[str, Inputs],
        cache: PassCache,
        row: int,
        start: int,
        real: int,
    ) -> dict[int, torch.Tensor]:
        """As `run`, for tokens of one row's prompt from position `start` on, in the dtype for
        prompts."""
        bound = self.bound(PROMPT)
        first = self._give(bound.graph, hidden_1TH, inputs, hidden_1TH.shape[1])
        past = bound.past(self._buffers(cache)[:, row : row + 1, :, :start])
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
        inputs: dict[str, Inputs],
        tokens: int,
    ) -> int:
        """Copy all inputs but keys and values; returns the number of the first of these."""
        rows, real, width = hidden_BTH.shape
        graph.input(0, rows, tokens, width)[:, :real] = hidden_BTH
        number = 1
        for kind in self.layers.used_kinds:
            for tensor in inputs[kind]:
                graph.input(number, *tensor.shape).copy_(tensor)
                number += 1
        return number

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


class Bound:
    """A graph and the tensors that it stays bound to from pass to pass."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._cache: weakref.ref[Any] | None = None
        self._visible = 0
        self._new: torch.Tensor | None = None
        self._rooms = [torch.empty(0), torch.empty(0)]
        """Memory of `past` and of `outputs`: to get it anew takes as long as to fill it."""

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
            self._new = self._room(1, size)
            for i, part in enumerate(self._new, first):
                self.graph.set_output(i, part)
        return self._new

    def past(self, slots_NBASE: torch.Tensor) -> torch.Tensor:
        """A copy without gaps, valid until the next one."""
        copy = self._room(0, slots_NBASE.shape)
        return copy.copy_(slots_NBASE)

    def _room(self, number: int, size: Sequence[int]) -> torch.Tensor:
        """A tensor of that size in one of `_rooms`."""
        count = math.prod(size)
        if self._rooms[number].numel() < count:
            self._rooms[number] = torch.empty(count)
        return self._rooms[number][:count].view(size)
