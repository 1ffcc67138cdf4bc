"""Cross-origin requests: which pages' scripts may read the answers (``--allowed-origins``, as in vLLM)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from tuili.base.config import Config
from tuili.base.errors import ConfigError
from tuili.server.http import Header, Response

#: Headers of answers that scripts may read besides the usual ones.
EXPOSED = (b"access-control-expose-headers", b"x-request-id, x-tuili-warning, retry-after")
#: Seconds for which a browser may keep the answer to a preflight request.
MAX_AGE = (b"access-control-max-age", b"600")
ASKED_LENGTH = 1000


def parse_origins(text: str) -> frozenset[bytes]:
    """``*``, one origin, or a JSON list of them. ConfigError for anything else."""
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [text] if text else []
    except json.JSONDecodeError as error:
        raise ConfigError(f"--allowed-origins is no JSON list of origins: {error}") from error
    for origin in found:
        if not isinstance(origin, str) or not origin.isascii() or not ("://" in origin or origin in ("*", "null")):
            raise ConfigError(f"--allowed-origins takes origins such as https://a.example, or *, got {origin!r}")
    return frozenset(origin.rstrip("/").encode() for origin in found)


class Cors:
    def __init__(self, config: Config):
        self.origins = parse_origins(config.allowed_origins)
        self.any = b"*" in self.origins
        self.credentials = config.allow_credentials

    def headers(self, origin: bytes) -> Sequence[Header]:
        """What tells a browser that scripts of ``origin`` may read the answer."""
        if self.any and not self.credentials:
            return (b"access-control-allow-origin", b"*"), EXPOSED
        vary = (b"vary", b"origin")
        if not self.any and origin not in self.origins:
            return (vary,)
        allowed = (b"access-control-allow-origin", origin), EXPOSED, vary
        return (*allowed, (b"access-control-allow-credentials", b"true")) if self.credentials else allowed

    def options(self, headers: Mapping[bytes, bytes], methods: Sequence[str]) -> Response:
        """The answer to OPTIONS; of a preflight request all headers are allowed, and the route's methods."""
        listed = ", ".join(methods).encode()
        if b"access-control-request-method" not in headers:
            return Response(headers=((b"allow", listed),))
        asked = headers.get(b"access-control-request-headers", b"")[:ASKED_LENGTH]
        allow = (b"access-control-allow-methods", listed), (b"access-control-allow-headers", asked), MAX_AGE
        return Response(headers=((b"allow", listed), *allow))
