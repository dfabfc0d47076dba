"""The training run: from a recipe to an EE checkpoint, resumable at every step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer

from hispec.base_models.local import find_base, load_base
from hispec.checkpoint.io import check_target
from hispec.models.exit_model import ExitModel
from hispec.utils.console import Output, quiet_transformers
from hispec.utils.files import clear_leftovers, output_path, write_json
from train.batches import loaded_batches, streamed_batches
from train.best import BestCheckpoint
from train.data import TrainingRows, frequent_tokens, training_sets
from train.distributed import (
    build_accelerator,
    end_training,
    from_first,
    gather,
    leave_out_frozen,
    on_first,
    place,
    sharded,
)
from train.divergence import DivergedError, check_finite, not_finite
from train.evaluator import Evaluator, logged, shown
from train.exits_from import start_from
from train.fused import check_kernels
from train.losses import ExitLoss
from train.optimizer import build_optimizer
from train.progress import Figures, flat, progress_bar
from train.recipe import Recipe
from train.resume import load_state, save_state
from train.schedule import active_exits, learning_rate
from train.state_cache import StateStore, state_sizes
from train.stream import Position, RowStream, streamed_sets
from train.training_step import Batch, TrainingStep
from train.trunk import Trunk
from train.wrapped import Wrapped


class Trainer:
    """One run of a recipe.

    Raises:
        ValueError: the base is missing, the exits do not fit it, the text is too short, or the
            output folder may not be replaced.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe = recipe.for_this_machine()
        self.output = Path(recipe.output)
        check_target(self.output)
        self.run_folder = self.output.parent / f"{self.output.name}.run"
        output_path(self.run_folder / "state")
        self.accelerator = build_accelerator(recipe, self.run_folder / "logs")
        if recipe.fused_loss:
            check_kernels(self.accelerator.device)
        if self.accelerator.device.type == "cpu":
            share = (os.cpu_count() or 1) // self.accelerator.num_processes
            torch.set_num_threads(recipe.threads or max(1, share))
        set_seed(recipe.seed)
        quiet_transformers()
        self._console = Output()
        self.base = find_base(recipe.base)
        self._build_model()
        self.tokenizer = AutoTokenizer.from_pretrained(self.base.folder, local_files_only=True)
        self._prepare()
        self.step = 0
        self.minutes = 0.0
        self.history: list[dict[str, Any]] = []

    def _build_model(self) -> None:
        """The model, its trunk set up for training, and what computes a step's loss."""
        recipe, accelerator = self.recipe, self.accelerator
        # A trunk that is fully trained needs float32 master weights; any other keeps its dtype.
        dtype = torch.float32 if recipe.trunk == "full" else recipe.dtype
        hf = load_base(self.base.folder, dtype)
        self.model = place(ExitModel(hf, recipe.exit_config(), gather), accelerator)
        if recipe.exits_from is not None:
            start_from(self.model, recipe.exits_from)
        self.model.heads.float().requires_grad_(True)  # master weights; autocast does the rest
        self.trunk = Trunk(hf, recipe.trunk, rank=recipe.lora_rank, alpha=recipe.lora_alpha)
        untouched = None
        if recipe.base_kl and recipe.trunk == "full":
            untouched = place(ExitModel(load_base(self.base.folder, recipe.dtype)), accelerator)
            untouched.requires_grad_(False)
        self.training_step = TrainingStep(
            recipe,
            self.trunk,
            untouched,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            whole=not sharded(accelerator),
        )
        self.best = BestCheckpoint(
            self.run_folder / "best", recipe, accelerator, self.model, self.trunk, self.base
        )

    def _prepare(self) -> None:
        """The text, the optimizer, and all of it under accelerate."""
        recipe, processes = self.recipe, self.accelerator.num_processes
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
        self.evaluator = Evaluator(held_out, self.trunk)
        shared_out = sharded(self.accelerator)
        wrapped = Wrapped(
            self.model,
            with_trunk=self.trunk.trained or shared_out,
            base=self.training_step.base if shared_out else None,
        )
        optimizer = build_optimizer(wrapped, recipe, self.accelerator.device)
        self.wrapped, self.optimizer, *loaders = self.accelerator.prepare(
            wrapped, optimizer, *loaders
        )
        leave_out_frozen(wrapped)
        if loaders:
            (self.loader,) = loaders
            if len(self.loader) < recipe.accumulate:
                raise ValueError(
                    f"batch_size={recipe.batch_size} times {processes} process(es), "
                    f"{recipe.accumulate} times a step, is more than the {len(training)} rows of "
                    f"{recipe.seq_len} tokens that data={recipe.data!r} gives"
                )

    def _choose_draft_tokens(self, labels_RT: torch.Tensor) -> None:
        if self.model.draft_tokens is not None and self.recipe.exits_from is None:
            tokens_W = frequent_tokens(labels_RT, self.recipe.draft_vocab, self.model.vocab_size)
            with gather(self.model.hf.lm_head):
                self.model.set_draft_tokens(tokens_W)

    def _state_store(self, training: TrainingRows) -> StateStore | None:
        if self.recipe.states is None:
            return None
        sizes = state_sizes(self.recipe, self.model.hf.config)
        return StateStore(Path(self.recipe.states), training, sizes, self.base.weights())

    def train(self) -> Path:
        """Train to the end and export the best checkpoint; returns its folder.

        Raises:
            ValueError: the run belongs to other settings, could not be written, has diverged, or
                has no checkpoint within `max_drift`.
        """
        try:
            try:
                self._train()
            except DivergedError as error:
                self._check_export_of_diverged(error)
            return self._export()
        finally:
            del self.wrapped, self.optimizer
            end_training(self.accelerator)

    def _train(self) -> None:
        """All steps that are left, with evaluations and saved states."""
        self._on_model(self.evaluator.remember_base)
        self._resume()
        recipe = self.recipe
        if recipe.log_with:
            self.accelerator.init_trackers("hispec", config=flat(asdict(recipe)))
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
        with progress_bar(self._console, recipe.steps, self.step, shown=main) as report:
            batches = self._batches()
            while self.step < recipe.steps and not self._time_is_up() and not self._drifted():
                figures, logged_too = self._train_step(batches)
                self.step += 1
                self.minutes = spent + (time.perf_counter() - began) / 60
                report(self.step, {**figures, **logged_too})
                self.accelerator.log({**figures, **logged_too}, step=self.step)
                check_finite(self.step, {**figures, **logged_too})
                if self.step % recipe.eval_every == 0 and self.step < recipe.steps:
                    self._evaluate(figures)
                if self.step % recipe.save_every == 0:
                    self._save_state()
        if self.history[-1]["step"] != self.step:
            self._evaluate()
        self._save_state()

    def _train_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> tuple[Figures, Figures]:
        """One step of the optimizer.

        The loss is the mean over the labelled tokens of the whole step. A mean of each pass's own
        mean would give a token more weight where there are fewer of them, so that the gradient
        would depend on how rows are spread over passes and processes.

        Returns:
            The losses and agreements by name, and what else is logged of the step.
        """
        began = time.perf_counter()
        recipe, accelerator = self.recipe, self.accelerator
        rate = self._set_learning_rate()
        parts = [
            Batch.of(next(batches), self.step, micro, recipe.passes)
            for micro in range(recipe.accumulate)
        ]
        own = torch.stack([part.labels() for part in parts])
        labels = accelerator.reduce(own.sum(), "sum").clamp_min(1)
        # Undoes the means over passes and processes that accelerate and DDP take of gradients.
        scale = recipe.accumulate * accelerator.num_processes / labels
        results: list[ExitLoss] = []
        norm: Any = None
        for part, count in zip(parts, own, strict=True):
            with accelerator.accumulate(self.wrapped):
                result = self._on_model(self.training_step, part)
                accelerator.backward(result.loss * (count * scale))
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), recipe.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            results.append(result)
        sums = torch.stack([torch.stack([r.loss_P, r.agreement_P]) for r in results])
        sums = (sums * own[:, None, None]).sum(0)
        loss_P, agreement_P = (accelerator.reduce(sums, "sum") / labels).tolist()
        figures: Figures = {}
        chosen = active_exits(recipe.curriculum, len(recipe.exits), self.step, recipe.steps)
        for p, e in enumerate(chosen):
            figures[f"@{recipe.depths[e]} loss"] = loss_P[p]
            figures[f"@{recipe.depths[e]} agree"] = agreement_P[p]
        if self.trunk.trained:
            figures["final loss"] = loss_P[-1]
        logged_too = {"learning rate": rate}
        if norm is not None:
            logged_too["gradient norm"] = float(norm)
        tokens = sum(part.tokens_BT.numel() for part in parts) * accelerator.num_processes
        logged_too["tokens/s"] = tokens / (time.perf_counter() - began)
        return figures, logged_too

    def _set_learning_rate(self) -> float:
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
        return rate

    def _on_model(self, job: Callable[..., Any], *args: Any) -> Any:
        """Run `job(model, *args)` inside the forward pass of what accelerate wrapped."""
        with self.accelerator.autocast():
            return self.wrapped(job, *args).value

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches (see `TrainingRows`) without end, from the run's position on."""
        recipe, accelerator = self.recipe, self.accelerator
        if self.stream is not None:
            return streamed_batches(self.stream, accelerator, recipe.batch_size)
        return loaded_batches(self.loader, accelerator, self.step * recipe.accumulate)

    def _time_is_up(self) -> bool:
        """Whether `max_minutes` are spent, by the clock of the first process: all stop together."""
        limit = self.recipe.max_minutes
        return limit is not None and from_first(self.minutes >= limit)

    def _drifted(self) -> bool:
        """Whether the last evaluation found the full model further from its base than allowed."""
        if not self._beyond(self.history[-1]):
            return False
        self.say(
            f"the full model is {self.history[-1]['drift']:.4f} nats from its base, more than "
            f"max_drift={self.recipe.max_drift}: stopping"
        )
        return True

    def _beyond(self, entry: dict[str, Any]) -> bool:
        limit = self.recipe.max_drift
        return limit is not None and not entry["drift"] <= limit

    def _evaluate(self, figures: Figures | None = None) -> None:
        """Measure the exits on held-out text, and keep the best so far in the run's folder."""
        self.wrapped.eval()
        found = self._on_model(self.evaluator)
        self.wrapped.train()
        entry: dict[str, Any] = from_first(
            {
                "step": self.step,
                "tokens": self._tokens_seen(),
                "minutes": self.minutes,
                **found,
                **({"training": figures} if figures else {}),
            }
        )
        self.say(f"step {self.step}: held-out text: {shown(entry)}")
        self.accelerator.log(logged(entry), step=self.step)
        check_finite(self.step, entry)
        for name in gather_object([not_finite(self.wrapped)]):
            if name is not None:
                raise DivergedError(
                    f"the run has diverged: at step {self.step} {name} holds NaN or infinity"
                )
        self.history.append(entry)
        within = [e for e in self.history if e["step"] > 0 and not self._beyond(e)]
        if max(within, key=lambda e: e["expected"]["speed"], default=None) is entry:
            self.best.write(entry, self.history[0]["agreement"])

    def _tokens_seen(self) -> int:
        recipe = self.recipe
        per_step = recipe.batch_size * recipe.seq_len * recipe.accumulate
        return self.step * per_step * self.accelerator.num_processes

    def say(self, text: str) -> None:
        """Print a line, once for all processes."""
        if self.accelerator.is_main_process:
            self._console.say(text)

    def _save_state(self) -> None:
        progress = {"step": self.step, "minutes": self.minutes, "history": self.history}
        if self.stream is not None:
            progress["stream"] = asdict(self.stream.position)
        save_state(self.accelerator, self.wrapped, self.run_folder / "state", self.recipe, progress)

    def _resume(self) -> None:
        """Go on from the saved state, if there is one."""
        state = self.run_folder / "state"
        on_first(self.accelerator, lambda: self._clean_up(state))
        progress = load_state(self.accelerator, state, self.recipe)
        if progress is not None:
            self.step = progress["step"]
            self.minutes = progress["minutes"]
            self.history = progress["history"]
            if self.stream is not None:
                self.stream.seek(Position(**progress["stream"]))
            self.say(f"going on at step {self.step} of {self.recipe.steps}, from {state}")

    def _clean_up(self, state: Path) -> None:
        """Remove what an interrupted run left half written."""
        for target in (self.output, state, self.best.folder):
            if clear_leftovers(target):
                self.say(f"an earlier run was interrupted while it wrote {target}: cleaned up")
        if not state.exists() and self.run_folder.exists():
            self.say(f"an earlier run in {self.run_folder} saved no state: starting anew")
        self.run_folder.mkdir(parents=True, exist_ok=True)

    # The end of a run ---------------------------------------------------------------------------

    def _check_export_of_diverged(self, error: DivergedError) -> None:
        """Raise unless the best checkpoint of a run that diverged exists and is asked for."""
        if not self.best.exists():
            raise DivergedError(f"{error}; lower lr. No checkpoint was written before") from error
        if not self.recipe.export_diverged:
            raise DivergedError(
                f"{error}; lower lr. The best checkpoint before is kept in {self.best.folder}; "
                "export_diverged=true exports it"
            ) from error
        self.say(f"{error}; exporting the best checkpoint before, as export_diverged=true asks")

    def _export(self) -> Path:
        if not self.best.exists():
            if self._beyond(self.history[-1]):
                raise ValueError(
                    f"max_drift={self.recipe.max_drift}: the full model was further from its base "
                    "at every evaluation, so there is no checkpoint; lower lr, raise base_kl, or "
                    "set a smaller eval_every"
                )
            self.best.write(self.history[-1], self.history[0]["agreement"])
        history = {"history": self.history}
        on_first(self.accelerator, lambda: write_json(self.run_folder / "history.json", history))
        figures = self.best.export(self.output)
        self.say(
            f"EE checkpoint: {self.output}, the fastest by expectation, "
            f"{figures['expected']['speed']:.2f}x, after {figures['training_tokens']} tokens"
        )
        return self.output
