"""Published sizes of the recipes' base models, for plans where the model is not on this machine."""

from __future__ import annotations

from typing import Any


def _llama(
    hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": hidden // heads,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": _llama(4096, 14336, 32, 32, 8, vocab_size=128256),
    "meta-llama/Llama-3.2-1B": _llama(
        2048, 8192, 16, 32, 8, vocab_size=128256, tie_word_embeddings=True
    ),
    "meta-llama/Llama-2-7b-hf": _llama(4096, 11008, 32, 32, 32),
    "meta-llama/Llama-2-13b-hf": _llama(5120, 13824, 40, 40, 40),
    "meta-llama/Llama-2-70b-hf": _llama(8192, 28672, 80, 64, 8),
    "codellama/CodeLlama-7b-hf": _llama(4096, 11008, 32, 32, 32, vocab_size=32016),
    "codellama/CodeLlama-34b-hf": _llama(8192, 22016, 48, 64, 8),
    "Qwen/Qwen3-0.6B": _llama(
        *(1024, 3072, 28, 16, 8),
        **dict(model_type="qwen3", head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    ),
    "Qwen/Qwen3-8B": _llama(
        4096, 12288, 36, 32, 8, model_type="qwen3", head_dim=128, vocab_size=151936
    ),
    "gemma3-270m": _llama(
        *(640, 2048, 18, 4, 1),
        **dict(model_type="gemma3_text", head_dim=256, vocab_size=262144, tie_word_embeddings=True),
    ),
    "qwen2.5-coder-1.5b": _llama(1536, 8960, 28, 12, 2, model_type="qwen2", vocab_size=151936),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True),
}
