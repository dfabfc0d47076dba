"""Other packages' decoders on the same weights: transformers' own, and those of `economize`.

Each drafts as many tokens as ours; what else there is to set is left as it comes. Exits with blocks
of their own have a place in neither package's early exit, which reads a depth through the final
norm. So there is a second row for them: the same exit as a draft model, with its trained head, a KV
cache of its own and the first layers run twice.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from eval.presets import shown
from eval.timing import FREE, Contestant, Outcome
from hispec.config import check_depths
from hispec.decoding.stats import DraftStats
from hispec.export.draft_model import draft_model
from hispec.lm import EarlyExitLM
from hispec.metrics.equivalence import hf_generate
from hispec.utils.settings import check

HF = ("hf-lookup", "hf-early-exit", "hf-draft-model")
ECONOMIZE = ("economize-lookup", "economize-early-exit", "economize-draft-model")


@dataclass
class Limits:
    """What all decoders are held to."""

    max_new_tokens: int
    eos: tuple[int, ...]
    draft_length: int
    """Tokens that an exit or a draft model drafts."""
    lookup_length: int
    """Tokens that a lookup proposes."""


def installed() -> list[str]:
    """The rivals that this machine has."""
    has_economize = importlib.util.find_spec("economize") is not None
    return [*HF, *(ECONOMIZE if has_economize else ())]


def by_generate(lm: EarlyExitLM, limits: Limits) -> Contestant:
    """transformers' plain greedy `generate`, which all else is measured against."""
    return _by_hf(lm, limits, "HF generate")


def rivals(
    lm: EarlyExitLM, limits: Limits, names: Sequence[str], exits: Sequence[int]
) -> tuple[list[Contestant], list[str]]:
    """(the rivals of these names, with each of the exits where they use one; what is left out).

    Raises:
        ValueError: an unknown name, a rival that is not installed, or exits that the model cannot
            have.
    """
    check_depths("rival_exits", exits, lm.model.num_layers, at_least=0)
    here = installed()
    for name in names:
        check(name in (*HF, *ECONOMIZE), "rivals", name, f"known: {', '.join((*HF, *ECONOMIZE))}")
        check(name in here, "rivals", name, "it needs economize: pip install 'hispec[rivals]'")
    makers = {"lookup": _lookup, "early-exit": _early_exit, "draft-model": _draft_model}
    found, left_out = [], []
    for name in names:
        kind = name.partition("-")[2]
        for depth in [lm.model.num_layers] if kind == "lookup" else exits:
            try:
                found.append(makers[kind](lm, limits, name, depth))
            except ValueError as error:
                left_out.append(f"{name} is left out: {error}")
    return found, left_out


def _lookup(lm: EarlyExitLM, limits: Limits, name: str, full: int) -> Contestant:
    if name in HF:
        label, tokens = f"HF prompt lookup {shown([full])}", limits.lookup_length
        return _by_hf(lm, limits, label, {"prompt_lookup_num_tokens": tokens})
    from economize.techniques.lookup import LookupConfig

    drafter = LookupConfig(max_proposal=limits.lookup_length)
    label = f"economize lookup {shown([full])}"
    return _by_economize(lm, limits, label, drafter, limits.lookup_length, FREE)


def _early_exit(lm: EarlyExitLM, limits: Limits, name: str, depth: int) -> Contestant:
    """An early exit is read through the final norm, so only a `shared` head is the same as ours."""
    own = "" if lm.model.exits.head == "shared" else ", final norm"
    label = f"early exit{own} {shown([depth, lm.model.num_layers])}"
    if name in HF:
        return _by_hf(lm, limits, f"HF {label}", {"assistant_early_exit": depth})
    from economize.techniques.early_exit import EarlyExitConfig

    drafter = EarlyExitConfig(exit_layer=depth, head="shared")
    label = f"economize {label}"
    return _by_economize(lm, limits, label, drafter, limits.draft_length, str(depth))


def _draft_model(lm: EarlyExitLM, limits: Limits, name: str, depth: int) -> Contestant:
    """Raises ValueError where plain transformers cannot express the exit."""
    draft = draft_model(lm.model, depth)
    label = f"exit as draft model {shown([depth, lm.model.num_layers])}"
    if name in HF:
        draft.generation_config = GenerationConfig(  # the draft model's counts, not the target's
            num_assistant_tokens=limits.draft_length, pad_token_id=0
        )
        return _by_hf(lm, limits, f"HF, {label}", {"assistant_model": draft})
    from economize.techniques.draft_model import DraftModelConfig

    with tempfile.TemporaryDirectory() as folder:  # read once, when it is attached
        draft.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        return _by_economize(
            lm,
            limits,
            f"economize, {label}",
            DraftModelConfig(model=folder),
            limits.draft_length,
            str(depth),
        )


def _by_hf(
    lm: EarlyExitLM, limits: Limits, name: str, assisted: dict[str, Any] | None = None
) -> Contestant:
    """transformers' `generate`, with these arguments."""
    hf = lm.model.hf
    length = {"num_assistant_tokens": limits.draft_length} if assisted else {}

    def decode(prompt: list[int]) -> Outcome:
        with _same_depth(hf), _passes(hf) as passes:
            tokens = hf_generate(
                hf, prompt, limits.max_new_tokens, limits.eos, assisted=assisted, **length
            )
        return Outcome(tokens, passes())

    return Contestant(name, decode, outside=True)


def _by_economize(
    lm: EarlyExitLM, limits: Limits, name: str, drafter: Any, draft_length: int, drafts: str
) -> Contestant:
    """A decoder of `economize` with one of its drafters.

    Args:
        drafts: what the drafter's tokens are called.

    Raises:
        ValueError: it cannot be had for this model.
    """
    import economize

    hf = lm.model.hf
    config = economize.DecodeConfig(cycle_length=draft_length + 1)
    try:
        model = economize.apply(hf, drafter, decoding=config)
    except economize.EconomizeError as error:
        raise ValueError(f"economize: {error}") from error

    def decode(prompt: list[int]) -> Outcome:
        ids_T = torch.tensor(prompt, device=hf.device)
        with _passes(hf) as passes:
            result = model.decode(ids_T, limits.max_new_tokens, stop=limits.eos or None)
        proposed, accepted = map(sum, zip((0, 0), *result.acceptance, strict=True))
        return Outcome(result.tokens.tolist(), passes(), {drafts: DraftStats(proposed, accepted)})

    return Contestant(name, decode, outside=True)


@contextmanager
def _passes(hf: Any) -> Iterator[Callable[[], int]]:
    """Count the passes through all layers: how often the last one is called."""
    count = 0

    def one_more(*_: Any) -> None:
        nonlocal count
        count += 1

    hook = hf.model.layers[-1].register_forward_hook(one_more)
    try:
        yield lambda: count
    finally:
        hook.remove()


@contextmanager
def _same_depth(hf: Any) -> Iterator[None]:
    """Restore the number of layers, whatever happens inside: `assistant_early_exit` writes it into
    the config while it drafts, and leaves it there if it is interrupted."""
    layers = hf.config.num_hidden_layers
    try:
        yield
    finally:
        hf.config.num_hidden_layers = layers
