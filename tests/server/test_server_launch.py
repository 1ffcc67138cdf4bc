"""Starting and stopping: ports, signals, dead engines. The server runs in a process of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tuili.base.config import Config
from tuili.base.errors import ConfigError
from tuili.server import launch

HERE = Path(__file__).parent
TEXT = "/v1/completions"
PROGRAM = """
import sys
from scripted import make_engine
from tuili.base import log
from tuili.base.errors import TuiliError
from tuili.server import launch
log.setup()
engine = make_engine(delay={delay}, port=0, shutdown_seconds={grace})
try:
    with launch.bind("127.0.0.1", {port}) as sock:
        launch.serve(engine, sock)
except TuiliError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(1)
finally:
    engine.close()
"""


class Process:
    def __init__(self, delay: float, grace: float, port: int = 0):
        paths = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        self.child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(delay=delay, grace=grace, port=port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.greeting = ""

    def ready(self) -> str:
        """The URL, once it is printed."""
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.greeting += line
            if line.startswith("  curl"):
                break
        found = re.search(r"http://127\.0\.0\.1:\d+", self.greeting)
        assert found, self.end()
        return found[0]

    def end(self, number: int | None = None, seconds: float = 15) -> tuple[int, str]:
        """Exit code and stderr, after a signal if one is given."""
        if number is not None:
            self.child.send_signal(number)
        _, err = self.child.communicate(timeout=seconds)
        return self.child.returncode, err


@contextlib.contextmanager
def process(delay: float = 0.0, grace: float = 5.0, port: int = 0) -> Iterator[Process]:
    made = Process(delay, grace, port)
    with made.child:  # closes the pipes
        try:
            yield made
        finally:
            made.child.kill()


def test_a_port_in_use_names_its_holder() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            launch.run(Config(port=port, model="/no/such/model"))  # the port is looked at before the model
    message = str(caught.value)
    assert f"port {port} is in use by process {os.getpid()} (" in message
    assert "--port" in message
    assert "\n" not in message


@pytest.mark.parametrize("host", ["no.such.host.invalid", "300.1.1.1", "192.0.2.1", "x" * 400])
def test_a_wrong_host_is_one_line(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        launch.run(Config(host=host, port=0))
    assert "--host" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_model_gives_the_port_back(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    from tuili.base.errors import TuiliError

    for _ in range(2):
        with pytest.raises(TuiliError, match="nothing-here"):
            launch.run(Config(port=port, model=str(tmp_path / "nothing-here")))


@pytest.mark.parametrize(
    ("host", "shown"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("localhost", "localhost"), ("10.0.0.1", "10.0.0.1")],
)
def test_urls_can_be_clicked(host: str, shown: str) -> None:
    assert launch.url(host, 80) == f"http://{shown}:80"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_end_and_the_exit_code_is_0(number: int) -> None:
    with process(delay=0.01) as started:
        url = started.ready()
        ask = {"prompt": "x", "temperature": 0, "max_tokens": 60, "stream": True}
        with httpx.stream("POST", url + TEXT, json=ask, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            started.child.send_signal(number)
            time.sleep(0.2)
            with pytest.raises(httpx.ConnectError):
                httpx.get(url + "/health")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        code, err = started.end()
    assert (code, "Traceback" in err) == (0, False), err


def test_after_the_grace_period_streams_end_with_an_error() -> None:
    with process(delay=0.02, grace=0.3) as started:
        url = started.ready()
        ask = {"prompt": "x", "temperature": 0, "max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url + TEXT, json=ask, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            started.child.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        error = json.loads(rest[-2].removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("ServiceUnavailableError", 503)
        code, err = started.end()
    assert (code, "Traceback" in err) == (0, False), err


def test_the_printed_command_works() -> None:
    with process() as started:
        url = started.ready()
        command = next(line for line in started.greeting.splitlines() if line.startswith("  curl"))
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=20)
        assert json.loads(done.stdout)["object"] == "chat.completion", done
        assert shlex.split(command)[1].startswith(url)
        assert started.end(signal.SIGTERM)[0] == 0


def test_a_dead_engine_ends_the_process() -> None:
    with process() as started:
        url = started.ready()
        answer = httpx.post(url + TEXT, json={"prompt": "DIE", "temperature": 0, "max_tokens": 9}, timeout=20)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, 503)
        code, err = started.end()
    assert code == 1
    assert "the device is on fire" in err
    assert "error: the engine died" in err


def test_the_second_of_two_servers_on_a_port_says_so() -> None:
    with process() as first:
        port = int(first.ready().rpartition(":")[2])
        with process(port=port) as second:
            code, err = second.end()
        assert code == 1
        assert f"port {port} is in use by process {first.child.pid}" in err
        assert "Traceback" not in err
