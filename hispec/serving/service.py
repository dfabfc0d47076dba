"""From a request to the texts that the scheduler decodes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from hispec.config import DRAFTERS, DecodeConfig
from hispec.lm import AUTO, PLAIN, EarlyExitLM
from hispec.serving.batching.jobs import Failure, Job, Update
from hispec.serving.batching.text import RowText
from hispec.serving.errors import ApiError
from hispec.serving.schemas import ChatRequest, CompletionRequest, Hispec, Request

Tell = Callable[[int, Update | Failure], None]
"""Receives the number of a choice and what is told of it; called by the decoding thread."""
_COMPLETION_TOKENS = 16  # of `/v1/completions` without `max_tokens`, as in OpenAI's API


@dataclass
class Limits:
    """What a request may ask for."""

    max_prompt: int = 2048
    """Tokens of a prompt."""
    max_new_tokens: int = 1024
    """Tokens of a text."""
    max_choices: int = 8
    """Texts of one request: prompts times `n`."""
    max_body: int = 2**20
    """Bytes of a request."""

    def fitted(self, lm: EarlyExitLM) -> Limits:
        """These limits, within what the model can read."""
        context = context_of(lm)
        if context is None:
            return self
        new = min(self.max_new_tokens, context - 1)
        prompt = min(self.max_prompt, context - 1)
        if (longest := lm.model.longest_text) is not None and prompt + new > longest:
            new = min(new, longest // 2)
            prompt = min(prompt, longest - new)
        return Limits(prompt, new, self.max_choices, self.max_body)


def context_of(lm: EarlyExitLM) -> int | None:
    """Tokens of the longest text, prompt included, that a model was made for."""
    known = [getattr(lm.model.hf.config, "max_position_embeddings", None), lm.model.longest_text]
    return min((length for length in known if length), default=None)


class Service:
    """Knows one model and what may be asked of it.

    Args:
        name: of the model; a request must name it.
        limits: as `Limits.fitted` gives them.
    """

    def __init__(self, lm: EarlyExitLM, name: str, limits: Limits) -> None:
        self.lm, self.name, self.limits = lm, name, limits
        self.context = context_of(lm)
        self.created = int(time.time())
        self._tokenizing = threading.Lock()  # fast tokenizers refuse two callers at a time

    def entry(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        model = self.lm.model
        chosen, _ = self.lm.choose(None, {})
        exits = model.exits.depths
        about = {
            "num_layers": model.num_layers,
            "exits": exits,
            "drafters": [name for name in DRAFTERS if exits or "exit" not in name],
            "ladder": chosen["ladder"],
            "drafter": chosen.get("drafter", "exit"),
            "dtype": str(model.hf.dtype).removeprefix("torch."),
            "backend": model.backend,
        }
        return {
            **{"id": self.name, "object": "model", "created": self.created, "owned_by": "hispec"},
            **{"max_model_len": self.context, "hispec": about},
        }

    def jobs(self, request: ChatRequest | CompletionRequest, tell: Tell) -> list[Job]:
        """The texts that a request asks for, in the order of its choices.

        Raises:
            ApiError: it asks for what this model or server does not give.
        """
        if request.model != self.name:
            words = f"There is no model {request.model[:100]!r}; this server has {self.name!r}."
            raise ApiError(404, words, param="model", code="model_not_found")
        if request.stream_options is not None and not request.stream:
            raise ApiError(400, "stream_options needs stream=true", param="stream_options")
        self._check_choices(request)
        config = self._config(request)
        seed = random.getrandbits(31) if request.seed is None else request.seed
        found: list[Job] = []
        for prompt in self._prompts(request):
            limit = self._limit(request, len(prompt))
            for number in range(request.n or 1):
                index = len(found)
                job = Job(
                    prompt,
                    config,
                    seed + number,
                    limit,
                    RowText(self.lm.tokenizer, request.stops),
                    lambda update, index=index: tell(index, update),  # type: ignore[misc]
                )
                found.append(job)
        return found

    def _check_choices(self, request: ChatRequest | CompletionRequest) -> None:
        prompts = len(request.prompts) if isinstance(request, CompletionRequest) else 1
        if (texts := prompts * (request.n or 1)) > self.limits.max_choices:
            words = f"at most {self.limits.max_choices} texts per request (prompts times n)"
            name = "n" if (request.n or 1) > 1 else "prompt"
            raise ApiError(400, f"{name}: {texts} texts are not possible: {words}", param=name)

    def _config(self, request: Request) -> DecodeConfig:
        """What the texts of a request share with others, but for seed and limit."""
        asked = request.hispec or Hispec()
        if asked.trace and not request.stream:
            raise ApiError(400, "hispec.trace needs stream=true", param="hispec.trace")
        temperature = 1.0 if request.temperature is None else request.temperature
        settings: dict[str, Any] = {"temperature": float(temperature)}
        if temperature and request.top_p is not None and request.top_p < 1:
            settings["top_p"] = float(request.top_p)
        for key in ("drafter", "draft_length"):
            if (value := getattr(asked, key)) is not None:
                settings[key] = value
        if asked.ladder == PLAIN and len(settings.keys() - {"temperature", "top_p"}):
            name = "drafter" if asked.drafter else "draft_length"
            raise ApiError(400, f"ladder {PLAIN!r} has no {name}", param=f"hispec.{name}")
        model = self.lm.model
        if isinstance(asked.ladder, list):
            known = [*model.exits.depths, model.num_layers]
            if not set(asked.ladder) <= set(known):
                words = f"ladder={asked.ladder} is not possible: depths of {known}"
                raise ApiError(400, words[:500], param="hispec.ladder")
        try:
            ladder = None if asked.ladder == AUTO else asked.ladder
            chosen, _ = self.lm.choose(ladder, settings)
            chosen = {"eos": self.lm.eos(), **chosen, "max_new_tokens": self.limits.max_new_tokens}
            config = DecodeConfig(**chosen)
            config.validate(model.num_layers)
        except ValueError as error:
            raise ApiError.of(error, "hispec.") from None
        return config

    def _prompts(self, request: ChatRequest | CompletionRequest) -> list[list[int]]:
        """Token ids of every prompt."""
        name = "messages" if isinstance(request, ChatRequest) else "prompt"
        with self._tokenizing:
            if isinstance(request, ChatRequest):
                found = [self._chat(request)]
            else:
                found = [
                    prompt if isinstance(prompt, list) else self.lm.encode(prompt, chat=False)
                    for prompt in request.prompts
                ]
        vocabulary = self.lm.model.vocab_size
        for tokens in found:
            if not tokens:
                raise ApiError(400, f"{name} holds no token", param=name)
            if max(tokens) >= vocabulary:
                words = f"{name}: token {max(tokens)} is not possible: below {vocabulary}"
                raise ApiError(400, words, param=name)
            if len(tokens) > self.limits.max_prompt:
                raise self._too_long(name, len(tokens), self.limits.max_prompt)
        return found

    def _chat(self, request: ChatRequest) -> list[int]:
        tokenizer = self.lm.tokenizer
        if tokenizer.chat_template is None:
            words = "This model has no chat template; use /v1/completions."
            raise ApiError(400, words, param="messages")
        turns = [message.plain() for message in request.messages]
        try:
            encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError) as error:
            words = f"The chat template of this model refuses these messages: {error}"
            raise ApiError(400, words[:500], param="messages") from None
        found: list[int] = encoded["input_ids"]
        return found

    def _limit(self, request: ChatRequest | CompletionRequest, prompt: int) -> int:
        """Tokens that a text may have."""
        name, asked = "max_tokens", request.max_tokens
        if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
            name, asked = "max_completion_tokens", request.max_completion_tokens
        most = self.limits.max_new_tokens
        if asked is not None and asked > most:
            words = f"{name}={str(asked)[:40]} is not possible: at most {most} on this server"
            raise ApiError(400, words, param=name)
        room = most if self.context is None else self.context - prompt
        if asked is not None and asked > room:
            raise self._too_long(name, prompt + asked, self.context or 0)
        if asked is None and isinstance(request, CompletionRequest):
            most = min(most, _COMPLETION_TOKENS)
        return asked or min(most, room)

    @staticmethod
    def _too_long(name: str, tokens: int, most: int) -> ApiError:
        words = f"{name}: {tokens} tokens are not possible: at most {most}"
        return ApiError(400, words, param=name, code="context_length_exceeded")
