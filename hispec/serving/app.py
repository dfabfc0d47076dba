"""The routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hispec.serving.batching.scheduler import Scheduler
from hispec.serving.completion import Completion
from hispec.serving.errors import ApiError
from hispec.serving.gate import Gate
from hispec.serving.openapi import description
from hispec.serving.playground import add_playground
from hispec.serving.replies import EventReply, Json, error_reply, read_object, whole_reply
from hispec.serving.schemas import ChatRequest, CompletionRequest
from hispec.serving.service import Service
from hispec.utils.schema import validate

R = TypeVar("R", ChatRequest, CompletionRequest)


def build_app(
    service: Service, scheduler: Scheduler, keys: Sequence[str] = (), *, local: bool = True
) -> FastAPI:
    """The application.

    Args:
        keys: see `Gate`.
        local: see `Gate`.
    """
    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="HiSpec", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, keys=keys, local=local, requests=scheduler.metrics.requests)

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        return error_reply(error)

    @app.exception_handler(HTTPException)
    async def refuse_route(_: Request, error: HTTPException) -> Response:
        return error_reply(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def fail(_: Request, __: Exception) -> Response:
        return error_reply(ApiError(500, "The server failed to answer this request."))

    async def answer(request: Request, kind: type[R]) -> Response:
        body = await read_object(request, service.limits.max_body)
        try:
            asked = validate(kind, body)
        except ValueError as error:
            raise ApiError.of(error) from None
        completion = Completion(asked, service, scheduler)
        await completion.begin()
        return EventReply(completion) if asked.stream else await whole_reply(completion, request)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, ChatRequest)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await answer(request, CompletionRequest)

    @app.get("/v1/models")
    async def models() -> Response:
        return Json({"object": "list", "data": [service.entry()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != service.name:
            words = f"There is no model {name[:100]!r}; this server has {service.name!r}."
            raise ApiError(404, words, param="model", code="model_not_found")
        return Json(service.entry())

    @app.get("/health")
    async def health() -> Response:
        if scheduler.draining:
            raise ApiError(503, "The server is shutting down.", code="shutting_down")
        return Json({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(scheduler.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    described = description(app, service.name)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Json(described)

    add_playground(app)
    return app
