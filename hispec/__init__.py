"""HiSpec: early-exit models and hierarchical speculative decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hispec.config import DecodeConfig, ExitConfig
    from hispec.lm import DecodeResult, EarlyExitLM, load
    from hispec.models.exit_model import ExitModel

__all__ = ["DecodeConfig", "DecodeResult", "EarlyExitLM", "ExitConfig", "ExitModel", "load"]
__version__ = "0.1.0"

_HOME = {
    "DecodeConfig": "config",
    "ExitConfig": "config",
    "DecodeResult": "lm",
    "EarlyExitLM": "lm",
    "load": "lm",
    "ExitModel": "models.exit_model",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `hispec --help` must not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
