"""What stands before every route: the key, the host, and the count of answers."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hispec.serving.errors import ApiError
from hispec.serving.replies import error_reply

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_GUARDED = ("/v1/", "/metrics", "/openapi.json")
_COUNTED = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


class Gate:
    """ASGI middleware.

    Args:
        keys: one of them must be sent as `Authorization: Bearer KEY`; with none, any may come.
        local: whether requests must name this machine in `Host`. A page of another site whose
            name points here (DNS rebinding) cannot.
        requests: counts answers by path and status.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], local: bool, requests: Counter) -> None:
        self.app, self.local, self.requests = app, local, requests
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        label = path if path in _COUNTED else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.requests.labels(label, str(message["status"])).inc()
            await send(message)

        refused = self._refused(path, Headers(scope=scope))
        app = self.app if refused is None else error_reply(refused)
        await app(scope, receive, counted)

    def _refused(self, path: str, headers: Headers) -> ApiError | None:
        if self.local and _host(headers.get("host", "")) not in LOOPBACK:
            words = "This server answers to localhost alone; start it with --host or --api-key."
            return ApiError(403, words, code="wrong_host")
        if not self._keys or not path.startswith(_GUARDED):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        sent = given.strip().encode()
        # every key is compared, so that time does not tell which one came close
        right = [hmac.compare_digest(sent, key) for key in self._keys]
        if scheme.lower() == "bearer" and any(right):
            return None
        words = "The API key is wrong." if given else "An API key is needed: Authorization: Bearer"
        return ApiError(401, words, code="invalid_api_key")


def _host(header: str) -> str:
    """The name in a `Host` header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()
