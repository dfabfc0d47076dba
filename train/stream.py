"""Training rows of a data set that is too large to be read at once, resumable at every row.

The documents are read in the order of their source and packed into rows. A block of rows is read,
shuffled and used up, then the next one. When the data ends it begins again, in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hispec.data.documents import SEARCHED, Document, held_out_stream, is_held_out, stream_documents
from hispec.data.packing import DOCUMENTS_AT_ONCE, Rows, Tokens, encoded, in_parts, packed, windows
from train.recipe import Recipe

BLOCK = 4096
"""Rows that are shuffled among each other; fewer where a run needs fewer."""


@dataclass(frozen=True)
class Position:
    """Position of a stream of rows: its current block, and how to build that block again."""

    epoch: int = 0
    """Number of times that the data has ended."""
    block: int = 0
    """Number of the block in its epoch."""
    document: int = 0
    """Number in the source of the document that the block begins with."""
    token: int = 0
    """Offset in this document, in tokens."""
    row: int = 0
    """Rows of the block that were used."""


class RowStream:
    """Rows of training documents without end; from the same position on always the same rows.

    Every process reads the same stream and takes its own rows of it, so none waits for another.

    Args:
        read: yields the documents of the source from a number on.
        is_left_out: whether a document is held out from training.
        block_rows: rows that are shuffled among each other.
        name: name of the source, for messages.
    """

    def __init__(
        self,
        read: Callable[[int], Iterator[Document]],
        tokenizer: Any,
        seq_len: int,
        *,
        is_left_out: Callable[[Document], bool],
        block_rows: int = BLOCK,
        seed: int = 0,
        name: str = "text",
    ) -> None:
        self._read = read
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._is_left_out = is_left_out
        self._block_rows = block_rows
        self._seed = seed
        self._name = name
        self.seek(Position())

    def seek(self, position: Position) -> None:
        """Continue at an earlier value of `position`. The documents before its block are skipped
        without being tokenized; the block itself is built again."""
        self.position = position
        self._blocks = self._blocks_from(position)
        self._block: Rows | None = None

    def take(self, count: int) -> Rows:
        """The next `count` rows.

        Raises:
            ValueError: the text does not fill one row, or its documents cannot be read.
        """
        parts: list[Rows] = []
        while count > 0:
            if self._block is None:
                begin, self._block = next(self._blocks)
                self.position = replace(begin, row=self.position.row)
            row = self.position.row
            if row >= len(self._block):
                self._block, self.position = None, replace(self.position, row=0)
                continue
            part = self._block[row : row + count]
            self.position = replace(self.position, row=row + len(part))
            parts.append(part)
            count -= len(part)
        return Rows.joined(parts)

    def first_block(self) -> Rows:
        """The rows of the first block, whatever the stream's position."""
        _, rows = next(self._blocks_from(Position()))
        return rows

    def _blocks_from(self, at: Position) -> Iterator[tuple[Position, Rows]]:
        """Yield (its first position, its shuffled rows) of every block, from that of `at` on."""
        full = self._block_rows * self._seq_len
        begin = replace(at, row=0)
        while True:
            parts: list[Tokens] = []
            held = 0
            offset = begin.token
            for number, (ids, taught) in self._texts(begin.document):
                while held + len(ids) - offset >= full:
                    stop = offset + full - held
                    parts.append((ids[offset:stop], taught[offset:stop]))
                    yield begin, self._shuffled(begin, parts, self._block_rows)
                    begin = Position(begin.epoch, begin.block + 1, number, stop)
                    parts, held, offset = [], 0, stop
                parts.append((ids[offset:], taught[offset:]))
                held += len(ids) - offset
                offset = 0
            rows = held // self._seq_len
            if rows > 0:
                yield begin, self._shuffled(begin, parts, rows)
            elif begin == Position(begin.epoch):
                raise ValueError(
                    f"{self._name}: the stream ended after {held} tokens to train on, which do not "
                    f"fill one row of {self._seq_len}"
                )
            begin = Position(begin.epoch + 1)

    def _shuffled(self, begin: Position, parts: list[Tokens], count: int) -> Rows:
        """The rows of a block, in an order that (seed, epoch, block) fixes."""
        generator = np.random.default_rng([self._seed, begin.epoch, begin.block])
        order_R = torch.from_numpy(generator.permutation(count))
        return packed(parts, self._seq_len, count)[order_R]

    def _texts(self, first: int) -> Iterator[tuple[int, Tokens]]:
        """Yield (number in the source, tokens) of every training document, from a number on."""
        numbered = enumerate(self._read(first), start=first)
        kept = ((number, d) for number, d in numbered if not self._is_left_out(d))
        for some in in_parts(kept, DOCUMENTS_AT_ONCE):
            tokens = encoded([document for _, document in some], self._tokenizer)
            yield from zip((number for number, _ in some), tokens, strict=True)


def streamed_sets(recipe: Recipe, tokenizer: Any, processes: int = 1) -> tuple[RowStream, Rows]:
    """(training rows, held-out rows) of a recipe's data, read as they are needed.

    The held-out rows are the first rows of the held-out documents in the stream: rows spread over
    the whole data would need all of it.

    Raises:
        ValueError: the data does not exist, or its beginning has less than one held-out row.
    """
    source = recipe.data, recipe.text_column, recipe.data_split
    held_out = windows(
        held_out_stream(*source, recipe.held_out),
        tokenizer,
        recipe.seq_len,
        recipe.eval_sequences,
        f"the held-out documents (held_out={recipe.held_out}) among the first {SEARCHED:,} of "
        f"data={recipe.data!r}",
    )
    rows = RowStream(
        lambda skip: stream_documents(*source, skip),
        tokenizer,
        recipe.seq_len,
        is_left_out=lambda document: is_held_out(document, recipe.held_out),
        block_rows=min(BLOCK, recipe.steps * recipe.accumulate * recipe.batch_size * processes),
        seed=recipe.seed,
        name=f"data={recipe.data!r}",
    )
    return rows, held_out
