"""Servers of the scripted model: one for the tests of shapes, and a maker for those that need their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scripted import Server, make_engine, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    made = Server(make_engine())
    yield made
    made.engine.close()


@pytest.fixture(scope="session")
def url(server: Server) -> Iterator[str]:
    with serving(server) as found:
        yield found


@pytest.fixture
def make_server() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(**options: Any) -> Server:
        made.append(Server(make_engine(**options)))
        return made[-1]

    yield make
    for server in made:
        server.engine.client.engine.executor.gate.set()  # type: ignore[attr-defined]
        server.engine.close()
