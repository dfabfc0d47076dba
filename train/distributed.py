"""One process or many, on GPUs or, for small models, on a CPU: the accelerator of a run, and what
its processes do together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

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
    broadcast_object_list,
    gather_object,
    get_int_from_env,
    parse_flag_from_env,
)
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled

from hispec.models.exit_model import ExitModel
from hispec.utils.settings import check
from train.recipe import Recipe

T = TypeVar("T")
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
# What a user can mend: bad settings, and disks that are full or refuse to be written to.
_CLEAN = (ValueError, OSError, SafetensorError)


def build_accelerator(recipe: Recipe, logs: Path) -> Accelerator:
    """An accelerator for the processes that `accelerate launch` has started.

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
    handlers: list[KwargsHandler] = [
        # What a step skips gets no gradient in it; without this DDP would wait for one.
        DistributedDataParallelKwargs(find_unused_parameters=skips),
        InitProcessGroupKwargs(
            backend="gloo" if on_cpu and deepspeed else None,
            # accelerate passes on only what differs from its own default of ten minutes
            timeout=timedelta(minutes=recipe.timeout_minutes, microseconds=1),
        ),
    ]
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
    if plugin is not None:
        if plugin.is_auto("train_micro_batch_size_per_gpu"):
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = recipe.batch_size
        # DeepSpeed clips by itself; accelerate would tell it 1.0, whatever the recipe says.
        plugin.deepspeed_config["gradient_clipping"] = recipe.clip
    if on_cpu and plugin is not None and plugin.zero_stage == 3 and recipe.precision != "fp32":
        raise ValueError(
            f"precision={recipe.precision!r} is not possible with ZeRO-3 on a CPU: DeepSpeed's own "
            "linear layer has no mixed precision there; use precision=fp32 or zero2.yaml"
        )
    return accelerator


def end_training(accelerator: Accelerator) -> None:
    """Let go of the wrapped model, then leave the group of processes.

    In this order: DDP's reducer, were it the last to hold the group, would destroy it without
    giving up Python's lock, and join gloo's threads while one of them waits for that lock.
    """
    accelerator.free_memory()
    accelerator.end_training()


def _use_fsdp_on_cpu(accelerator: Accelerator) -> None:
    """Make accelerate use FSDP2 on CPU processes.

    FSDP2 runs there, but accelerate 1.15 only uses it on accelerators and would silently train with
    plain data parallelism.
    """
    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        raise ValueError("FSDP on a CPU needs --num_processes 2 or more; one alone is single.yaml")
    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


# Weights that are spread over the processes ------------------------------------------------------


def place(model: ExitModel, accelerator: Accelerator) -> ExitModel:
    """Move a model to the device of this process.

    FSDP moves it by itself, layer by layer as it shards them: a device that is to hold a share of
    the weights may be too small for all of them.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return model.to(accelerator.device)
    if model.draft_tokens is not None:  # a buffer, which FSDP does not shard
        model.draft_tokens = model.draft_tokens.to(accelerator.device)
    return model


def sharded(accelerator: Accelerator) -> bool:
    """Whether weights, gradients or optimizer state may be spread over the processes."""
    return accelerator.distributed_type in _SHARDED


def gather(module: nn.Module) -> AbstractContextManager[Any]:
    """A context in which this process has all parameters of a module, also with ZeRO-3."""
    return _gathered(list(module.parameters()))


def _gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    from deepspeed import zero  # installed, since it is in use

    gathered: AbstractContextManager[Any] = zero.GatheredParameters(parameters)
    return gathered


def whole_state(module: nn.Module, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The state dict of a module whose weights may be spread over the processes.

    Every process must call it. The first one gets the tensors, gathered one at a time and copied to
    the CPU if they were spread; all others get an empty dict.
    """
    whole: dict[str, torch.Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        with _gathered([tensor] if hasattr(tensor, "ds_id") else []):
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if accelerator.is_main_process:
                own = full.detach()
                # ZeRO-2 keeps all weights in one buffer, of which a file would hold the whole.
                lent = own.untyped_storage().nbytes() != own.nbytes
                spread = lent or full is not tensor or hasattr(tensor, "ds_id")
                whole[name] = own.to("cpu", copy=True) if spread else own
    return whole


def leave_out_frozen(module: nn.Module) -> None:
    """Keep frozen parameters out of a module's state dict, when it is saved and when it is loaded.

    They are those of the base and never change, so a saved state does not need them. Call it after
    `Accelerator.prepare`, which reads the state dict to shard the module.
    """
    frozen = {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in frozen:
            state.pop(prefix + name, None)

    def allow(module: nn.Module, keys: Any) -> None:
        missing = [key for key in keys.missing_keys if key.removeprefix("module.") not in frozen]
        keys.missing_keys[:] = missing  # DDP calls itself `module`

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_post_hook(allow)


# Decisions and failures that all processes share -------------------------------------------------


def from_first(value: T) -> T:
    """The value that the first process has, on every process.

    Floats differ in their last bits between processes, and so do clocks and disks: whatever decides
    how the run goes on must come from one of them.
    """
    return cast(T, broadcast_object_list([value])[0])


def on_first(accelerator: Accelerator, job: Callable[[], T]) -> T:
    """Run a job on the first process alone and give its result to all of them.

    Raises:
        ValueError: the job failed with an error that a user can mend; every process raises it, so
            that none waits for the others.
    """
    outcome: tuple[Any, str | None] = None, None
    if accelerator.is_main_process:
        outcome = _outcome(job)
    result, fault = from_first(outcome)
    if fault is not None:
        raise ValueError(fault)
    return cast(T, result)


def on_all(job: Callable[[], T]) -> T:
    """Run a job on every process; if it fails on one, all of them raise its ValueError."""
    result, fault = _outcome(job)
    faults: Iterable[str | None] = gather_object([fault])
    if fault := next((found for found in faults if found is not None), None):
        raise ValueError(fault)
    return cast(T, result)


def _outcome(job: Callable[[], T]) -> tuple[T | None, str | None]:
    """(result, None), or (None, message) after an error that a user can mend."""
    try:
        return job(), None
    except _CLEAN as error:
        return None, str(error)
