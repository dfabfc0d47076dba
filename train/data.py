"""Token windows of a recipe's text: documents, split, shuffled, tokenized, packed."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.utils.data import TensorDataset

from hispec.text import documents, evenly_spaced, split, taught_windows, windows

from .recipe import Recipe


def training_sets(
    recipe: Recipe, tokenizer: Any, processes: int = 1
) -> tuple[TensorDataset, TensorDataset]:
    """(training rows and their labels, held-out rows). Both depend on the recipe alone."""
    training, held_out = split(
        documents(recipe.data, recipe.text_column, recipe.data_split), recipe.held_out
    )
    random.Random(recipe.seed).shuffle(training)
    needed = recipe.steps * recipe.batch_size * recipe.accumulate * processes
    held_out_RT = windows(held_out, tokenizer, recipe.seq_len)
    rows_RT, taught_RT = taught_windows(training, tokenizer, recipe.seq_len, needed)
    return (
        TensorDataset(rows_RT, next_tokens(rows_RT, taught_RT)),
        TensorDataset(evenly_spaced(held_out_RT, recipe.eval_sequences)),
    )


def next_tokens(rows_RT: torch.Tensor, taught_RT: torch.Tensor | None = None) -> torch.Tensor:
    """The token after each; -100 where it is not to be learned, or not known: at the row's end."""
    labels_RT = torch.full_like(rows_RT, -100)
    labels_RT[:, :-1] = rows_RT[:, 1:]
    if taught_RT is not None:
        labels_RT[:, :-1][~taught_RT[:, 1:]] = -100
    return labels_RT
