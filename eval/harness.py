"""A depth of an early-exit model as lm-evaluation-harness sees models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import StoppingCriteriaList, StopStringCriteria

from hispec.config import DecodeConfig
from hispec.decoding.decoder import Decode
from hispec.export.draft_model import draft_model
from hispec.lm import EarlyExitLM
from hispec.metrics.agreement import normed_states
from hispec.models.exit_model import ExitModel
from hispec.utils.console import bar
from hispec.utils.settings import check

_CHUNK = 64  # tokens whose probabilities are in memory at one time, for one depth
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Settings of a task's generation that `DecodeConfig` has under the same name."""
_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks have for the most tokens to generate; the first one given counts."""

LogLikelihood = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding gives this continuation."""
Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a context and of its continuation, neither of them empty."""


class LogLikelihoods:
    """Log-likelihoods of continuations at several depths, all from one pass through the trunk.

    They are kept, so a second depth that is asked for the same text needs no pass. An exit is read
    with the whole LM head; a head that reads the token before gets the full model's state of it.

    Args:
        rows: texts of similar length that are run together.
        longest: most tokens of a text; the beginning of a longer one is left out.
    """

    def __init__(self, model: ExitModel, depths: Sequence[int], rows: int, longest: int) -> None:
        self.model = model
        self.depths = list(depths)
        self.rows = rows
        self.longest = longest
        self._known: dict[Pair, dict[int, LogLikelihood]] = {}

    def of(self, pairs: Sequence[Pair], depth: int) -> list[LogLikelihood]:
        """Log-likelihood of each pair at `depth`."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        new.sort(key=lambda pair: -len(pair[0]) - len(pair[1]))
        groups = [new[i : i + self.rows] for i in range(0, len(new), self.rows)]
        for group in bar(groups, "log-likelihoods"):
            for pair, found in zip(group, self._compute(group), strict=True):
                self._known[pair] = found
        return [self._known[pair][depth] for pair in pairs]

    @torch.inference_mode()
    def _compute(self, pairs: Sequence[Pair]) -> list[dict[int, LogLikelihood]]:
        """Padding is on the right, where no token that counts attends to it."""
        cut = [[*context, *ending][-self.longest - 1 :] for context, ending in pairs]
        width = max(map(len, cut)) - 1
        tokens_BT = torch.tensor([row[:-1] + [0] * (width + 1 - len(row)) for row in cut])
        states = normed_states(self.model, tokens_BT.to(self.model.device), None, self.depths)
        found: list[dict[int, LogLikelihood]] = [{} for _ in pairs]
        for row, text in enumerate(cut):
            count = min(len(pairs[row][1]), len(text) - 1)
            ending_N = torch.tensor(text[len(text) - count :], device=self.model.device).long()
            read = slice(len(text) - 1 - count, len(text) - 1)
            for depth in self.depths:
                total, greedy = 0.0, True
                normed_NH = states[depth][0][row, read]
                for chunk_NH, chunk_N in zip(
                    normed_NH.split(_CHUNK), ending_N.split(_CHUNK), strict=True
                ):
                    log_probs_NV = self.model.project(chunk_NH).float().log_softmax(-1)
                    total += log_probs_NV.gather(-1, chunk_N[:, None]).sum().item()
                    greedy = greedy and bool((log_probs_NV.argmax(-1) == chunk_N).all())
                found[row][depth] = total, greedy
        return found


def longest_text(model: ExitModel) -> int:
    """Most tokens of a text that a model supports."""
    limits = (model.hf.config.max_position_embeddings, model.longest_text)
    return min(limit for limit in limits if limit)


@dataclass
class GenerationSettings:
    """How text is generated for tasks."""

    decoding: DecodeConfig
    """Settings of the full model; an exit alone decodes plainly."""
    rows: int = 4
    """Prompts that are decoded together."""
    max_new_tokens: int = 256
    """Used where a task names no number."""


class HarnessModel(TemplateLM):
    """One depth of a model.

    The full model generates text through the ladder, which gives the same text as plain decoding.
    An exit generates alone, as the causal LM that `draft_model` makes of it.

    Args:
        scores: shared by all depths of the model.

    Raises:
        ValueError: from generation, for an exit that cannot be a causal LM, or for settings of a
            task that the decoder does not have.
    """

    def __init__(
        self, lm: EarlyExitLM, depth: int, scores: LogLikelihoods, generation: GenerationSettings
    ) -> None:
        super().__init__()
        self.lm = lm
        self.tokenizer = lm.tokenizer
        self.depth = depth
        self.scores = scores
        self.generation = generation
        self._alone: ExitModel | None = None

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:  # a chat template writes BOS itself
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        ids = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)
        return ids["input_ids"]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[LogLikelihood]:
        pairs = [(tuple(context), tuple(ending)) for _, context, ending in requests]
        return self.scores.of(pairs, self.depth)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        texts = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.scores.longest,
                context_len=1,
            )
            cut = (make_disjoint_window(window) for window in windows)
            texts.append([(tuple(context), tuple(ending)) for context, ending in cut])
        found = iter(self.scores.of([pair for text in texts for pair in text], self.depth))
        return [sum(next(found)[0] for _ in text) for text in texts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        by_settings: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            by_settings[repr(request.args[1])].append(i)
        groups = []
        for alike in by_settings.values():  # similar lengths together need little padding
            alike.sort(key=lambda i: -len(requests[i].args[0]))
            rows = self.generation.rows
            groups += [alike[i : i + rows] for i in range(0, len(alike), rows)]
        texts = [""] * len(requests)
        for group in bar(groups, f"text of depth {self.depth}"):
            prompts = [requests[i].args[0] for i in group]
            generated = self._generate(prompts, requests[group[0]].args[1])
            for i, text in zip(group, generated, strict=True):
                texts[i] = text
        return texts

    def _generate(self, prompts: Sequence[str], task_settings: dict[str, Any]) -> list[str]:
        """Continue each prompt up to the first of the task's stop strings."""
        given = dict(task_settings)
        until = given.pop("until", None) or []
        until = [until] if isinstance(until, str) else [string for string in until if string]
        sizes = [given.pop(key) for key in _TOKENS if key in given]
        size = int(sizes[0]) if sizes else self.generation.max_new_tokens
        if not given.pop("do_sample", bool(given.get("temperature"))):
            given["temperature"] = 0.0
        sampling = {key: given.pop(key) for key in _SAMPLING if key in given}
        known = ("until", "do_sample", *_TOKENS, *_SAMPLING)
        check(not given, "generation_kwargs", given, f"the decoder knows {', '.join(known)}")
        room = self.scores.longest - size
        check(room >= 1, _TOKENS[0], size, f"the model's texts have {self.scores.longest} tokens")
        model, decoding = self._model()
        config = replace(decoding, max_new_tokens=size, eos=self.lm.eos(), **sampling)
        stopping = [StopStringCriteria(self.tokenizer, until)] if until else []
        rows = [self.tok_encode(prompt)[-room:] or [self.prefix_token_id] for prompt in prompts]
        decode = Decode(model, rows, config, stopping_criteria=StoppingCriteriaList(stopping))
        texts = self.tokenizer.batch_decode(decode.finish(), skip_special_tokens=True)
        for string in until:
            texts = [text.split(string)[0] for text in texts]
        return texts

    def _model(self) -> tuple[ExitModel, DecodeConfig]:
        """(the model that generates, how it decodes)."""
        if self.depth == self.lm.model.num_layers:
            return self.lm.model, self.generation.decoding
        if self._alone is None:
            self._alone = ExitModel(draft_model(self.lm.model, self.depth)).eval()
        return self._alone, DecodeConfig([self._alone.num_layers])
