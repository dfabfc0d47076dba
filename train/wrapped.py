"""The module that accelerate wraps, and what its forward pass returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hispec.models.exit_model import ExitModel


@dataclass
class Outcome:
    """What a job returned from `Wrapped.forward`.

    Under mixed precision accelerate turns all tensors that a forward pass returns into float32. It
    does not look into a dataclass, so that results keep their dtype.
    """

    value: Any


class Wrapped(nn.Module):
    """The module that accelerate wraps: what is trained, and what is frozen where it is sharded.

    Everything that touches the model runs inside `forward`, as a job that receives the model, so
    that the hooks of DDP, FSDP and ZeRO see it.

    Args:
        with_trunk: whether the trunk belongs to it: it is trained, or sharded.
        base: an untouched base that is sharded too.
    """

    def __init__(
        self, model: ExitModel, *, with_trunk: bool, base: ExitModel | None = None
    ) -> None:
        super().__init__()
        self.heads = model.heads
        if with_trunk:
            self.trunk = model.hf
        if base is not None:
            self.base = base.hf
        self._model = (model,)  # in a tuple: a frozen trunk must not become a submodule
        self._no_split_modules = model.hf._no_split_modules  # the units that FSDP shards

    def tie_weights(self) -> None:
        """Tie the LM head to the embedding again where they were tied; accelerate's FSDP calls it
        after it has moved the parameters."""
        self._model[0].hf.tie_weights()
        if hasattr(self, "base"):
            self.base.tie_weights()

    def forward(self, job: Callable[..., Any], *args: Any) -> Outcome:
        return Outcome(job(self._model[0], *args))
