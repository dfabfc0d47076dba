"""The training run: exits of one model, from a recipe to an EE checkpoint, resumable anywhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, set_seed
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer

from hispec.base_models.local import find_base, load_base
from hispec.checkpoint.io import (
    check_target,
    copy_checkpoint,
    is_checkpoint,
    read_config,
    save_checkpoint,
)
from hispec.models.exit_model import ExitModel
from hispec.utils.console import Output, quiet_transformers
from hispec.utils.files import clear_leftovers, write_json
from train.data import TrainingRows, frequent_tokens, training_sets
from train.distributed import build_accelerator, gather, place, sharded
from train.evaluator import Judge, shown
from train.fused import check_kernels
from train.losses import ExitLoss
from train.progress import Figures, progress_bar
from train.recipe import Recipe
from train.resume import load_state, save_state
from train.schedule import active_exits, learning_rate
from train.state_cache import StateStore, state_sizes
from train.stream import Position, RowStream, streamed_sets
from train.training_step import Batch, TrainingStep, Wrapped
from train.trunk import Trunk


class Trainer:
    """One run of a recipe.

    Raises:
        ValueError: the base is missing, the exits do not fit it, the text is too short, or the
            folder holds the state of a run with other settings.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.output = Path(recipe.output)
        check_target(self.output)
        self.run_folder = self.output.parent / f"{self.output.name}.run"
        self.accelerator = build_accelerator(recipe, self.run_folder / "logs")
        if recipe.fused_loss:
            check_kernels(self.accelerator.device)
        if self.accelerator.device.type == "cpu":
            share = (os.cpu_count() or 1) // self.accelerator.num_processes
            torch.set_num_threads(recipe.threads or max(1, share))
        set_seed(recipe.seed)
        quiet_transformers()
        self.base = find_base(recipe.base)
        # A trunk that is trained whole needs master weights; any other is used as it is.
        dtype = torch.float32 if recipe.trunk == "full" else recipe.dtype
        hf = load_base(self.base.folder, dtype)
        self.model = place(ExitModel(hf, recipe.exit_config(), gather), self.accelerator)
        self.model.heads.float().requires_grad_(True)  # master weights; autocast does the rest
        self.trunk = Trunk(hf, recipe.trunk, rank=recipe.lora_rank, alpha=recipe.lora_alpha)
        untouched = None
        if recipe.base_kl and recipe.trunk == "full":
            untouched = ExitModel(load_base(self.base.folder, recipe.dtype))
            untouched.to(self.accelerator.device).requires_grad_(False)
        self.training_step = TrainingStep(
            recipe,
            self.trunk,
            untouched,
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        self.tokenizer = AutoTokenizer.from_pretrained(self.base.folder, local_files_only=True)

        processes = self.accelerator.num_processes
        self.stream: RowStream | None = None
        self.store: StateStore | None = None
        loaders = []
        if recipe.streaming:
            self.stream, held_out = streamed_sets(recipe, self.tokenizer, processes)
            if recipe.draft_vocab:
                self._choose_draft_tokens(TrainingRows(self.stream.first_block()).labels_RT)
        else:
            training, held_out = training_sets(recipe, self.tokenizer, processes)
            self._choose_draft_tokens(training.labels_RT)
            self.store = self._state_store(training)
            dataset: Dataset[dict[str, torch.Tensor]] = self.store or training
            loaders = [DataLoader(dataset, recipe.batch_size, shuffle=True, drop_last=True)]
        self.judge = Judge(held_out, self.trunk)
        with_trunk = self.trunk.trained or sharded(self.accelerator)
        wrapped = Wrapped(self.model, with_trunk=with_trunk)
        optimizer = torch.optim.AdamW(
            [p for p in wrapped.parameters() if p.requires_grad],
            lr=recipe.lr,
            betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
        )
        self.wrapped, self.optimizer, *loaders = self.accelerator.prepare(
            wrapped, optimizer, *loaders
        )
        if loaders:
            (self.loader,) = loaders
            if len(self.loader) < recipe.accumulate:
                raise ValueError(
                    f"batch_size={recipe.batch_size} times {processes} process(es), "
                    f"{recipe.accumulate} times a step, is more than the {len(training)} rows of "
                    f"{recipe.seq_len} tokens that data={recipe.data!r} gives"
                )
        self._console = Output()
        self.step = 0
        self.minutes = 0.0
        self.history: list[dict[str, Any]] = []

    def _choose_draft_tokens(self, labels_RT: torch.Tensor) -> None:
        if self.model.draft_tokens is not None:
            count = self.recipe.draft_vocab
            tokens_K = frequent_tokens(labels_RT, count, self.model.vocab_size)
            self.model.draft_tokens.copy_(tokens_K)

    def _state_store(self, training: TrainingRows) -> StateStore | None:
        if self.recipe.states is None:
            return None
        sizes = state_sizes(self.recipe, self.model.hf.config.hidden_size, self.model.vocab_size)
        return StateStore(Path(self.recipe.states), training, sizes, self.base.weights())

    def train(self) -> Path:
        """Train to the end and export the best; returns the checkpoint's folder."""
        self._on_model(self.judge.remember_base)
        self._resume()
        recipe, processes = self.recipe, self.accelerator.num_processes
        if recipe.log_with:
            self.accelerator.init_trackers("hispec", config=_flat(asdict(recipe)))
        began, spent = time.perf_counter(), self.minutes
        if self.store is not None:
            self.store.fill(
                self.accelerator,
                self._on_model,
                batch_size=recipe.batch_size,
                chunk=recipe.loss_chunk,
                say=self.say,
            )
            self.minutes = spent + (time.perf_counter() - began) / 60
        if self.step == 0:
            self._evaluate()
        main = self.accelerator.is_main_process
        with progress_bar(self._console, recipe.steps, self.step, shown=main) as watch:
            batches = self._batches()
            while self.step < recipe.steps and not self._time_is_up() and not self._drifted():
                figures, tokens = self._train_step(batches)
                self.step += 1
                self.minutes = spent + (time.perf_counter() - began) / 60
                watch(self.step, figures, tokens * processes)
                self.accelerator.log(figures, step=self.step)
                if self.step % recipe.eval_every == 0 and self.step < recipe.steps:
                    self._evaluate(figures)
                if self.step % recipe.save_every == 0:
                    self._save_state()
        if self.history[-1]["step"] != self.step:
            self._evaluate()
        self._save_state()
        exported = self._export()
        self.accelerator.end_training()
        return exported

    def _train_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> tuple[Figures, int]:
        """One step of the optimizer; (its figures by name, tokens that this process ran)."""
        recipe = self.recipe
        rate = recipe.lr * learning_rate(
            self.step,
            recipe.steps,
            warmup=recipe.warmup,
            floor=recipe.min_lr,
            curve=recipe.lr_schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        results: list[ExitLoss] = []
        tokens = 0
        for micro in range(recipe.accumulate):
            batch = Batch.of(next(batches), self.step, micro)
            tokens += batch.tokens_BT.numel()
            with self.accelerator.accumulate(self.wrapped):
                result = self._on_model(self.training_step, batch)
                self.accelerator.backward(result.loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.wrapped.parameters(), recipe.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            results.append(result)
        loss_P = torch.stack([r.loss_P for r in results]).mean(0).tolist()
        agreement_P = torch.stack([r.agreement_P for r in results]).mean(0).tolist()
        figures: Figures = {}
        chosen = active_exits(recipe.curriculum, len(recipe.exits), self.step, recipe.steps)
        for p, e in enumerate(chosen):
            figures[f"@{recipe.exits[e]} loss"] = loss_P[p]
            figures[f"@{recipe.exits[e]} agree"] = agreement_P[p]
        if self.trunk.trained:
            figures["final loss"] = loss_P[-1]
        return figures, tokens

    def _on_model(self, job: Callable[..., Any], *args: Any) -> Any:
        """Do something with the model from inside what accelerate wrapped."""
        with self.accelerator.autocast():
            return self.wrapped(job, *args)

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches (see `TrainingRows`) without end, from the run's position on."""
        if self.stream is not None:
            yield from self._streamed_batches(self.stream)
        epoch, skip = divmod(self.step * self.recipe.accumulate, len(self.loader))
        while True:
            self.loader.set_epoch(epoch)
            yield from self.accelerator.skip_first_batches(self.loader, skip)
            epoch, skip = epoch + 1, 0

    def _streamed_batches(self, stream: RowStream) -> Iterator[dict[str, torch.Tensor]]:
        """The rows of a pass in the order of the processes, as one process would have them."""
        size, accelerator = self.recipe.batch_size, self.accelerator
        first = accelerator.process_index * size
        while True:
            rows = TrainingRows(stream.take(size * accelerator.num_processes))
            batch = rows[first : first + size]
            yield {name: tensor_BT.to(accelerator.device) for name, tensor_BT in batch.items()}

    def _time_is_up(self) -> bool:
        """Whether `max_minutes` are spent, by the clock of the first process: all stop together."""
        limit = self.recipe.max_minutes
        if limit is None:
            return False
        return cast(bool, broadcast_object_list([self.minutes >= limit])[0])

    def _drifted(self) -> bool:
        """Whether the last evaluation found the final rung further from the base than allowed."""
        if not self._beyond(self.history[-1]):
            return False
        self.say(
            f"the final rung is {self.history[-1]['drift']:.4f} nats from its base, more than "
            f"max_drift={self.recipe.max_drift}: stopping"
        )
        return True

    def _beyond(self, entry: dict[str, Any]) -> bool:
        limit = self.recipe.max_drift
        return limit is not None and entry["drift"] > limit

    def _evaluate(self, figures: Figures | None = None) -> None:
        """Measure the exits on held-out text, and keep the best so far in the run's folder."""
        self.wrapped.eval()
        found = self._on_model(self.judge)
        self.wrapped.train()
        entry: dict[str, Any] = {
            "step": self.step,
            "tokens": self._tokens_seen(),
            "minutes": self.minutes,
            **found,
            **({"training": figures} if figures else {}),
        }
        self.history.append(entry)
        self.say(f"step {self.step}: held-out text: {shown(found)}")
        self.accelerator.log(_flat({"held out": found["expected"]}), step=self.step)
        within = [e for e in self.history if e["step"] > 0 and not self._beyond(e)]
        if max(within, key=lambda e: e["expected"]["speed"], default=None) is entry:
            self._write_best(entry)

    def _tokens_seen(self) -> int:
        recipe = self.recipe
        per_step = recipe.batch_size * recipe.seq_len * recipe.accumulate
        return self.step * per_step * self.accelerator.num_processes

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self._console.say(text)

    def _save_state(self) -> None:
        progress = {"step": self.step, "minutes": self.minutes, "history": self.history}
        if self.stream is not None:
            progress["stream"] = asdict(self.stream.position)
        save_state(self.accelerator, self.run_folder / "state", self.recipe, progress)

    def _resume(self) -> None:
        state = self.run_folder / "state"
        if self.accelerator.is_main_process:
            for target in (self.output, state, self.run_folder / "best"):
                if clear_leftovers(target):
                    self.say(f"an earlier run was interrupted while it wrote {target}: cleaned up")
            if not state.exists() and self.run_folder.exists():
                self.say(f"an earlier run in {self.run_folder} saved no state: starting anew")
            self.run_folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        progress = load_state(self.accelerator, state, self.recipe)
        if progress is not None:
            self.step = progress["step"]
            self.minutes = progress["minutes"]
            self.history = progress["history"]
            if self.stream is not None:
                self.stream.seek(Position(**progress["stream"]))
            self.say(f"going on at step {self.step} of {self.recipe.steps}, from {state}")

    # The best so far, and the end of a run ------------------------------------------------------

    def _write_best(self, entry: dict[str, Any]) -> None:
        """Write the model as it is to the run's folder. Every process takes part: each may hold a
        part of the weights."""
        state = self.accelerator.get_state_dict(self.wrapped)
        if self.accelerator.is_main_process:
            kept = {k: entry[k] for k in ("agreement", "expected", "drift", "loss") if k in entry}
            save_checkpoint(
                self.run_folder / "best",
                self.model,
                self.base,
                recipe=asdict(self.recipe),
                figures={
                    "text": f"held-out documents of {self.recipe.data}",
                    **kept,
                    "untrained": self.history[0]["agreement"],
                    "training_tokens": entry["tokens"],
                    "minutes": entry["minutes"],
                },
                full=self.recipe.export_full,
                exits=_below(state, "heads."),
                trunk=self.trunk.merged(_below(state, "trunk.")) if self.trunk.trained else None,
            )
        self.accelerator.wait_for_everyone()

    def _export(self) -> Path:
        best = self.run_folder / "best"
        if not is_checkpoint(best):
            if self._beyond(self.history[-1]):
                raise ValueError(
                    f"max_drift={self.recipe.max_drift}: the final rung was further from its base "
                    "at every evaluation, so there is no checkpoint; lower lr, raise base_kl, or "
                    "set a smaller eval_every"
                )
            self._write_best(self.history[-1])
        if self.accelerator.is_main_process:
            write_json(self.run_folder / "history.json", {"history": self.history})
            copy_checkpoint(best, self.output)
            figures = read_config(self.output)["figures"]
            self.say(
                f"EE checkpoint: {self.output}, the fastest by expectation, "
                f"{figures['expected']['speed']:.2f}x, after {figures['training_tokens']} tokens"
            )
        self.accelerator.wait_for_everyone()
        return self.output


def _below(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries of a state dict that begin with a prefix, without it."""
    return {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}


def _flat(nested: dict[str, Any]) -> dict[str, Any]:
    """Values that every tracker takes, by one name each."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update({f"{key} {name}": inner for name, inner in value.items()})
        else:
            flat[key] = value if isinstance(value, (int, float, str)) else str(value)
    return flat
