"""The training run: exits of one model, from a recipe to an EE checkpoint, resumable anywhere."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list, set_seed
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from hispec import checkpoint
from hispec.console import Output, quiet_transformers
from hispec.files import clear_leftovers, read_json, swap_in, write_json
from hispec.measure import agreement, ladder_pairs
from hispec.model import ExitModel

from .data import training_sets
from .losses import ExitLoss, exit_loss
from .recipe import Recipe
from .schedule import learning_rate

PROGRESS = "progress.json"
_LOG_EVERY = 50  # steps between two lines where there is no terminal for a bar
# A resumed run may change these: they do not touch what a step computes.
_FREE_KEYS = {"max_minutes", "save_every", "export_full", "threads"}


class Exits(nn.Module):
    """The trained part as one module, so that accelerate wraps, saves and averages it as one."""

    def __init__(self, model: ExitModel) -> None:
        super().__init__()
        self.heads = model.heads
        self._model = (model,)  # in a tuple: the frozen trunk must not become a submodule

    def forward(self, states: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """Normed states [B, T, H] of every exit, from the trunk's states there."""
        (model,) = self._model
        return [model.normed(d, model.run_head(d, hidden)) for d, hidden in states.items()]


class Trainer:
    """One run of a recipe.

    Raises:
        ValueError: the base is missing, the exits do not fit it, the text is too short, or the
            folder holds the state of a run with other settings.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.output = Path(recipe.output)
        checkpoint.check_target(self.output)
        self.run_folder = self.output.parent / f"{self.output.name}.run"
        self.accelerator = Accelerator(
            mixed_precision="no" if recipe.precision == "fp32" else recipe.precision,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        )
        if self.accelerator.device.type == "cpu":
            share = (os.cpu_count() or 1) // self.accelerator.num_processes
            torch.set_num_threads(recipe.threads or max(1, share))
        set_seed(recipe.seed)
        quiet_transformers()
        self.base = checkpoint.find_base(recipe.base)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}
        hf = checkpoint.load_base(self.base.folder, half.get(recipe.precision, torch.float32))
        hf.requires_grad_(False)
        self.model = ExitModel(hf, recipe.exit_config()).to(self.accelerator.device)
        self.model.heads.float().requires_grad_(True)  # master weights; autocast does the rest
        self.tokenizer = AutoTokenizer.from_pretrained(self.base.folder, local_files_only=True)

        training, self.held_out = training_sets(
            recipe, self.tokenizer, self.accelerator.num_processes
        )
        loader = DataLoader(training, recipe.batch_size, shuffle=True, drop_last=True)
        exits = Exits(self.model)
        optimizer = torch.optim.AdamW(
            exits.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
        )
        self.exits, self.optimizer, self.loader = self.accelerator.prepare(exits, optimizer, loader)
        if len(self.loader) == 0:
            raise ValueError(
                f"batch_size={recipe.batch_size} times {self.accelerator.num_processes} "
                f"process(es) is more than the {len(training)} rows of {recipe.seq_len} tokens "
                f"that data={recipe.data!r} gives"
            )
        self._console = Output()
        self.step = 0
        self.minutes = 0.0
        self.history: list[dict[str, Any]] = []

    def train(self) -> Path:
        """Train to the end and export; returns the checkpoint's folder."""
        self._resume()
        recipe = self.recipe
        began, spent = time.perf_counter(), self.minutes
        if self.step == 0:
            self._evaluate(None)
        with self._progress_bar() as watch:
            for (tokens_BT,) in self._batches():
                if self.step >= recipe.steps or self._time_is_up():
                    break
                result = self._train_step(tokens_BT)
                self.step += 1
                self.minutes = spent + (time.perf_counter() - began) / 60
                watch(result, tokens_BT.numel() * self.accelerator.num_processes)
                if self.step % recipe.eval_every == 0 and self.step < recipe.steps:
                    self._evaluate(result)
                if self.step % recipe.save_every == 0:
                    self._save_state()
        if not self.history or self.history[-1]["step"] != self.step:
            self._evaluate(None)
        self._save_state()
        return self._export()

    def _train_step(self, tokens_BT: torch.Tensor) -> ExitLoss:
        recipe = self.recipe
        rate = recipe.lr * learning_rate(
            self.step, recipe.steps, warmup=recipe.warmup, floor=recipe.min_lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        states, final_BTH = self._trunk(tokens_BT)
        width = final_BTH.shape[-1]
        labels_BT = torch.full_like(tokens_BT, -100)
        labels_BT[:, :-1] = tokens_BT[:, 1:]
        normed = self.exits(states)
        with self.accelerator.autocast():
            result = exit_loss(
                self.model.project,
                [hidden.reshape(-1, width) for hidden in normed],
                final_BTH.reshape(-1, width),
                labels_BT.reshape(-1),
                distill_weight=recipe.distill_weight,
                ce_weight=recipe.ce_weight,
                chunk=recipe.loss_chunk,
            )
        self.accelerator.backward(result.loss)
        self.accelerator.clip_grad_norm_(self.exits.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return result

    @torch.no_grad()
    def _trunk(self, tokens_BT: torch.Tensor) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """(states at every exit, normed final states), without gradient: the trunk is frozen."""
        model, states, at = self.model, {}, 0
        hidden_BTH = model.embed(tokens_BT)
        for depth in [*self.recipe.exits, model.num_layers]:
            hidden_BTH, at = model.run(hidden_BTH, at, depth), depth
            states[depth] = hidden_BTH
        final_BTH = states.pop(model.num_layers)
        return states, model.normed(model.num_layers, final_BTH)

    def _batches(self) -> Iterator[list[torch.Tensor]]:
        """Batches without end, from the run's position on: a function of (seed, step) alone."""
        epoch, skip = divmod(self.step, len(self.loader))
        while True:
            self.loader.set_epoch(epoch)
            yield from self.accelerator.skip_first_batches(self.loader, skip)
            epoch, skip = epoch + 1, 0

    def _time_is_up(self) -> bool:
        """Whether `max_minutes` are spent, by the clock of the first process: all stop together."""
        limit = self.recipe.max_minutes
        if limit is None:
            return False
        return broadcast_object_list([self.minutes >= limit])[0]

    def _evaluate(self, result: ExitLoss | None) -> None:
        """Measure the exits on held-out text, and keep the figures with the run."""
        if not self.accelerator.is_main_process:
            return
        (rows_RT,) = self.held_out.tensors
        with self.accelerator.autocast():
            pairs = ladder_pairs(self.recipe.exits, self.model.num_layers)
            measured = agreement(self.model, rows_RT, pairs)
        entry: dict[str, Any] = {
            "step": self.step,
            "tokens": self._tokens_seen(),
            "minutes": self.minutes,
            "agreement": [asdict(m) for m in measured],
        }
        if result is not None:
            entry["loss"] = result.loss_E.tolist()
        self.history.append(entry)
        shown = "  ".join(
            f"{m.shallow}->{m.deep} agreement {m.top1:.3f} acceptance {m.acceptance:.3f}"
            for m in measured
        )
        self.say(f"step {self.step}: held-out text: {shown}")

    def _tokens_seen(self) -> int:
        per_step = self.recipe.batch_size * self.recipe.seq_len * self.accelerator.num_processes
        return self.step * per_step

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self._console.say(text)

    @contextmanager
    def _progress_bar(self) -> Iterator[Any]:
        columns = (
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        bar = Progress(
            *columns, console=self._console, disable=not self.accelerator.is_main_process
        )
        with bar:
            task = bar.add_task("", total=self.recipe.steps, completed=self.step, figures="")
            mean: dict[str, Any] = {}

            def watch(result: ExitLoss, tokens: int) -> None:
                now = time.perf_counter()
                seen = {"loss": result.loss_E, "agree": result.agreement_E}
                if "at" in mean:
                    seen["rate"] = tokens / (now - mean["at"])
                for key, value in seen.items():  # moving average over about twenty steps
                    mean[key] = value if key not in mean else 0.95 * mean[key] + 0.05 * value
                mean["at"] = now
                per_exit = "  ".join(
                    f"@{depth} loss {loss:.2f} agree {agree:.2f}"
                    for depth, loss, agree in zip(
                        self.recipe.exits, mean["loss"], mean["agree"], strict=True
                    )
                )
                figures = f"{per_exit}  {mean.get('rate', 0):.0f} tok/s"
                bar.update(task, completed=self.step, figures=figures)
                if not self._console.is_terminal and self.step % _LOG_EVERY == 0:
                    self.say(f"step {self.step} of {self.recipe.steps}: {figures}")

            yield watch

    # State of an unfinished run ---------------------------------------------------------------

    def _save_state(self) -> None:
        """Write all that a killed run needs to go on, whole or not at all.

        Every process takes part: each has random states of its own to save.
        """
        staging = self.run_folder / "state.new"  # one name for all processes
        if self.accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(staging), safe_serialization=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(
                staging / PROGRESS,
                {
                    "step": self.step,
                    "minutes": self.minutes,
                    "history": self.history,
                    "processes": self.accelerator.num_processes,
                    "recipe": asdict(self.recipe),
                },
            )
            swap_in(staging, self.run_folder / "state")
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        state = self.run_folder / "state"
        if self.accelerator.is_main_process:
            for target in (self.output, state):
                if clear_leftovers(target):
                    self.say(f"an earlier run was interrupted while it wrote {target}: cleaned up")
            if not state.exists() and self.run_folder.exists():
                self.say(f"an earlier run in {self.run_folder} saved no state: starting anew")
            self.run_folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        if not (state / PROGRESS).is_file():
            return
        progress = read_json(state / PROGRESS)
        now, then = asdict(self.recipe), progress["recipe"]
        changed = [
            f"{key}: {then.get(key)!r} there, {now[key]!r} now"
            for key in now
            if key not in _FREE_KEYS and now[key] != then.get(key)
        ]
        if (processes := self.accelerator.num_processes) != progress["processes"]:
            changed.append(f"processes: {progress['processes']} there, {processes} now")
        if changed:
            raise ValueError(
                f"{state} belongs to a run with other settings ({'; '.join(changed)}); "
                f"remove {self.run_folder} or choose another output="
            )
        self.accelerator.load_state(str(state))
        self.step = progress["step"]
        self.minutes = progress["minutes"]
        self.history = progress["history"]
        self.say(f"going on at step {self.step} of {self.recipe.steps}, from {state}")

    # The end of a run -------------------------------------------------------------------------

    def _export(self) -> Path:
        if self.accelerator.is_main_process:
            last = self.history[-1]
            checkpoint.save(
                self.output,
                self.model,
                self.base,
                recipe=asdict(self.recipe),
                figures={
                    "text": f"held-out documents of {self.recipe.data}",
                    "agreement": last["agreement"],
                    "untrained": self.history[0]["agreement"],
                    "training_tokens": last["tokens"],
                    "minutes": last["minutes"],
                },
                full=self.recipe.export_full,
            )
            write_json(self.run_folder / "history.json", {"history": self.history})
            self.say(f"EE checkpoint: {self.output}")
        self.accelerator.wait_for_everyone()
        return self.output
