"""``create_app(engine, config)``: the ASGI app, its routes and what surrounds each: ids, CORS, errors, HTTP metrics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tuili.base.config import Config
from tuili.base.errors import NotFoundError
from tuili.server import chat, completions, models, openapi, probes
from tuili.server.cors import Cors
from tuili.server.errors import ClientGone, HTTPRequestError
from tuili.server.http import Exchange, Message, Receive, Response, Send
from tuili.server.metrics import Metrics
from tuili.server.service import Route, Service

if TYPE_CHECKING:
    from tuili.engine.text import TextEngine

METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"})


def create_app(engine: TextEngine, config: Config) -> App:
    """The ASGI app. ``config`` is resolved. ``app.service`` holds what the routes share."""
    metrics = Metrics(config, engine.model_name, engine.max_model_len, engine.snapshot)
    engine.on_step.append(metrics.steps.step)
    engine.on_finish.append(metrics.requests.finish)
    routes = (*chat.ROUTES, *completions.ROUTES, *models.ROUTES, *probes.ROUTES)
    return App(Service(engine, config, metrics), (*routes, openapi.route(routes)))


class App:
    def __init__(self, service: Service, routes: tuple[Route, ...]):
        self.service = service
        self.cors = Cors(service.config)
        self.routes: dict[str, dict[str, Route]] = {}
        for route in routes:
            self.routes.setdefault(route.path, {})[route.method] = route

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"this app speaks HTTP only, not {scope['type']}")
        exchange, path, began = Exchange(scope, receive, send), "none", time.monotonic()
        try:
            path = self.find(exchange)
            answer = await self._answer(exchange, path)
            if answer is not None:
                await exchange.respond(answer)
        except ClientGone:
            exchange.status = 499
        except Exception as error:
            await exchange.fail(error)
        finally:
            method = exchange.method if exchange.method in METHODS else "OTHER"
            seconds = time.monotonic() - began
            self.service.metrics.frontend.http(path, method, exchange.status or 500, seconds)

    def find(self, exchange: Exchange) -> str:
        """The path of the routes that ``exchange`` asks for: a template, so that metrics have no series per client.

        NotFoundError for any other.
        """
        path = exchange.path if exchange.path == "/" else exchange.path.rstrip("/")
        if path in self.routes:
            return path
        if path.startswith(models.PREFIX):  # a served name may be a directory or a hub id
            exchange.rest = path.removeprefix(models.PREFIX)
            return models.ONE
        hint = "see /openapi.json for the routes"
        if path.startswith("/v1/v1/"):
            hint = "the base URL of the client ends in /v1, and the client adds another one"
        raise NotFoundError(f"There is no {path[:200]!r} here; {hint}.")

    async def _answer(self, exchange: Exchange, path: str) -> Response | None:
        routes = self.routes[path]
        origin = exchange.headers.get(b"origin")
        if origin is not None:
            exchange.extra = self.cors.headers(origin)
        allowed = sorted({*routes, "OPTIONS", *(["HEAD"] if "GET" in routes else ())})
        if exchange.method == "OPTIONS":
            return self.cors.options(exchange.headers, allowed)
        route = routes.get("GET" if exchange.method == "HEAD" else exchange.method)
        if route is None:
            raise HTTPRequestError(
                f"{path} takes {' and '.join(routes)}, not {exchange.method[:20]}",
                405,
                {b"allow": ", ".join(allowed).encode()},
            )
        return await route.handler(self.service, exchange)
