"""Training rows of a text that is too large to be read at once, resumable at every row.

The documents come in the order of their source and are packed into rows, a block of rows is read,
shuffled and given out, then the next one. When the text ends it begins again, in another order.
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
    """Where a stream of rows stands: which block is being given out, and how to build it again."""

    epoch: int = 0
    """Times that the text has ended."""
    block: int = 0
    """Number of the block in its epoch."""
    document: int = 0
    """Place in the source of the document that the block begins with."""
    token: int = 0
    """Where in this document."""
    row: int = 0
    """Rows of the block that were given out."""


class RowStream:
    """Rows of training documents without end, the same ones from the same position on.

    Every process reads the same stream and takes its own rows of it, so none waits for another.

    Args:
        read: the documents of the source from a number on.
        is_left_out: which of them are not trained on.
        block_rows: rows that are shuffled among each other.
        name: of the source, for messages.
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
        """Go on from what `position` was before. The documents up to it are skipped, not tokenized;
        the block that it lies in is built again."""
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
        """The rows of the first block, wherever the stream stands."""
        _, rows = next(self._blocks_from(Position()))
        return rows

    def _blocks_from(self, at: Position) -> Iterator[tuple[Position, Rows]]:
        """(where it begins, its shuffled rows) of every block from that of a position on."""
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
        """The rows of a block in the order of its place: (seed, epoch, block)."""
        generator = np.random.default_rng([self._seed, begin.epoch, begin.block])
        order_R = torch.from_numpy(generator.permutation(count))
        return packed(parts, self._seq_len, count)[order_R]

    def _texts(self, first: int) -> Iterator[tuple[int, Tokens]]:
        """(its number in the source, tokens) of every training document from a number on."""
        numbered = enumerate(self._read(first), start=first)
        kept = ((number, d) for number, d in numbered if not self._is_left_out(d))
        for some in in_parts(kept, DOCUMENTS_AT_ONCE):
            tokens = encoded([document for _, document in some], self._tokenizer)
            yield from zip((number for number, _ in some), tokens, strict=True)


def streamed_sets(recipe: Recipe, tokenizer: Any, processes: int = 1) -> tuple[RowStream, Rows]:
    """(training rows, held-out rows) of a recipe's text, read as they are needed.

    The held-out rows are the first ones of the held-out documents that the stream brings: rows
    spread over the whole text would need all of it.

    Raises:
        ValueError: there is no such text, or its beginning has less than one held-out row.
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
