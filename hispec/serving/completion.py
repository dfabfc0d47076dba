"""One request while it is decoded, and its answer in OpenAI's form, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from hispec.serving.batching.jobs import Failure, Job, Update, Usage
from hispec.serving.batching.scheduler import Scheduler
from hispec.serving.errors import ApiError
from hispec.serving.schemas import ChatRequest, CompletionRequest
from hispec.serving.service import Service


class Completion:
    """The texts of one request. Made in the event loop, which receives what is told of them."""

    def __init__(
        self, request: ChatRequest | CompletionRequest, service: Service, scheduler: Scheduler
    ) -> None:
        self.request, self.service, self.scheduler = request, service, scheduler
        self.chat = isinstance(request, ChatRequest)
        prefix = "chatcmpl" if self.chat else "cmpl"
        kind = "chat.completion" if self.chat else "text_completion"
        if self.chat and request.stream:
            kind += ".chunk"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": service.name,
        }
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[tuple[int, Update | Failure]] = asyncio.Queue()
        self.jobs: list[Job] = []
        self._usages: dict[int, Usage] = {}

    async def begin(self) -> None:
        """Read the prompts and put the texts into the queue.

        Raises:
            ApiError: see `Service.jobs` and `Scheduler.submit`.
        """
        self.jobs = await asyncio.to_thread(self.service.jobs, self.request, self._tell)
        self.scheduler.submit(self.jobs)

    def cancel(self) -> None:
        """Give up what has not been decoded yet."""
        if len(self._usages) < len(self.jobs):
            self.scheduler.cancel(self.jobs)

    def _tell(self, index: int, update: Update | Failure) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._told.put_nowait, (index, update))

    async def _updates(self) -> AsyncIterator[tuple[int, Update]]:
        """(Number of the choice, update), until all texts have ended.

        Raises:
            ApiError: a text cannot be decoded to its end.
        """
        while len(self._usages) < len(self.jobs):
            index, update = await self._told.get()
            if isinstance(update, Failure):
                raise ApiError(500, update.message)
            if update.usage is not None:
                self._usages[index] = update.usage
            yield index, update

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        texts = [""] * len(self.jobs)
        reasons: list[str | None] = [None] * len(self.jobs)
        async for index, update in self._updates():
            texts[index] += "".join(text for text, _ in update.pieces)
            reasons[index] = update.finish
        choices = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            message = {"role": "assistant", "content": text, "refusal": None}
            said = {"message": message} if self.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        options = self.request.stream_options
        with_usage = bool(options and options.include_usage)
        trace = bool(self.request.hispec and self.request.hispec.trace)
        rest: dict[str, Any] = {"usage": None} if with_usage else {}
        try:
            if self.chat:
                for index in range(len(self.jobs)):
                    yield self._event(self._choice(index, "", first=True), rest)
            async for index, update in self._updates():
                text = "".join(text for text, _ in update.pieces)
                if text or trace:
                    more = {"hispec": _trace(update)} if trace else {}
                    yield self._event(self._choice(index, text), {**rest, **more})
                if update.finish:
                    yield self._event(self._choice(index, None, reason=update.finish), rest)
            if with_usage:
                yield _line({**self._head, "choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _line(error.body())

    def _choice(
        self, index: int, text: str | None, *, first: bool = False, reason: str | None = None
    ) -> dict[str, Any]:
        """A choice of a chunk."""
        if self.chat:
            delta = {} if text is None else {"content": text}
            said: dict[str, Any] = {"delta": {"role": "assistant", **delta} if first else delta}
        else:
            said = {"text": text or ""}
        return {"index": index, **said, "logprobs": None, "finish_reason": reason}

    def _event(self, choice: dict[str, Any], rest: dict[str, Any]) -> str:
        return _line({**self._head, "choices": [choice], **rest})

    def _usage(self) -> dict[str, Any]:
        """Counts over all choices; a prompt of several choices counts once."""
        usages = [self._usages[index] for index in range(len(self.jobs))]
        prompt = sum(usage.prompt_tokens for usage in usages[:: self.request.n or 1])
        new = sum(usage.new_tokens for usage in usages)
        drafted, accepted = Counter[int](), Counter[int]()
        for usage in usages:
            drafted.update(usage.drafted)
            accepted.update(usage.accepted)
        seconds = max(usage.seconds for usage in usages)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "hispec": {
                "drafted_per_exit": {str(exit): count for exit, count in drafted.items()},
                "accepted_per_exit": {str(exit): count for exit, count in accepted.items()},
                "tokens_per_target_pass": new / max(1, sum(usage.passes for usage in usages)),
                "seconds": seconds,
                "tokens_per_second": new / seconds if seconds else 0.0,
            },
        }


def _trace(update: Update) -> dict[str, Any]:
    passed = update.passed
    return {
        "tokens": [{"text": text, "exit": depth} for text, depth in update.pieces],
        "round": {
            "drafted": passed.drafted,
            "accepted": passed.accepted,
            "drafters": passed.drafters,
        },
    }


def _line(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value)}\n\n"
