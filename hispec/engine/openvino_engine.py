"""The layers and the LM head as OpenVINO graphs: the engine for CPUs.

The trunk is cut where exits are, so any ladder runs the same graphs, and every half gigabyte, so
that a large model is compiled in little memory; states that heads read on the way are outputs. A
piece is compiled up to four times. One graph is for up to four tokens of one row: OpenVINO's
kernels take as long for four as for one, and twice as long for five (docs/benchmarks.md), so plain
decoding and short drafts run it, padded to four. One is for up to eight, in two products of four
per layer. One is for any number of rows and tokens. When sizes differ from those of the pass
before, OpenVINO plans a graph anew, which takes 18 ms for 30 layers; so passes are padded to the
size of the pass before if that is a little larger. One is for prompts, which a model in bf16 reads
in bf16.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import openvino as ov
import torch
import torch.nn.functional as F
from torch import nn

from hispec.engine.graph import Shape, layer_index
from hispec.engine.head_step import HeadStep
from hispec.engine.inputs import Inputs, PassInputs, RopeTable, RowInputs
from hispec.engine.lm_head import CompiledLMHead, LMHead
from hispec.engine.openvino_graph import Traced
from hispec.engine.pieces import FEW, MORE, Layers, Piece
from hispec.models.attention import PassCache, causal
from hispec.models.engine import DRAFTING, WHOLE
from hispec.models.exit_model import ExitModel
from hispec.models.layer_inputs import additive_mask
from hispec.utils.console import Progress

_LARGEST = 512 << 20
"""Bytes of weights in a piece: to trace it takes six times as much memory."""
_MOST = 32
"""States that it turns into logits; the LM head reads more as fast (docs/benchmarks.md)."""
_PROMPT_BLOCK = 16
"""Passes over prompts have whole blocks of so many tokens: OpenVINO plans each size anew, the first
time for a tenth of a second."""
_PADDING = 6
"""Tokens over all rows that a pass is padded by at most: so many take as long as a new size."""


class OpenVinoEngine:
    """Runs the cached passes of a model as compiled graphs.

    Pieces are traced, or loaded from disk, and compiled when they are first run.

    Args:
        model: on the CPU, in float32 or half precision. Graphs of either compute in float32: a
            token has the same states up to float32's rounding in passes of any size, so texts do
            not depend on these. Prompts of a model in bf16 are read in bf16 where the
            processor multiplies in it and there is more than one thread for them.
    """

    name = "openvino"
    few = FEW[1]
    dtype = torch.float32
    block = 128
    prompt_tokens = 512

    def __init__(self, model: ExitModel) -> None:
        self.model = model
        self.shape = Shape.of(model.hf.config)
        self._weights = _versions(model)
        self._pieces: dict[tuple[int, int], Piece] = {}
        """By their first and last layer."""
        self._stretches: dict[tuple[int, int], list[Piece]] = {}
        """The pieces of some layers, by the first and the last of these."""
        self._sizes: dict[int, tuple[int, int]] = {}
        """(rows, tokens) of the last pass by its first layer, padding included."""
        self._lm_heads: dict[int, CompiledLMHead] = {}
        """See `Engine.project`."""
        self._head_steps: dict[int, HeadStep] = {}
        self._inputs: PassInputs | None = None
        self._ropes = RopeTable(model)
        self._of_row = RowInputs(model, self._ropes)
        self.threads = torch.get_num_threads()
        self._core = ov.Core()
        native = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        # On one thread OpenVINO 2026.4 divides by zero where it fuses an MLP in bf16 for AMX.
        processors = self._core.get_property("CPU", "RANGE_FOR_STREAMS")[1]
        several = min(self.threads, processors) > 1
        half = native and several and model.hf.dtype == torch.bfloat16
        self.prompt_dtype = torch.bfloat16 if half else self.dtype
        self.cold_passes = 0
        self.say: Callable[[str], None] = logging.getLogger(__name__).warning
        self._said = False

    def refresh(self) -> None:
        """Drop what was compiled from weights that have changed since."""
        if (weights := _versions(self.model)) != self._weights:
            self._weights = weights
            self._pieces.clear()
            self._stretches.clear()
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
        reads: Sequence[int] = (),
    ) -> list[torch.Tensor]:
        """Hidden states [B, T, H] after some layers, see `Engine.run`."""
        if cache.of_prompts:
            return self._read(layers, hidden_BTH, positions_BT, cache, reads)
        rows, tokens, _ = hidden_BTH.shape
        size = self._size(layer_index(layers[0][0]), rows, tokens)
        kinds = {kind for _, kind in layers}
        if size <= MORE[1] and self._of_row.takes(kinds, cache, size):
            inputs = self._of_row.of(kinds, cache, size)
        else:
            inputs = self._pass_inputs(kinds, positions_BT, cache, size - tokens)
        found: dict[int, torch.Tensor] = {}
        for piece in self._pieces_of(layers):
            found |= piece.run(hidden_BTH, inputs, cache, tokens, size)
            hidden_BTH = found[max(found)]
        return [found[depth][:, :tokens] for depth in (*reads, max(found))]

    def _pass_inputs(
        self, kinds: set[str], positions_BT: torch.Tensor, cache: PassCache, padding: int
    ) -> dict[str, Inputs]:
        """What the announced pass gets besides hidden states, for these attention types at
        least."""
        known = self._inputs
        if known is None or not known.of(cache, positions_BT, padding):
            known = self._inputs = PassInputs(cache, positions_BT, padding)
        for kind in kinds - set(known.by_kind):
            positions = F.pad(positions_BT, (0, padding)) if padding else positions_BT
            rope = self.model.rope(kind, torch.zeros(1, 1, 1, dtype=self.dtype), positions)
            known.by_kind[kind] = *rope, self._mask(kind, cache, padding)
        return known.by_kind

    def _read(
        self,
        layers: Layers,
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor,
        cache: PassCache,
        reads: Sequence[int],
    ) -> list[torch.Tensor]:
        """`run` for prompts: every row alone, padded to whole blocks, so the bits of a text depend
        on nothing else."""
        depths = *reads, layer_index(layers[-1][0]) + 1
        size = *hidden_BTH.shape[:2], self.shape.hidden
        found = [torch.zeros(size, dtype=self.dtype) for _ in depths]
        for row, count in enumerate(cache.counts):
            if not count:
                continue
            start = int(positions_BT[row, 0])
            states = self._read_row(layers, hidden_BTH[row : row + 1, :count], cache, row, start)
            for all_BTH, depth in zip(found, depths, strict=True):
                all_BTH[row, :count] = states[depth][0, :count]
        return found

    def _read_row(
        self, layers: Layers, hidden_1TH: torch.Tensor, cache: PassCache, row: int, start: int
    ) -> dict[int, torch.Tensor]:
        """States [1, T, H], padding included, of one row from position `start` on, by depth."""
        count = hidden_1TH.shape[1]
        tokens = -(-count // _PROMPT_BLOCK) * _PROMPT_BLOCK
        hidden_1TH = F.pad(hidden_1TH.to(self.dtype), (0, 0, 0, tokens - count))
        slots_S = torch.arange(start + tokens)
        positions_1T = slots_S[None, start:]
        # some families' rotary frequencies change where a text is longer than it may be
        real_1T = positions_1T.clamp_max(start + count - 1)
        inputs: dict[str, Inputs] = {}
        for kind in {kind for _, kind in layers}:
            seen_1TS = causal(positions_1T, slots_S, self.model.reach(kind)).roll(tokens, dims=-1)
            mask = additive_mask(seen_1TS, torch.float32, self.shape.heads_per_kv)
            inputs[kind] = *self.model.rope(kind, hidden_1TH, real_1T), mask
        found: dict[int, torch.Tensor] = {}
        for piece in self._pieces_of(layers):
            found |= piece.read(hidden_1TH, inputs, cache, row, start, count)
            hidden_1TH = found[max(found)]
        return found

    def project(self, normed: torch.Tensor, head: int) -> torch.Tensor:
        """Logits of normed states [..., H], see `Engine.project`."""
        logits_NV = self._lm_head(head).logits(normed.reshape(-1, normed.shape[-1]))
        return logits_NV.view(*normed.shape[:-1], -1)

    def rope(self, kind: str, first: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary embeddings of an attention type, see `Engine.rope`."""
        return self._ropes.of(kind, first, tokens)

    def head_step(self, depth: int) -> HeadStep:
        """The step of a chain of drafts, see `Engine.head_step`."""
        if depth not in self._head_steps:
            own = self.model.head(depth).lm_head is not None
            lm_head = LMHead(self.model, depth if own else DRAFTING)
            self._head_steps[depth] = HeadStep(self, depth, lm_head, FEW[1])
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
        todo: list[Callable[[], list[Path]]] = [
            partial(_load, self._piece, piece) for piece in pieces
        ]
        lm_heads = [WHOLE] if model.draft_tokens is None else [WHOLE, DRAFTING]
        lm_heads += [d for d in model.exits.depths if model.head(d).lm_head is not None]
        todo += [partial(_load, self._lm_head, head) for head in lm_heads]
        chains = [depth for depth in model.exits.depths if depth == 0 and model.reads_before(depth)]
        todo += [partial(_load, self.head_step, depth) for depth in chains]
        paths = [path for load in progress(todo, "compiling") for path in load()]
        return list(dict.fromkeys(paths))

    def _size(self, first: int, rows: int, tokens: int) -> int:
        """Tokens to run a pass with, from this layer on."""
        for size in (FEW, MORE):
            if rows == size[0] and tokens <= size[1]:
                return size[1]
        before = self._sizes.get(first, (0, 0))
        if before[0] != rows or not 0 <= rows * (before[1] - tokens) <= _PADDING:
            self._sizes[first] = rows, tokens
        return self._sizes[first][1]

    def _mask(self, kind: str, cache: PassCache, padding: int) -> torch.Tensor:
        """The mask [B, 1, heads per KV head * T, T + S] of an attention type; padding sees itself
        alone."""
        slots_BTS, own_BTT = cache.seen_apart(self.model.reach(kind))
        if padding:
            tokens = own_BTT.shape[1]
            slots_BTS = F.pad(slots_BTS, (0, 0, 0, padding))
            own_BTT = F.pad(own_BTT, (0, padding, 0, padding))
            own_BTT.diagonal(dim1=1, dim2=2)[:, tokens:] = True
        seen = torch.cat([own_BTT, slots_BTS], dim=-1)
        return additive_mask(seen, torch.float32, self.shape.heads_per_kv)

    def traced(
        self, module: nn.Module, example: Sequence[torch.Tensor], *, join: bool = True
    ) -> Traced:
        """A module, traced or loaded, to compile graphs from: see `Traced`."""
        return Traced(
            self._core,
            module,
            self.model.hf.config,
            example,
            threads=self.threads,
            join=join,
            before=self._announce,
            cold=self._count_cold,
        )

    def _count_cold(self) -> None:
        self.cold_passes += 1

    def _announce(self) -> None:
        """Say once that graphs are compiled."""
        if not self._said:
            self._said = True
            self.say("compiling for this machine, once; `hispec compile` does it ahead")

    def _lm_head(self, head: int) -> CompiledLMHead:
        if head not in self._lm_heads:
            self._lm_heads[head] = CompiledLMHead(LMHead(self.model, head).eval(), self)
        return self._lm_heads[head]

    def _cut(self, layers: Layers) -> list[Layers]:
        """Layers of the trunk cut where exits are, and between these into parts of one size at most
        `_LARGEST`; the blocks of a head stay together."""
        first = layer_index(layers[0][0])
        if first >= self.model.num_layers:
            return [layers]
        size = sum(weight.nbytes for weight in layers[0][0].parameters())
        most = max(1, _LARGEST // max(1, size))
        cuts = [depth - first for depth in self.model.exits.depths]
        ends = [cut for cut in cuts if 0 < cut < len(layers)]
        found = []
        for a, b in pairwise([0, *ends, len(layers)]):
            parts = -(-(b - a) // most)
            bounds = [a + (b - a) * part // parts for part in range(parts + 1)]
            found += [layers[start:end] for start, end in pairwise(bounds)]
        return found

    def _pieces_of(self, layers: Layers) -> list[Piece]:
        """What runs these layers, one after the other."""
        key = layer_index(layers[0][0]), layer_index(layers[-1][0])
        if key not in self._stretches:
            self._stretches[key] = [self._piece(part) for part in self._cut(layers)]
        return self._stretches[key]

    def _piece(self, layers: Layers) -> Piece:
        key = layer_index(layers[0][0]), layer_index(layers[-1][0])
        if key not in self._pieces:
            self._pieces[key] = Piece(layers, self)
        return self._pieces[key]


def _load(build: Callable[[Any], Any], of: Any) -> list[Path]:
    """Build and compile a piece, an LM head or a step; returns the files that keep it."""
    paths: list[Path] = build(of).load()
    return paths


def _versions(model: ExitModel) -> list[tuple[int, int]]:
    """What changes whenever a weight is replaced or written to."""
    tensors = [*model.parameters(), *([] if model.draft_tokens is None else [model.draft_tokens])]
    return [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors]
