"""Recipes: the settings of one training run. Defaults here, deviations in `recipes/NAME.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING

from hispec.config import HEAD_KINDS, ExitConfig
from hispec.data.documents import STDLIB
from hispec.utils.settings import check, resolve
from train.fused import FUSED
from train.layer_dropout import SCHEDULES
from train.schedule import CURRICULA, CURVES, EXIT_WEIGHTS

CHOICES: dict[str, tuple[str | None, ...]] = {
    "head": HEAD_KINDS,
    "trunk": ("frozen", "lora", "full"),
    "dropout_schedule": SCHEDULES,
    "divergence": ("forward_kl", "reverse_kl", "tv"),
    "exit_weights": EXIT_WEIGHTS,
    "curriculum": CURRICULA,
    "lr_schedule": CURVES,
    "precision": ("fp32", "bf16"),
    "log_with": (None, "tensorboard", "wandb", "trackio"),
}
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
    """`shared` (LayerSkip: final norm and LM head as they are), `adapter` or `block`."""
    head_blocks: int = 2
    head_rank: int = 64
    """Width of an `adapter` head's bottleneck."""
    draft_vocab: int = 0
    """Tokens that the exits draft from: the most frequent ones of the training text, stored with
    the exits; 0 for the whole vocabulary."""
    head_previous: bool = False
    """Whether a `block` head also reads the final hidden state of the token before."""

    # trunk
    trunk: str = "frozen"
    """`frozen`: the model's text stays what it was. `lora`, `full`: it is trained too, on the
    text's next tokens, and the checkpoint carries it."""
    lora_rank: int = 16
    lora_alpha: float = 32.0
    layer_dropout: float = 0.0
    """Probability that a sample skips the last layer; not for a frozen trunk."""
    dropout_schedule: str = "exp"
    """How it grows over the depth: see `train/layer_dropout.py`."""
    dropout_warmup: float = 0.0
    """Share of the steps over which it rises from 0."""
    base_kl: float = 0.0
    """Weight of the KL of the final rung to the untouched base in the final rung's loss. With
    trunk=full it needs a second copy of the base."""
    max_drift: float | None = None
    """Stop when the KL of the final rung to the base on held-out text is more nats than this; the
    best checkpoint within it is kept."""

    # text
    data: str = STDLIB
    """`stdlib`, a local text, JSONL or Parquet file, a folder of such, or a Hub dataset id."""
    data_split: str = "train"
    """Split of a Hub dataset."""
    text_column: str = "text"
    """Its rows hold texts, or chats (lists of messages with role and content), which are rendered
    by the base's chat template and taught where the assistant speaks."""
    held_out: float = 0.05
    """Share of the documents that is only evaluated on."""
    streaming: bool = False
    """Read the documents as they are needed, for sets that are too large to be read at once: see
    `train/stream.py`."""
    seq_len: int = 256
    max_rows: int | None = None
    """Most rows of `seq_len` tokens that are trained on; they are gone through again where `steps`
    need more."""
    states: str | None = None
    """Folder, for a frozen trunk: its states for all rows are computed once, kept there and read in
    every epoch, and by every run with the same base, text and exits. `--plan` says how large."""
    states_top_k: int = 64
    """Tokens of the final law that are kept there; all others count as one."""

    # optimisation
    steps: int = 1000
    max_minutes: float | None = None
    """Stop early, and export, when this wall time is spent (evaluation, saving and the computing of
    stored states included, loading not); the schedule still spans `steps`."""
    batch_size: int = 4
    """Sequences per process and pass."""
    accumulate: int = 1
    """Passes per step."""
    gradient_checkpointing: bool = False
    """Compute the trunk's layers a second time in the backward pass instead of keeping their
    inside."""
    lr: float = 1e-3
    lr_schedule: str = "cosine"
    """Fall of the learning rate after the warm-up, `cosine` or `linear`."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    min_lr: float = 0.1
    """Where it ends, as a share of `lr`."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest gradient norm."""

    # loss
    distill_weight: float = 1.0
    """Weight of an exit's distance from the final rung's law."""
    divergence: str = "forward_kl"
    """That distance: `forward_kl`, `reverse_kl` or `tv` (1 - tv is the acceptance rate)."""
    neighbour_share: float = 0.0
    """Share of the next deeper exit's law in what an exit is to imitate."""
    ce_weight: float = 0.1
    """Weight of the cross-entropy to the text's next token."""
    exit_weights: str = "uniform"
    """Weights over the exits: `uniform`, or growing with the depth, `linear` or `sum`."""
    e_scale: float = 1.0
    """What the exits weigh against the final rung, if the trunk is trained."""
    curriculum: str = "none"
    """`none`: all exits in every step. `rotational`: one after another. `gradual`: from the deepest
    on, all from the middle of the training on."""
    loss_chunk: int = 128
    """Tokens whose logits are in memory at one time. On a CPU 128 was 1.5x faster than 256 with a
    vocabulary of 49,152: larger buffers come from the system anew each time."""
    fused_loss: bool = False
    """Softmax, divergence and gradient by Liger's kernels, on a GPU (`pip install hispec[liger]`):
    they go over the logits fewer times. For `forward_kl` and `tv`."""
    precision: str = "bf16"
    """`fp32`, or `bf16` (mixed: the exits' master weights stay in float32)."""
    threads: int | None = None
    """Threads per process on a CPU; default: the cores, shared among the processes. (`accelerate
    launch` on its own leaves one to each.)"""
    seed: int = 0

    # watching
    eval_every: int = 200
    eval_sequences: int = 16
    timeout_minutes: float = 30.0
    """Longest time that a process waits for the others before the run ends with an error."""
    log_with: str | None = None
    """`tensorboard`, `wandb` or `trackio`, if it is installed; logs go to `OUTPUT.run/logs`."""
    save_every: int = 100
    """Steps between two states that a killed run resumes from."""
    export_full: bool = False
    """Write the base's weights into the checkpoint too."""
    export_diverged: bool = False
    """If the run diverges (a loss, gradient, drift or weight is not finite), export the best
    checkpoint from before; otherwise it ends with an error and exports nothing."""

    def validate(self) -> None:
        """Raises ValueError naming the key, the value and what is allowed."""
        for key, allowed in CHOICES.items():
            check(
                getattr(self, key) in allowed,
                key,
                getattr(self, key),
                f"one of {', '.join(map(str, allowed))}",
            )
        trained = self.trunk != "frozen"
        check(
            trained or self.head != "shared",
            "head",
            self.head,
            "with trunk='frozen' a shared head has nothing to train; use head=block, trunk=lora or "
            "trunk=full, or decode the base as it is with `hispec generate BASE --exits ...`",
        )
        for key in ("layer_dropout", "base_kl"):
            check(
                trained or getattr(self, key) == 0,
                key,
                getattr(self, key),
                "a frozen trunk is not trained; it needs trunk=lora or trunk=full",
            )
        check(
            self.states is None or not trained,
            "states",
            self.states,
            f"with trunk={self.trunk!r} they change in every step; they need trunk=frozen",
        )
        check(
            self.states is None or self.neighbour_share == 0,
            "neighbour_share",
            self.neighbour_share,
            "with stored states only the final rung teaches",
        )
        check(
            not self.fused_loss or self.divergence in FUSED,
            "fused_loss",
            self.fused_loss,
            f"there is no kernel for divergence={self.divergence!r}, only for {', '.join(FUSED)}",
        )
        check(
            not self.fused_loss or self.states is None,
            "fused_loss",
            self.fused_loss,
            "stored states come without a whole law; leave it out, or states",
        )
        for key in ("states", "max_rows"):
            value = getattr(self, key)
            check(
                not self.streaming or value is None,
                key,
                value,
                "a streamed text is not gone through twice; it needs streaming=false",
            )
        check(self.max_rows is None or self.max_rows >= 1, "max_rows", self.max_rows, "1 or more")
        check(
            trained or self.max_drift is None,
            "max_drift",
            self.max_drift,
            "a frozen trunk does not drift",
        )
        check(0 <= self.layer_dropout < 1, "layer_dropout", self.layer_dropout, "from 0, below 1")
        check(
            0 <= self.neighbour_share < 1,
            "neighbour_share",
            self.neighbour_share,
            "from 0, below 1",
        )
        check(
            self.neighbour_share == 0 or self.distill_weight > 0,
            "neighbour_share",
            self.neighbour_share,
            "it is a share of the distillation, and distill_weight is 0",
        )
        check(
            self.max_drift is None or self.max_drift > 0,
            "max_drift",
            self.max_drift,
            "above 0, or null",
        )
        for key in ("lora_alpha", "e_scale"):
            check(getattr(self, key) > 0, key, getattr(self, key), "above 0")
        for key in ("head_blocks", "head_rank", "lora_rank", "steps", "batch_size", "accumulate",
                    "loss_chunk", "eval_every", "eval_sequences", "save_every",
                    "states_top_k"):  # fmt: skip
            check(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        check(bool(self.exits), "exits", self.exits, "name one depth or more")
        check(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 2^32 - 1")
        check(self.seq_len >= 2, "seq_len", self.seq_len, "2 or more tokens")
        check(0 < self.held_out < 1, "held_out", self.held_out, "above 0, below 1")
        check(self.lr > 0, "lr", self.lr, "above 0")
        for key in ("warmup", "dropout_warmup"):
            check(
                0 <= getattr(self, key) <= 1,
                key,
                getattr(self, key),
                "a share of the steps, 0 to 1",
            )
        check(0 <= self.min_lr <= 1, "min_lr", self.min_lr, "a share of lr, 0 to 1")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        check(self.clip > 0, "clip", self.clip, "above 0")
        check(self.threads is None or self.threads >= 1, "threads", self.threads, "1 or more")
        minutes = self.max_minutes
        check(minutes is None or minutes > 0, "max_minutes", minutes, "above 0, or null")
        for key in ("distill_weight", "ce_weight", "base_kl"):
            check(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        check(
            self.distill_weight + self.ce_weight > 0,
            "distill_weight",
            self.distill_weight,
            "it and ce_weight cannot both be 0: there would be no loss",
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of a frozen trunk, and of what is computed with it."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def exit_config(self) -> ExitConfig:
        return ExitConfig(
            list(self.exits),
            self.head,
            self.head_blocks,
            self.head_rank,
            self.draft_vocab,
            self.head_previous,
        )


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
