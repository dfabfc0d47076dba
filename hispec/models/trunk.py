"""Runs any stretch of the layers of an unmodified transformers model.

This file and `exit_model` are the only ones that know the insides of transformers' models. They
call their own embedding, decoder layers, norm and LM head; nothing is copied or patched, so an
upgrade of transformers is either picked up or fails by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hispec.models.architectures import SLIDING, check_supported, layer_types, longest_text
from hispec.models.attention import (
    FEWEST_TOKENS,
    NAME,
    PassCache,
    Reach,
    attention_by,
    needs_company,
)
from hispec.models.engine import Engine
from hispec.models.layer_inputs import (
    LayerInputs,
    all_positions,
    cached_inputs,
    documents,
    text_mask,
)
from hispec.utils.threads import torch_threads


class Trunk(nn.Module):
    """The embedding and the decoder layers of a causal LM, run in stretches.

    Args:
        hf: a `...ForCausalLM` of one of `architectures.FAMILIES`, used as it is.

    Raises:
        ValueError: an architecture that is not supported.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        check_supported(hf.config)
        self.hf = hf
        self.num_layers: int = hf.config.num_hidden_layers
        self.layer_types = layer_types(hf.config)
        self.longest_text = longest_text(hf.config)
        self.engine: Engine | None = None
        """Runs cached passes in place of the modules, where it takes them."""
        self._rope_by_type = "layer_type" in signature(hf.model.rotary_emb.forward).parameters
        self._heads_per_kv = hf.config.num_attention_heads // hf.config.num_key_value_heads

    @property
    def device(self) -> torch.device:
        device: torch.device = self.hf.model.embed_tokens.weight.device
        return device  # `hf.device` looks through all modules, several times per round

    @property
    def backend(self) -> str:
        """The name of what runs cached passes."""
        return "eager" if self.engine is None else self.engine.name

    @property
    def cold_passes(self) -> int:
        """See `Engine.cold_passes`; 0 without an engine."""
        return 0 if self.engine is None else self.engine.cold_passes

    def cache_layout(self) -> tuple[torch.dtype, int | None]:
        """(dtype, slots of a block) of a new KV cache as the engine wants it; (the model's dtype,
        None) without an engine."""
        if self.engine is None:
            return self.hf.dtype, None
        self.engine.refresh()
        return self.engine.dtype, self.engine.block

    def between_passes(self) -> AbstractContextManager[None]:
        """Torch's threads for a `with` block that runs cached passes: one beside an engine, see
        `Engine.threads`; as they are without."""
        return nullcontext() if self.engine is None else torch_threads(1)

    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, H] at depth 0."""
        hidden_BTH = self.hf.model.embed_tokens(tokens_BT)
        factor = getattr(self.hf.model, "embedding_multiplier", None)  # Granite
        return hidden_BTH if factor is None else hidden_BTH * factor

    def run(
        self,
        hidden_BTH: torch.Tensor,
        from_depth: int,
        to_depth: int,
        positions_BT: torch.Tensor | None = None,
        cache: PassCache | None = None,
        inputs: dict[str, LayerInputs] | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, H] at `to_depth` from those at `from_depth`, before any norm.

        Without a cache the tokens are whole sequences from position 0 on (training), or, with
        `positions_BT`, packed documents: where the position is 0 one begins, and a token attends to
        those of its own document alone. With a cache they continue what it holds, at
        `positions_BT`; `KVCache.place` was called for them.

        Args:
            inputs: what `layer_inputs` gave for these tokens, if the caller runs one stretch of
                layers after another: the masks are then built once.
        """
        layers = self._layers(from_depth, to_depth)
        return self.run_layers(layers, hidden_BTH, positions_BT, cache, inputs)

    def run_each(
        self,
        hidden_BTH: torch.Tensor,
        from_depth: int,
        depths: Sequence[int],
        positions_BT: torch.Tensor,
        cache: PassCache,
    ) -> list[torch.Tensor]:
        """Hidden states [B, T, H] of a cached pass at each of `depths`, increasing; see `run`.

        All but the last depth are read by heads. An engine computes all of them in one go.
        """
        if self.engine is None or from_depth == depths[-1]:
            found, at = [], from_depth
            for depth in depths:
                hidden_BTH = self.run(hidden_BTH, at, depth, positions_BT, cache)
                found.append(hidden_BTH)
                at = depth
            return found
        layers = self._layers(from_depth, depths[-1])
        return self.engine.run(layers, hidden_BTH, positions_BT, cache, depths[:-1])

    def layer_inputs(
        self, hidden_BTH: torch.Tensor, positions_BT: torch.Tensor | None = None
    ) -> dict[str, LayerInputs]:
        """Masks and rotary embeddings of whole sequences or packed documents, by attention type."""
        document_BT = None
        if positions_BT is None:
            positions_BT = all_positions(hidden_BTH)
        else:
            document_BT = documents(positions_BT)
        return {
            kind: self._layer_inputs(kind, hidden_BTH, positions_BT, None, document_BT)
            for kind in dict.fromkeys(self.layer_types)
        }

    def states(
        self,
        tokens_BT: torch.Tensor,
        depths: Iterable[int],
        positions_BT: torch.Tensor | None = None,
    ) -> dict[int, torch.Tensor]:
        """Hidden states [B, T, H] of whole sequences or packed documents by depth, before any norm.

        Every layer up to the deepest of `depths` runs once.
        """
        hidden_BTH, at, found = self.embed(tokens_BT), 0, {}
        for depth in sorted(depths):
            hidden_BTH, at = self.run(hidden_BTH, at, depth, positions_BT), depth
            found[depth] = hidden_BTH
        return found

    def _layers(self, start: int, stop: int) -> list[tuple[nn.Module, str]]:
        """Layers with their attention types."""
        # a slice of a ModuleList is a new ModuleList, which takes 0.5 ms for 30 layers
        return list(zip(self.hf.model.layers, self.layer_types, strict=True))[start:stop]

    def run_layers(
        self,
        layers: Sequence[tuple[nn.Module, str]],
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor | None,
        cache: PassCache | None,
        inputs: dict[str, LayerInputs] | None = None,
        keys: Any = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, H] after layers of the trunk or of a head, each with its attention
        type; see `run`.

        Args:
            keys: without a cache, what the layers call `update` of, see `models.unrolled`.
        """
        if not layers:
            return hidden_BTH
        if cache is not None and self.engine is not None:
            assert positions_BT is not None
            return self.engine.run(layers, hidden_BTH, positions_BT, cache)[-1]
        if cache is not None and positions_BT is not None and needs_company(hidden_BTH):
            twice = hidden_BTH.expand(-1, FEWEST_TOKENS, -1), positions_BT.expand(-1, FEWEST_TOKENS)
            return self.run_layers(layers, *twice, cache, inputs, keys)[:, :1]
        inputs, document_BT = dict(inputs or {}), None
        if positions_BT is None:
            positions_BT = all_positions(hidden_BTH)
        elif cache is None and not inputs:
            document_BT = documents(positions_BT)
        config = self.hf.config
        with nullcontext() if cache is None else attention_by(config, NAME):
            for layer, kind in layers:
                if kind not in inputs:
                    inputs[kind] = self._layer_inputs(
                        kind, hidden_BTH, positions_BT, cache, document_BT
                    )
                hidden_BTH = layer(
                    hidden_BTH,
                    attention_mask=inputs[kind].attention_mask,
                    position_embeddings=inputs[kind].position_embeddings,
                    position_ids=positions_BT,
                    past_key_values=keys if cache is None else cache,
                    use_cache=cache is not None or keys is not None,
                    **(inputs[kind].of_cache() if cache is not None else {}),
                )
        return hidden_BTH

    def _layer_inputs(
        self,
        kind: str,
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor,
        cache: PassCache | None,
        document_BT: torch.Tensor | None,
    ) -> LayerInputs:
        """Args: document_BT: without a cache, the number of each token's document in its row."""
        rope = self.rope(kind, hidden_BTH, positions_BT)
        reach = self.reach(kind)
        if cache is None:
            return LayerInputs(text_mask(hidden_BTH, positions_BT, document_BT, reach), rope)
        return cached_inputs(hidden_BTH, rope, cache, reach, self._heads_per_kv)

    def rope(
        self, kind: str, hidden_BTH: torch.Tensor, positions_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) [B, T, head size] of an attention type."""
        rotary = self.hf.model.rotary_emb
        return rotary(hidden_BTH, positions_BT, *([kind] if self._rope_by_type else []))

    def reach(self, kind: str) -> Reach:
        """Which tokens before it a token attends to in layers of an attention type."""
        return Reach(self.hf.config.sliding_window if kind == SLIDING else None)
