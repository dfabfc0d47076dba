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

_ROWS = 64  # tokens whose laws are in memory at one time, for one depth
_LAW = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Settings of a task's generation that `DecodeConfig` has under the same name."""
_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the most tokens to generate; the first one given counts."""

Scored = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether it is what greedy decoding gives."""
Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a context and of its continuation, neither of them empty."""


class Scores:
    """Log-likelihoods of continuations at several depths, all from one pass through the trunk.

    They are kept, so the second depth that asks for the same text costs nothing. An exit is read
    with the whole LM head; a head that reads the token before gets the full model's state of it.

    Args:
        rows: texts of similar length that are run together.
        longest: tokens of a text; of a longer one the beginning is left out.
    """

    def __init__(self, model: ExitModel, depths: Sequence[int], rows: int, longest: int) -> None:
        self.model = model
        self.depths = list(depths)
        self.rows = rows
        self.longest = longest
        self._known: dict[Pair, dict[int, Scored]] = {}

    def of(self, pairs: Sequence[Pair], depth: int) -> list[Scored]:
        """What `depth` gives to each pair."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        new.sort(key=lambda pair: -len(pair[0]) - len(pair[1]))
        groups = [new[i : i + self.rows] for i in range(0, len(new), self.rows)]
        for group in bar(groups, "log-likelihoods"):
            for pair, scored in zip(group, self._score(group), strict=True):
                self._known[pair] = scored
        return [self._known[pair][depth] for pair in pairs]

    @torch.inference_mode()
    def _score(self, pairs: Sequence[Pair]) -> list[dict[int, Scored]]:
        """Padding is on the right, where no token that counts sees it."""
        cut = [[*context, *ending][-self.longest - 1 :] for context, ending in pairs]
        width = max(map(len, cut)) - 1
        tokens_BT = torch.tensor([row[:-1] + [0] * (width + 1 - len(row)) for row in cut])
        states = normed_states(self.model, tokens_BT.to(self.model.device), None, self.depths)
        found: list[dict[int, Scored]] = [{} for _ in pairs]
        for row, text in enumerate(cut):
            count = min(len(pairs[row][1]), len(text) - 1)
            ending_N = torch.tensor(text[len(text) - count :], device=self.model.device).long()
            read = slice(len(text) - 1 - count, len(text) - 1)
            for depth in self.depths:
                total, greedy = 0.0, True
                normed_NH = states[depth].first_BTH[row, read]
                for part_NH, part_N in zip(
                    normed_NH.split(_ROWS), ending_N.split(_ROWS), strict=True
                ):
                    law_NV = self.model.project(part_NH).float().log_softmax(-1)
                    total += law_NV.gather(-1, part_N[:, None]).sum().item()
                    greedy = greedy and bool((law_NV.argmax(-1) == part_N).all())
                found[row][depth] = total, greedy
        return found


def longest_text(model: ExitModel) -> int:
    """Tokens of the longest text that a model is made for."""
    limits = (model.hf.config.max_position_embeddings, model.longest_text)
    return min(limit for limit in limits if limit)


@dataclass
class Writing:
    """How text is generated."""

    decoding: DecodeConfig
    """Of the full model; an exit alone decodes plainly."""
    rows: int = 4
    """Prompts decoded together."""
    max_new_tokens: int = 256
    """Where a task does not say."""


class HarnessModel(TemplateLM):
    """One depth of a model.

    At full depth text is generated through the ladder, whose text is that of the full model. An
    exit writes alone, as the causal LM that `draft_model` makes of it.

    Args:
        scores: shared by all depths of the model.

    Raises:
        ValueError: in generation, an exit that cannot stand alone, or settings of a task that the
            decoder does not have.
    """

    def __init__(self, lm: EarlyExitLM, depth: int, scores: Scores, writing: Writing) -> None:
        super().__init__()
        self.lm = lm
        self.tokenizer = lm.tokenizer
        self.depth = depth
        self.scores = scores
        self.writing = writing
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
    ) -> list[Scored]:
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
        scored = iter(self.scores.of([pair for text in texts for pair in text], self.depth))
        return [sum(next(scored)[0] for _ in text) for text in texts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        by_settings: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            by_settings[repr(request.args[1])].append(i)
        groups = []
        for alike in by_settings.values():  # little padding
            alike.sort(key=lambda i: -len(requests[i].args[0]))
            rows = self.writing.rows
            groups += [alike[i : i + rows] for i in range(0, len(alike), rows)]
        texts = [""] * len(requests)
        for group in bar(groups, f"text of depth {self.depth}"):
            prompts = [requests[i].args[0] for i in group]
            texts_of = self._write(prompts, requests[group[0]].args[1])
            for i, text in zip(group, texts_of, strict=True):
                texts[i] = text
        return texts

    def _write(self, prompts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        """What follows each prompt, up to the first of the task's stop strings."""
        asked = dict(asked)
        until = asked.pop("until", None) or []
        until = [until] if isinstance(until, str) else [string for string in until if string]
        sizes = [asked.pop(key) for key in _TOKENS if key in asked]
        size = int(sizes[0]) if sizes else self.writing.max_new_tokens
        if not asked.pop("do_sample", bool(asked.get("temperature"))):
            asked["temperature"] = 0.0
        law = {key: asked.pop(key) for key in _LAW if key in asked}
        known = ("until", "do_sample", *_TOKENS, *_LAW)
        check(not asked, "generation_kwargs", asked, f"the decoder knows {', '.join(known)}")
        room = self.scores.longest - size
        check(room >= 1, _TOKENS[0], size, f"the model's texts have {self.scores.longest} tokens")
        model, decoding = self._model()
        config = replace(decoding, max_new_tokens=size, eos=self.lm.eos(), **law)
        stopping = [StopStringCriteria(self.tokenizer, until)] if until else []
        rows = [self.tok_encode(prompt)[-room:] or [self.prefix_token_id] for prompt in prompts]
        decode = Decode(model, rows, config, stopping_criteria=StoppingCriteriaList(stopping))
        texts = self.tokenizer.batch_decode(decode.finish(), skip_special_tokens=True)
        for string in until:
            texts = [text.split(string)[0] for text in texts]
        return texts

    def _model(self) -> tuple[ExitModel, DecodeConfig]:
        """(the model that writes, how it decodes)."""
        if self.depth == self.lm.model.num_layers:
            return self.lm.model, self.writing.decoding
        if self._alone is None:
            self._alone = ExitModel(draft_model(self.lm.model, self.depth)).eval()
        return self._alone, DecodeConfig([self._alone.num_layers])
