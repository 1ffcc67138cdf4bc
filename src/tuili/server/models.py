"""GET /v1/models, POST /tokenize and /detokenize: what the server has, and its tokenizer."""

from __future__ import annotations

from typing import Any

from tuili.base.errors import RequestError
from tuili.server import schemas
from tuili.server.body import read
from tuili.server.http import Exchange, Response, as_json
from tuili.server.inputs import encode_chat
from tuili.server.protocol import DetokenizeRequest, TokenizeRequest
from tuili.server.service import BODY_ERRORS, Route, Service


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


async def tokens(service: Service, request: TokenizeRequest) -> dict[str, Any]:
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


def text(service: Service, request: DetokenizeRequest) -> dict[str, Any]:
    service.model(request.model)
    tokenizer = service.engine.tokenizer
    wrong = next((id for id in request.tokens if id >= tokenizer.vocab_size), None)
    if wrong is not None:
        raise RequestError(f"tokens has {wrong}, and the vocabulary ends at {tokenizer.vocab_size - 1}", "tokens")
    return {"prompt": tokenizer.decode(request.tokens, skip_special_tokens=False)}


async def list_models(service: Service, exchange: Exchange) -> Response:
    return as_json({"object": "list", "data": [card(service)]})


async def show_model(service: Service, exchange: Exchange) -> Response:
    service.model(exchange.rest)
    return as_json(card(service))


async def tokenize(service: Service, exchange: Exchange) -> Response:
    return as_json(await tokens(service, await read(service, exchange, TokenizeRequest)))


async def detokenize(service: Service, exchange: Exchange) -> Response:
    return as_json(text(service, await read(service, exchange, DetokenizeRequest)))


PREFIX = "/v1/models/"
ONE = PREFIX + "{model}"
ROUTES = (
    Route("GET", "/v1/models", list_models, schemas.ModelsAnswer),
    Route("GET", ONE, show_model, schemas.ModelAnswer, errors=(404,)),
    Route("POST", "/tokenize", tokenize, schemas.TokenizeAnswer, TokenizeRequest, BODY_ERRORS),
    Route("POST", "/detokenize", detokenize, schemas.DetokenizeAnswer, DetokenizeRequest, BODY_ERRORS),
)
