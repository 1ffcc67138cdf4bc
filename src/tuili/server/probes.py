"""Routes for machines and operators: health, version, load, metrics, and what the server's settings came to."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Response

from tuili import __version__
from tuili.base.errors import EngineDead
from tuili.server import schemas
from tuili.server.errors import ShuttingDown
from tuili.server.openapi import answers
from tuili.server.service import Service
from tuili.server.wire import dumps


def as_json(content: Any) -> Response:
    return Response(dumps(content), media_type="application/json")


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["probes"])

    @routes.get("/health", responses=answers(None, 503), response_class=Response)
    @routes.get("/ping", responses=answers(None, 503), response_class=Response)
    @routes.post("/ping", responses=answers(None, 503), response_class=Response)
    async def health() -> Response:
        """200 with no body while the engine lives, else 503."""
        if not service.engine.healthy():
            raise EngineDead("the engine is dead; the process ends, start it again")
        return Response()

    @routes.get("/health/ready", responses=answers(None, 503), response_class=Response)
    async def ready() -> Response:
        """200 with no body when requests are taken: the port opens when the model is loaded."""
        if service.flight.stopping:
            raise ShuttingDown
        return await health()

    @routes.get("/version", responses=answers(schemas.VersionAnswer))
    async def version() -> Response:
        return as_json({"version": __version__})

    @routes.get("/load", responses=answers(schemas.LoadAnswer))
    async def load() -> Response:
        return as_json({"server_load": len(service.flight)})

    @routes.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """Prometheus text format, vLLM's names and our own."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/server_info", responses=answers(schemas.ServerInfoAnswer))
    async def server_info() -> Response:
        """The resolved options, and the sampling defaults with where each came from."""
        engine = service.engine
        defaults = {
            name: {"value": value, "source": engine.sampling_sources.get(name, "neutral")}
            for name, value in engine.sampling_defaults.items()
        }
        return as_json(
            {
                "version": __version__,
                "model": engine.model_name,
                "max_model_len": engine.max_model_len,
                "config": dataclasses.asdict(service.config),
                "sampling_defaults": defaults,
            }
        )

    return routes
