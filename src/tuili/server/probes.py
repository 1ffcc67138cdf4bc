"""Routes for machines and operators: health, version, load, metrics, and what the server's settings came to."""

from __future__ import annotations

import dataclasses

from tuili import __version__
from tuili.base.errors import EngineDead
from tuili.server import schemas
from tuili.server.errors import ShuttingDown
from tuili.server.http import Exchange, Response, as_json
from tuili.server.service import Route, Service


async def health(service: Service, exchange: Exchange) -> Response:
    """200 with no body while the engine lives, else 503."""
    if not service.engine.healthy():
        raise EngineDead("the engine is dead; the process ends, start it again")
    return Response()


async def ready(service: Service, exchange: Exchange) -> Response:
    """200 with no body when requests are taken: the port opens when the model is loaded."""
    if service.flight.stopping:
        raise ShuttingDown
    return await health(service, exchange)


async def version(service: Service, exchange: Exchange) -> Response:
    return as_json({"version": __version__})


async def load(service: Service, exchange: Exchange) -> Response:
    return as_json({"server_load": len(service.flight)})


async def metrics(service: Service, exchange: Exchange) -> Response:
    """Prometheus text format, vLLM's names and our own."""
    return Response(service.metrics.text(), headers=((b"content-type", METRICS_TYPE),))


async def server_info(service: Service, exchange: Exchange) -> Response:
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


METRICS_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
ROUTES = (
    Route("GET", "/health", health, errors=(503,)),
    Route("GET", "/ping", health, errors=(503,)),
    Route("POST", "/ping", health, errors=(503,)),
    Route("GET", "/health/ready", ready, errors=(503,)),
    Route("GET", "/version", version, schemas.VersionAnswer),
    Route("GET", "/load", load, schemas.LoadAnswer),
    Route("GET", "/metrics", metrics, "text/plain"),
    Route("GET", "/server_info", server_info, schemas.ServerInfoAnswer),
)
