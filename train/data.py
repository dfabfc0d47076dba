"""Token windows of a recipe's text: documents, split, shuffled, tokenized, packed."""

from __future__ import annotations

import random
from typing import Any

from torch.utils.data import TensorDataset

from hispec.text import documents, evenly_spaced, split, windows

from .recipe import Recipe


def training_sets(
    recipe: Recipe, tokenizer: Any, processes: int = 1
) -> tuple[TensorDataset, TensorDataset]:
    """(training rows, held-out rows). Both depend on the recipe alone."""
    training, held_out = split(
        documents(recipe.data, recipe.text_column, recipe.data_split), recipe.held_out
    )
    random.Random(recipe.seed).shuffle(training)
    needed = recipe.steps * recipe.batch_size * processes
    held_out_RT = windows(held_out, tokenizer, recipe.seq_len)
    return (
        TensorDataset(windows(training, tokenizer, recipe.seq_len, needed)),
        TensorDataset(evenly_spaced(held_out_RT, recipe.eval_sequences)),
    )
