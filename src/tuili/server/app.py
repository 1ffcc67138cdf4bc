"""``create_app(engine, config)``: the routes, bound to one engine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException

from tuili import __version__
from tuili.base.config import Config
from tuili.base.errors import TuiliError
from tuili.server import errors, models, openapi, probes, schemas
from tuili.server.body import read
from tuili.server.chat import Chat
from tuili.server.completions import Completions
from tuili.server.http import Observe
from tuili.server.metrics import Metrics
from tuili.server.openapi import BODY_ERRORS, answers, takes
from tuili.server.protocol import ChatRequest, CompletionRequest
from tuili.server.service import Call, Service
from tuili.server.stream import Answer, EventStream

if TYPE_CHECKING:
    from tuili.engine.text import TextEngine


def create_app(engine: TextEngine, config: Config) -> FastAPI:
    """The ASGI app. ``config`` is resolved. ``app.state.service`` holds what the routes share."""
    metrics = Metrics(config, engine.model_name, engine.max_model_len, engine.snapshot)
    engine.on_step.append(metrics.steps.step)
    engine.on_finish.append(metrics.requests.finish)
    service = Service(engine, config, metrics)
    app = FastAPI(title="Tuili", version=__version__, description="OpenAI-compatible server of the Tuili engine.")
    app.state.service = service
    for routes in (generating(service), models.router(service), probes.router(service)):
        app.include_router(routes)
    app.add_exception_handler(TuiliError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_middleware(Observe, metrics=metrics.frontend)
    openapi.install(app)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    return errors.response(error)


def generating(service: Service) -> APIRouter:
    """The routes that generate text."""
    routes = APIRouter(tags=["generate"])
    failures = (*BODY_ERRORS, 500, 503)

    @routes.post(
        "/v1/chat/completions",
        responses=answers(schemas.ChatAnswer, *failures, stream=True),
        openapi_extra=takes(ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        body = await read(request, ChatRequest, service.config.max_body_bytes)
        return answer(service, body, await Chat.open(service, call(service, request, body), body))

    @routes.post(
        "/v1/completions",
        responses=answers(schemas.CompletionAnswer, *failures, stream=True),
        openapi_extra=takes(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        body = await read(request, CompletionRequest, service.config.max_body_bytes)
        return answer(service, body, await Completions.open(service, call(service, request, body), body))

    return routes


def call(service: Service, request: Request, body: ChatRequest | CompletionRequest) -> Call:
    """NotFoundError for a model that is not served."""
    id = body.request_id or request.scope["state"]["request_id"]
    return Call(id, service.model(body.model), int(time.time()), service.engine.clock.now())


def answer(service: Service, body: ChatRequest | CompletionRequest, work: Chat | Completions) -> Response:
    if body.stream:
        return EventStream(work.events(), service.flight)
    return Answer(work.answer(), service.flight)
