"""What `ExitModel` asks of an engine; `hispec.engine` has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from hispec.models.attention import PassCache
from hispec.utils.console import Progress

WHOLE, DRAFTING = -1, -2
"""Parts of the LM head that an engine projects with."""


class Engine(Protocol):
    """Runs the cached passes of a model in place of its modules; see `hispec.engine`."""

    name: str
    dtype: torch.dtype
    """Of the states that it computes with, whatever the dtype of the weights."""
    block: int
    """The cache shows slots in multiples of this."""
    say: Callable[[str], None]
    """Called with a sentence for the user before work that takes seconds."""

    def compile(self, progress: Progress) -> list[Path]:
        """Compile or load all that the model needs; returns the files that hold it."""

    def refresh(self) -> None:
        """Drop what was compiled from weights that have changed since; called before a decode."""

    def takes(self, states: torch.Tensor) -> bool:
        """Whether it runs a pass with these states [..., H], or turns them into logits."""

    def run(
        self,
        layers: Sequence[tuple[nn.Module, str]],
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor,
        cache: PassCache,
    ) -> torch.Tensor:
        """Hidden states [B, T, H] after these layers, each with its attention type."""

    def project(self, normed: torch.Tensor, head: int) -> torch.Tensor:
        """Logits of normed states [..., H].

        Args:
            head: `WHOLE` for the LM head, [..., V]; `DRAFTING` for its rows of the draft
                vocabulary, [..., W]; else the depth of an exit that has an LM head of its own.
        """
