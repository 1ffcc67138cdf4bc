"""GET /v1/models, POST /tokenize and /detokenize: what the server has, and its tokenizer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from tuili.base.errors import RequestError
from tuili.server import schemas
from tuili.server.body import read
from tuili.server.openapi import BODY_ERRORS, answers, takes
from tuili.server.probes import as_json
from tuili.server.prompts import encode_chat
from tuili.server.protocol import DetokenizeRequest, TokenizeRequest
from tuili.server.service import Service


def card(service: Service) -> dict[str, Any]:
    name = service.engine.model_name
    allowed = ("create_engine", "sampling", "logprobs", "view")
    denied = ("search_indices", "fine_tuning", "is_blocking")
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": service.created,
        **{f"allow_{verb}": True for verb in allowed},
        **{f"allow_{verb}": False for verb in denied[:2]},
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "tuili",
        "root": service.config.model,
        "parent": None,
        "max_model_len": service.engine.max_model_len,
        "permission": [permission],
    }


async def tokenize(service: Service, request: TokenizeRequest) -> dict[str, Any]:
    service.model(request.model)
    engine = service.engine
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("give either prompt or messages", "prompt")
    if request.prompt is not None:
        (ids,) = await engine.encode([request.prompt], request.add_special_tokens is not False, fits=False)
    else:
        ids = await encode_chat(request, engine, service.config, {}, fits=False)
    strings = [engine.tokenizer.token_text(id) for id in ids] if request.return_token_strs else None
    return {"count": len(ids), "max_model_len": engine.max_model_len, "tokens": ids, "token_strs": strings}


def detokenize(service: Service, request: DetokenizeRequest) -> dict[str, Any]:
    service.model(request.model)
    tokenizer = service.engine.tokenizer
    wrong = next((id for id in request.tokens if id >= tokenizer.vocab_size), None)
    if wrong is not None:
        raise RequestError(f"tokens has {wrong}, and the vocabulary ends at {tokenizer.vocab_size - 1}", "tokens")
    return {"prompt": tokenizer.decode(request.tokens, skip_special_tokens=False)}


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["models"])
    limit = service.config.max_body_bytes

    @routes.get("/v1/models", responses=answers(schemas.ModelsAnswer))
    async def models() -> Response:
        return as_json({"object": "list", "data": [card(service)]})

    # ":path", because a served name may be a directory or a hub id
    @routes.get("/v1/models/{model:path}", responses=answers(schemas.ModelAnswer, 404))
    async def model(model: str) -> Response:
        service.model(model)
        return as_json(card(service))

    @routes.post(
        "/tokenize", responses=answers(schemas.TokenizeAnswer, *BODY_ERRORS), openapi_extra=takes(TokenizeRequest)
    )
    async def tokenize_(request: Request) -> Response:
        return as_json(await tokenize(service, await read(request, TokenizeRequest, limit)))

    @routes.post(
        "/detokenize", responses=answers(schemas.DetokenizeAnswer, *BODY_ERRORS), openapi_extra=takes(DetokenizeRequest)
    )
    async def detokenize_(request: Request) -> Response:
        return as_json(detokenize(service, await read(request, DetokenizeRequest, limit)))

    return routes
