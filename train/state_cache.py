"""The frozen trunk's states on disk: computed once, read in every epoch.

A frozen trunk gives the same states for the same row of text every time. So its states at the exits
and the full model's top-k probabilities are written to files, row by row, and training reads them
instead of running the trunk: a step then runs the exits and the LM head only.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.filesize import decimal
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

from hispec.models.exit_model import ExitModel
from hispec.utils.console import Output
from hispec.utils.files import clear_leftovers, new_file, read_json, write_json
from hispec.utils.settings import check
from train.data import TrainingRows
from train.distributed import on_all, on_first
from train.losses import StoredProbs, top_probs
from train.recipe import Recipe

ABOUT = "states.json"
_SHARD = 2**26  # bytes of one file, about: what a killed run computes again


@dataclass
class StateSizes:
    """Which tensors are stored per token, and how many bytes they take."""

    depths: list[int]
    top_k: int
    hidden: int
    final: bool
    """Whether the normed state at full depth is stored too, for heads that read it."""
    dtype: torch.dtype

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        states = [f"depth.{depth}" for depth in self.depths] + ["final"] * self.final
        return [*states, "top.tokens", "top.log_p"]

    @property
    def bytes_per_token(self) -> int:
        """Bytes: the states, and an id and a log-probability for each of the top tokens."""
        states = len(self.depths) + self.final
        return states * self.hidden * self.dtype.itemsize + self.top_k * (4 + 4)


def state_sizes(recipe: Recipe, config: Any) -> StateSizes:
    """What a recipe stores of a model with this transformers config.

    Raises:
        ValueError: `states_top_k` is larger than the vocabulary.
    """
    hidden, vocab_size, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
    check(
        recipe.states_top_k <= vocab_size,
        "states_top_k",
        recipe.states_top_k,
        f"at most {vocab_size}, the vocabulary of the base",
    )
    more = set(recipe.states_depths)
    check(
        all(depth <= layers for depth in more),
        "states_depths",
        recipe.states_depths,
        f"at most {layers}, the layers of the base",
    )
    return StateSizes(
        depths=sorted({*recipe.read_depths(layers), *more} - {layers}),
        top_k=recipe.states_top_k,
        hidden=hidden,
        final=layers in more or any(exit.previous for exit in recipe.exit_config().exits),
        dtype=recipe.dtype,
    )


@dataclass
class StoredStates:
    """The stored states of a batch of rows."""

    states: dict[int, torch.Tensor]
    """[B, T, H] by depth."""
    tokens_BTK: torch.Tensor
    log_probs_BTK: torch.Tensor
    final_BTH: torch.Tensor | None = None
    """Normed, at full depth."""

    @classmethod
    def of(cls, row: dict[str, torch.Tensor]) -> StoredStates | None:
        """The states of a collated batch, None if it has none."""
        if "top.tokens" not in row:
            return None
        depths = {name.removeprefix("depth."): t for name, t in row.items() if name[:6] == "depth."}
        return cls(
            {int(depth): states for depth, states in depths.items()},
            row["top.tokens"],
            row["top.log_p"],
            row.get("final"),
        )

    def probs(self) -> StoredProbs:
        """The full model's top-k probabilities at all N = B * T tokens."""
        return StoredProbs(self.tokens_BTK.flatten(0, 1).long(), self.log_probs_BTK.flatten(0, 1))


@torch.no_grad()
def compute_states(
    model: ExitModel,
    tokens_BT: torch.Tensor,
    positions_BT: torch.Tensor | None,
    sizes: StateSizes,
    chunk: int,
) -> dict[str, torch.Tensor]:
    """The tensors [B, T, ...] to store for some rows, on the CPU, by name."""
    states = model.states(tokens_BT, [*sizes.depths, model.num_layers], positions_BT)
    final_BTH = model.normed(model.num_layers, states[model.num_layers])
    found = {f"depth.{depth}": states[depth] for depth in sizes.depths}
    if sizes.final:
        found["final"] = final_BTH
    top = top_probs(model.project, final_BTH.flatten(0, 1), sizes.top_k, chunk)
    shape = (*tokens_BT.shape, sizes.top_k)
    kept = {name: tensor.to("cpu", sizes.dtype) for name, tensor in found.items()}
    kept["top.tokens"] = top.tokens_NK.int().view(shape).cpu()
    kept["top.log_p"] = top.log_probs_NK.view(shape).cpu()
    return kept


def _with_stored(folder: Path, sizes: StateSizes) -> StateSizes:
    """`sizes`, with what a folder stores beside them."""
    about = folder / ABOUT
    there = read_json(about) if about.is_file() else {}
    depths = there.get("depths", sizes.depths)
    final = there.get("final", sizes.final)
    if set(sizes.depths) <= set(depths) and sizes.final <= final:
        return replace(sizes, depths=depths, final=final)
    return sizes


class StateStore(Dataset[dict[str, Any]]):
    """Training rows with the trunk's states for them; `fill` comes before the first row is read.

    Args:
        folder: where the files are. Runs with the same base, text, depths and precision share it.
        rows: the training rows.
        sizes: what the run reads. A folder that holds more than that is left as it is.
        base: SHA-256 of the base's weight files.
    """

    def __init__(
        self,
        folder: Path,
        rows: TrainingRows,
        sizes: StateSizes,
        base: dict[str, str],
    ) -> None:
        self.folder = folder
        self.rows = rows
        self.names = sizes.names
        sizes = self.sizes = _with_stored(folder, sizes)
        per_row = rows.rows.tokens_RT.shape[1] * sizes.bytes_per_token
        self.bytes = len(rows) * per_row
        self.rows_per_file = max(1, _SHARD // per_row)
        self.files = -(-len(rows) // self.rows_per_file)
        text = hashlib.sha256()
        for tensor_RT in (rows.rows.tokens_RT, rows.rows.positions_RT):
            text.update(tensor_RT.numpy().tobytes())
        self.about = {
            "base": base,
            "text": text.hexdigest(),
            **asdict(sizes),
            "dtype": str(sizes.dtype),
        }
        self._open = cache(self._open_file)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        opened = self._open(row // self.rows_per_file)
        at = row % self.rows_per_file
        stored = {name: opened.get_slice(name)[at] for name in self.names}
        return {**self.rows[row], **stored}

    def _file(self, number: int) -> Path:
        return self.folder / f"states-{number:05d}-of-{self.files:05d}.safetensors"

    def _open_file(self, number: int) -> Any:
        return safe_open(self._file(number), framework="pt")

    def fill(
        self,
        accelerator: Accelerator,
        on_model: Callable[..., Any],
        *,
        batch_size: int,
        chunk: int,
        say: Callable[[str], None],
    ) -> None:
        """Compute and write the missing files; each is written whole or not at all.

        Every process computes its share. Where the trunk is spread over processes each of them
        must take part in every pass, so all make as many passes as the one with most to do.

        Raises:
            ValueError: the folder holds other states, or the disk has no room for these.
        """
        missing = on_first(accelerator, lambda: self._prepare(say))
        processes, rank = accelerator.num_processes, accelerator.process_index
        rounds = range(0, len(missing), processes)
        shown = accelerator.is_main_process and bool(missing)
        for first in track(rounds, "trunk states", disable=not shown, console=Output(stderr=True)):
            number = missing[min(first + rank, len(missing) - 1)]
            tensors = self._compute(accelerator, on_model, number, batch_size, chunk)
            if first + rank >= len(missing):  # computed with the others, who write it
                tensors = {}
            on_all(partial(self._write, self._file(number), tensors))
        accelerator.wait_for_everyone()

    def _prepare(self, say: Callable[[str], None]) -> list[int]:
        """Check the folder and the room on its disk; returns the numbers of the missing files."""
        about = self.folder / ABOUT
        if about.is_file():
            there = read_json(about)
            differing = [k for k, v in self.about.items() if there.get(k) != v]
            if differing:
                rows = there.get("rows", len(self))
                hint = (
                    f" It has {rows} rows of text and this run reads {len(self)}: data, seed, "
                    "max_rows, and where they need fewer rows steps and batch_size, decide which."
                ) * (differing == ["text"] and rows != len(self))
                raise ValueError(
                    f"states={str(self.folder)!r} holds the states of another model or text (it "
                    f"differs in: {', '.join(differing)}); remove it or name another folder.{hint}"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(
                f"states={str(self.folder)!r} is not empty and holds no states; name another folder"
            )
        for number in range(self.files):
            clear_leftovers(self._file(number))
        missing = [n for n in range(self.files) if not self._file(n).is_file()]
        share = len(missing) / self.files
        parent = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(parent).free
        say(
            f"trunk states: {decimal(self.bytes)} in {self.folder} for {len(self)} rows of text, "
            f"{100 * (1 - share):.0f}% are there; {decimal(free)} are free"
        )
        if share * self.bytes > free:
            raise ValueError(
                f"states={str(self.folder)!r}: {decimal(round(share * self.bytes))} are needed "
                f"and {decimal(free)} are free; set a smaller max_rows or name another disk"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(about, {**self.about, "rows": len(self)})
        return missing

    def _compute(
        self,
        accelerator: Accelerator,
        on_model: Callable[..., Any],
        number: int,
        batch_size: int,
        chunk: int,
    ) -> dict[str, torch.Tensor]:
        """Compute the tensors of one file."""
        first = number * self.rows_per_file
        stop = min(first + self.rows_per_file, len(self.rows))
        parts: list[dict[str, torch.Tensor]] = []
        for start in range(first, stop, batch_size):
            rows = slice(start, min(start + batch_size, stop))
            texts = self.rows.rows[rows].on(accelerator.device)
            parts.append(on_model(compute_states, *texts, self.sizes, chunk))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if not tensors:
            return
        try:
            with new_file(path) as temporary:
                save_file(tensors, temporary)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"states={str(self.folder)!r}: {path.name} could not be written: {error}; the "
                "files that are there already are whole and will be used"
            ) from error
