"""The accelerator of a run: one process or many, on GPUs or, for small models, on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    get_int_from_env,
    parse_flag_from_env,
)
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from hispec.models.exit_model import ExitModel
from hispec.utils.settings import check
from train.recipe import Recipe

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def build_accelerator(recipe: Recipe, logs: Path) -> Accelerator:
    """An accelerator for what `accelerate launch` has started.

    Raises:
        ValueError: FSDP1, or on a CPU FSDP in one process or mixed precision with ZeRO-3, or a
            tracker that is not installed.
    """
    on_cpu = not torch.accelerator.is_available()
    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if fsdp:
        version = get_int_from_env(["FSDP_VERSION"], 1)  # accelerate's default too
        check(version == 2, "fsdp_version", version, "2, as in recipes/accelerate/fsdp.yaml")
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
    if on_cpu and fsdp:
        _use_fsdp_on_cpu(accelerator)
    plugin = accelerator.state.deepspeed_plugin if deepspeed else None
    if plugin is not None and plugin.is_auto("train_micro_batch_size_per_gpu"):
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = recipe.batch_size
    if on_cpu and plugin is not None and plugin.zero_stage == 3 and recipe.precision != "fp32":
        raise ValueError(
            f"precision={recipe.precision!r} is not possible with ZeRO-3 on a CPU: DeepSpeed's own "
            "linear layer knows no mixed precision there; use precision=fp32 or zero2.yaml"
        )
    return accelerator


def _use_fsdp_on_cpu(accelerator: Accelerator) -> None:
    """Have accelerate's FSDP2 on CPU processes.

    It runs there, but accelerate 1.15 asks for it on accelerators alone and would go on as plain
    data parallelism without a word.
    """
    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        raise ValueError("FSDP on a CPU needs --num_processes 2 or more; one alone is single.yaml")
    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def place(model: ExitModel, accelerator: Accelerator) -> ExitModel:
    """Take a model to the device of this process.

    FSDP is left to do it itself, layer by layer as it cuts them up: a device that is to hold a
    share of the weights may be too small for all of them.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return model.to(accelerator.device)
    if model.draft_tokens is not None:  # belongs to no part that is shared out
        model.draft_tokens = model.draft_tokens.to(accelerator.device)
    return model


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
