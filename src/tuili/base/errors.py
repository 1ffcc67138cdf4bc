"""Typed, scoped errors (DESIGN.md 5). Each says what happened, the value, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TuiliError(Exception):
    """Root of all errors that Tuili raises on purpose; its text is meant for the user."""


class ConfigError(TuiliError):
    """An option, a file or the machine does not allow the run. Raised before any work starts."""


class ModelError(TuiliError):
    """A checkpoint cannot be used as it is."""


class KernelError(TuiliError):
    """A kernel was given what it does not take; names the op, the argument and the value. A fault of ours."""


class RequestError(TuiliError):
    """The request is wrong (HTTP 400). ``param`` names the field at fault."""

    status = 400

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class NotFoundError(RequestError):
    """The request names something that is not here (HTTP 404)."""

    status = 404


class OverloadedError(TuiliError):
    """The queue is full (HTTP 429/503); try again after ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after


class RequestFailed(TuiliError):
    """This request died (HTTP 500); the engine lives."""


class EngineDead(TuiliError):
    """The engine died (HTTP 503); the process must exit non-zero."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'? Known: a, b.`` for the end of an "unknown name" message."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(names) or 'none'}."
