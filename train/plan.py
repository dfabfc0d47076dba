"""Memory and compute that a run would need:
`python train/ee_finetune.py --plan recipe=NAME [key=value ...]`.

No weights are loaded: the model is built on the meta device, from the base's config or, where the
base is not on this machine, from its published sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.filesize import decimal
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from hispec.base_models.local import find_base
from hispec.models.exit_model import ExitModel
from hispec.utils.console import Output
from train.model_sizes import SHAPES
from train.recipe import Recipe
from train.state_cache import state_sizes
from train.trunk import Trunk

GIB = 2**30
ASSUMED_TFLOPS = 400.0
"""Assumed speed of one device: 40% of an H100's dense bf16 peak."""
LAYOUTS = ("one device or DDP", "ZeRO-2", "ZeRO-3 or FSDP")


@dataclass
class Plan:
    """Sizes of one run. The memory is that of weights, gradients, optimizer and activations; the
    CUDA context, the allocator's slack and the buffers of collectives add about 2 GiB."""

    trunk: int
    """Parameters of the base model, with LoRA adapters."""
    exits: int
    """Parameters of the exit heads."""
    trained: int
    """Parameters that are trained."""
    tokens_per_step: int
    """Of one process."""
    flops_per_step: float
    """Of one process."""
    activations: float
    """Bytes that a forward pass keeps for the backward pass, and the logits of a chunk."""
    weight_bytes: float
    """Bytes of all weights, in the dtypes that they are held in."""
    stored: float = 0.0
    """Bytes on disk of the trunk's states for one process, if they are stored."""

    def memory(self, layout: str, devices: int) -> float:
        """Peak bytes on each of some devices.

        Training keeps 4 bytes of gradient and 8 of AdamW's moments per trained parameter.
        """
        gradients, moments = 4.0 * self.trained, 8.0 * self.trained
        weights = self.weight_bytes
        if layout != LAYOUTS[0]:
            gradients, moments = gradients / devices, moments / devices
        if layout == LAYOUTS[2]:
            weights /= devices
        return weights + gradients + moments + self.activations


def plan(recipe: Recipe) -> Plan:
    """Count what a recipe would train, store and compute.

    Activations follow Korthikanti et al. (2205.05198): 34 bytes per token, layer and hidden unit in
    16 bit, without the attention's scores, which are not kept; with gradient checkpointing 2 bytes
    and one layer whole. Operations are 2 per parameter and token forward, twice that backward.

    Raises:
        ValueError: the base's sizes are unknown, or the exits do not fit it.
    """
    config = _config(recipe.base)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = ExitModel(hf, recipe.exit_config())
        model.heads.requires_grad_(True)
        Trunk(hf, recipe.trunk, rank=recipe.lora_rank, alpha=recipe.lora_alpha)
    exits = sum(p.numel() for p in model.heads.parameters())
    trunk = sum(p.numel() for p in hf.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    wide = 4.0 if recipe.precision == "fp32" else 2.0
    weights = 4.0 * trained + wide * (trunk + exits - trained)
    if recipe.base_kl and recipe.trunk == "full":
        weights += wide * trunk

    tokens = recipe.batch_size * recipe.seq_len
    layers, blocks = config.num_hidden_layers, sum(len(h.blocks) for h in model.heads.values())
    kept = tokens * config.hidden_size * 17.0 * wide  # of one layer
    light = tokens * config.hidden_size * wide
    activations = blocks * kept + (len(recipe.exits) + 2) * 3 * light
    if recipe.trunk != "frozen":
        again = recipe.gradient_checkpointing
        activations += layers * light + kept if again else layers * kept
    activations += 4 * 4.0 * min(recipe.loss_chunk, tokens) * config.vocab_size

    head = config.vocab_size * config.hidden_size
    in_layers = sum(p.numel() for p in hf.model.layers.parameters())
    body = in_layers * (3 if recipe.trunk != "frozen" else 1)
    if recipe.trunk != "frozen" and recipe.gradient_checkpointing:
        body += in_layers
    reads = 1 + 3 * (len(recipe.exits) + (recipe.trunk != "frozen"))
    flops = 2.0 * tokens * (body + 3 * exits + reads * head) * recipe.accumulate
    return Plan(
        trunk=trunk,
        exits=exits,
        trained=trained,
        tokens_per_step=tokens * recipe.accumulate,
        flops_per_step=flops,
        activations=activations,
        weight_bytes=weights,
        stored=_stored(recipe, config),
    )


def _stored(recipe: Recipe, config: Any) -> float:
    """Bytes of the states that a run stores on disk, if its text is long enough."""
    if recipe.states is None:
        return 0.0
    sizes = state_sizes(recipe, config)
    rows = recipe.steps * recipe.batch_size * recipe.accumulate
    if recipe.max_rows is not None:
        rows = min(rows, recipe.max_rows)
    return float(rows * recipe.seq_len * sizes.bytes_per_token)


def _config(base: str) -> Any:
    """The config of a base model, from its folder or its published sizes."""
    try:
        return AutoConfig.from_pretrained(find_base(base).folder, local_files_only=True)
    except ValueError:
        if base not in SHAPES:
            raise
    shape = dict(SHAPES[base])
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def memory_note(found: Plan) -> str:
    """The line of a recipe's header: its memory on one device if 80 GiB hold it, or on eight."""
    alone = found.memory(LAYOUTS[0], 1) < 76 * GIB
    layout, devices = (LAYOUTS[0], 1) if alone else (LAYOUTS[2], 8)
    where = "one device" if alone else f"each of {devices} devices with {layout}"
    return f"By --plan: {found.memory(layout, devices) / GIB:.1f} GiB on {where}."


def show_plan(recipe: Recipe) -> None:
    """Print the plan as a table and a few lines."""
    found = plan(recipe)
    heads = " and ".join(dict.fromkeys(exit.head for exit in recipe.exit_config().exits))
    shown = Table(title=f"{recipe.base}, exits {recipe.depths}, {heads}, {recipe.trunk} trunk")
    shown.add_column("peak memory per device")
    shown.add_column("1 device", justify="right")
    shown.add_column("8 devices", justify="right")
    for layout in LAYOUTS:
        shown.add_row(layout, *(f"{found.memory(layout, n) / GIB:.1f} GiB" for n in (1, 8)))
    out = Output()
    out.print(shown)
    parameters = found.trunk + found.exits
    out.say(f"parameters: {found.trained / 1e6:,.1f} M of {parameters / 1e6:,.1f} M are trained")
    out.say(
        f"a step: {found.tokens_per_step:,} tokens per device, {found.flops_per_step / 1e12:,.1f} "
        f"TFLOP, {found.flops_per_step / ASSUMED_TFLOPS / 1e12:.2g} s at {ASSUMED_TFLOPS:.0f} "
        "TFLOP/s"
    )
    if found.stored:
        out.say(f"trunk states on disk: {decimal(int(found.stored))} per process at most")
    out.say("on top of that: context, allocator and collectives, about 2 GiB")
