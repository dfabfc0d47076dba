"""The layers and the LM head as OpenVINO graphs: the engine for CPUs.

A graph takes any number of rows, tokens and slots, so a piece of the model is compiled once and its
weights are packed once. The trunk is cut where exits are: any ladder runs the same graphs.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from torch import nn

from hispec.engine.artifacts import artifact_path, read_artifact, write_artifact
from hispec.engine.graph import LayerGraph, Shape, layer_index, traced_attention
from hispec.models.attention import PassCache
from hispec.models.exit_model import ExitModel
from hispec.utils.console import Progress, one_line

Layers = Sequence[tuple[nn.Module, str]]


class OpenVinoEngine:
    """Runs the cached passes of a model as compiled graphs.

    Pieces are compiled when they are first run.

    Args:
        model: on the CPU, in float32 or bfloat16; its weights must not change any more.
    """

    name = "openvino"
    block = 128

    def __init__(self, model: ExitModel) -> None:
        self.model = model
        self.dtype = model.hf.dtype
        self.shape = Shape.of(model.hf.config)
        self._weights = _versions(model)
        self._cuts = [0, *model.exits.depths, model.num_layers]
        self._pieces: dict[tuple[int, int], _Piece] = {}
        self._lm_head: _Graph | None = None
        self._core = ov.Core()

    def refresh(self) -> None:
        """Drop what was compiled from weights that have changed since."""
        if (weights := _versions(self.model)) != self._weights:
            self._weights = weights
            self._pieces.clear()
            self._lm_head = None

    def takes(self, hidden: torch.Tensor) -> bool:
        """Whether it runs a pass with these states."""
        return hidden.dtype == self.dtype and hidden.device.type == "cpu"

    def run(
        self,
        layers: Layers,
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor,
        cache: PassCache,
    ) -> torch.Tensor:
        """Hidden states [B, T, H] after some layers of the trunk, or after blocks of a head."""
        inputs = self.model.graph_inputs(
            dict.fromkeys(kind for _, kind in layers), hidden_BTH, positions_BT, cache
        )
        for part in self._cut(layers):
            hidden_BTH = self._piece(part).run(hidden_BTH, inputs, cache)
        return hidden_BTH

    def project(self, normed: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of normed states [..., H]."""
        flat = normed.reshape(-1, normed.shape[-1]).contiguous()
        logits = torch.empty(len(flat), self.model.vocab_size, dtype=flat.dtype)
        graph = self._project()
        graph.set_input(0, _shared(flat))
        graph.set_output(0, _shared(logits))
        graph.infer()
        return logits.view(*normed.shape[:-1], -1)

    def compile(self, progress: Progress = lambda items, _: items) -> list[Path]:
        """Compile or load every piece; returns the files that hold them.

        Args:
            progress: sees the pieces go by, for a progress bar.
        """
        model = self.model
        trunk = list(zip(model.hf.model.layers, model.layer_types, strict=True))
        pieces = self._cut(trunk)
        for depth in model.exits.depths:
            head = model.head(depth)
            if head.blocks:
                pieces.append(list(zip(head.blocks, head.layer_types, strict=True)))
        todo = [*(partial(self._piece, piece) for piece in pieces), self._project]
        for one in progress(todo, "compiling"):
            one()
        graphs = [*(piece.graph for piece in self._pieces.values()), self._project()]
        return [graph.path for graph in graphs]

    def _project(self) -> _Graph:
        if self._lm_head is None:
            example = torch.zeros(2, self.shape.hidden, dtype=self.dtype)
            head = _LMHead(self.model).eval()
            config = self.model.hf.config
            self._lm_head = _Graph(self._core, head, config, [example], [[-1, self.shape.hidden]])
        return self._lm_head

    def _cut(self, layers: Layers) -> list[Layers]:
        """Layers of the trunk cut at the exits; the blocks of a head stay together."""
        first = layer_index(layers[0][0])
        if first >= self.model.num_layers:
            return [layers]
        ends = [cut - first for cut in self._cuts if 0 < cut - first < len(layers)]
        return [layers[a:b] for a, b in pairwise([0, *ends, len(layers)])]

    def _piece(self, layers: Layers) -> _Piece:
        key = layer_index(layers[0][0]), layer_index(layers[-1][0])
        if key not in self._pieces:
            with traced_attention(self.model.hf.config):
                self._pieces[key] = _Piece(LayerGraph(layers).eval(), self)
        return self._pieces[key]


class _LMHead(nn.Module):
    """The LM head with the scaling of its family."""

    def __init__(self, model: ExitModel) -> None:
        super().__init__()
        self.lm_head = model.hf.lm_head
        self._scale = model.scale_logits

    def forward(self, normed_NH: torch.Tensor) -> torch.Tensor:
        return self._scale(self.lm_head(normed_NH))


class _Graph:
    """A module compiled for inputs of these shapes, -1 for sizes that vary."""

    def __init__(
        self,
        core: ov.Core,
        module: nn.Module,
        config: Any,
        example: Sequence[torch.Tensor],
        shapes: Sequence[Sequence[int]],
    ) -> None:
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        }
        context = {**settings, "shapes": shapes, "openvino": ov.get_version()}
        self.path = artifact_path(module, config, context)
        compiled = _load(core, self.path, settings)
        if compiled is None:
            with torch.inference_mode():
                graph = ov.convert_model(module, example_input=tuple(example))
            graph.reshape({i: ov.PartialShape(list(shape)) for i, shape in enumerate(shapes)})
            compiled = core.compile_model(graph, "CPU", settings)
            write_artifact(self.path, compiled.export_model().getvalue())
        self._request = compiled.create_infer_request()
        self.infer = self._request.infer
        self.set_input = self._request.set_input_tensor
        self.set_output = self._request.set_output_tensor


def _load(core: ov.Core, path: Path, settings: dict[str, Any]) -> ov.CompiledModel | None:
    """A graph that was compiled before."""
    if (content := read_artifact(path)) is None:
        return None
    try:
        return core.import_model(content.tobytes(), "CPU", settings)
    except RuntimeError as error:
        warnings.warn(f"{path} is not for this machine ({one_line(error)[:80]})", stacklevel=2)
        return None


class _Piece:
    """A run of layers as a graph, and the cache whose tensors it is bound to."""

    def __init__(self, graph: LayerGraph, engine: OpenVinoEngine) -> None:
        self.indices = graph.indices
        self.kinds = graph.used_kinds
        self.shape = shape = engine.shape
        example = graph.example(shape, engine.dtype)
        self.graph = _Graph(
            engine._core, graph, engine.model.hf.config, example, graph.sizes(shape)
        )
        self._bound: tuple[Any, int] | None = None
        self._new: list[torch.Tensor] = []

    def run(
        self,
        hidden_BTH: torch.Tensor,
        inputs: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        cache: PassCache,
    ) -> torch.Tensor:
        """Hidden states [B, T, H] after the layers; writes the new keys and values."""
        self._bind(cache, hidden_BTH)
        graph = self.graph
        given = [hidden_BTH, *(tensor for kind in self.kinds for tensor in inputs[kind])]
        held = [_shared(tensor.contiguous()) for tensor in given]
        for i, tensor in enumerate(held):
            graph.set_input(i, tensor)
        out_BTH = torch.empty_like(hidden_BTH)
        graph.set_output(0, _shared(out_BTH))
        rows, tokens, _ = hidden_BTH.shape
        size = rows, self.shape.kv_heads, tokens, self.shape.head_size
        if not self._new or self._new[0].shape != size:
            self._new = [hidden_BTH.new_empty(size) for _ in range(2 * len(self.indices))]
            for i, tensor in enumerate(self._new):
                graph.set_output(1 + i, _shared(tensor))
        graph.infer()
        for i, index in enumerate(self.indices):
            cache.write(index, self._new[2 * i], self._new[2 * i + 1])
        return out_BTH

    def _bind(self, cache: PassCache, hidden_BTH: torch.Tensor) -> None:
        """Give the graph the slots of the cache that the pass may see, where they changed."""
        if self._bound is not None:
            bound, visible = self._bound
            if bound() is cache and visible == cache.visible:
                return
        first = 1 + 3 * len(self.kinds)
        shape = self.shape
        for i, index in enumerate(self.indices):
            buffers = cache.buffers(index, shape.kv_heads, shape.head_size, hidden_BTH)
            for j, buffer in enumerate(buffers):
                self.graph.set_input(first + 2 * i + j, _shared(buffer))
        self._bound = weakref.ref(cache), cache.visible


def _versions(model: ExitModel) -> list[tuple[int, int]]:
    """What changes whenever a weight is replaced or written to."""
    return [
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for tensor in model.parameters()
    ]


def _shared(tensor: torch.Tensor) -> ov.Tensor:
    """An OpenVINO tensor over the same memory; it does not keep it alive."""
    if tensor.dtype == torch.bfloat16:
        raw = tensor.view(torch.uint16).numpy()
        return ov.Tensor(raw, ov.Shape(tensor.shape), ov.Type.bf16)
    return ov.Tensor(tensor.numpy(), shared_memory=True)
