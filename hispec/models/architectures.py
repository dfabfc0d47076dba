"""The supported architectures, and what their configs say of layers and lengths."""

from __future__ import annotations

from typing import Any

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma3_text"),
    *("smollm3", "olmo2", "phi3", "granite"),
)
FULL, SLIDING = "full_attention", "sliding_attention"

_RECURRENT = {
    *("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "kimi_linear"),
    *("bamba", "jamba", "zamba", "zamba2", "falcon_h1", "nemotron_h", "granitemoehybrid"),
    *("recurrent_gemma", "lfm2", "lfm2_moe", "olmo_hybrid", "bailing_hybrid", "minimax"),
    *("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text"),
}
_RECURRENT_LAYERS = ("linear", "mamba", "recurrent", "ssm", "conv")
_DROPPING = {"switch_transformers", "nllb-moe"}


def check_supported(config: Any) -> None:
    """Raise ValueError, with the reason where one is known, unless the model can be decoded."""
    family = config.model_type
    if family in FAMILIES:
        return
    kinds = " ".join(map(str, getattr(config, "layer_types", None) or ()))
    if family in _RECURRENT or any(word in kinds for word in _RECURRENT_LAYERS):
        reason = (
            ": its recurrent (linear-attention) layers keep a running state, "
            "from which a rejected draft cannot be rolled back"
        )
    elif family in _DROPPING or getattr(config, "expert_capacity", None):
        reason = (
            ": its experts drop tokens by capacity, "
            "so that a token's result depends on the others in its pass"
        )
    else:
        reason = ""
    raise ValueError(
        f"model_type={family!r} is not supported{reason}; supported: {', '.join(FAMILIES)}"
    )


def layer_types(config: Any) -> list[str]:
    """Attention type of every layer: `full_attention` or `sliding_attention`."""
    if config.model_type in ("llama", "olmo2", "granite"):
        return [FULL] * config.num_hidden_layers
    if config.model_type in ("mistral", "phi3"):  # one type for all
        windowed = config.sliding_window is not None
        return [SLIDING if windowed else FULL] * config.num_hidden_layers
    return list(config.layer_types)


def longest_text(config: Any) -> int | None:
    """Tokens up to which the rotary frequencies are constant; None where they always are.

    The `longrope` and `dynamic` kinds change all frequencies once a text is longer than the
    original context. What is cached was rotated by the old ones, and passes that lie on either
    side of the border would disagree.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    for kind in kinds:
        name = kind.get("rope_type")
        if name == "longrope":
            return int(
                kind.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or config.max_position_embeddings
            )
        if name == "dynamic":
            return int(config.max_position_embeddings)
    return None
