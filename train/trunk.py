"""The trunk in training: frozen, with LoRA adapters, or fully trained."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


class Trunk:
    """A base model whose parameters are set up for one kind of training.

    Args:
        hf: the base model; with `lora` its linear layers are replaced in place.
        kind: `frozen`, `lora` or `full`.
        rank: rank of the LoRA adapters.
        alpha: their output is scaled by alpha / rank.
    """

    def __init__(self, hf: PreTrainedModel, kind: str, *, rank: int, alpha: float) -> None:
        self.kind = kind
        self.scale = alpha / rank
        self._adapted: PeftModel | None = None
        hf.requires_grad_(kind == "full")
        if kind == "lora":
            config = LoraConfig(
                r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            self._adapted = get_peft_model(hf, config)

    @property
    def trained(self) -> bool:
        return self.kind != "frozen"

    def untouched(self) -> AbstractContextManager[None]:
        """A context in which a LoRA trunk computes what its base computes."""
        assert self._adapted is not None
        return self._adapted.disable_adapter()

    def merged(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state dict of a plain model, with the adapters merged into its weights.

        Args:
            state: state dict of the model in training, gathered from all processes.
        """
        plain: dict[str, torch.Tensor] = {}
        for name, tensor in state.items():
            if ".lora_" in name:
                continue
            stem, adapted, leaf = name.partition(".base_layer")
            if adapted and leaf == ".weight":
                down, up = (state[f"{stem}.lora_{side}.default.weight"] for side in "AB")
                tensor = tensor.float() + self.scale * (up.float() @ down.float())
            plain[stem + leaf] = tensor
        return plain
