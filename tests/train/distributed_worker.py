"""`accelerate launch` runs this in several processes: `distributed_worker.py CHECK FOLDER WORD...`.

Every process writes what it found to `FOLDER/RANK.json` (tensors to `FOLDER/gradients.pt`).
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from train.recipe import load_recipe
from train.trainer import Trainer


def first_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Gradients of the first step by name, as the optimizer gets them."""
    found: dict[str, torch.Tensor] = {}

    def note(*_):
        named = trainer.model.named_parameters()
        found.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    trainer.optimizer.optimizer.register_step_pre_hook(note)
    trainer._train_step(trainer._batches())
    return found


def gradients(trainer: Trainer, folder: Path) -> dict:
    if trainer.accelerator.is_main_process:
        torch.save(first_gradients(trainer), folder / "gradients.pt")
    else:
        first_gradients(trainer)
    world = torch.distributed.group.WORLD
    timeout = world._get_backend(torch.device("cpu")).options._timeout
    return {"timeout_minutes": timeout.total_seconds() / 60}


def disagreement(trainer: Trainer, folder: Path) -> dict:
    """The second process measures other numbers than the first one: more drift, less speed."""
    evaluator = trainer.evaluator
    rank, calls = trainer.accelerator.process_index, []

    def evaluate(model):
        found = evaluator(model)
        calls.append(1)
        found["drift"] += 100.0 * rank
        found["expected"]["speed"] += len(calls) * (-1) ** rank
        return found

    evaluate.remember_base = evaluator.remember_base
    trainer.evaluator = evaluate
    trainer.train()
    ended = not torch.distributed.is_initialized()
    # a wrapper that outlived the group would destroy it, with Python's lock held
    wrappers = sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
    return dict(step=trainer.step, history=trainer.history, ended=ended, wrappers=wrappers)


def lost_state(trainer: Trainer, folder: Path) -> dict:
    """The second process does not see the state that the first one resumes from."""
    if trainer.accelerator.process_index == 1:
        trainer.run_folder = folder / "elsewhere"
    try:
        trainer.train()
    except ValueError as error:
        return {"error": str(error)}
    return {"step": trainer.step}


def deepspeed(trainer: Trainer, folder: Path) -> dict:
    clip = trainer.wrapped.gradient_clipping()
    trainer.train()
    return {"clip": clip, "history": trainer.history}


if __name__ == "__main__":
    check, folder, *words = sys.argv[1:]
    trainer = Trainer(load_recipe(words))
    found = globals()[check](trainer, Path(folder))
    rank = trainer.accelerator.process_index
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
