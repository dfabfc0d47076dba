"""Rows of tokens: documents laid one after another, each of them a text of its own."""

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
"""Token ids of a document, and whether each is to be learned."""


@dataclass(frozen=True)
class Rows:
    """Packed documents, and where each of them begins."""

    tokens_RT: torch.Tensor
    taught_RT: torch.Tensor
    """Whether each token is to be learned, bool: in a chat only what the assistant wrote."""
    positions_RT: torch.Tensor
    """Places of the tokens, from 0 on in each document and in each row."""

    @classmethod
    def whole(cls, tokens_RT: torch.Tensor) -> Rows:
        """Rows each of which is one text."""
        places_RT = torch.arange(tokens_RT.shape[1], device=tokens_RT.device).expand_as(tokens_RT)
        return cls(tokens_RT, torch.ones_like(tokens_RT, dtype=torch.bool), places_RT)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """All rows of the parts."""
        return cls(
            torch.cat([part.tokens_RT for part in parts]),
            torch.cat([part.taught_RT for part in parts]),
            torch.cat([part.positions_RT for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.tokens_RT)

    def __getitem__(self, picked: slice | torch.Tensor) -> Rows:
        return Rows(self.tokens_RT[picked], self.taught_RT[picked], self.positions_RT[picked])

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token ids [R, T], and positions [R, T] if any row has a border, for `ExitModel.run`."""
        positions_RT = positions_if_packed(self.positions_RT)
        if positions_RT is not None:
            positions_RT = positions_RT.to(device)
        return self.tokens_RT.to(device), positions_RT

    def one_by_one(
        self, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Each row on its own, see `on`."""
        for r in range(len(self)):
            yield self[r : r + 1].on(device)


def positions_if_packed(positions_BT: torch.Tensor) -> torch.Tensor | None:
    """The positions, or None where no row holds more than one document and no mask is needed.

    On a GPU this waits for the device: ask once per pass, not once per layer.
    """
    return positions_BT if bool((positions_BT[:, 1:] == 0).any()) else None


def windows(
    documents: Iterable[Document],
    tokenizer: Any,
    seq_len: int,
    most: int | None = None,
    name: str = "text",
) -> Rows:
    """Documents one after another, cut into rows of `seq_len` tokens.

    A text is ended by EOS; a chat ends as its template ends it.

    Args:
        most: rows wanted; only as many documents are read and tokenized as they need.
        name: of the documents, for messages.

    Raises:
        ValueError: less text than one row, or a chat that cannot be rendered.
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
    """The items in lists of `size`, the last one shorter."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def encoded(documents: Sequence[Document], tokenizer: Any) -> list[Tokens]:
    """What each document is as tokens. Raises ValueError: a chat that cannot be rendered."""
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
    """The first `rows` rows of documents (or ends of such) laid one after another."""
    total = rows * seq_len
    tokens_N = torch.cat([torch.tensor(ids, dtype=torch.long) for ids, _ in parts])[:total]
    taught_N = torch.cat([torch.tensor(taught, dtype=torch.bool) for _, taught in parts])[:total]
    begins_N = torch.zeros(total, dtype=torch.bool)
    begin = 0
    for ids, _ in parts:
        if begin < total:
            begins_N[begin] = True
        begin += len(ids)
    places_T = torch.arange(seq_len)
    begin_RT = torch.where(begins_N.view(rows, seq_len), places_T, 0).cummax(1).values
    shape = rows, seq_len
    return Rows(tokens_N.view(shape), taught_N.view(shape), places_T - begin_RT)


def evenly_spaced(rows: Rows, count: int) -> Rows:
    """`count` of the rows (or all, if there are fewer), spread over the whole of them."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()]


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
