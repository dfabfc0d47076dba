"""Compiled graphs on disk: compiled once per model and machine, then loaded.

A file holds the SHA-256 of a graph and the graph. Its name is the hash of everything that the
content depends on, so what no longer fits has another name and is never read. Files that nobody
has read for 30 days are removed when a new one is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from hispec.utils.devices import instruction_sets, processor
from hispec.utils.files import new_file

_DIGEST = hashlib.sha256().digest_size
_HEADER = 4096
"""Bytes before the content, so that it begins with a page of memory."""
_KEPT = 30 * 24 * 3600
"""Seconds that a file is kept after it was last read."""
_SOURCES = [
    Path(__file__).with_name(f"{name}.py")
    for name in ("graph", "head_step", "lm_head", "openvino_graph", "tracing")
]


def cache_folder() -> Path:
    """Where compiled graphs are kept: `$HISPEC_CACHE`, else `hispec` in the user's cache folder."""
    if named := os.environ.get("HISPEC_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hispec"


def module_digest(module: nn.Module, config: Any) -> str:
    """A hash of the weights of a module and of all that its computation depends on.

    Args:
        config: the transformers config of its model.
    """
    context = {
        "module": module.extra_repr(),
        "config": config.to_json_string(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": f"{processor()} {instruction_sets()}",
        "code": [hashlib.sha256(source.read_bytes()).hexdigest() for source in _SOURCES],
    }
    digest = hashlib.sha256(json.dumps(context, sort_keys=True).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def artifact_path(digest: str, settings: Mapping[str, Any]) -> Path:
    """The file of a module with this digest, compiled with these settings."""
    whole = hashlib.sha256((digest + json.dumps(settings, sort_keys=True)).encode())
    return cache_folder() / f"{whole.hexdigest()}.graph"


def read_artifact(path: Path) -> np.ndarray | None:
    """What was kept under that name, mapped into memory; None if nothing was, or if it is damaged,
    which is said."""
    try:
        content = np.memmap(path, dtype=np.uint8, mode="c")  # OpenVINO wants it writable
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} cannot be read ({error}); compiling anew", stacklevel=2)
        return None
    graph = content[_HEADER:]
    if hashlib.sha256(graph.data).digest() != content[:_DIGEST].tobytes():
        warnings.warn(f"{path} is damaged; compiling anew", stacklevel=2)
        return None
    with suppress(OSError):  # a folder that others fill
        os.utime(path)
    return graph


def write_artifact(path: Path, content: bytes) -> None:
    """Keep a compiled graph, whole or not at all; where that cannot be done, say so and go on."""
    try:
        with new_file(path, _HEADER + len(content)) as temporary, open(temporary, "wb") as file:
            file.write(hashlib.sha256(content).digest().ljust(_HEADER, b"\0"))
            file.write(content)
    except (OSError, ValueError) as error:
        warnings.warn(f"the compiled graph is not kept: {error}", stacklevel=2)
    _remove_unread(path.parent)


def _remove_unread(folder: Path) -> None:
    """Remove what was last read or written `_KEPT` seconds ago or more."""
    before = time.time() - _KEPT
    for path in folder.glob("*.graph"):
        with suppress(OSError):  # another process was faster, or it is somebody else's
            if path.stat().st_mtime < before:
                path.unlink()
