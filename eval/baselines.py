"""Baselines: other packages' decoders on the same weights, transformers' and those of `economize`.

Each of them drafts as many tokens as ours; their other settings keep their defaults. Neither
package's early exit can use a trained head: both read a depth through the final norm. So an exit is
also a baseline as a draft model, with its trained head, a KV cache of its own, and its layers run
twice.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from eval.presets import ladder_text
from eval.timing import FREE, Method, Outcome, counting_passes
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
    """Settings that all decoders share."""

    max_new_tokens: int
    eos: tuple[int, ...]
    draft_length: int
    """Tokens that an exit or a draft model drafts at a time."""
    lookup_length: int
    """Tokens that a prompt lookup proposes at a time."""


def installed() -> list[str]:
    """Names of the baselines whose packages are installed."""
    has_economize = importlib.util.find_spec("economize") is not None
    return [*HF, *(ECONOMIZE if has_economize else ())]


def by_generate(lm: EarlyExitLM, limits: Limits) -> Method:
    """transformers' plain greedy `generate`, the reference of all methods."""
    return _by_hf(lm, limits, "HF generate")


def baselines(
    lm: EarlyExitLM, limits: Limits, names: Sequence[str], exits: Sequence[int]
) -> tuple[list[Method], list[str]]:
    """The baselines of these names.

    Args:
        exits: depths that early exits and draft models draft with, one method for each.

    Returns:
        The methods, and a sentence for each that cannot be had with this model.

    Raises:
        ValueError: an unknown name, a package that is not installed, or depths that the model does
            not have.
    """
    check_depths("baseline_exits", exits, lm.model.num_layers, at_least=0)
    here = installed()
    for name in names:
        check(
            name in (*HF, *ECONOMIZE), "baselines", name, f"known: {', '.join((*HF, *ECONOMIZE))}"
        )
        check(name in here, "baselines", name, "it needs economize: pip install 'hispec[rivals]'")
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


def _lookup(lm: EarlyExitLM, limits: Limits, name: str, full: int) -> Method:
    if name in HF:
        label, tokens = f"HF prompt lookup {ladder_text([full])}", limits.lookup_length
        return _by_hf(lm, limits, label, {"prompt_lookup_num_tokens": tokens})
    from economize.techniques.lookup import LookupConfig

    drafter = LookupConfig(max_proposal=limits.lookup_length)
    label = f"economize lookup {ladder_text([full])}"
    return _by_economize(lm, limits, label, drafter, limits.lookup_length, FREE)


def _early_exit(lm: EarlyExitLM, limits: Limits, name: str, depth: int) -> Method:
    """These packages read an exit through the final norm, which only a `shared` head does too."""
    shared = all(exit.head == "shared" for exit in lm.model.exits.exits)
    own = "" if shared else ", final norm"
    label = f"early exit{own} {ladder_text([depth, lm.model.num_layers])}"
    if name in HF:
        return _by_hf(lm, limits, f"HF {label}", {"assistant_early_exit": depth})
    from economize.techniques.early_exit import EarlyExitConfig

    drafter = EarlyExitConfig(exit_layer=depth, head="shared")
    label = f"economize {label}"
    return _by_economize(lm, limits, label, drafter, limits.draft_length, str(depth))


def _draft_model(lm: EarlyExitLM, limits: Limits, name: str, depth: int) -> Method:
    """Raises ValueError where plain transformers cannot express the exit."""
    draft = draft_model(lm.model, depth)
    label = f"exit as draft model {ladder_text([depth, lm.model.num_layers])}"
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
) -> Method:
    """transformers' `generate`, with these arguments."""
    hf = lm.model.hf
    length = {"num_assistant_tokens": limits.draft_length} if assisted else {}

    def decode(prompt: list[int]) -> Outcome:
        with _same_depth(hf), counting_passes(hf) as passes:
            tokens = hf_generate(
                hf, prompt, limits.max_new_tokens, limits.eos, assisted=assisted, **length
            )
        return Outcome(tokens, passes())

    return Method(name, decode, external=True)


def _by_economize(
    lm: EarlyExitLM, limits: Limits, name: str, drafter: Any, draft_length: int, drafts: str
) -> Method:
    """A decoder of `economize` with one of its drafters.

    Args:
        drafts: name of the drafts in the statistics.

    Raises:
        ValueError: `economize` does not support the model.
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
        with counting_passes(hf) as passes:
            result = model.decode(ids_T, limits.max_new_tokens, stop=limits.eos or None)
        proposed, accepted = map(sum, zip((0, 0), *result.acceptance, strict=True))
        return Outcome(result.tokens.tolist(), passes(), {drafts: DraftStats(proposed, accepted)})

    return Method(name, decode, external=True)


@contextmanager
def _same_depth(hf: Any) -> Iterator[None]:
    """Restore the config's number of layers afterwards: `assistant_early_exit` changes it while it
    drafts, and does not restore it when it is interrupted."""
    layers = hf.config.num_hidden_layers
    try:
        yield
    finally:
        hf.config.num_hidden_layers = layers
