"""A module compiled by OpenVINO, and kept on disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import nn

from hispec.engine.artifacts import artifact_path, module_digest, read_artifact, write_artifact
from hispec.engine.tracing import Tracing
from hispec.utils.console import one_line

Sizes = Sequence[Sequence[int]]
"""Sizes of the inputs of a graph, -1 for those that vary."""


def compile_module(
    core: ov.Core,
    module: nn.Module,
    config: Any,
    example: Sequence[torch.Tensor],
    variants: Sequence[Sizes],
    before: Callable[[], None] = lambda: None,
) -> list[Graph]:
    """Graphs of a module, one for each variant: from disk, else compiled and kept there.

    Args:
        module: a function of tensors alone.
        config: the transformers config of its model.
        example: inputs to trace it with.
        variants: sizes of the inputs.
        before: called before anything is compiled.
    """
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # int8 weights, float32 states
    }
    digest = module_digest(module, config)
    traced: ov.Model | None = None
    graphs = []
    for sizes in variants:
        context = {**settings, "sizes": sizes, "openvino": ov.get_version()}
        path = artifact_path(digest, context)
        content = read_artifact(path)
        compiled = None if content is None else _load(core, path, content, settings)
        if compiled is None:
            before()
            if traced is None:
                with torch.inference_mode(), Tracing(module, example):
                    traced = ov.convert_model(module, example_input=tuple(example))
            model = traced.clone()
            model.reshape({i: ov.PartialShape(list(size)) for i, size in enumerate(sizes)})
            compiled = core.compile_model(model, "CPU", settings)
            write_artifact(path, compiled.export_model().getvalue())
        graphs.append(Graph(compiled, path, content))
    return graphs


class Graph:
    """A compiled module. Its inputs and outputs are torch tensors, used where they lie.

    Args:
        path: the file that keeps it.
        content: what it was loaded from, if it was; OpenVINO goes on reading it.
    """

    def __init__(self, compiled: ov.CompiledModel, path: Path, content: np.ndarray | None) -> None:
        self.path = path
        self._content = content
        self._request = compiled.create_infer_request()

    def infer(self) -> None:
        """Compute the outputs from the inputs."""
        self._request.infer()

    def set_input(self, number: int, tensor: torch.Tensor) -> None:
        """Read an input from this tensor, which must live until it is replaced or not used."""
        self._request.set_input_tensor(number, ov.Tensor(tensor.numpy(), shared_memory=True))

    def set_output(self, number: int, tensor: torch.Tensor) -> None:
        """Write an output to this tensor, which must live until it is replaced or not used."""
        self._request.set_output_tensor(number, ov.Tensor(tensor.numpy(), shared_memory=True))


def _load(
    core: ov.Core, path: Path, content: np.ndarray, settings: dict[str, Any]
) -> ov.CompiledModel | None:
    """A graph that was compiled before."""
    try:
        # Mapped, not read: the weights in it are copied once, into the order that kernels want.
        return core.import_model(ov.Tensor(content, shared_memory=True), "CPU", settings)
    except RuntimeError as error:
        warnings.warn(f"{path} cannot be loaded ({one_line(error)[:80]})", stacklevel=2)
        return None
