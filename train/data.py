"""Token windows of a recipe's text: documents, split, shuffled, tokenized, packed."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.utils.data import Dataset

from hispec.text import documents, evenly_spaced, split, taught_windows, windows

from .recipe import Recipe


class TrainingRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of text and what they teach; one row is a dict of tensors [T]."""

    def __init__(
        self,
        tokens_RT: torch.Tensor,
        labels_RT: torch.Tensor,
        positions_RT: torch.Tensor | None = None,
    ) -> None:
        self.tokens_RT = tokens_RT
        self.labels_RT = labels_RT
        self.positions_RT = positions_RT

    def __len__(self) -> int:
        return len(self.tokens_RT)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"tokens": self.tokens_RT[row], "labels": self.labels_RT[row]}

    def texts(self, rows: slice, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(tokens, positions if they are not simply 0, 1, ...) of some rows."""
        return self.tokens_RT[rows].to(device), None


def training_sets(
    recipe: Recipe, tokenizer: Any, processes: int = 1
) -> tuple[TrainingRows, torch.Tensor]:
    """(training rows, held-out rows of tokens). Both depend on the recipe alone."""
    training, held_out = split(
        documents(recipe.data, recipe.text_column, recipe.data_split), recipe.held_out
    )
    random.Random(recipe.seed).shuffle(training)
    needed = recipe.steps * recipe.batch_size * recipe.accumulate * processes
    if recipe.max_rows is not None:
        needed = min(needed, recipe.max_rows)
    held_out_RT = windows(held_out, tokenizer, recipe.seq_len)
    rows_RT, taught_RT = taught_windows(training, tokenizer, recipe.seq_len, needed)
    return (
        TrainingRows(rows_RT, next_tokens(rows_RT, taught_RT)),
        evenly_spaced(held_out_RT, recipe.eval_sequences),
    )


def next_tokens(rows_RT: torch.Tensor, taught_RT: torch.Tensor | None = None) -> torch.Tensor:
    """The token after each; -100 where it is not to be learned, or not known: at the row's end."""
    labels_RT = torch.full_like(rows_RT, -100)
    labels_RT[:, :-1] = rows_RT[:, 1:]
    if taught_RT is not None:
        labels_RT[:, :-1][~taught_RT[:, 1:]] = -100
    return labels_RT


def frequent_tokens(labels_RT: torch.Tensor, count: int, vocab_size: int) -> torch.Tensor:
    """The `count` token ids that are to be learned most often, in increasing order.

    Of equally frequent ones the smaller ids are taken: byte-pair vocabularies number their tokens
    by frequency.
    """
    labels_N = labels_RT[labels_RT >= 0]
    often_V = torch.bincount(labels_N, minlength=vocab_size)
    return often_V.sort(descending=True, stable=True).indices[:count].sort().values
