"""The OpenAPI document, made from the routes: bodies and answers as they are, errors included."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tuili import __version__
from tuili.server.http import Exchange, Response, as_json
from tuili.server.schemas import ErrorAnswer
from tuili.server.service import Route, Service

#: One server-sent event.
EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A chunk or an error as JSON on one line; [DONE] last."}},
}
MEANING = {
    400: "The request is wrong; `param` names the field.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    500: "The request failed.",
    503: "The server is full, stops, or its engine is dead; see `Retry-After`.",
}
Mode = Literal["validation", "serialization"]
Refs = Mapping[Any, dict[str, Any]]


def route(routes: Sequence[Route]) -> Route:
    """``GET /openapi.json``."""

    @functools.cache
    def written() -> Response:
        return as_json(document(routes))

    async def answer(service: Service, exchange: Exchange) -> Response:
        return written()

    return Route("GET", "/openapi.json", answer)


def document(routes: Sequence[Route]) -> dict[str, Any]:
    models: list[tuple[type[BaseModel], Mode]] = [(ErrorAnswer, "serialization")]
    models += [(route.takes, "validation") for route in routes if route.takes]
    models += [(route.gives, "serialization") for route in routes if isinstance(route.gives, type)]
    refs, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, refs)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tuili",
            "description": "OpenAI-compatible server of the Tuili engine.",
            "version": __version__,
        },
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


def _operation(route: Route, refs: Refs) -> dict[str, Any]:
    name = route.handler.__name__
    error = {"application/json": {"schema": refs[ErrorAnswer, "serialization"]}}
    responses = {str(status): {"description": MEANING[status], "content": error} for status in route.errors}
    found: dict[str, Any] = {
        "operationId": f"{name}_{route.method.lower()}",
        "summary": name.replace("_", " ").capitalize(),
        "responses": {"200": _good(route, refs), **responses},
    }
    if route.handler.__doc__:
        found["description"] = route.handler.__doc__
    if route.takes:
        content = {"application/json": {"schema": refs[route.takes, "validation"]}}
        found["requestBody"] = {"required": True, "content": content}
    if "{" in route.path:
        parameter = route.path.partition("{")[2].rstrip("}")
        found["parameters"] = [{"name": parameter, "in": "path", "required": True, "schema": {"type": "string"}}]
    return found


def _good(route: Route, refs: Refs) -> dict[str, Any]:
    if route.gives is None:
        return {"description": "No body."}
    if isinstance(route.gives, str):
        return {"description": "Text.", "content": {route.gives: {"schema": {"type": "string"}}}}
    content: dict[str, Any] = {"application/json": {"schema": refs[route.gives, "serialization"]}}
    if route.streams:
        content["text/event-stream"] = {"schema": EVENT}
    return {
        "description": "With `stream`: server-sent events, the last is `[DONE]`." if route.streams else "The answer.",
        "content": content,
    }
