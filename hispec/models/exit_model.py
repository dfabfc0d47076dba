"""ExitModel: run any stretch of layers of an unmodified transformers model and read any depth."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hispec.config import ExitConfig
from hispec.models import eagle3
from hispec.models.attention import FEWEST_TOKENS, PassCache, Reach, needs_company
from hispec.models.engine import DRAFTING, WHOLE
from hispec.models.exit_heads import ExitHead, Gather, build_head
from hispec.models.layer_inputs import LayerInputs
from hispec.models.quantization import FULL
from hispec.models.sharding import whole
from hispec.models.trunk import Trunk
from hispec.utils.settings import check


class ExitModel(Trunk):
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
        super().__init__(hf)
        self.vocab_size: int = hf.lm_head.out_features
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
        self._untrained = ExitHead()
        self.weights = FULL
        """`full`, or `int8` where `quantization` has rounded them."""

    def read_depths(self) -> list[int]:
        """Depths whose states of the token before a head reads, increasing."""
        return sorted({depth for exit in self.exits.depths for depth in self.head(exit).reads})

    def head(self, depth: int) -> ExitHead:
        """The trained head at `depth`, or the LayerSkip reading where there is none."""
        if str(depth) not in self.heads:
            return self._untrained
        head = self.heads[str(depth)]
        assert isinstance(head, ExitHead)
        return head

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
        return self.run_layers(layers, hidden_BTH, positions_BT, cache, inputs, keys)

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

    def rope(
        self, kind: str, hidden_BTH: torch.Tensor, positions_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) [B, T, head size] of an attention type."""
        if kind != eagle3.KIND:
            return super().rope(kind, hidden_BTH, positions_BT)
        own = self.head(0).rotary
        if own is not None:
            return own(hidden_BTH, positions_BT)
        cos, sin = super().rope(self.layer_types[-1], hidden_BTH, positions_BT)
        return cos.to(hidden_BTH.dtype), sin.to(hidden_BTH.dtype)  # OLMo 2 has float32

    def reach(self, kind: str) -> Reach:
        """Which tokens before it a token attends to in layers of an attention type."""
        # EAGLE-3 pairs a token with the one before it, so there is no pair for the first
        return Reach(first=1) if kind == eagle3.KIND else super().reach(kind)
