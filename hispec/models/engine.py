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


class HeadStep(Protocol):
    """The graph of a head that reads the token before, and the tensors that it reads and writes:
    see `hispec.engine.head_step`."""

    tokens: int
    kinds: list[str]
    embedding_1TH: torch.Tensor
    before_1TH: torch.Tensor
    rope: dict[str, tuple[torch.Tensor, torch.Tensor]]
    mask: dict[str, torch.Tensor]
    own_1TH: torch.Tensor
    hidden_1TH: torch.Tensor
    sure_1T: torch.Tensor
    logits_1TW: torch.Tensor
    reads: list[int]
    """Depths whose states `fuse` reads, from `states`; none for a head that reads one state."""
    states: list[torch.Tensor]

    def fuse(self) -> None:
        """Compute `before_1TH`, what the head reads of a token, from `states`."""

    def bind(self, cache: PassCache) -> None:
        """Read the keys and values of this cache, and make room for masks over its slots."""

    def run(self) -> None:
        """Compute the outputs from the inputs."""

    def keep(self, cache: PassCache, first: int, count: int) -> None:
        """Put the keys and values of the first `count` tokens into the slots from `first` on."""


class Engine(Protocol):
    """Runs the cached passes of a model in place of its modules; see `hispec.engine`."""

    name: str
    few: int
    """Tokens of a pass that take as long as one; a step of a chain takes so many."""
    threads: int
    """Those of its own. Between its passes torch uses one: two pools that take turns on the same
    cores wait for each other, 6 ms at a time."""
    dtype: torch.dtype
    """Of the states that it computes with, whatever the dtype of the weights."""
    prompt_tokens: int
    """Tokens of a pass over prompts, at most."""
    block: int
    """The cache shows slots in multiples of this."""
    cold_passes: int
    """Graphs that have run for the first time or with other sizes than before, and took longer for
    it: how long they took says nothing of the next pass."""
    say: Callable[[str], None]
    """Called with a sentence for the user before work that takes seconds."""

    def compile(self, progress: Progress) -> list[Path]:
        """Compile or load all that the model needs; returns the files that hold it."""

    def load(self, progress: Progress) -> list[Path]:
        """As `compile`; where something has to be compiled, it is said."""

    def refresh(self) -> None:
        """Drop what was compiled from weights that have changed since; called before a decode."""

    def takes(self, states: torch.Tensor) -> bool:
        """Whether it turns these states [..., H] into logits."""

    def run(
        self,
        layers: Sequence[tuple[nn.Module, str]],
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor,
        cache: PassCache,
        reads: Sequence[int] = (),
    ) -> list[torch.Tensor]:
        """Hidden states [B, T, H] at the depths of `reads`, then those after all of these layers,
        each with its attention type. They are valid until the next pass.

        Args:
            reads: depths between the layers that heads of the model read, increasing.
        """

    def rope(self, kind: str, first: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) [1, T, head size] of an attention type for positions from `first` on."""

    def head_step(self, depth: int) -> HeadStep:
        """The step of a chain of drafts from the head at a depth, which reads the token before."""

    def project(self, normed: torch.Tensor, head: int) -> torch.Tensor:
        """Logits of normed states [..., H].

        Args:
            head: `WHOLE` for the LM head, [..., V]; `DRAFTING` for its rows of the draft
                vocabulary, [..., W]; else the depth of an exit that has an LM head of its own.
        """
