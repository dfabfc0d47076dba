"""An LM head as OpenVINO graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hispec.engine.openvino_graph import Graph
from hispec.engine.pieces import FEW, MORE
from hispec.models.engine import DRAFTING

_WORDS = 8192
"""Rows of an LM head that one product reads: few enough to stay in the processor's cache for the
next four states."""


class LMHead(nn.Module):
    """An LM head, see `Engine.project`, with the scaling of its family if it is the model's.

    Its words are in parts of `_WORDS`, which share the memory of its weights.
    """

    def __init__(self, model: Any, head: int) -> None:
        super().__init__()
        whole = model.hf.lm_head
        weight_VH, bias_V = whole.weight, whole.bias
        if head >= 0 and (own := model.head(head).lm_head) is not None:
            weight_VH, bias_V = own.weight, own.bias
        elif head == DRAFTING and (rows_WH := model.draft_head()) is not None:
            weight_VH, bias_V = rows_WH, None
        self.words = len(weight_VH)
        self.parts = nn.ModuleList()
        for first in range(0, self.words, _WORDS):
            part = nn.Linear(1, 1, bias=False, device="meta")
            part.weight = _frozen(weight_VH[first : first + _WORDS])
            if bias_V is not None:
                part.bias = _frozen(bias_V[first : first + _WORDS])
            self.parts.append(part)
        self._scale = model.scale_logits if head < 0 else lambda logits: logits

    def forward(self, normed_NH: torch.Tensor) -> torch.Tensor:
        # Products of one tensor would be joined, so each part has a view of its own.
        parts = [part(normed_NH.view_as(normed_NH)) for part in self.parts]
        return self._scale(torch.cat(parts, dim=-1))


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


class CompiledLMHead:
    """An LM head, compiled for four and for eight states; more of them take several turns."""

    def __init__(self, lm_head: LMHead, engine: Any) -> None:
        self._width, self._count = engine.shape.hidden, lm_head.words
        self._traced = engine.traced(lm_head, [torch.zeros(2, self._width)])
        self._graphs: dict[int, Graph] = {}

    def load(self) -> list[Path]:
        """Compile it for passes of all kinds; returns the file that keeps it."""
        for _, count in (FEW, MORE):
            self._graph(count)
        return [self._traced.path]

    def _graph(self, count: int) -> Graph:
        """For so many states."""
        if count not in self._graphs:
            self._graphs[count] = self._traced.graph([[count, self._width]])
        return self._graphs[count]

    def logits(self, normed_NH: torch.Tensor) -> torch.Tensor:
        """Logits [N, V or W] of normed states."""
        logits_NV = normed_NH.new_empty(len(normed_NH), self._count)
        for first in range(0, len(normed_NH), MORE[1]):
            part_NH = normed_NH[first : first + MORE[1]]
            count = len(part_NH)
            size = FEW[1] if count <= FEW[1] else MORE[1]
            graph = self._graph(size)
            graph.input(0, size, self._width)[:count] = part_NH
            found = graph.output(0, size, self._count)
            graph.infer()
            logits_NV[first : first + count] = found[:count]
        return logits_NV
