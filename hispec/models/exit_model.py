"""ExitModel: run any stretch of layers of an unmodified transformers model and read any depth.

This is the only file that knows the insides of transformers' models. It calls their own embedding,
decoder layers, norm and LM head; nothing is copied or patched, so an upgrade of transformers is
either picked up or fails by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hispec.config import ExitConfig
from hispec.models import eagle3
from hispec.models.architectures import SLIDING, check_supported, layer_types, longest_text
from hispec.models.attention import (
    FEWEST_TOKENS,
    NAME,
    PassCache,
    Reach,
    attention_by,
    needs_company,
)
from hispec.models.engine import DRAFTING, WHOLE, Engine
from hispec.models.exit_heads import ExitHead, Gather, build_head
from hispec.models.layer_inputs import (
    LayerInputs,
    all_positions,
    cached_inputs,
    documents,
    text_mask,
)
from hispec.models.quantization import FULL
from hispec.models.sharding import whole
from hispec.utils.settings import check


class ExitModel(nn.Module):
    """A causal LM whose hidden states can be entered, left and read at any depth.

    Args:
        hf: a `...ForCausalLM` of one of `architectures.FAMILIES`, used as it is.
        exits: trained exits; depths that are not among them are read through the final norm.
        gather: see `exit_heads.Gather`; for training with ZeRO-3.

    Raises:
        ValueError: an architecture that is not supported, or exits that the model cannot have.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        exits: ExitConfig | None = None,
        gather: Gather = nullcontext,
    ) -> None:
        super().__init__()
        check_supported(hf.config)
        self.hf = hf
        self.num_layers: int = hf.config.num_hidden_layers
        self.vocab_size: int = hf.lm_head.out_features
        self.layer_types = layer_types(hf.config)
        self.longest_text = longest_text(hf.config)
        self.exits = exits or ExitConfig()
        if self.exits.exits:
            self.exits.validate(self.num_layers)
            self.exits = self.exits.resolved(self.num_layers)
        size = self.exits.draft_vocab
        check(
            size <= self.vocab_size, "draft_vocab", size, f"the model has {self.vocab_size} tokens"
        )
        self.heads = nn.ModuleDict()
        index = self.num_layers
        for exit in self.exits.exits:
            head = build_head(hf, exit, self.layer_types, index, gather, size)
            self.heads[str(exit.depth)] = head
            index += len(head.blocks)
        self.draft_tokens: torch.Tensor | None
        self.register_buffer("draft_tokens", torch.arange(size) if size else None)
        self._rope_by_type = "layer_type" in signature(hf.model.rotary_emb.forward).parameters
        self._heads_per_kv = hf.config.num_attention_heads // hf.config.num_key_value_heads
        self._untrained = ExitHead()
        self.weights = FULL
        """`full`, or `int8` where `quantization` has rounded them."""
        self.engine: Engine | None = None
        """Runs cached passes in place of the modules, where it takes them."""

    def cuts(self) -> list[int]:
        """Depths whose states an exit or a head reads, increasing, below the full depth."""
        read = {depth for exit in self.exits.depths for depth in self.head(exit).reads}
        return sorted({*self.exits.depths, *read} - {self.num_layers})

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def backend(self) -> str:
        """The name of what runs cached passes."""
        return "eager" if self.engine is None else self.engine.name

    def cache_layout(self) -> tuple[torch.dtype, int | None]:
        """(dtype, slots of a block) of a new KV cache as the engine wants it; (the model's dtype,
        None) without an engine."""
        if self.engine is None:
            return self.hf.dtype, None
        self.engine.refresh()
        return self.engine.dtype, self.engine.block

    def head(self, depth: int) -> ExitHead:
        """The trained head at `depth`, or the LayerSkip reading where there is none."""
        if str(depth) not in self.heads:
            return self._untrained
        head = self.heads[str(depth)]
        assert isinstance(head, ExitHead)
        return head

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
        # a slice of a ModuleList is a new ModuleList, which takes 0.5 ms for 30 layers
        layers = list(zip(self.hf.model.layers, self.layer_types, strict=True))
        layers = layers[from_depth:to_depth]
        return self._run_layers(layers, hidden_BTH, positions_BT, cache, inputs)

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

    def set_draft_tokens(self, tokens_W: torch.Tensor) -> None:
        """Let exits draft from these token ids [W], increasing; for fresh heads.

        LM heads of exits become the rows of the model's own.
        """
        assert self.draft_tokens is not None
        self.draft_tokens.copy_(tokens_W)
        rows_WH = self.draft_head()
        for depth in self.exits.depths:
            if (lm_head := self.head(depth).lm_head) is not None and rows_WH is not None:
                with torch.no_grad():
                    lm_head.weight.copy_(rows_WH)

    def run_head(
        self,
        depth: int,
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor | None = None,
        cache: PassCache | None = None,
        previous_BTH: torch.Tensor | None = None,
        inputs: dict[str, LayerInputs] | None = None,
        keys: Any = None,
    ) -> torch.Tensor:
        """States [B, T, H] after the blocks of the exit head at `depth`, before its norm.

        A head without blocks returns what it is given.

        Args:
            hidden_BTH: the trunk's states at `depth`.
            previous_BTH: for a head that reads the token before, what `ExitHead.before` gave of it,
                or a stand-in (`ExitHead.own`); 0 where neither is known. None is 0 everywhere.
            inputs: as in `run`.
            keys: without a cache, what the layers call `update` of, see `models.unrolled`.
        """
        head = self.head(depth)
        hidden_BTH = head.enter(hidden_BTH, previous_BTH)
        layers = list(zip(head.blocks, head.layer_types, strict=True))
        return self._run_layers(layers, hidden_BTH, positions_BT, cache, inputs, keys)

    def reads_before(self, depth: int) -> bool:
        """Whether the head at a depth reads the token before; the full model does not."""
        return depth < self.num_layers and self.head(depth).reads_before

    def normed(self, depth: int, hidden: torch.Tensor) -> torch.Tensor:
        """States [..., H] at `depth` (after `run_head`) as the LM head expects them."""
        head = self.head(depth) if depth < self.num_layers else self._untrained
        normed = (head.norm if head.norm is not None else self.hf.model.norm)(hidden)
        return normed if head.adapter is None else head.adapter(normed)

    def read(self, depth: int, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of states [..., H] at `depth` (after `run_head`)."""
        normed = self.normed(depth, hidden)
        own = depth < self.num_layers and self.head(depth).lm_head is not None
        return self.draft(depth, normed) if own else self.project(normed)

    def final(
        self, tokens_BT: torch.Tensor, positions_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normed states [B, T, H] at full depth of whole sequences or packed documents."""
        hidden_BTH = self.run(self.embed(tokens_BT), 0, self.num_layers, positions_BT)
        return self.normed(self.num_layers, hidden_BTH)

    def project(self, normed: torch.Tensor, head_VH: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [..., V] of normed states [..., H]: LM head, then the family's scaling or cap.

        Args:
            head_VH: weights to use instead of the LM head's own.
        """
        if head_VH is None and self.engine is not None and self.engine.takes(normed):
            return self.engine.project(normed, WHOLE)
        if needs_company(normed):
            twice = normed.expand(FEWEST_TOKENS, *normed.shape)
            return self.project(twice, head_VH)[0]
        return self.scale_logits(
            self.hf.lm_head(normed) if head_VH is None else F.linear(normed, head_VH)
        )

    def scale_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of the LM head with the scaling and the cap of the family."""
        if (divisor := getattr(self.hf.config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / divisor
        cap = getattr(self.hf.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def draft_head(self) -> torch.Tensor | None:
        """Rows [W, H] of the LM head that exits draft with; None for all of them."""
        if self.draft_tokens is None:
            return None
        rows: torch.Tensor = whole(self.hf.lm_head.weight)[self.draft_tokens]
        return rows

    def draft(
        self, depth: int, normed: torch.Tensor, head_WH: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [..., V] as an exit drafts: those of tokens outside the draft vocabulary are -inf.

        Args:
            normed: its states [..., H] after its norm.
            head_WH: rows from `draft_head`; without them the whole LM head is used.
        """
        lm_head = self.head(depth).lm_head
        if self.draft_tokens is None and lm_head is None:
            return self.project(normed)
        engine = self.engine if self.engine is not None and self.engine.takes(normed) else None
        if lm_head is not None:
            logits_W = lm_head(normed) if engine is None else engine.project(normed, depth)
        elif head_WH is not None:
            logits_W = (
                self.project(normed, head_WH)
                if engine is None
                else engine.project(normed, DRAFTING)
            )
        else:
            assert self.draft_tokens is not None
            logits_W = self.project(normed).index_select(-1, self.draft_tokens)
        if self.draft_tokens is None:
            return logits_W
        everywhere = logits_W.new_full((*normed.shape[:-1], self.vocab_size), -torch.inf)
        return everywhere.index_copy_(-1, self.draft_tokens, logits_W)

    def logits(
        self,
        depth: int,
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor | None = None,
        previous_BTH: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, V] of whole sequences or packed documents with these states at `depth`.

        Args:
            previous_BTH: see `run_head`.
        """
        if depth < self.num_layers:
            hidden_BTH = self.run_head(depth, hidden_BTH, positions_BT, previous_BTH=previous_BTH)
        return self.read(depth, hidden_BTH)

    def _run_layers(
        self,
        layers: Sequence[tuple[nn.Module, str]],
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor | None,
        cache: PassCache | None,
        inputs: dict[str, LayerInputs] | None = None,
        keys: Any = None,
    ) -> torch.Tensor:
        if not layers:
            return hidden_BTH
        if cache is not None and self.engine is not None:
            if not cache.of_prompts:
                assert positions_BT is not None
                return self.engine.run(layers, hidden_BTH, positions_BT, cache)
            hidden_BTH = hidden_BTH.to(self.hf.dtype)  # what the cache keeps may be in another one
        if cache is not None and positions_BT is not None and needs_company(hidden_BTH):
            twice = hidden_BTH.expand(-1, FEWEST_TOKENS, -1), positions_BT.expand(-1, FEWEST_TOKENS)
            return self._run_layers(layers, *twice, cache, inputs, keys)[:, :1]
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

    def rope(
        self, kind: str, hidden_BTH: torch.Tensor, positions_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) [B, T, head size] of an attention type."""
        rotary = self.hf.model.rotary_emb
        if kind == eagle3.KIND:
            own = self.head(0).rotary
            if own is not None:
                return own(hidden_BTH, positions_BT)
            cos, sin = self.rope(self.layer_types[-1], hidden_BTH, positions_BT)
            return cos.to(hidden_BTH.dtype), sin.to(hidden_BTH.dtype)  # OLMo 2 has float32
        return rotary(hidden_BTH, positions_BT, *([kind] if self._rope_by_type else []))

    def reach(self, kind: str) -> Reach:
        """Which tokens before it a token attends to in layers of an attention type."""
        window = self.hf.config.sliding_window if kind == SLIDING else None
        # EAGLE-3 pairs a token with the one before it, so there is no pair for the first
        return Reach(window, first=int(kind == eagle3.KIND))

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
