"""Responses, and reading the body of a request."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from hispec.serving.completion import Completion
from hispec.serving.errors import ApiError
from hispec.utils.schema import parse_json

BODY_SECONDS = 30
"""Time in which the body of a request has to come."""


class Json(JSONResponse):
    """JSON in ASCII, which can hold whatever came in."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def error_reply(error: ApiError) -> Json:
    """The response to a request that is refused."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
    return Json(error.body(), error.status, headers=headers.get(error.status))


class EventReply(StreamingResponse):
    """A stream of events. However it ends, its completion holds no row after it."""

    def __init__(self, completion: Completion) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(completion.events(), media_type="text/event-stream", headers=headers)
        self._completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._completion.cancel()


async def whole_reply(completion: Completion, request: Request) -> Json:
    """The response in one piece, unless the client goes away first."""
    decoding = asyncio.ensure_future(completion.whole())
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({decoding, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if decoding.done():
            return Json(decoding.result())
        return error_reply(ApiError(499, "The client has gone."))
    finally:
        completion.cancel()
        decoding.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    """Return once the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_object(request: Request, most: int) -> dict[str, Any]:
    """The JSON object in the body of a request.

    Args:
        most: bytes of the longest body.

    Raises:
        ApiError: another content type, a body that is too long or too slow, or no JSON object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form of another site's page cannot send this one
        raise ApiError(415, "The body must be JSON, Content-Type: application/json.")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise ApiError(413, f"The body is longer than {most} bytes.")
    except TimeoutError:
        raise ApiError(408, f"The body did not come within {BODY_SECONDS} s.") from None
    except ClientDisconnect:
        raise ApiError(499, "The client has gone.") from None
    try:
        value = parse_json(bytes(body), "The body")
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    if not isinstance(value, dict):
        raise ApiError(400, f"The body must be a JSON object, not a {type(value).__name__}.")
    return value
