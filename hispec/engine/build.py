"""Which engine a model gets."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from hispec.config import AUTO, BACKENDS, EAGER
from hispec.models.engine import Engine
from hispec.models.exit_model import ExitModel
from hispec.models.sharding import is_sharded
from hispec.utils.settings import check

HALF = torch.bfloat16, torch.float16
_WORTHWHILE = 20_000_000
"""Parameters from which on `auto` compiles: it takes seconds."""


def openvino_installed() -> bool:
    """Whether the package is there."""
    return find_spec("openvino") is not None


def build_engine(model: ExitModel, backend: str = AUTO) -> Engine | None:
    """The engine that runs a model's cached passes; None runs its modules.

    Args:
        backend: `eager`, `openvino`, or `auto`: openvino where it is installed, can run the model
            and is worth the seconds that compiling takes, else eager.

    Raises:
        ValueError: a backend that is not known, not installed, or cannot run this model.
    """
    check(backend in BACKENDS, "backend", backend, f"one of {', '.join(BACKENDS)}")
    if backend == EAGER:
        return None
    device, dtype = model.device.type, str(model.hf.dtype).removeprefix("torch.")
    fits = device == "cpu" and model.hf.dtype in (torch.float32, *HALF)
    fits = fits and not is_sharded(model.hf)
    if backend == AUTO and sum(p.numel() for p in model.parameters()) < _WORTHWHILE:
        return None
    if not openvino_installed():
        check(
            backend == AUTO, "backend", backend, "it is installed by pip install 'hispec[openvino]'"
        )
        return None
    if not fits:
        where = f"{dtype} on {device}" + ", shared by several processes" * is_sharded(model.hf)
        allowed = f"it runs float32, bf16 and float16 on a CPU, and this model is in {where}"
        check(backend == AUTO, "backend", backend, allowed)
        return None
    from hispec.engine.openvino_engine import OpenVinoEngine

    return OpenVinoEngine(model)
