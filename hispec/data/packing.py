"""Rows of tokens: documents packed one after another, each computed as a text of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch

from hispec.data.chat import encode
from hispec.data.documents import Document

DOCUMENTS_AT_ONCE = 64
"""Documents that are tokenized in one call."""

T = TypeVar("T")
Tokens = tuple[list[int], list[bool]]
"""Token ids of a document, and whether each of them counts in the loss."""


@dataclass(frozen=True)
class Rows:
    """Packed documents, and where each of them begins."""

    tokens_RT: torch.Tensor
    """Token ids."""
    loss_mask_RT: torch.Tensor
    """Whether each token counts in the loss, bool: in a chat only what the assistant wrote."""
    positions_RT: torch.Tensor
    """Positions of the tokens, counted from 0 in each document and in each row."""

    @classmethod
    def whole(cls, tokens_RT: torch.Tensor) -> Rows:
        """Rows that are one text each."""
        positions_RT = torch.arange(tokens_RT.shape[1], device=tokens_RT.device)
        loss_mask_RT = torch.ones_like(tokens_RT, dtype=torch.bool)
        return cls(tokens_RT, loss_mask_RT, positions_RT.expand_as(tokens_RT))

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """All rows of the parts."""
        return cls(
            torch.cat([part.tokens_RT for part in parts]),
            torch.cat([part.loss_mask_RT for part in parts]),
            torch.cat([part.positions_RT for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.tokens_RT)

    def __getitem__(self, index: slice | torch.Tensor) -> Rows:
        return Rows(self.tokens_RT[index], self.loss_mask_RT[index], self.positions_RT[index])

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token ids [R, T], and positions [R, T] if any row is packed, as `ExitModel.run` takes
        them."""
        positions_RT = positions_if_packed(self.positions_RT)
        if positions_RT is not None:
            positions_RT = positions_RT.to(device)
        return self.tokens_RT.to(device), positions_RT

    def one_by_one(
        self, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield (token ids [1, T], positions [1, T] or None) of each row, see `on`."""
        for r in range(len(self)):
            yield self[r : r + 1].on(device)


def positions_if_packed(positions_BT: torch.Tensor) -> torch.Tensor | None:
    """The positions, or None if no row holds more than one document, so that no mask is needed.

    On a GPU this waits for the device: call it once per pass, not once per layer.
    """
    return positions_BT if bool((positions_BT[:, 1:] == 0).any()) else None


def windows(
    documents: Iterable[Document],
    tokenizer: Any,
    seq_len: int,
    most: int | None = None,
    name: str = "text",
) -> Rows:
    """Tokenize documents and pack them one after another into rows of `seq_len` tokens.

    EOS is added after a text; a chat ends as its template ends it.

    Args:
        most: rows wanted; only as many documents are read and tokenized as they need.
        name: of the documents, for messages.

    Raises:
        ValueError: the documents do not fill one row, or a chat cannot be rendered.
    """
    parts: list[Tokens] = []
    tokens = 0
    for some in in_parts(documents, DOCUMENTS_AT_ONCE):
        new = encoded(some, tokenizer)
        parts += new
        tokens += sum(len(ids) for ids, _ in new)
        if most is not None and tokens >= most * seq_len:
            break
    rows = tokens // seq_len
    rows = rows if most is None else min(rows, most)
    if rows == 0:
        raise ValueError(f"{tokens} tokens of {name} do not fill one row of {seq_len}")
    return packed(parts, seq_len, rows)


def in_parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`; the last one may be shorter."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def encoded(documents: Sequence[Document], tokenizer: Any) -> list[Tokens]:
    """Tokenize documents. Raises ValueError: a chat that cannot be rendered."""
    texts = [d.text for d in documents if not d.chat]
    tokenized = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else [])
    found: list[Tokens] = []
    for document in documents:
        if document.chat:
            found.append(encode(document.chat, tokenizer, document.name))
        else:
            ids = [*next(tokenized), tokenizer.eos_token_id]
            found.append((ids, [True] * len(ids)))
    return found


def packed(parts: Sequence[Tokens], seq_len: int, rows: int) -> Rows:
    """Pack tokenized documents (or ends of documents) and return the first `rows` rows."""
    total = rows * seq_len
    tokens_N = torch.cat([torch.tensor(ids, dtype=torch.long) for ids, _ in parts])[:total]
    mask_N = torch.cat([torch.tensor(mask, dtype=torch.bool) for _, mask in parts])[:total]
    begins_N = torch.zeros(total, dtype=torch.bool)
    begin = 0
    for ids, _ in parts:
        if begin < total:
            begins_N[begin] = True
        begin += len(ids)
    column_T = torch.arange(seq_len)
    begin_RT = torch.where(begins_N.view(rows, seq_len), column_T, 0).cummax(1).values
    shape = rows, seq_len
    return Rows(tokens_N.view(shape), mask_N.view(shape), column_T - begin_RT)


def evenly_spaced(rows: Rows, count: int) -> Rows:
    """Select `count` rows (or all, if fewer) at even distances, first and last included."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()]


def next_tokens(
    rows_RT: torch.Tensor,
    loss_mask_RT: torch.Tensor | None = None,
    positions_RT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Labels [R, T]: the token after each one, or -100.

    -100 stands at the end of a row and of each document in it, where the next token is unknown,
    and where the next token is masked out.
    """
    labels_RT = torch.full_like(rows_RT, -100)
    labels_RT[:, :-1] = rows_RT[:, 1:]
    if loss_mask_RT is not None:
        labels_RT[:, :-1][~loss_mask_RT[:, 1:]] = -100
    if positions_RT is not None:
        labels_RT[:, :-1][positions_RT[:, 1:] == 0] = -100
    return labels_RT
