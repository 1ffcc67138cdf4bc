"""A request's body: parsed strictly, checked against its model; every fault is a typed 4xx that names its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from tuili.base.errors import RequestError
from tuili.base.log import get
from tuili.server.errors import HTTPRequestError
from tuili.server.http import Exchange
from tuili.server.protocol import Strict, unknown
from tuili.server.wire import loads

if TYPE_CHECKING:
    from tuili.server.service import Service

log = get(__name__)
M = TypeVar("M", bound=Strict)
#: Unknown fields that are named.
MAX_NAMES = 20


async def read(service: Service, exchange: Exchange, model: type[M]) -> M:
    """The checked body; fields that nobody knows are named in the log and in the header ``x-tuili-warning``."""
    check_media_type(exchange)
    try:
        raw = await exchange.body(service.config.max_body_bytes, service.room)
        found = validated(await loads(raw, service.parsing), model)
    finally:
        service.room.left += exchange.taken
    ignored, passed_on = unknown(found, MAX_NAMES)
    if ignored or passed_on:
        parts = [f"ignored unknown fields: {', '.join(map(_short, ignored))}"] if ignored else []
        parts += [f"only the chat template sees: {', '.join(map(_short, passed_on))}"] if passed_on else []
        exchange.warning = "; ".join(parts)
        log.warning("%s: %s", exchange.path, exchange.warning)
    return found


def _short(name: str) -> str:
    return repr(name[-60:] if len(name) > 60 and "." in name[-60:] else name[:60])


def check_media_type(exchange: Exchange) -> None:
    given = exchange.headers.get(b"content-type", b"application/json").decode("latin-1")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise HTTPRequestError(f"the body must be application/json, got {kind[:100]!r}", 415)
    coding = exchange.headers.get(b"content-encoding", b"identity").decode("latin-1").lower()
    if coding != "identity":
        raise HTTPRequestError(f"the body must not be encoded, got content-encoding {coding[:100]!r}", 415)


def validated(value: dict[str, Any], model: type[M]) -> M:
    """The model of ``value``. RequestError with the path of the field at fault, such as ``messages.0.content``."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        path, message = max(((_path(value, fault), fault["msg"]) for fault in faults), key=lambda found: len(found[0]))
        param = ".".join(str(part)[:100] for part in path)
        others = sorted({str(fault["loc"][0])[:100] for fault in faults if fault["loc"]} - {str(p) for p in path[:1]})
        more = f" (also wrong: {', '.join(others[:10])})" if others else ""
        raise RequestError(f"{param}: {message}{more}" if param else message, param or None) from error


def _path(value: Any, fault: Any) -> list[str | int]:
    """The fault's place as far as it is in the body: pydantic adds the names of union members, which nobody sent."""
    path: list[str | int] = []
    for part in fault["loc"]:
        missing = fault["type"] == "missing" and part == fault["loc"][-1] and isinstance(value, dict)
        if not missing:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                continue
        path.append(part)
    return [*path, *fault.get("ctx", {}).get("item", ())]
