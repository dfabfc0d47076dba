"""EarlyExitLM: a model with its tokenizer, text in and text out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from hispec.base_models.local import find_base, load_base
from hispec.base_models.model_folder import load_tokenizer
from hispec.checkpoint.format import is_checkpoint
from hispec.checkpoint.io import attach_exits, load_checkpoint
from hispec.config import EAGER, DecodeConfig, ExitConfig, current_names
from hispec.data.detokenizer import Detokenizer
from hispec.decoding.decoder import Decode
from hispec.decoding.stats import DecodeStats
from hispec.engine.build import build_engine
from hispec.hub.pull import locate
from hispec.models.exit_model import ExitModel
from hispec.models.quantization import FULL, INT8, WEIGHTS, quantize_linear
from hispec.planner.plan_file import PLANNED, Machine, Plan, Setting, read_plan, shown
from hispec.planner.search_space import default_setting, drafts_trees, lookup_setting
from hispec.utils.command_line import parse_device, parse_dtype
from hispec.utils.devices import multiplies_half
from hispec.utils.schema import STRICT, validate
from hispec.utils.settings import check

PLAIN, AUTO = "plain", "auto"
_FREE = {"drafter", "tree_tokens", *(key for key in PLANNED if "lookup" in key)}
"""Settings of free drafts, which no exit makes."""


@dataclass
class DecodeResult:
    """The output of one `generate` call; lists hold one entry per row."""

    text: list[str]
    tokens: list[list[int]]
    """New token ids, the one that ended the text included."""
    depths: list[list[int]]
    """For each new token, the depth of the rung that produced it; -1 for a free draft."""
    stats: DecodeStats


@dataclass
class Piece:
    """A committed token of a stream, and the text that it completed (possibly empty)."""

    token: int
    depth: int
    text: str


@dataclass
class _Arguments:
    """Arguments of `decode` that are not fields of `DecodeConfig`."""

    __pydantic_config__ = STRICT

    prompts: list[str]
    chat: bool | None
    stop_strings: list[Annotated[str, Field(min_length=1)]]
    seeds: list[Annotated[int, Field(ge=-(2**63), lt=2**64)]] | None
    logits_processor: list[Callable[..., Any]] | None
    stopping_criteria: list[Callable[..., Any]] | None


def _is_auto(ladder: Any) -> bool:
    return ladder is None or (isinstance(ladder, str) and ladder == AUTO)


def _as_list(value: Any) -> Any:
    """The members of a sequence or an iterator; anything else as it is, for a schema to refuse."""
    whole = not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping)
    return value if whole else list(value)


class EarlyExitLM:
    """An early-exit model and its tokenizer."""

    def __init__(self, model: ExitModel, tokenizer: Any, plan: Plan | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan
        """The checkpoint's plan, made by `hispec plan` on this machine or another."""

    def ladder(self, ladder: str | Sequence[int] | None = None) -> list[int]:
        """Depths of a ladder: as given, `plain` for the full model alone, or `auto`, the same as
        None, for all trained exits and the full model."""
        full = self.model.num_layers
        if _is_auto(ladder):
            return [*self.model.exits.depths, full]
        depths = [full] if isinstance(ladder, str) and ladder == PLAIN else _as_list(ladder)
        check(isinstance(depths, list), "ladder", ladder, f"depths, {AUTO!r} or {PLAIN!r}")
        return depths

    def planned(self, rows: int = 1) -> tuple[Setting | None, str]:
        """Look for a plan for this model and machine, of several that for the nearest `rows`.

        Returns:
            (its setting, or None without such a plan; a sentence that says which).
        """
        if self.plan is None:
            return None, "no plan: `hispec plan` finds the fastest setting for this machine"
        if (layers := self.plan.num_layers) != self.model.num_layers:
            other = f"a model of {layers} layers, this one has {self.model.num_layers}"
            return None, f"the plan is for {other}: `hispec plan` makes one for it"
        here = Machine.of(self.model)
        if differences := self.plan.machine.differences(here):
            return None, f"the plan is not for this machine ({'; '.join(differences)})"
        plan = self.plan.for_rows(rows)
        gain = f"{plan.tokens_per_second:.1f} tokens/s, {plan.speedup:.2f}x plain{plan.together}"
        return plan.setting, f"planned: {shown(plan.setting)} ({gain})"

    def choose(
        self, ladder: str | Sequence[int] | None, settings: Mapping[str, Any], rows: int = 1
    ) -> tuple[dict[str, Any], str]:
        """Choose what the caller left open.

        A ladder that was given stays. Without one, and if nothing else was given that a plan
        chooses, the setting planned for the nearest number of rows is taken if there is a plan for
        this model and machine; without one, the full model verifies prompt lookups, and greedy
        drafts of a head at depth 0 that is compiled. Settings of exits without a ladder mean all
        trained exits.

        Returns:
            (the settings, with a ladder among them; a sentence that says why these, empty if the
            caller chose).
        """
        if not _is_auto(ladder):
            return {"ladder": self.ladder(ladder), **settings}, ""
        named = PLANNED & settings.keys()
        by_exits = bool(named - _FREE) or "exit" in str(settings.get("drafter", ""))
        if by_exits:
            return {"ladder": self.ladder(), **settings}, ""
        lookup = lookup_setting(self.model)
        if named:
            return {**lookup, **settings}, ""
        setting, words = self.planned(rows)
        chains_only = settings.get("verification", "match") != "match"
        if setting is not None:
            if chains_only and drafts_trees(setting):
                words = "the plan drafts trees, which verification 'rejection' cannot verify"
            else:
                return {**setting, **settings}, words
        default = default_setting(self.model)
        if settings.get("temperature") or (chains_only and drafts_trees(default)):
            default = lookup
        who = "the exit at 0 and prompt lookup draft"
        if "exit" not in default["drafter"]:
            who = "decoded plainly with prompt lookup"
        return {**default, **settings}, f"{words}; {who}"

    @classmethod
    def from_transformers(
        cls,
        hf: PreTrainedModel,
        tokenizer: Any,
        exits: Sequence[int] | str | Path = (),
        backend: str = AUTO,
    ) -> EarlyExitLM:
        """Wrap a loaded transformers model, every depth read through its final norm (LayerSkip).

        Args:
            exits: the depths that `ladder()` returns, besides the full model's; or the folder of an
                EE checkpoint of this model, whose exits are put on it.
            backend: see `load`.

        Raises:
            ValueError: an architecture that is not supported, depths that it does not have, a
                checkpoint of another model, or a backend that cannot run it.
        """
        trained = isinstance(exits, str | Path)
        own = None if trained else ExitConfig.of(_as_list(exits), head="shared")
        model = attach_exits(hf, Path(str(exits))) if own is None else ExitModel(hf, own)
        model.eval().engine = build_engine(model, backend)
        return cls(model, tokenizer)

    def encode(self, prompt: str, chat: bool | None = None) -> list[int]:
        """Token ids of a prompt.

        Args:
            chat: wrap it as a user's turn in the chat template; None does so where there is one.

        Raises:
            ValueError: an empty prompt, or `chat` without a template.
        """
        check(isinstance(prompt, str), "prompt", prompt, "a text")
        check(bool(prompt), "prompt", prompt, "it cannot be empty")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            where = f"character {error.start} is half of a pair (a lone surrogate)"
            raise ValueError(f"prompt is not possible: {where}, which UTF-8 cannot hold") from None
        has_template = self.tokenizer.chat_template is not None
        if chat is None:
            chat = has_template
        check(has_template or not chat, "chat", chat, "this tokenizer has no chat template")
        if not chat:
            return self.tokenizer(prompt)["input_ids"]
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True
        )["input_ids"]

    def eos(self) -> tuple[int, ...]:
        """Token ids that end a text: the tokenizer's, and those of the generation config."""
        named = self.model.hf.generation_config.eos_token_id
        ids = {self.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
        return tuple(sorted(token for token in ids if token is not None))

    def decode(
        self,
        prompts: Sequence[str],
        *,
        ladder: str | Sequence[int] | None = None,
        chat: bool | None = None,
        stop_strings: str | Sequence[str] = (),
        seeds: Sequence[int] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **settings: Any,
    ) -> Decode:
        """A decode that has not run yet.

        Args:
            ladder: depths, `plain`, or `auto`, the same as None: what was planned or is the
                default, see `choose`; all exits if `settings` holds any that concern exits.
            chat: see `encode`.
            stop_strings: a text ends with the token that completes one of them.
            seeds: one of each prompt, in place of `seed`: equal prompts get texts of their own.
            logits_processor, stopping_criteria: more of them, of transformers, see `Decode`.
            settings: the other fields of `DecodeConfig`.

        Raises:
            ValueError: a setting or a prompt that this model cannot decode.
        """
        arguments = validate(
            _Arguments,
            {
                "prompts": _as_list(prompts),
                "chat": chat,
                "stop_strings": [stop_strings]
                if isinstance(stop_strings, str)
                else _as_list(stop_strings),
                "seeds": _as_list(seeds),
                "logits_processor": logits_processor,
                "stopping_criteria": stopping_criteria,
            },
        )
        settings = current_names(settings)
        known = {field.name for field in fields(DecodeConfig)}
        for key in settings:
            check(key in known, key, settings[key], f"known settings: {', '.join(sorted(known))}")
        if isinstance(ladder, str) and ladder == PLAIN:
            drafter = settings.get("drafter", "exit")
            check(drafter == "exit", "drafter", drafter, f"ladder {PLAIN!r} has no drafter")
        stopping = StoppingCriteriaList(stopping_criteria or [])
        if arguments.stop_strings:
            stopping.append(StopStringCriteria(self.tokenizer, arguments.stop_strings))
        chosen = self.choose(ladder, settings, len(arguments.prompts) or 1)[0]
        config = DecodeConfig(**{"eos": self.eos(), **chosen})
        return Decode(
            self.model,
            [self.encode(prompt, chat) for prompt in arguments.prompts],
            config,
            seeds=arguments.seeds,
            logits_processor=logits_processor,
            stopping_criteria=stopping,
        )

    def generate(
        self, prompts: str | Sequence[str], *, streamer: BaseStreamer | None = None, **settings: Any
    ) -> DecodeResult:
        """Decode prompts to the end. A string is one row, a list is as many as it holds.

        Args:
            streamer: a `TextStreamer` of transformers; for one prompt.
            settings: those of `decode`.

        Raises:
            ValueError: a setting or a prompt that this model cannot decode.
        """
        run = self.decode([prompts] if isinstance(prompts, str) else prompts, **settings)
        check(
            streamer is None or (hasattr(streamer, "put") and run.state.rows == 1),
            "streamer",
            streamer,
            "a streamer of transformers, for one prompt only",
        )
        if streamer is not None:
            streamer.put(torch.from_numpy(run.state.tokens_BN[:1, : run.state.prompt_B[0]]))
            for (committed,) in run.run():
                streamer.put(torch.tensor(committed.tokens))
            streamer.end()
        tokens = run.finish()
        depths = [depths for _, depths in run.outputs()]
        text = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return DecodeResult(text, tokens, depths, run.stats)

    def stream(self, prompt: str | Decode, **settings: Any) -> Iterator[Piece]:
        """Yield the committed tokens of one prompt, with text as soon as it is whole characters."""
        run = prompt if isinstance(prompt, Decode) else self.decode([prompt], **settings)
        check(run.state.rows == 1, "prompt", f"{run.state.rows} rows", "one row only")
        detokenizer = Detokenizer(self.tokenizer)
        for committed in run.run():
            (part,) = committed
            for left, token, depth in zip(
                range(len(part.tokens) - 1, -1, -1), part.tokens, part.depths, strict=True
            ):
                text = detokenizer.step(token, last=run.done and not left)
                yield Piece(token, depth, text)


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    exits: Sequence[int] | None = None,
    base: str | None = None,
    backend: str = AUTO,
    weights: str = FULL,
) -> EarlyExitLM:
    """Load an EE checkpoint, or a plain model whose depths are read through its final norm.

    Args:
        path: folder of an EE checkpoint or of a plain transformers model, a name or Hub id that
            `hispec fetch` has fetched, or an EE checkpoint on the Hub, `ORG/NAME` or
            `ORG/NAME@REVISION`: as `hispec pull` left it, else out of huggingface_hub's cache.
        dtype: "auto" takes the dtype that the base is stored in, but float32 on a CPU that is slow
            in half precision (see `multiplies_half`).
        device: default: the accelerator, if there is one, else the CPU.
        exits: for a plain model, depths to use as exits.
        base: for an EE checkpoint, where its base is, if not where its name says.
        backend: what runs the passes of a decode, `eager`, `openvino` or `auto`, see
            `engine.build.build_engine`.
        weights: `full`, or `int8`: the linear layers are rounded, see `models.quantization`; the
            texts are then those of the rounded model, in float32.

    Raises:
        ValueError: nothing there, a checkpoint that does not hold what its config says, or a
            backend that cannot run this model.
        HubError: nothing here, and the Hub refuses it or cannot be reached.
    """
    check(isinstance(path, str | Path) and str(path) != "", "path", path, "a folder or a name")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = parse_device(device) if isinstance(device, str) else device
    dtype = parse_dtype(dtype) if isinstance(dtype, str) else dtype
    check(weights in WEIGHTS, "weights", weights, f"one of {', '.join(WEIGHTS)}")
    if dtype == "auto" and (weights == INT8 or not multiplies_half(torch.device(device))):
        dtype = torch.float32
    folder = Path(path)
    if not folder.exists():
        folder = locate(str(path)) or folder
    if is_checkpoint(folder):
        check(exits is None, "exits", exits, f"{folder} names its own exits")
        model, tokenizer = load_checkpoint(folder, dtype=dtype, device=device, base=base)
        lm = EarlyExitLM(model, tokenizer, _plan(folder, model.num_layers))
        return _prepared(lm, backend, weights)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is neither an EE checkpoint nor a transformers model")
    home = find_base(str(path)).folder
    tokenizer = load_tokenizer(home)
    hf = load_base(home, dtype).to(device)
    lm = EarlyExitLM.from_transformers(hf, tokenizer, () if exits is None else exits, EAGER)
    lm.plan = _plan(home, lm.model.num_layers) if exits is None else None
    return _prepared(lm, backend, weights)


def _prepared(lm: EarlyExitLM, backend: str, weights: str) -> EarlyExitLM:
    """The model with its weights rounded, if that is asked for, and with its engine."""
    if weights == INT8:
        quantize_linear(lm.model)
        lm.model.weights = INT8
    lm.model.engine = build_engine(lm.model, backend)
    return lm


def _plan(folder: Path, num_layers: int) -> Plan | None:
    try:
        return read_plan(folder, num_layers)
    except ValueError as error:  # a model decodes without one
        warnings.warn(f"{error}; the plan is not used", stacklevel=3)
        return None
