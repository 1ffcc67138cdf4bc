"""What the tests of the command line share: an invoker in this process, and a clean logger after each test."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

Invoke = Callable[..., Any]


@pytest.fixture
def tuili() -> Invoke:
    """``tuili("config", "show")``: the result of the command, run in this process."""
    from tuili.cli import app

    return lambda *words, **fields: CliRunner().invoke(app, [str(word) for word in words], **fields)


@pytest.fixture(autouse=True)
def _logger() -> Iterator[None]:
    """Commands send the log to stderr; the next test's stderr is another one."""
    root = logging.getLogger("tuili")
    before = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.level, root.propagate = before
