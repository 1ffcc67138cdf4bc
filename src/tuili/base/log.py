"""Logging: the standard library's, set up once. ``TUILI_LOG`` chooses the level (the only environment variable)."""

from __future__ import annotations

import logging
import os


def get(name: str) -> logging.Logger:
    """The logger of a module: ``log = get(__name__)``."""
    return logging.getLogger(name)


def setup(level: str | None = None, *, default: str = "INFO") -> None:
    """Send Tuili's log to stderr in one line per record. Called by commands, never on import.

    ``level`` wins over TUILI_LOG, which wins over ``default``.
    """
    chosen = (level or os.environ.get("TUILI_LOG") or default).upper()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S"))
    root = logging.getLogger("tuili")
    root.handlers[:] = [handler]
    root.setLevel(chosen)
    root.propagate = False
