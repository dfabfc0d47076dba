"""Operators as compilers want them, while a module is traced.

States are in float32, whatever the dtype of the weights. Weights are read in the fewest bits that
lose nothing: those of a checkpoint in bf16 are exact in bf16 in a float32 model too, and those that
`quantization` rounded are exact in int8. So graphs hold half or a quarter of the bytes and compute
the same products in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from hispec.models.quantization import int8_parts

_NEGATIONS = (torch.neg, torch.Tensor.neg, torch.Tensor.__neg__)


class Tracing(TorchFunctionMode):
    """Replaces operators of a module while it is traced; the results stay the same.

    - `F.linear` reads float32 weights from an exact copy in fewer bits, where there is one. The
      compiled graph holds the copy alone.
    - Products of one input with several weights, as those of queries, keys and values, are one
      product if `join` says so: fewer and larger kernels, for passes of a few tokens. Apart, an
      activation is computed within the product, which is faster for prompts.
    - A negation becomes a product with -1.0: OpenVINO fuses rotary embeddings that are written so.

    docs/benchmarks.md has what each of them gains.

    Args:
        module: a function of tensors alone.
        example: its inputs.
        join: whether products of one input are one product.
    """

    def __init__(
        self, module: nn.Module, example: Sequence[torch.Tensor], join: bool = True
    ) -> None:
        super().__init__()
        with _Products() as products:
            module(*example)
        self._part_of: dict[int, tuple[_Product, int]] = {}
        found = products.by_input()
        for same_input in found if join else [[one] for group in found for one in group]:
            product = _Product(same_input)
            for number, (weight, _) in enumerate(same_input):
                self._part_of[id(weight)] = product, number

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _NEGATIONS:
            return args[0] * -1.0
        if func is F.linear and id(args[1]) in self._part_of:
            product, number = self._part_of[id(args[1])]
            return product.part(args[0], number)
        return func(*args, **(kwargs or {}))


_Linear = tuple[torch.Tensor, torch.Tensor | None]
"""Weight and bias."""


class _Products(TorchFunctionMode):
    """Collects the linear layers of a pass, and which of them read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self._read: list[tuple[torch.Tensor, _Linear]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs:
            states, weight, bias = (*args, None)[:3]
            self._read.append((states, (weight, bias)))
            return F.linear(states, weight.to(states.dtype), _in(states.dtype, bias))
        return func(*args, **(kwargs or {}))

    def by_input(self) -> list[list[_Linear]]:
        """Linear layers that follow each other and read the same tensor."""
        found: list[list[_Linear]] = []
        before: tuple[torch.Tensor, bool] | None = None
        for states, (weight, bias) in self._read:
            now = states, bias is None
            if before is not None and before[0] is states and before[1] == now[1]:
                found[-1].append((weight, bias))
            else:
                found.append([(weight, bias)])
            before = now
        return found


class _Product:
    """Linear layers of one input as one product."""

    def __init__(self, linear: Sequence[_Linear]) -> None:
        weights = [weight.detach() for weight, _ in linear]
        biases = [bias.detach() for _, bias in linear if bias is not None]
        self._sizes = [len(weight) for weight in weights]
        self._bias = torch.cat(biases).float() if biases else None
        self._scale: torch.Tensor | None = None
        self._weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        if (copy := exact_copy(self._weight)) is not None:
            self._weight, self._scale = copy
        self._parts: Sequence[torch.Tensor] = ()

    def part(self, states: torch.Tensor, number: int) -> torch.Tensor:
        """What one of the linear layers gives, computed with the first of them."""
        if number == 0:
            weight = self._weight.float()
            if self._scale is not None:
                weight = weight * self._scale
            whole = F.linear(states.float(), weight, self._bias)
            self._parts = [whole] if len(self._sizes) == 1 else whole.split(self._sizes, dim=-1)
        return self._parts[number]


def _in(dtype: torch.dtype, bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.to(dtype)


def exact_copy(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """(copy, scale or None) of a matrix, in the narrowest of int8, bf16 and float16 that holds its
    values as they are; None if none does. One in half precision is its own copy."""
    if weight.dtype != torch.float32:
        return weight, None
    if (parts := int8_parts(weight)) is not None:
        return parts
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal((copy := weight.to(dtype)).float(), weight):
            return copy, None
    return None


def forget_traces() -> None:
    """Free what torch's tracer keeps of the modules traced so far, their weights among it.

    It registers the type of each traced module for the life of the process, and the type holds the
    constants. optimum-intel clears the same registry after each export. An OpenVINO model that
    shares its weights with such a module cannot be used any more.
    """
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    torch.jit._state._clear_class_state()
