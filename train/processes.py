"""The accelerator of a run: one process or many, on GPUs or, for small models, on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    parse_flag_from_env,
)
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from hispec.config import check

from .recipe import Recipe

_SHARDED = ("FSDP", "DEEPSPEED")


def build_accelerator(recipe: Recipe, logs: Path) -> Accelerator:
    """An accelerator for what `accelerate launch` has started.

    Raises:
        ValueError: FSDP without a GPU, where accelerate would go on as plain data parallelism, or
            mixed precision with ZeRO-3 on a CPU, or a tracker that is not installed.
    """
    on_cpu = not torch.accelerator.is_available()
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if on_cpu and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError("FSDP needs GPUs; on a CPU launch with ddp.yaml, zero2.yaml or zero3.yaml")
    tracker = recipe.log_with
    check(
        tracker is None or find_spec(tracker) is not None,
        "log_with",
        tracker,
        f"it is not installed: pip install {tracker}",
    )
    skips = recipe.curriculum != "none" or recipe.layer_dropout > 0
    # What a step skips gets no gradient in it; without this DDP would wait for one.
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(find_unused_parameters=skips)]
    if on_cpu and deepspeed:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,
        mixed_precision="no" if recipe.precision == "fp32" else recipe.precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=recipe.accumulate, sync_with_dataloader=False
        ),
        kwargs_handlers=handlers,
        log_with=recipe.log_with,
        project_dir=str(logs),
    )
    plugin = accelerator.state.deepspeed_plugin if deepspeed else None
    if plugin is not None and plugin.is_auto("train_micro_batch_size_per_gpu"):
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = recipe.batch_size
    if on_cpu and plugin is not None and plugin.zero_stage == 3 and recipe.precision != "fp32":
        raise ValueError(
            f"precision={recipe.precision!r} is not possible with ZeRO-3 on a CPU: DeepSpeed's own "
            "linear layer knows no mixed precision there; use precision=fp32 or zero2.yaml"
        )
    return accelerator


def sharded(accelerator: Accelerator) -> bool:
    """Whether weights, gradients or optimizer state may be spread over the processes."""
    return accelerator.distributed_type in _SHARDED


def gather(module: nn.Module) -> AbstractContextManager[Any]:
    """While this lasts all parameters of a module are here, also with ZeRO-3."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    from deepspeed import zero  # it is there, since it is in use

    gathered: AbstractContextManager[Any] = zero.GatheredParameters(list(module.parameters()))
    return gathered
