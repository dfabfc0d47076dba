"""Token windows of a recipe's text: documents, split, shuffled, tokenized, packed."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.utils.data import TensorDataset

from hispec.packing import Rows, evenly_spaced, windows
from hispec.text import documents, split

from .recipe import Recipe


def training_sets(recipe: Recipe, tokenizer: Any, processes: int = 1) -> tuple[TensorDataset, Rows]:
    """(training rows as `lesson` gives them, held-out rows). Both depend on the recipe alone."""
    training, held_out = split(
        documents(recipe.data, recipe.text_column, recipe.data_split), recipe.held_out
    )
    random.Random(recipe.seed).shuffle(training)
    needed = recipe.steps * recipe.batch_size * recipe.accumulate * processes
    held_out_rows = windows(held_out, tokenizer, recipe.seq_len)
    rows = windows(training, tokenizer, recipe.seq_len, needed)
    return TensorDataset(*lesson(rows)), evenly_spaced(held_out_rows, recipe.eval_sequences)


def lesson(rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, labels, positions) [R, T] of rows: what a batch is made of."""
    labels_RT = next_tokens(rows.tokens_RT, rows.taught_RT, rows.positions_RT)
    return rows.tokens_RT, labels_RT, rows.positions_RT


def next_tokens(
    rows_RT: torch.Tensor,
    taught_RT: torch.Tensor | None = None,
    positions_RT: torch.Tensor | None = None,
) -> torch.Tensor:
    """The token after each; -100 where it is not to be learned, or not known: at the end of the row
    and of each document in it."""
    labels_RT = torch.full_like(rows_RT, -100)
    labels_RT[:, :-1] = rows_RT[:, 1:]
    if taught_RT is not None:
        labels_RT[:, :-1][~taught_RT[:, 1:]] = -100
    if positions_RT is not None:
        labels_RT[:, :-1][positions_RT[:, 1:] == 0] = -100
    return labels_RT
