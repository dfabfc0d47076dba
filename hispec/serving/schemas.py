"""What a request may hold. Fields of OpenAI's API that this server does not implement are taken
where they ask for nothing, as some clients always send them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core.core_schema import CoreSchema, no_info_before_validator_function

from hispec.config import DRAFTERS
from hispec.utils.limits import Temperature, one_of
from hispec.utils.schema import Schema

LONGEST_STOP, MOST_STOPS, MOST_MESSAGES, MOST_PROMPTS = 1000, 4, 1000, 64


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("a text in valid UTF-8, without lone surrogates") from None
    return text


class _NothingBut:
    """A value that asks for nothing: a field that is not implemented."""

    def __init__(self, *allowed: Any) -> None:
        self.allowed = (None, *allowed)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self.allowed)}

    def _check(self, value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in self.allowed):
            words = " or ".join(["null", *map(repr, self.allowed[1:])])
            raise ValueError(f"not supported; leave it out ({words})")
        return value


Text = Annotated[str, AfterValidator(_utf8)]
Full = Annotated[str, Field(min_length=1), AfterValidator(_utf8)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP), AfterValidator(_utf8)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Off = Annotated[Any, _NothingBut(False)]
Zero = Annotated[Any, _NothingBut(0, 0.0)]
Empty = Annotated[Any, _NothingBut([], {})]


class Hispec(Schema):
    """How to decode: the extension of this server."""

    ladder: Literal["auto", "plain"] | list[Annotated[int, Field(ge=0, le=10_000)]] = "auto"
    """`auto`, `plain`, or depths of exits and the full model."""
    drafter: Annotated[str, one_of(*DRAFTERS)] | None = None
    draft_length: Annotated[int, Field(ge=1, le=32)] | None = None
    """Tokens that an exit drafts per round."""
    trace: bool = False
    """Whether each chunk tells the exit of every token, and the round."""


class StreamOptions(Schema):
    """What a stream brings besides text."""

    include_usage: bool | None = None
    """Whether the last chunk holds the usage."""
    include_obfuscation: Off = None


class Request(Schema):
    """Fields that both endpoints have."""

    model: Full
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Temperature, Field(ge=0, le=2)] | None = None
    """Default: 1, as in OpenAI's API; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Choice i is drawn with `seed` + i; without one each request has another."""
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    user: str | None = None
    """Taken, and ignored."""
    hispec: Hispec | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Empty = None

    @property
    def stops(self) -> list[str]:
        """The strings that end a text."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Part(Schema):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Schema):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        role = "system" if self.role == "developer" else self.role
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": role, "content": content}


class ChatRequest(Request):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of `max_tokens`."""
    logprobs: Off = None
    top_logprobs: Zero = None
    response_format: Annotated[Any, _NothingBut({"type": "text"})] = None
    tools: Empty = None
    tool_choice: Annotated[Any, _NothingBut("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, _NothingBut(False, True)] = None
    store: Off = None


class CompletionRequest(Request):
    """`/v1/completions`."""

    prompt: (
        Full
        | Annotated[list[Full], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    """Texts, or token ids."""
    logprobs: Zero = None
    echo: Off = None
    best_of: Annotated[Any, _NothingBut(1)] = None
    suffix: Annotated[Any, _NothingBut("")] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
