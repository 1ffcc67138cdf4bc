"""The OpenAPI document: bodies and answers as they are, errors included.

Bodies are parsed by ``body.read`` and not by FastAPI, so their schemas are put here.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tuili.server import protocol
from tuili.server.schemas import ErrorAnswer

BODIES: tuple[type[BaseModel], ...] = (
    protocol.ChatRequest,
    protocol.CompletionRequest,
    protocol.TokenizeRequest,
    protocol.DetokenizeRequest,
)
#: Statuses of a route that takes a body.
BODY_ERRORS = (400, 404, 408, 413, 415)
#: One server-sent event.
EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A chunk or an error as JSON on one line; [DONE] last."}},
}
REF = "#/components/schemas/{model}"
MEANING = {
    400: "The request is wrong; `param` names the field.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    500: "The request failed.",
    503: "The server is full, stops, or its engine is dead; see `Retry-After`.",
}


def answers(model: type[BaseModel] | None, *statuses: int, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route: ``model`` as JSON (None: an empty body) or events, and errors in their one shape."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorAnswer, "description": MEANING[status]} for status in statuses
    }
    if model is not None:
        found[200] = {"model": model}
        if stream:
            found[200]["content"] = {"text/event-stream": {"schema": EVENT}}
            found[200]["description"] = "With `stream`: server-sent events, the last is `[DONE]`."
    return found


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` of a route with a JSON body."""
    schema = {"$ref": REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def install(app: FastAPI) -> None:
    """Make ``app.openapi`` add the bodies' schemas, and drop the 422 that no route gives."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = build(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def build(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, definitions = models_json_schema([(model, "validation") for model in BODIES], ref_template=REF)
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas.update(definitions["$defs"])
    for path in found["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    return found
