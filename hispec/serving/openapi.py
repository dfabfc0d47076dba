"""The server's description at `/openapi.json`, from which tools make clients and tests."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from hispec.serving.schemas import ChatRequest, CompletionRequest

_BODIES = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
_PLACE = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
        }
    },
    "required": ["error"],
    "additionalProperties": False,
}


def description(app: FastAPI, model: str) -> dict[str, Any]:
    """The description of an application. Its routes read bodies themselves, so FastAPI alone would
    not know them.

    Args:
        model: the name that requests have to give.
    """
    whole = get_openapi(title="HiSpec", version="1", routes=app.routes)
    kinds = [(kind, "validation") for kind in _BODIES.values()]
    _, found = models_json_schema(kinds, ref_template=_PLACE)  # type: ignore[arg-type]
    schemas = {**found["$defs"], "Error": _ERROR}
    for kind in _BODIES.values():
        schemas[kind.__name__]["properties"]["model"] = {"type": "string", "enum": [model]}
    whole["components"] = {"schemas": schemas}
    error = {"$ref": _PLACE.format(model="Error")}
    refused = {
        "description": "Refused; the message names the field.",
        "content": {"application/json": {"schema": error}},
    }
    for path, operations in whole["paths"].items():
        for operation in operations.values():
            operation["responses"] = {"200": {"description": "The answer."}, "4XX": refused}
        if path in _BODIES:
            schema = {"$ref": _PLACE.format(model=_BODIES[path].__name__)}
            content = {"application/json": {"schema": schema}}
            whole["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    return whole
