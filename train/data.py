"""The training and held-out rows of a recipe: documents, split, shuffled, tokenized, packed."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.utils.data import Dataset

from hispec.data.documents import documents, split
from hispec.data.packing import Rows, evenly_spaced, next_tokens, windows
from train.recipe import Recipe


class TrainingRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens with labels and positions, as dicts of tensors: one row [T], or some
    [B, T]."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.labels_RT = next_tokens(rows.tokens_RT, rows.loss_mask_RT, rows.positions_RT)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> dict[str, torch.Tensor]:
        return {
            "tokens": self.rows.tokens_RT[index],
            "labels": self.labels_RT[index],
            "positions": self.rows.positions_RT[index],
        }


def training_sets(recipe: Recipe, tokenizer: Any, processes: int = 1) -> tuple[TrainingRows, Rows]:
    """(training rows, held-out rows). Both depend on the recipe alone.

    Raises:
        ValueError: the data cannot be read, or is less than one row of either.
    """
    found = documents(recipe.data, recipe.text_column, recipe.data_split)
    name = f"data={recipe.data!r}"
    try:
        training, held_out = split(found, recipe.held_out)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    random.Random(recipe.seed).shuffle(training)
    needed = recipe.steps * recipe.batch_size * recipe.accumulate * processes
    if recipe.max_rows is not None:
        needed = min(needed, recipe.max_rows)
    held_out_rows = windows(
        held_out, tokenizer, recipe.seq_len, name=f"the held-out documents of {name}"
    )
    rows = windows(training, tokenizer, recipe.seq_len, needed, name)
    return TrainingRows(rows), evenly_spaced(held_out_rows, recipe.eval_sequences)


def frequent_tokens(labels_RT: torch.Tensor, count: int, vocab_size: int) -> torch.Tensor:
    """The `count` token ids that occur most often as labels, in increasing order.

    Of equally frequent tokens those with smaller ids are taken: byte-pair vocabularies number their
    tokens by frequency.
    """
    labels_N = labels_RT[labels_RT >= 0]
    often_V = torch.bincount(labels_N, minlength=vocab_size)
    return often_V.sort(descending=True, stable=True).indices[:count].sort().values
