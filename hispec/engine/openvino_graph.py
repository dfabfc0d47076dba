"""A module compiled by OpenVINO, and kept on disk."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset6, opset13
from torch import nn

from hispec.engine.artifacts import artifact_path, module_digest, read_artifact, write_artifact
from hispec.engine.tracing import Tracing, forget_traces
from hispec.utils.console import one_line
from hispec.utils.threads import torch_threads

Sizes = Sequence[Sequence[int]]
"""Sizes of the inputs of a graph, -1 for those that vary."""
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_MARK = "language model"
AT_ONCE = 4
"""Tokens that one product with weights in 16 bits takes as fast as one: docs/benchmarks.md."""
_LENGTH, _PAGE = 8, 4096


class Traced:
    """A module traced for OpenVINO; compiles graphs for inputs of some sizes when asked to.

    Tracing takes the time, so what was traced is kept on disk; compiling takes a tenth of that.
    Every graph packs the weights for its own kernels when it first runs.

    Args:
        module: a function of tensors alone.
        config: the transformers config of its model.
        example: inputs to trace it with.
        threads: that graphs run on.
        join: see `Tracing`.
        before: called before anything is traced.
        cold: called after a graph was planned, see `Graph`.
    """

    def __init__(
        self,
        core: ov.Core,
        module: nn.Module,
        config: Any,
        example: Sequence[torch.Tensor],
        *,
        threads: int,
        join: bool = True,
        before: Callable[[], None] = lambda: None,
        cold: Callable[[], None] = lambda: None,
    ) -> None:
        self._core, self._threads, self._cold = core, threads, cold
        self.path = artifact_path(module_digest(module, config), {"openvino": ov.get_version()})
        self._content = read_artifact(self.path)
        known = None if self._content is None else _load(core, self.path, self._content)
        if known is None:
            before()
            with torch_threads(threads), torch.inference_mode(), Tracing(module, example, join):
                inputs = tuple(example)
                known = _marked(ov.convert_model(module, example_input=inputs, share_weights=False))
            forget_traces()
            try:
                write_artifact(self.path, _packed(known))
            except (OSError, RuntimeError) as error:  # no room for temporary files
                warnings.warn(f"the graph is not kept: {one_line(error)[:80]}", stacklevel=2)
            # From the file, so that its weights are no further copy in memory.
            self._content = read_artifact(self.path)
            kept = None if self._content is None else _load(core, self.path, self._content)
            known = known if kept is None else kept
        self._model = known

    def graph(self, sizes: Sizes, dtype: torch.dtype = torch.float32) -> Graph:
        """A graph for inputs of these sizes.

        Args:
            dtype: to compute in: float32 or, where the CPU can, bf16.
        """
        model = self._model.clone()
        model.reshape({i: ov.PartialShape(list(size)) for i, size in enumerate(sizes)})
        _divide_products(model)
        settings = {
            "INFERENCE_NUM_THREADS": self._threads,
            "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # int8 weights, float32 states
        }
        compiled = self._core.compile_model(model, "CPU", settings)
        return Graph(compiled, self._content, self._cold)


def _marked(model: ov.Model) -> ov.Model:
    """The same model, which OpenVINO takes for a language model.

    Only in those do its CPU kernels read weights in 16 bits, which makes a pass of one token 1.5
    times as fast; in others they are unpacked to float32 when the model is loaded. It goes by two
    signs: an attention operator and a variable. Ours have neither, as their keys and values come
    from outside, so they get both, of four numbers and on the side.
    """
    empty = opset13.constant(np.zeros((1, 1, 1, 4), np.float32))
    state = opset6.read_value(empty, _MARK, ov.Type.f32, [1, 1, 1, 4])
    attention = opset13.scaled_dot_product_attention(state, state, state)
    kept = opset6.assign(attention, _MARK)
    return ov.Model(model.outputs, [kept], model.get_parameters(), model.get_friendly_name())


def _divide_products(model: ov.Model) -> None:
    """Replace products of weights with 5 to 8 tokens by two of up to four.

    Kernels for five tokens and more unpack the weights to float32 first, which takes longer than
    the product. The second product finds the weights of the first in the processor's cache, and
    both read the same packed copy.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or not _is_constant(node.input_value(1).get_node()):
            continue
        states, size = node.input_value(0), node.input(0).get_partial_shape()
        tokens = size[len(size) - 2]
        if size.is_dynamic or not AT_ONCE < tokens.get_length() <= 2 * AT_ONCE:
            continue
        axis = opset13.constant(len(size) - 2)
        counts = opset13.constant([AT_ONCE, tokens.get_length() - AT_ONCE])
        turned = node.get_attributes()["transpose_b"]
        parts = [
            opset13.matmul(part, node.input_value(1), transpose_a=False, transpose_b=turned)
            for part in opset13.variadic_split(states, axis, counts).outputs()
        ]
        node.output(0).replace(opset13.concat(parts, axis=len(size) - 2).output(0))


def _is_constant(node: ov.Node) -> bool:
    """Whether a node depends on constants alone."""
    inputs = [value.get_node() for value in node.input_values()]
    known = node.get_type_name() == "Constant" or bool(inputs)
    return known and all(map(_is_constant, inputs))


class Graph:
    """A compiled module. Its inputs and outputs are torch tensors, used where they lie: the
    caller's, or those that the graph keeps from pass to pass while their sizes stay.

    Args:
        content: what it was compiled from, if it lies in a file in memory; OpenVINO goes on reading
            it.
        cold: called after it ran for the first time or with inputs of other sizes. OpenVINO then
            packs its weights or plans it anew, which takes up to ten times as long as to run it.
    """

    def __init__(
        self,
        compiled: ov.CompiledModel,
        content: np.ndarray | None,
        cold: Callable[[], None] = lambda: None,
    ) -> None:
        self._content, self._cold = content, cold
        self._planned = False
        self._sizes: dict[int, torch.Size] = {}
        self._request = compiled.create_infer_request()
        self._inputs: dict[int, torch.Tensor] = {}
        self._outputs: dict[int, torch.Tensor] = {}

    def infer(self) -> None:
        """Compute the outputs from the inputs."""
        self._request.infer()
        if not self._planned:
            self._planned = True
            self._cold()

    def input(self, number: int, *size: int) -> torch.Tensor:
        """The tensor of that size, zeros at first, that an input is read from, until another size
        is asked for. Copying a few states to it takes a tenth of the time that OpenVINO takes to
        look at another tensor."""
        kept = self._inputs.get(number)
        if kept is None or kept.shape != size:
            kept = self._inputs[number] = torch.zeros(size)
            self.set_input(number, kept)
        return kept

    def output(self, number: int, *size: int) -> torch.Tensor:
        """The tensor of that size that an output is written to, until another size is asked for."""
        kept = self._outputs.get(number)
        if kept is None or kept.shape != size:
            kept = self._outputs[number] = torch.empty(size)
            self.set_output(number, kept)
        return kept

    def set_input(self, number: int, tensor: torch.Tensor) -> None:
        """Read an input from this tensor, which must live until it is replaced or not used."""
        if self._sizes.get(number) != tensor.shape:
            self._sizes[number] = tensor.shape
            self._planned = False
        self._request.set_input_tensor(number, ov.Tensor(tensor.numpy(), shared_memory=True))

    def set_output(self, number: int, tensor: torch.Tensor) -> None:
        """Write an output to this tensor, which must live until it is replaced or not used."""
        self._request.set_output_tensor(number, ov.Tensor(tensor.numpy(), shared_memory=True))


def _packed(model: ov.Model) -> bytes:
    """A model as one file: the length of its description, the description, its weights from the
    next page of memory on."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "model.xml"
        ov.save_model(model, xml, compress_to_fp16=False)
        description = xml.read_bytes()
        weights = xml.with_suffix(".bin").read_bytes()
    start = _weights_at(len(description))
    return (len(description).to_bytes(_LENGTH, "little") + description).ljust(start) + weights


def _weights_at(length: int) -> int:
    """Where the weights begin behind a description of that length."""
    return -(-(_LENGTH + length) // _PAGE) * _PAGE


def _load(core: ov.Core, path: Path, content: np.ndarray) -> ov.Model | None:
    """A model that was packed before; its weights stay where they lie."""
    length = int.from_bytes(content[:_LENGTH].tobytes(), "little")
    try:
        description = content[_LENGTH : _LENGTH + length].tobytes()
        weights = content[_weights_at(length) :]
        return core.read_model(description, ov.Tensor(weights, shared_memory=True))
    except (RuntimeError, ValueError) as error:
        warnings.warn(f"{path} cannot be loaded ({one_line(error)[:80]})", stacklevel=2)
        return None
