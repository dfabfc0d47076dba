"""Recipes: the settings of one training run. Defaults here, deviations in `recipes/NAME.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from omegaconf import MISSING
from pydantic import Field

from hispec.config import HEAD_KINDS, Exit, ExitConfig
from hispec.data.documents import STDLIB
from hispec.utils.devices import multiplies_half
from hispec.utils.limits import PartialShare, Seed, Share, Threads, Weight, at_most, one_of
from hispec.utils.schema import STRICT, filled, validate
from hispec.utils.settings import check, resolve
from train.fused import FUSED
from train.layer_dropout import SCHEDULES
from train.schedule import CURRICULA, CURVES, EXIT_WEIGHTS

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
_COSTS = {
    "blocks": "each block weighs as much as a layer of the model",
    "rank": "a rank is useful up to the hidden size, and each costs 2 times that in weights",
    "row": "memory grows with a row's tokens, that of its attention mask with their square",
    "batch": "the memory of a pass grows with its rows",
    "passes": "all batches of a step are read before it, to count their labels",
    "steps": "at ten steps a second they would take eleven days",
    "chunk": "the logits of a chunk take 4 bytes times the vocabulary per token",
    "unroll": "a pass takes as long as the first, and its attention longer",
    "rows": "every evaluation runs the full model over them",
}


@dataclass
class Recipe:
    """The settings of a run, with their types and limits. Lengths are in tokens."""

    __pydantic_config__ = STRICT

    base: str = MISSING
    """A name that `hispec fetch` knows, a Hub id, or a local folder."""
    output: str = MISSING
    """Folder of the EE checkpoint; the state of an unfinished run is kept beside it, in
    `OUTPUT.run`."""

    # exits
    exits: Annotated[list[int | dict[str, Any]], Field(min_length=1, max_length=64)] = MISSING
    """Depths of the exits; or for some of them the fields of `hispec.config.Exit`, as in
    `[{depth: 0, head: eagle3}, {depth: 12, blocks: 1}]`. What is not said there the four keys below
    say, for all kinds of head that have it."""
    head: Annotated[str, one_of(*HEAD_KINDS)] = "block"
    """`shared` (LayerSkip: final norm and LM head as they are), `adapter` or `block`."""
    head_blocks: Annotated[int, Field(ge=1), at_most(256, _COSTS["blocks"])] = 2
    """Transformer blocks of a `block` head."""
    head_rank: Annotated[int, Field(ge=1), at_most(16384, _COSTS["rank"])] = 64
    """Width of the bottleneck of an `adapter` head."""
    draft_vocab: Annotated[int, Field(ge=0)] = 0
    """Tokens that the exits draft from: the most frequent ones of the training text, stored with
    the exits; 0 for the whole vocabulary."""
    exits_from: str | None = None
    """EE checkpoint whose exits are trained further, such as a head of `hispec import-drafter`, in
    place of fresh ones. `exits` and `draft_vocab` have to be its own; its draft vocabulary
    stays."""
    head_previous: bool = False
    """Whether a `block` head also reads the full model's hidden state of the previous token."""

    unroll: Annotated[int, Field(ge=1), at_most(16, _COSTS["unroll"])] = 3
    """Passes over a text of a head that reads the token before, each fed with what the one before
    said, as its drafts are (the training-time test of EAGLE-3)."""
    unroll_decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Weight of each pass relative to the one before."""

    # trunk
    trunk: Annotated[str, one_of("frozen", "lora", "full")] = "frozen"
    """`frozen`: the full model keeps its weights, and so its text. `lora`, `full`: it is trained
    too, with cross-entropy on the next token, and the checkpoint includes it."""
    lora_rank: Annotated[int, Field(ge=1), at_most(16384, _COSTS["rank"])] = 16
    lora_alpha: Annotated[float, Field(gt=0, le=16384)] = 32.0
    """The adapters' output is scaled by lora_alpha / lora_rank."""
    layer_dropout: PartialShare = 0.0
    """Probability that a sample skips the last layer; only for a trained trunk."""
    dropout_schedule: Annotated[str, one_of(*SCHEDULES)] = "exp"
    """How this probability grows over the depth: see `train/layer_dropout.py`."""
    dropout_warmup: Share = 0.0
    """Share of the steps over which it rises from 0."""
    base_kl: Weight = 0.0
    """Weight of KL(base || full model) in the full model's loss. With trunk=full this needs a
    second copy of the base in memory."""
    max_drift: Annotated[float, Field(gt=0)] | None = None
    """Stop when KL(base || full model) on held-out text exceeds this many nats; the best checkpoint
    within it is exported."""

    # text
    data: str = STDLIB
    """`stdlib`, a local text, JSONL or Parquet file, a folder of such, or a Hub dataset id."""
    data_split: str = "train"
    """Split of a Hub dataset."""
    text_column: str = "text"
    """Column with texts, or with chats (lists of messages with role and content), which are
    rendered by the base's chat template; only the assistant's tokens are labels."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the documents that is kept for evaluation."""
    streaming: bool = False
    """Read the documents as they are needed, for data sets that are too large to be read at once:
    see `train/stream.py`."""
    seq_len: Annotated[int, Field(ge=2), at_most(2**20, _COSTS["row"])] = 256
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Most rows of `seq_len` tokens to train on; if `steps` need more, they are repeated."""
    states: str | None = None
    """Folder, for a frozen trunk: its states for all rows are computed once, stored there and read
    in every epoch, and by every run with the same base, text and exits. `--plan` prints their
    size."""
    states_top_k: Annotated[int, Field(ge=1)] = 64
    """Tokens whose probability under the full model is stored; all others count as one outcome."""
    states_depths: list[Annotated[int, Field(ge=1)]] = field(default_factory=list)
    """Depths that are stored beside those that the exits read (a depth of all layers: the state
    behind the final norm), so that runs with other exits read the same folder."""

    # optimisation
    steps: Annotated[int, Field(ge=1), at_most(10**7, _COSTS["steps"])] = 1000
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Stop early, and export, after this wall time (evaluation, saving and computing stored states
    included, loading not); the schedules still span `steps`."""
    batch_size: Annotated[int, Field(ge=1), at_most(2**16, _COSTS["batch"])] = 4
    """Rows per process and pass."""
    accumulate: Annotated[int, Field(ge=1), at_most(4096, _COSTS["passes"])] = 1
    """Passes per step."""
    gradient_checkpointing: bool = False
    """Compute the trunk's layers a second time in the backward pass instead of keeping their
    activations."""
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """Peak learning rate of AdamW."""
    lr_schedule: Annotated[str, one_of(*CURVES)] = "cosine"
    """Fall of the learning rate after the warm-up, `cosine` or `linear`."""
    warmup: Share = 0.05
    """Share of the steps over which the learning rate rises."""
    min_lr: Share = 0.1
    """Learning rate at the end, as a share of `lr`."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm; a larger gradient is scaled down to it."""

    # loss
    distill_weight: Weight = 1.0
    """Weight of an exit's divergence from the full model's probabilities."""
    divergence: Annotated[str, one_of("forward_kl", "reverse_kl", "tv")] = "forward_kl"
    """Which one: `forward_kl`, `reverse_kl` or `tv` (1 - tv is the acceptance rate)."""
    neighbour_share: PartialShare = 0.0
    """Share of the next deeper exit's probabilities in an exit's teacher."""
    ce_weight: Weight = 0.1
    """Weight of an exit's cross-entropy to the text's next token."""
    exit_weights: Annotated[str, one_of(*EXIT_WEIGHTS)] = "uniform"
    """Weights of the exits: `uniform`, or growing with the depth, `linear` or `sum`."""
    e_scale: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Weight of the exits relative to the full model, if the trunk is trained."""
    curriculum: Annotated[str, one_of(*CURRICULA)] = "none"
    """`none`: all exits in every step. `rotational`: one after another. `gradual`: from the deepest
    on, all of them from the middle of the training on."""
    loss_chunk: Annotated[int, Field(ge=1), at_most(2**17, _COSTS["chunk"])] = 128
    """Tokens whose logits are in memory at one time; over draft words alone, more tokens with as
    many logits. On a CPU 128 was 1.5x faster than 256 with a vocabulary of 49,152: the allocator
    returns larger buffers to the system each time."""
    fused_loss: bool = False
    """Compute softmax, divergence and gradient in Liger's kernels, on a GPU (`pip install
    hispec[liger]`): they read the logits fewer times. For `forward_kl` and `tv`."""
    precision: Annotated[str, one_of("auto", "fp32", "bf16")] = "auto"
    """`fp32`, or `bf16` (mixed: the exits' master weights stay in float32). `auto` is `bf16`, on a
    CPU without matrix products in it `fp32`."""
    threads: Threads | None = None
    """Threads per process on a CPU; default: the cores, shared among the processes. (`accelerate
    launch` by itself leaves one to each.)"""
    seed: Seed = 0

    # evaluation, logs and saved states
    eval_every: Annotated[int, Field(ge=1)] = 200
    """Steps between two evaluations."""
    eval_sequences: Annotated[int, Field(ge=1), at_most(2**16, _COSTS["rows"])] = 16
    """Rows of held-out text that an evaluation runs over."""
    log_with: Annotated[str | None, one_of(None, "tensorboard", "wandb", "trackio")] = None
    """`tensorboard`, `wandb` or `trackio`, if it is installed; logs go to `OUTPUT.run/logs`."""
    save_every: Annotated[int, Field(ge=1)] = 100
    """Steps between two saved states, from which a killed run resumes."""
    timeout_minutes: Annotated[float, Field(gt=0, le=10080)] = 30.0
    """Longest time that a process waits for the others before the run ends with an error."""
    export_full: bool = False
    """Include the base's weights in the checkpoint."""
    export_diverged: bool = False
    """If the run diverges (a loss, gradient, drift or weight is not finite), export the best
    checkpoint from before; otherwise it ends with an error and exports nothing."""

    def validate(self) -> None:
        """Raises ValueError naming the key, the value and what is allowed."""
        validate(Recipe, self)
        validate(ExitConfig, self.exit_config())
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
            trained or self.max_drift is None,
            "max_drift",
            self.max_drift,
            "a frozen trunk does not drift",
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
            "with stored states the full model is the only teacher",
        )
        check(
            not self.fused_loss or self.divergence in FUSED,
            "fused_loss",
            self.fused_loss,
            f"no kernel computes divergence={self.divergence!r}, only {', '.join(FUSED)}",
        )
        check(
            not self.fused_loss or self.states is None,
            "fused_loss",
            self.fused_loss,
            "stored states lack the probabilities of most tokens; leave it out, or states",
        )
        for key in ("states", "max_rows"):
            value = getattr(self, key)
            check(
                not self.streaming or value is None,
                key,
                value,
                "a streamed text is not read twice; it needs streaming=false",
            )
        check(
            self.neighbour_share == 0 or self.distill_weight > 0,
            "neighbour_share",
            self.neighbour_share,
            "it is a share of the distillation, and distill_weight is 0",
        )
        check(
            self.distill_weight + self.ce_weight > 0,
            "distill_weight",
            self.distill_weight,
            "it and ce_weight cannot both be 0: there would be no loss",
        )

    def for_this_machine(self) -> Recipe:
        """This recipe with the precision that `auto` stands for here."""
        if self.precision != "auto":
            return self
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        return replace(self, precision="bf16" if multiplies_half(device) else "fp32")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of a frozen trunk and of its activations."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def depths(self) -> list[int]:
        """Depths of the exits."""
        return self.exit_config().depths

    def exit_config(self) -> ExitConfig:
        """The exits one by one."""
        return ExitConfig([self._exit(entry) for entry in self.exits], self.draft_vocab)

    @property
    def passes(self) -> int:
        """Passes over a text of heads that read the token before; 0 without such heads."""
        return self.unroll if any(e.reads_before for e in self.exit_config().exits) else 0

    def read_depths(self, num_layers: int) -> list[int]:
        """Depths above 0 whose states heads read, besides the full model's final one."""
        exits = self.exit_config().resolved(num_layers).exits
        return sorted({depth for e in exits for depth in (e.depth, *e.aux_depths)} - {0})

    def _exit(self, entry: int | dict[str, Any]) -> Exit:
        keys = entry if isinstance(entry, dict) else {"depth": entry}
        keys = {"head": self.head, **keys}
        if keys["head"] == "block":
            keys = {"blocks": self.head_blocks, "previous": self.head_previous, **keys}
        elif keys["head"] == "adapter":
            keys = {"rank": self.head_rank, **keys}
        return filled(Exit, keys, "exits")


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
