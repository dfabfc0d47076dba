"""The `config.json` of EAGLE-3 heads, in the two forms that other tools write and read.

That of SafeAILab/EAGLE and SpecForge is flat. That of vLLM's speculators keeps the config of the
head's layer in a section of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isclose
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from hispec.base_models.model_folder import Size
from hispec.config import Eagle3, Exit, ExitConfig
from hispec.models.exit_model import ExitModel
from hispec.utils.schema import STRICT, Schema, validate
from hispec.utils.settings import check

CONFIG = "config.json"
EAGLE3, SPECULATORS = "eagle3", "speculators"
_SECTION = "transformer_layer_config"
_IDS = "eagle_aux_hidden_state_layer_ids"
_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that Llama layers of other tools have too, with constant frequencies."""


class _Keys(Schema):
    """The keys of either form that decide what a head computes; what is absent is as in Llama."""

    model_config = ConfigDict({**STRICT, "extra": "ignore"})

    model_type: str = "llama"
    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    num_hidden_layers: int = 1
    vocab_size: Size
    draft_vocab_size: Size | None = None
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    target_hidden_size: Size | None = None
    norm_before_residual: bool | None = None
    norm_before_fc: bool = False
    fc_norm: bool = False
    use_aux_norm: bool = False
    """An older name of `fc_norm`."""
    norm_output: bool = False
    return_hidden_post_norm: bool = False
    """TensorRT-LLM's name of `norm_output`."""
    use_aux_hidden_state: bool = True
    use_input_layernorm_in_first_layer: bool = True
    use_last_layernorm: bool = True
    use_mtp_layernorm: bool = False
    eh_proj_before_attn: bool = False


@dataclass
class Described:
    """What the config of a head says."""

    exit: Exit
    draft_vocab: int
    """Rows of its LM head."""


def config_of(model: ExitModel, exit: Exit, form: str, target: str) -> dict[str, Any]:
    """The `config.json` of an EAGLE-3 head.

    Args:
        target: name of the model that it belongs to, which the form of speculators holds.
    """
    base, settings = model.hf.config, exit.eagle3 or Eagle3()
    rope = base_rope(model)
    if settings.rope_theta is not None:
        rope = {"rope_type": "default", "rope_theta": settings.rope_theta}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    layer = {
        "model_type": "llama",
        "hidden_size": base.hidden_size,
        "intermediate_size": settings.intermediate_size or base.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": base.num_attention_heads,
        "num_key_value_heads": _kv_heads(base),
        "head_dim": _head_size(base),
        "hidden_act": "silu",
        "max_position_embeddings": base.max_position_embeddings,
        "rms_norm_eps": base.rms_norm_eps,
        # transformers 4 reads the first two, 5 reads the third
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "rope_parameters": rope,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": False,
        "bos_token_id": base.bos_token_id,
        "eos_token_id": base.eos_token_id,
    }
    flags = {
        "draft_vocab_size": model.exits.draft_vocab or model.vocab_size,
        "norm_before_residual": settings.norm_before_residual,
        "norm_before_fc": False,
        "fc_norm": settings.fc_norm,
        "norm_output": settings.norm_output,
    }
    dtype = str(model.hf.dtype).removeprefix("torch.")
    if form == EAGLE3:
        # Readers disagree on how ids count, see `_depths`; without ids all take the usual depths.
        usual = exit.aux_depths == usual_depths(model.num_layers)
        ids = {} if usual else {_IDS: exit.aux_depths}
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            **layer,
            **flags,
            **ids,
            "eagle_config": {"use_aux_hidden_state": True, **ids},
            "torch_dtype": dtype,
        }
    kinds = base.architectures or [type(model.hf).__name__]
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        **flags,
        _IDS: exit.aux_depths,
        "target_hidden_size": None,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": target, "architectures": kinds},
        },
        _SECTION: layer,
        "dtype": dtype,
    }


def check_expressible(model: ExitModel, exit: Exit, form: str) -> None:
    """Raise ValueError, naming the key, unless readers of a form understand the exit's config."""
    depths = exit.aux_depths
    increasing = all(a < b for a, b in pairwise(depths))
    check(
        increasing,
        "aux_depths",
        depths,
        "increasing depths, none twice: servers collect the states layer by layer",
    )
    check(
        form != EAGLE3 or depths[0] > 1,
        "aux_depths",
        depths,
        "depths from 2 on: SGLang takes numbers that begin with 1 for the layers' outputs, and "
        "vLLM does not; --as speculators has one meaning",
    )
    if (exit.eagle3 or Eagle3()).rope_theta is None:
        rope = base_rope(model)
        kind = rope["rope_type"]
        check(kind in _ROPES, "rope_type", kind, f"{', '.join(_ROPES)} in the head of a server")
        part = rope.get("partial_rotary_factor")
        check(part is None, "partial_rotary_factor", part, "1 in the head of a server")


def described(
    config: dict[str, Any], model: ExitModel, aux_depths: Sequence[int] | None = None
) -> Described:
    """The exit at depth 0 that the config of a head describes.

    Args:
        model: the base that the head belongs to.
        aux_depths: depths whose states it reads, if what the config says is not to be believed.

    Raises:
        ValueError: a value that cannot be, or a head that is no exit of this base; the message
            names the key, the value and what is possible.
    """
    flat, depths = _flat(config, aux_depths)
    keys = validate(_Keys, flat)
    _check_shape(keys, model)
    _check_kind(keys)
    exits = ExitConfig([Exit(0, "eagle3", aux_depths=depths, eagle3=_settings(keys, model))])
    exits.validate(model.num_layers)
    width = keys.draft_vocab_size or keys.vocab_size
    check(width <= keys.vocab_size, "draft_vocab_size", width, f"at most {keys.vocab_size}")
    return Described(exits.resolved(model.num_layers).exits[0], width)


def usual_depths(num_layers: int) -> list[int]:
    """The depths that every reader takes where the config names none."""
    return [2, num_layers // 2, num_layers - 3]


def base_rope(model: ExitModel) -> dict[str, Any]:
    """Rotary parameters of the base that a head without its own uses."""
    found = model.hf.config.rope_parameters
    return _plain_rope(found.get(model.layer_types[-1], found))


def _plain_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Without what says nothing, and with one name for the type."""
    known = {key: value for key, value in parameters.items() if value is not None}
    found = {"rope_type": known.pop("type", "default"), **known}
    if found.get("partial_rotary_factor") == 1:
        del found["partial_rotary_factor"]
    return found


def _flat(config: dict[str, Any], given: Sequence[int] | None) -> tuple[dict[str, Any], list[int]]:
    """(the keys of either form beside each other, the depths that the head reads)."""
    if "speculators_model_type" not in config and _SECTION not in config:
        more = config.get("eagle_config") or {}
        check(isinstance(more, dict), "eagle_config", more, "an object")
        ids = [keys[_IDS] for keys in (config, more) if keys.get(_IDS) is not None]
        agree = given is not None or ids[:1] == ids[1:] or len(ids) < 2
        check(agree, _IDS, ids, "one list; say with --aux-depths which depths the head reads")
        return {**more, **config}, _depths(ids[0] if ids else None, given, outputs=True)
    kind = config.get("speculators_model_type")
    check(kind == "eagle3", "speculators_model_type", kind, "'eagle3' is read")
    layer = config.get(_SECTION)
    if not isinstance(layer, dict):
        raise ValueError(f"{_SECTION} is missing: the config of the head's layer")
    said = config.get("norm_before_residual")
    check(
        said is not None,
        "norm_before_residual",
        said,
        "true or false: without it speculators and vLLM take it differently",
    )
    flat = {**config, "model_type": "llama", **layer}
    return flat, _depths(config.get(_IDS), given, outputs=False)


def _depths(ids: Any, given: Sequence[int] | None, *, outputs: bool) -> list[int]:
    """Depths of the states that a head reads; empty for the usual ones.

    vLLM and speculators say `i` of the state that enters layer `i`, which is depth `i`. Files in
    the flat form say it of that, or of what layer `i` puts out, which is depth `i + 1`; as in
    SGLang (its pull request 25454), numbers that begin with 1 are outputs.
    """
    if given is not None:
        return list(given)
    if ids is None:
        return []
    whole = isinstance(ids, list) and all(type(number) is int for number in ids)
    check(whole and len(ids) == 3, _IDS, ids, "three numbers of layers")
    return [number + 1 for number in ids] if outputs and ids[0] == 1 else list(ids)


def _settings(keys: _Keys, model: ExitModel) -> Eagle3:
    """How the head differs from the first published ones.

    Raises:
        ValueError: rotary embeddings that are neither the base's nor without scaling.
    """
    theta = {"rope_theta": 10_000.0 if keys.rope_theta is None else keys.rope_theta}
    part = {"partial_rotary_factor": keys.partial_rotary_factor}
    scaling = keys.rope_parameters or keys.rope_scaling or {}
    own, base = _plain_rope({**theta, **part, **scaling}), base_rope(model)
    plain = set(own) == {"rope_type", "rope_theta"} and own["rope_type"] == "default"
    check(
        plain or own == base,
        "rope_parameters",
        own,
        f"rotary embeddings without scaling, or those of the base, {base}",
    )
    same = keys.intermediate_size == model.hf.config.intermediate_size
    return validate(
        Eagle3,
        {
            "intermediate_size": 0 if same else keys.intermediate_size,
            "norm_before_residual": bool(keys.norm_before_residual),
            "norm_output": keys.norm_output or keys.return_hidden_post_norm,
            "fc_norm": keys.fc_norm or keys.use_aux_norm,
            "rope_theta": None if own == base else own["rope_theta"],
        },
    )


def _check_shape(keys: _Keys, model: ExitModel) -> None:
    """Raise ValueError, naming the key, if a head has not the base's sizes."""
    base, heads = model.hf.config, keys.num_attention_heads
    for key, value, wanted in (
        ("hidden_size", keys.hidden_size, base.hidden_size),
        ("target_hidden_size", keys.target_hidden_size or base.hidden_size, base.hidden_size),
        ("num_attention_heads", heads, base.num_attention_heads),
        ("num_key_value_heads", keys.num_key_value_heads or heads, _kv_heads(base)),
        ("head_dim", keys.head_dim or keys.hidden_size // heads, _head_size(base)),
        ("vocab_size", keys.vocab_size, model.vocab_size),
        ("rms_norm_eps", keys.rms_norm_eps, base.rms_norm_eps),
    ):
        # a base that came as a GGUF has 1e-5 as the float32 nearest to it
        check(isclose(value, wanted, rel_tol=1e-6), key, value, f"{wanted}, as in the base")


def _check_kind(keys: _Keys) -> None:
    """Raise ValueError, naming the key, if a head computes what no exit computes."""
    window = keys.sliding_window if keys.use_sliding_window is not False else None
    check(window is None, "sliding_window", window, "None: a head attends to the whole text")
    for key, wanted in (
        ("model_type", "llama"),
        ("num_hidden_layers", 1),
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("norm_before_fc", False),
        ("use_aux_hidden_state", True),
        ("use_input_layernorm_in_first_layer", True),
        ("use_last_layernorm", True),
        ("use_mtp_layernorm", False),
        ("eh_proj_before_attn", False),
    ):
        value = getattr(keys, key)
        check(value == wanted, key, value, f"{wanted!r}: the head of an exit has nothing else")


def _head_size(base: Any) -> int:
    size: int = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    return size


def _kv_heads(base: Any) -> int:
    heads: int = base.num_key_value_heads or base.num_attention_heads
    return heads
