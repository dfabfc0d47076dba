"""The layers and the LM head as OpenVINO graphs: the engine for CPUs.

The trunk is cut where exits are, so any ladder runs the same graphs. A piece is compiled twice. One
graph is for up to four tokens of one row: OpenVINO's kernels take as long for four as for one, and
twice as long for five (docs/benchmarks.md), so plain decoding and short drafts run it, padded to
four. The other one is for any number of rows and tokens. When sizes differ from those of the pass
before, OpenVINO plans a graph anew, which takes 18 ms for 30 layers; so passes are padded to the
size of the pass before if that is a little larger.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import openvino as ov
import torch
import torch.nn.functional as F
from torch import nn

from hispec.engine.graph import NAME, LayerGraph, Shape, layer_index
from hispec.engine.head_step import HeadStep
from hispec.engine.openvino_graph import Graph, Sizes, compile_module
from hispec.models.attention import PassCache, attention_by
from hispec.models.engine import DRAFTING, WHOLE
from hispec.models.exit_model import ExitModel
from hispec.models.layer_inputs import additive_mask
from hispec.utils.console import Progress
from hispec.utils.threads import torch_threads

Layers = Sequence[tuple[nn.Module, str]]
_FEW, _ANY = (1, 4), (-1, -1)
"""(rows, tokens) that a graph is compiled for."""
_MOST = 32
"""States that it turns into logits; the LM head reads more as fast (docs/benchmarks.md)."""
_PADDING = 6
"""Tokens over all rows that a pass is padded by at most: so many take as long as a new size."""


class OpenVinoEngine:
    """Runs the cached passes of a model as compiled graphs.

    Pieces are compiled, or loaded from disk, when they are first run.

    Args:
        model: on the CPU, in float32 or half precision. Graphs of either compute in float32: a
            token has the same states up to float32's rounding in passes of any size, so texts do
            not depend on these. The modules read the prompt, in the dtype of the weights.
    """

    name = "openvino"
    few = _FEW[1]
    dtype = torch.float32
    block = 128

    def __init__(self, model: ExitModel) -> None:
        self.model = model
        self.shape = Shape.of(model.hf.config)
        self._weights = _versions(model)
        self._pieces: dict[tuple[int, int], _Piece] = {}
        self._sizes: dict[int, tuple[int, int]] = {}
        """(rows, tokens) of the last pass by its first layer, padding included."""
        self._lm_heads: dict[int, tuple[list[Graph], int]] = {}
        """LM heads with the number of their rows, see `Engine.project`."""
        self._head_steps: dict[int, HeadStep] = {}
        self._inputs: _Inputs | None = None
        self.threads = torch.get_num_threads()
        self._core = ov.Core()
        self.say: Callable[[str], None] = logging.getLogger(__name__).warning
        self._said = False

    def refresh(self) -> None:
        """Drop what was compiled from weights that have changed since."""
        if (weights := _versions(self.model)) != self._weights:
            self._weights = weights
            self._pieces.clear()
            self._lm_heads.clear()
            self._head_steps.clear()

    def takes(self, states: torch.Tensor) -> bool:
        """Whether it turns these states [..., H] into logits: a few, or all that the LM head in
        half precision would round."""
        few = states.numel() <= _MOST * states.shape[-1] or self.model.hf.dtype != self.dtype
        return few and states.dtype == self.dtype and states.device.type == "cpu"

    def run(
        self,
        layers: Layers,
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor,
        cache: PassCache,
    ) -> torch.Tensor:
        """Hidden states [B, T, H] after some layers of the trunk, or after blocks of a head."""
        rows, tokens, _ = hidden_BTH.shape
        more = self._size(layer_index(layers[0][0]), rows, tokens) - tokens
        hidden_BTH = hidden_BTH.to(self.dtype)
        if more:
            hidden_BTH = F.pad(hidden_BTH, (0, 0, 0, more))
        known = self._inputs
        if known is None or not known.of(cache, positions_BT, more):
            known = self._inputs = _Inputs(cache, positions_BT, more)
        inputs = known.by_kind
        for kind in {kind for _, kind in layers} - set(inputs):
            positions = F.pad(positions_BT, (0, more)) if more else positions_BT
            rope = self.model.rope(kind, hidden_BTH, positions)
            inputs[kind] = *rope, self._mask(kind, cache, more)
        for part in self._cut(layers):
            hidden_BTH = self._piece(part).run(hidden_BTH, inputs, cache, tokens)
        return hidden_BTH[:, :tokens].clone()

    def project(self, normed: torch.Tensor, head: int) -> torch.Tensor:
        """Logits of normed states [..., H], see `Engine.project`."""
        flat = normed.reshape(-1, normed.shape[-1])
        count, (graphs, vocab_size) = len(flat), self._project(head)
        few = count <= _FEW[1]
        if few:
            flat = F.pad(flat, (0, 0, 0, _FEW[1] - count))
        graph = graphs[0 if few else 1]
        graph.copy_input(0, flat)
        logits = graph.output(0, len(flat), vocab_size)
        graph.infer()
        return logits[:count].clone().view(*normed.shape[:-1], -1)

    def head_step(self, depth: int) -> HeadStep:
        """The step of a chain of drafts, see `Engine.head_step`."""
        if depth not in self._head_steps:
            own = self.model.head(depth).lm_head is not None
            lm_head = _LMHead(self.model, depth if own else DRAFTING)
            self._head_steps[depth] = HeadStep(self, depth, lm_head, _FEW[1])
        return self._head_steps[depth]

    def compile(self, progress: Progress = lambda items, _: items) -> list[Path]:
        """Compile or load all that the model needs; returns the files that keep it.

        Args:
            progress: sees the graphs go by, for a progress bar.
        """
        self._said = True  # who asks for it knows that it takes seconds
        return self.load(progress)

    def load(self, progress: Progress = lambda items, _: items) -> list[Path]:
        """As `compile`; where something has to be compiled, it is said."""
        model = self.model
        pieces = self._cut(list(zip(model.hf.model.layers, model.layer_types, strict=True)))
        for depth in model.exits.depths:
            head = model.head(depth)
            if len(head.blocks):
                pieces.append(list(zip(head.blocks, head.layer_types, strict=True)))
        todo: list[Callable[[], list[Graph]]] = [partial(self._graphs, piece) for piece in pieces]
        lm_heads = [WHOLE] if model.draft_tokens is None else [WHOLE, DRAFTING]
        lm_heads += [d for d in model.exits.depths if model.head(d).lm_head is not None]
        todo += [partial(self._head_graphs, head) for head in lm_heads]
        chains = [depth for depth in model.exits.depths if depth == 0 and model.reads_before(depth)]
        todo += [partial(self._step_graphs, depth) for depth in chains]
        paths = [graph.path for graphs in progress(todo, "compiling") for graph in graphs()]
        return list(dict.fromkeys(paths))

    def _size(self, first: int, rows: int, tokens: int) -> int:
        """Tokens to run a pass with, from this layer on."""
        if rows == _FEW[0] and tokens <= _FEW[1]:
            return _FEW[1]
        before = self._sizes.get(first, (0, 0))
        if before[0] != rows or not 0 <= rows * (before[1] - tokens) <= _PADDING:
            self._sizes[first] = rows, tokens
        return self._sizes[first][1]

    def _mask(self, kind: str, cache: PassCache, padding: int) -> torch.Tensor:
        """The mask [B, 1, heads per KV head * T, S + T] of an attention type; padding sees itself
        alone."""
        slots_BTS, own_BTT = cache.seen_apart(self.model.reach(kind))
        if padding:
            tokens = own_BTT.shape[1]
            slots_BTS = F.pad(slots_BTS, (0, 0, 0, padding))
            own_BTT = F.pad(own_BTT, (0, padding, 0, padding))
            own_BTT.diagonal(dim1=1, dim2=2)[:, tokens:] = True
        seen = torch.cat([slots_BTS, own_BTT], dim=-1)
        return additive_mask(seen, torch.float32, self.shape.heads_per_kv)

    def _compiled(
        self, module: nn.Module, example: Sequence[torch.Tensor], variants: Sequence[Sizes]
    ) -> list[Graph]:
        """Graphs of a module for inputs of several sizes."""
        with torch_threads(self.threads):
            config = self.model.hf.config
            return compile_module(self._core, module, config, example, variants, self._announce)

    def _announce(self) -> None:
        """Say once that graphs are compiled."""
        if not self._said:
            self._said = True
            self.say("compiling for this machine, once; `hispec compile` does it ahead")

    def _project(self, head: int) -> tuple[list[Graph], int]:
        if head not in self._lm_heads:
            config = self.model.hf.config
            example = torch.zeros(2, config.hidden_size)
            module = _LMHead(self.model, head).eval()
            sizes = [[[count, config.hidden_size]] for count in (_FEW[1], -1)]
            graphs = self._compiled(module, [example], sizes)
            self._lm_heads[head] = graphs, module.lm_head.out_features
        return self._lm_heads[head]

    def _head_graphs(self, head: int) -> list[Graph]:
        return self._project(head)[0]

    def _step_graphs(self, depth: int) -> list[Graph]:
        return [self.head_step(depth).graph]

    def _cut(self, layers: Layers) -> list[Layers]:
        """Layers of the trunk cut where states are read; the blocks of a head stay together."""
        first = layer_index(layers[0][0])
        if first >= self.model.num_layers:
            return [layers]
        cuts = [depth - first for depth in self.model.cuts()]
        ends = [cut for cut in cuts if 0 < cut < len(layers)]
        return [layers[a:b] for a, b in pairwise([0, *ends, len(layers)])]

    def _piece(self, layers: Layers) -> _Piece:
        key = layer_index(layers[0][0]), layer_index(layers[-1][0])
        if key not in self._pieces:
            self._pieces[key] = _Piece(layers, self)
        return self._pieces[key]

    def _graphs(self, layers: Layers) -> list[Graph]:
        return [bound.graph for bound in self._piece(layers).bound.values()]


class _LMHead(nn.Module):
    """An LM head, see `Engine.project`, with the scaling of its family if it is the model's."""

    def __init__(self, model: ExitModel, head: int) -> None:
        super().__init__()
        self.lm_head = model.hf.lm_head
        if head >= 0 and (own := model.head(head).lm_head) is not None:
            self.lm_head = own
        elif head == DRAFTING and (rows_WH := model.draft_head()) is not None:
            count, width = rows_WH.shape
            self.lm_head = nn.Linear(width, count, bias=False, device="meta")
            self.lm_head.weight = nn.Parameter(rows_WH, requires_grad=False)
        self._scale = model.scale_logits if head < 0 else lambda logits: logits

    def forward(self, normed_NH: torch.Tensor) -> torch.Tensor:
        return self._scale(self.lm_head(normed_NH))


class _Piece:
    """A run of layers, compiled for few tokens and for any number of rows and tokens."""

    def __init__(self, layers: Layers, engine: OpenVinoEngine) -> None:
        config = engine.model.hf.config
        self.shape = engine.shape
        self.layers = LayerGraph(layers).eval()
        example, sizes = self.layers.example(self.shape), (_FEW, _ANY)
        variants = [self.layers.sizes(self.shape, *size) for size in sizes]
        with attention_by(config, NAME):
            graphs = engine._compiled(self.layers, example, variants)
        self.bound = {size: _Bound(graph) for size, graph in zip(sizes, graphs, strict=True)}

    def run(
        self,
        hidden_BTH: torch.Tensor,
        inputs: Mapping[str, Sequence[torch.Tensor]],
        cache: PassCache,
        real: int,
    ) -> torch.Tensor:
        """Hidden states [B, T, H] after the layers; the KV of the `real` first tokens goes to the
        cache."""
        rows, tokens, _ = hidden_BTH.shape
        bound, shape = self.bound[_FEW if (rows, tokens) == _FEW else _ANY], self.shape
        given = [hidden_BTH, *(part for kind in self.layers.used_kinds for part in inputs[kind])]
        for i, tensor in enumerate(given):
            bound.graph.copy_input(i, tensor)
        indices = self.layers.indices
        if not bound.holds(cache):
            stack = cache.buffers(indices, shape.kv_heads, shape.head_size)
            for i, buffer in enumerate(stack, len(given)):
                bound.graph.set_input(i, buffer)
        out_BTH = bound.graph.output(0, rows, tokens, shape.hidden)
        size = 2 * len(indices), rows, shape.kv_heads, tokens, shape.head_size
        new_NBATE = bound.outputs(size)
        bound.graph.infer()
        cache.write(indices, new_NBATE[..., :real, :])
        return out_BTH


class _Inputs:
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


class _Bound:
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

    def outputs(self, size: tuple[int, ...]) -> torch.Tensor:
        """A tensor of that size that the new keys and values are written to."""
        if self._new is None or self._new.shape != size:
            self._new = torch.empty(size)
            for i, part in enumerate(self._new, 1):
                self.graph.set_output(i, part)
        return self._new


def _versions(model: ExitModel) -> list[tuple[int, int]]:
    """What changes whenever a weight is replaced or written to."""
    tensors = [*model.parameters(), *([] if model.draft_tokens is None else [model.draft_tokens])]
    return [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors]
