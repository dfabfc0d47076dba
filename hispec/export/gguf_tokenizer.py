"""Describes a byte-level BPE tokenizer in the metadata of a GGUF file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from transformers import PreTrainedModel

from hispec.base_models.model_folder import load_tokenizer

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_AFTER_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


# The steps that split text into words, llama.cpp's name for them, and whether a word that is a
# token as it stands is taken without merging, which llama.cpp ties to the name.
_CUTS: list[tuple[list[dict[str, Any]], str, bool]] = [
    ([_BYTE_LEVEL], "gpt-2", False),
    ([{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL], "smollm", False),
    ([_split(_LLAMA3), _AFTER_SPLIT], "llama-bpe", True),
    ([_split(_QWEN2), _AFTER_SPLIT], "qwen2", False),
]


@dataclass(frozen=True)
class GgufTokenizer:
    """The tokenizer of a GGUF file."""

    pre: str
    """llama.cpp's name of the way to cut text into words."""
    tokens: list[str]
    kinds: list[gguf.TokenType]
    merges: list[str]
    special: dict[str, int | None]
    """Ids of `bos`, `eos`, `unk` and `pad`."""
    add_bos: bool
    add_eos: bool
    chat_template: str | None

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        for name, number in self.special.items():
            if number is not None:
                getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_tokenizer(folder: Path, hf: PreTrainedModel) -> GgufTokenizer:
    """The tokenizer in a model's folder.

    Raises:
        ValueError: it is no byte-level BPE, or does something that llama.cpp has no name for.
    """
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"the tokenizer in {folder} is none of the library `tokenizers`")
    # As it is loaded: for some architectures transformers sets parts that the file says otherwise.
    content = json.loads(backend.to_str())
    pre = _name_of(folder, content)
    size = hf.config.vocab_size
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= size:
        raise ValueError(f"the tokenizer in {folder} has more tokens than the model's {size}")
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [gguf.TokenType.UNUSED] * size
    for token, number in vocabulary.items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        if odd := [key for key in ("single_word", "lstrip", "rstrip") if added[key]]:
            raise ValueError(
                f"the tokenizer in {folder}: the token {added['content']!r} has {odd[0]}, which "
                "llama.cpp has not"
            )
        control = added["special"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    add_bos, add_eos = _what_it_adds(folder, tokenizer)
    template = tokenizer.chat_template
    return GgufTokenizer(
        pre,
        tokens,
        kinds,
        merges,
        {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")},
        add_bos,
        add_eos,
        template if isinstance(template, str) else None,
    )


def _name_of(folder: Path, content: dict[str, Any]) -> str:
    """llama.cpp's name for the way a tokenizer cuts text. Raises ValueError if it has none."""
    model = content["model"]
    plain = model["type"] == "BPE" and not any(
        model.get(key)
        for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    )
    if not plain or "ByteLevel" not in str(content["pre_tokenizer"]):
        raise ValueError(
            f"the tokenizer in {folder} is no byte-level BPE; other tokenizers are not written as "
            "GGUF, because the scores of the pieces, which llama.cpp needs, do not stand there"
        )
    cut = content["pre_tokenizer"]
    steps = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    normalizer = (content.get("normalizer") or {}).get("type")
    for known, name, whole_words in _CUTS:
        if (
            len(known) == len(steps)
            and all(_is(step, want) for step, want in zip(steps, known, strict=True))
            and bool(model.get("ignore_merges")) == whole_words
            and normalizer in ((None, "NFC") if name == "qwen2" else (None,))
        ):
            return name
    raise ValueError(
        f"the tokenizer in {folder} cuts text into words in a way for which no name in llama.cpp "
        f"is known here; those of {', '.join(name for _, name, _ in _CUTS)} are"
    )


def _is(step: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(step.get(key, True) == value for key, value in wanted.items())


def _what_it_adds(folder: Path, tokenizer: Any) -> tuple[bool, bool]:
    """Whether BOS and EOS are put around a text. Raises ValueError if anything else is."""
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x")["input_ids"]
    for bos, eos in ((False, False), (True, False), (False, True), (True, True)):
        before = [tokenizer.bos_token_id] if bos else []
        after = [tokenizer.eos_token_id] if eos else []
        if whole == [*before, *bare, *after]:
            return bos, eos
    raise ValueError(
        f"the tokenizer in {folder} puts more around a text than BOS and EOS, and a GGUF cannot "
        "say so"
    )
