"""``run(config)``: take the port, load the model, serve until a signal, end every request before the process ends.

The port is bound first, so that a port in use is told before a model is loaded, and listened on last: connections are
refused until the model is there, so an open port means ready. Errors are TuiliErrors; the command prints them.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import resource
import shlex
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import psutil
import uvicorn

from tuili.base.config import Config
from tuili.base.errors import ConfigError, EngineDead, RequestError
from tuili.base.log import get
from tuili.server.app import App, create_app
from tuili.server.connections import check_all, protocol

if TYPE_CHECKING:
    from tuili.engine.text import TextEngine

log = get(__name__)
Progress = Callable[[str, int, int], None]
#: Files that the process needs beside its connections: weights, sockets, logs.
OWN_FILES = 128
PROMPT = "Tell a bedtime story about a brave little fox."


def run(
    config: Config,
    loading: Callable[[], AbstractContextManager[Progress | None]] = nullcontext,  # type: ignore[assignment]
) -> None:
    """Serve until SIGTERM or SIGINT; ``loading`` shows the progress of the load.

    Raises ConfigError or ModelError before anything is served, EngineDead when the engine died.
    """
    with bind(config.host, config.port) as sock:
        with loading() as progress:
            from tuili.engine.build import build

            engine = build(config, progress)
        try:
            serve(engine, sock)
        finally:
            engine.close()


def serve(engine: TextEngine, sock: socket.socket, http: str = "auto") -> None:
    """Serve ``engine`` on a bound socket. Raises EngineDead when it dies, ConfigError when the port was lost."""
    server = Server(create_app(engine, engine.config), http)
    gc.collect()
    gc.freeze()  # modules and weights stay: without them a full collection takes a millisecond instead of a hundred
    uvicorn_log = logging.getLogger("uvicorn")
    uvicorn_log.handlers[:] = logging.getLogger("tuili").handlers
    uvicorn_log.setLevel(logging.WARNING)
    port = sock.getsockname()[1]
    try:
        server.run(sockets=[sock])
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise in_use(port) from error
    if server.engine_died:
        raise EngineDead("the engine died, the log says why; all requests were answered with an error. Start it again.")


class Server(uvicorn.Server):
    """uvicorn that says when it is ready, ends when the engine dies, and gives requests a limited time to end."""

    def __init__(self, app: App, http: str = "auto"):
        self.service = app.service
        config = self.service.config
        connections = open_files(config.limit_concurrency)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol(http, config, connections),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=config.timeout_keep_alive,  # type: ignore[arg-type]
                h11_max_incomplete_event_size=config.h11_max_incomplete_event_size,
                timeout_graceful_shutdown=int(config.shutdown_seconds) + 5,  # for connections that are no generation
            )
        )
        self.engine_died = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = self.service.config.host, sockets[0].getsockname()[1]
            print(greeting(self.service.engine, url(host, port)), flush=True)

    async def on_tick(self, counter: int) -> bool:
        self.engine_died = not self.service.engine.healthy()
        check_all(self.server_state.connections, asyncio.get_running_loop().time())
        return await super().on_tick(counter) or self.engine_died

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        flight, seconds = self.service.flight, self.service.config.shutdown_seconds
        if len(flight):
            log.info("stopping: %d requests have %g s to end (Ctrl+C: end now)", len(flight), seconds)
        timer = asyncio.get_running_loop().call_later(seconds, flight.stop)
        await super().shutdown(sockets)
        timer.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals ask for a shutdown, no more: uvicorn's own would raise them again after it, and end the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def open_files(connections: int) -> int:
    """Let the process open files for so many connections and its own; how many connections that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OWN_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < wanted:
        log.warning("the limit of open files (ulimit -n) allows %d connections, not %d", soft - OWN_FILES, connections)
    return max(1, min(connections, soft - OWN_FILES))


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. ConfigError: who holds the port, or what is wrong with the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host!r} is no address: {error}") from error
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # inherited: hosts that vanish are noticed
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise in_use(port) from error
        raise ConfigError(f"cannot listen on {host}:{port} (--host, --port): {error.strerror}") from error
    return sock


def in_use(port: int) -> ConfigError:
    return ConfigError(f"port {port} is in use by {holder(port)}; stop it, or choose another port with --port")


def holder(port: int) -> str:
    """Who listens on ``port``, as far as this user may know."""
    try:
        found = (
            c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port
        )
        pid = next(found, None)
        if pid is None:
            return "another process"
        command = shlex.join(psutil.Process(pid).cmdline()) or psutil.Process(pid).name()
    except psutil.Error:
        return "another process"
    return f"process {pid} ({command if len(command) <= 80 else command[:77] + '...'})"


def url(host: str, port: int) -> str:
    """Where a client on this machine finds the server."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def greeting(engine: TextEngine, base: str) -> str:
    """The URL, and a command to try: a chat, or a completion where the model has no chat template."""
    messages = [{"role": "user", "content": PROMPT}]
    path, body = "/v1/chat/completions", {"messages": messages, "max_tokens": 200}
    try:
        engine.encode_chat(messages)
    except RequestError:
        path, body = "/v1/completions", {"prompt": PROMPT, "max_tokens": 64}
    command = f"curl {base}{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    return f"\nTuili serves {engine.model_name} at {base} (Ctrl+C to stop). Try:\n\n  {command}\n"
