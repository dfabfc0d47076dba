"""Recipes: the settings of one training run. Defaults here, deviations in `recipes/NAME.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from hispec.config import HEAD_KINDS, ExitConfig, check, resolve
from hispec.text import STDLIB

PRECISIONS = ("fp32", "bf16")
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@dataclass
class Recipe:
    """Everything that a run depends on. Lengths are in tokens, times in minutes."""

    base: str = MISSING
    """A name that `hispec fetch` knows, a Hub id, or a local folder."""
    output: str = MISSING
    """Folder of the EE checkpoint; the state of an unfinished run is kept beside it, in
    `OUTPUT.run`."""

    # exits
    exits: list[int] = MISSING
    """Depths of the exits."""
    head: str = "block"
    head_blocks: int = 2
    trunk: str = "frozen"

    # text
    data: str = STDLIB
    """`stdlib`, a local text or JSONL file, a folder of such files, or a Hub dataset id."""
    data_split: str = "train"
    """Split of a Hub dataset."""
    text_column: str = "text"
    held_out: float = 0.05
    """Share of the documents that is only evaluated on."""
    seq_len: int = 256

    # optimisation
    steps: int = 1000
    max_minutes: float | None = None
    """Stop early, and export, when this wall time is spent (evaluation and saving included, loading
    not); the schedule still spans `steps`."""
    batch_size: int = 4
    """Sequences per process and step."""
    lr: float = 1e-3
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises; it falls as a cosine afterwards."""
    min_lr: float = 0.1
    """Where the cosine ends, as a share of `lr`."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest gradient norm."""
    distill_weight: float = 1.0
    """Weight of the cross-entropy to the final rung's law."""
    ce_weight: float = 0.1
    """Weight of the cross-entropy to the text's next token."""
    loss_chunk: int = 128
    """Tokens whose logits are in memory at one time. On a CPU 128 was 1.5x faster than 256 with a
    vocabulary of 49,152: larger buffers come from the system anew each time."""
    precision: str = "bf16"
    """`fp32`, or `bf16` (mixed: the exits' master weights stay in float32)."""
    threads: int | None = None
    """Threads per process on a CPU; default: the cores, shared among the processes. (`accelerate
    launch` on its own leaves one to each.)"""
    seed: int = 0

    # watching
    eval_every: int = 200
    eval_sequences: int = 16
    save_every: int = 100
    """Steps between two states that a killed run resumes from."""
    export_full: bool = False
    """Write the base's weights into the checkpoint too."""

    def validate(self) -> None:
        """Raises ValueError naming the key, the value and what is allowed."""
        check(self.head in HEAD_KINDS, "head", self.head, f"one of {', '.join(HEAD_KINDS)}")
        check(self.trunk == "frozen", "trunk", self.trunk, "only 'frozen' so far")
        check(
            self.head != "shared",
            "head",
            self.head,
            "with trunk='frozen' a shared head has nothing to train; use head=block, or decode the "
            "base as it is with `hispec generate BASE --exits ...`",
        )
        for key in ("head_blocks", "steps", "batch_size", "loss_chunk", "eval_every",
                    "eval_sequences", "save_every"):  # fmt: skip
            check(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        check(bool(self.exits), "exits", self.exits, "name one depth or more")
        check(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 2^32 - 1")
        check(self.seq_len >= 2, "seq_len", self.seq_len, "2 or more tokens")
        check(0 < self.held_out < 1, "held_out", self.held_out, "above 0, below 1")
        check(self.lr > 0, "lr", self.lr, "above 0")
        check(0 <= self.warmup <= 1, "warmup", self.warmup, "a share of the steps, 0 to 1")
        check(0 <= self.min_lr <= 1, "min_lr", self.min_lr, "a share of lr, 0 to 1")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        check(self.clip > 0, "clip", self.clip, "above 0")
        check(self.threads is None or self.threads >= 1, "threads", self.threads, "1 or more")
        minutes = self.max_minutes
        check(minutes is None or minutes > 0, "max_minutes", minutes, "above 0, or null")
        for key in ("distill_weight", "ce_weight"):
            check(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        check(
            self.distill_weight + self.ce_weight > 0,
            "distill_weight",
            self.distill_weight,
            "it and ce_weight cannot both be 0: there would be no loss",
        )
        check(
            self.precision in PRECISIONS,
            "precision",
            self.precision,
            f"one of {', '.join(PRECISIONS)}",
        )

    def exit_config(self) -> ExitConfig:
        return ExitConfig(list(self.exits), self.head, self.head_blocks)


def load_recipe(words: Sequence[str]) -> Recipe:
    """The recipe of a command line such as `recipe=smollm2-135m steps=500`.

    Raises:
        ValueError: no such recipe, an unknown key, a wrong type or an impossible value; the
            message names it.
    """
    names = [word.removeprefix("recipe=") for word in words if word.startswith("recipe=")]
    deviations = [word for word in words if not word.startswith("recipe=")]
    recipe = resolve(Recipe, yaml=_find(names[-1] if names else ""), overrides=deviations)
    recipe.validate()
    return recipe


def _find(name: str) -> Path:
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if not name:
        raise ValueError(f"name a recipe: recipe=NAME, one of {', '.join(known)}, or a YAML file")
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"recipe={name!r} does not exist; there are: {', '.join(known)}")
    return path
