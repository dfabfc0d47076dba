"""Text of tokens as they come."""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Gives the text that each token of one text completes; special tokens have none.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._shown = 0

    def step(self, token: int, *, last: bool = False) -> str:
        """The text that a token completed, possibly empty.

        Args:
            last: no token will follow, so what is held back of a broken character comes too.
        """
        self._tokens.append(token)
        text = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        if last:
            whole: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            text = whole[self._shown :]
        self._shown += len(text)
        return text
