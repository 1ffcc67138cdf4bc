"""A server at saturation for minutes: streams and plain requests, clients that leave, bad requests (`make soak`).

Starts ``tuili serve`` on a free port of 127.0.0.1, keeps ``--clients`` clients busy for ``--minutes``, samples the
server's memory and its /metrics every second, drains, stops the server, and then asserts what must hold:

1. every accepted request ended in a finished output or a typed error (law 7), every bad one in the 4xx it deserves;
2. when all is quiet nothing runs, nothing waits, and no KV block is in use (law 8);
3. memory is flat: the median RSS of the last third is not above that of the second third by more than ``--rss-bound``;
4. no 5xx but 503 (overloaded);
5. the server stops by itself when asked to.

Writes the counts and the raw series as JSON. It ends by itself: clients have deadlines, and the whole run has one too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tuili.base.errors import TuiliError
from tuili.bench.http import Client, ClientResponse, HttpError
from tuili.bench.load import Events
from tuili.bench.provenance import provenance, results_folder
from tuili.bench.statistics import median
from tuili.cli.progress import counting

RESULTS = Path(__file__).parent / "results"
SENTENCE = "the little red fox ran over a hill and saw the big old moon 月亮 und Äpfel 🦊 then it said goodnight"
WORDS = SENTENCE.split()
GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_usage": "vllm:kv_cache_usage_perc",
}
COUNTERS = {"preemptions": "vllm:num_preemptions_total", "prefix_hits": "vllm:prefix_cache_hits_total"}
#: Options of the server: few rows, a short queue and too few KV blocks for them, so that all of it is at its limit.
SATURATED = ["--max-model-len", "512", "--max-num-seqs", "16", "--max-num-queued-reqs", "24"]
SATURATED += ["--num-gpu-blocks-override", "48"]
#: Seconds that one request may take before the soak calls it a hang.
REQUEST_SECONDS = 120.0
#: The longest that a refused client waits before its next request.
REFUSED_SECONDS = 2.0
#: Seconds given to the server to become idle after the last client has left.
DRAIN_SECONDS = 60.0


@dataclass
class Soak:
    """The state of a run: what was sent, how it ended, and what the server looked like every second."""

    client: Client
    model: str
    max_len: int
    rng: random.Random
    sent: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    series: list[dict[str, float]] = field(default_factory=list)

    def fail(self, message: str) -> None:
        """Remember a broken promise (the first hundred in words)."""
        self.outcomes["wrong"] += 1
        if len(self.wrong) < 100:
            self.wrong.append(message)

    # ------------------------------------------------------------------------------------------------ good requests

    def prompt(self) -> str:
        """Words in several scripts, short enough for any context (a word takes at most ten tokens)."""
        return " ".join(self.rng.choices(WORDS, k=self.rng.randint(1, min(40, self.max_len // 20))))

    def fields(self, chat: bool, stream: bool) -> dict[str, Any]:
        """A valid request with sampling settings of all kinds."""
        rng, text = self.rng, self.prompt()
        body: dict[str, Any] = {
            "model": self.model,
            "stream": stream,
            "max_tokens": rng.randint(1, min(96, self.max_len // 5)),
        }
        body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        body |= {
            "temperature": rng.choice([0.0, 0.7, 1.0]),
            "top_p": rng.choice([0.8, 1.0]),
            "seed": rng.randrange(1000),
        }
        if body["temperature"] and rng.random() < 0.15:
            body["n"] = rng.randint(2, 3)
        if rng.random() < 0.2:
            body["stop"] = [".", "the"]
        if rng.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
        if rng.random() < 0.3:
            body |= {"frequency_penalty": 0.5, "min_p": 0.05}
        if stream:
            body["stream_options"] = {"include_usage": True}
        return body

    async def plain(self) -> None:
        chat = self.rng.random() < 0.5
        body = self.fields(chat, stream=False)
        response = await self.post(_path(chat), json.dumps(body).encode())
        if response.status == 200:
            choices = json.loads(response.body)["choices"]
            ended = len(choices) == body.get("n", 1) and all(choice["finish_reason"] for choice in choices)
            self.ended("plain", ended, response)
        else:
            await self.refused("plain", response)

    async def stream(self) -> None:
        """A stream read to its end: a finish reason for each choice, or an error event, then [DONE]."""
        chat = self.rng.random() < 0.5
        body, events = self.fields(chat, stream=True), Events()
        seen: list[bytes] = []
        response = await self.post(_path(chat), json.dumps(body).encode(), lambda p, now: seen.extend(events.feed(p)))
        if response.status != 200:
            await self.refused("stream", response)
            return
        messages = [json.loads(data) for data in seen if data != b"[DONE]"]
        finished = {c["index"] for m in messages for c in m.get("choices", ()) if c.get("finish_reason")}
        failed = any("error" in message for message in messages)
        self.ended("stream", seen[-1:] == [b"[DONE]"] and (failed or len(finished) == body.get("n", 1)), response)

    def ended(self, kind: str, well: bool, response: ClientResponse) -> None:
        self.outcomes[f"{kind} finished"] += well
        if not well:
            self.fail(f"{kind}: a request answered {response.status} did not end: {bytes(response.body[:200])!r}")

    async def refused(self, kind: str, response: ClientResponse) -> None:
        """Only an overloaded server may refuse a good request, with a typed error; the client then waits."""
        if response.status == 503 and _typed(response):
            self.outcomes[f"{kind} refused (503)"] += 1
            await asyncio.sleep(self.rng.random() * REFUSED_SECONDS)
        else:
            self.fail(f"{kind}: HTTP {response.status} for a good request: {bytes(response.body[:200])!r}")

    # ------------------------------------------------------------------------------------------- clients that leave

    async def leave(self) -> None:
        """Disconnect at once, after a moment, or in the middle of the answer, streaming or not."""
        chat, stream = self.rng.random() < 0.5, self.rng.random() < 0.7
        body = self.fields(chat, stream) | {"max_tokens": min(200, self.max_len // 4)}
        exchange = await self.client.connect()
        pieces = asyncio.Event()
        future = exchange.send(
            self.client.message("POST", _path(chat), json.dumps(body).encode()), lambda p, n: pieces.set()
        )
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        with contextlib.suppress(TimeoutError):
            wait = self.rng.choice([0.0, 0.01, 0.1, 1.0])
            await asyncio.wait_for(pieces.wait() if stream and wait == 1.0 else asyncio.sleep(wait), 5.0)
        exchange.abort()
        self.outcomes["left"] += 1

    async def half_sent(self) -> None:
        """A client that dies while it sends its body."""
        body = json.dumps(self.fields(True, True)).encode()
        message = self.client.message("POST", "/v1/chat/completions", body)
        exchange = await self.client.connect()
        future = exchange.send(message[: len(message) - self.rng.randint(1, len(body))])
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.sleep(self.rng.choice([0.0, 0.05]))
        exchange.abort()
        self.outcomes["left while sending"] += 1

    # ------------------------------------------------------------------------------------------------- bad requests

    async def bad(self) -> None:
        name, path, body, statuses = self.rng.choice(bad_requests(self.model, self.max_len))
        response = await self.post(path, body)
        if response.status in statuses and _typed(response):
            self.outcomes[f"bad refused ({response.status})"] += 1
        else:
            self.fail(f"bad request {name}: HTTP {response.status}, not {statuses}: {bytes(response.body[:200])!r}")

    # ------------------------------------------------------------------------------------------------------ the loop

    async def post(self, path: str, body: bytes, sink: Callable[[bytes, float], None] | None = None) -> ClientResponse:
        response = await self.client.request("POST", path, body, sink)
        self.statuses[str(response.status)] += 1
        return response

    def kinds(self) -> list[tuple[Callable[[], Awaitable[None]], float]]:
        """What a client may do, and how often."""
        return [(self.stream, 0.4), (self.plain, 0.25), (self.leave, 0.2), (self.half_sent, 0.03), (self.bad, 0.12)]

    async def worker(self, until: float) -> None:
        while time.monotonic() < until:
            act = self.rng.choices([kind for kind, _ in self.kinds()], [weight for _, weight in self.kinds()])[0]
            self.sent[act.__name__] += 1
            try:
                async with asyncio.timeout(REQUEST_SECONDS):
                    await act()
            except TimeoutError:
                self.fail(f"{act.__name__}: no end after {REQUEST_SECONDS:g} s")
            except (HttpError, ValueError, KeyError, TypeError) as error:
                self.fail(f"{act.__name__}: {type(error).__name__}: {error}")


def _path(chat: bool) -> str:
    return "/v1/chat/completions" if chat else "/v1/completions"


def _typed(response: ClientResponse) -> bool:
    """Is the body OpenAI's error envelope?"""
    try:
        error = json.loads(response.body)["error"]
        return bool(error["message"]) and bool(error["type"])
    except (ValueError, KeyError, TypeError):
        return False


def bad_requests(model: str, max_len: int) -> list[tuple[str, str, bytes, tuple[int, ...]]]:
    """What is wrong, where it goes, the body, and the statuses that it may get."""
    chat, text = "/v1/chat/completions", "/v1/completions"
    hello = [{"role": "user", "content": "hello"}]

    def of(path: str, name: str, status: int = 400, **fields: Any) -> tuple[str, str, bytes, tuple[int, ...]]:
        good: dict[str, Any] = {"messages": hello} if path == chat else {"prompt": "hello"}
        return name, path, json.dumps({"model": model, "max_tokens": 4, **good, **fields}).encode(), (status,)

    return [
        ("malformed JSON", chat, b'{"model": ', (400,)),
        ("empty body", chat, b"", (400,)),
        ("not UTF-8", text, b'{"model": "\xff\xfe"}', (400,)),
        ("deep", chat, b"[" * 20_000 + b"]" * 20_000, (400,)),
        ("a list", text, b"[1, 2]", (400,)),
        of(chat, "wrong type", messages="hello"),
        of(chat, "no messages", messages=[]),
        of(chat, "temperature", temperature=99),
        of(text, "top_p", top_p=0),
        of(text, "n", n=0),
        of(text, "token out of the vocabulary", prompt=[10**9]),
        of(text, "max_tokens", max_tokens=-1),
        of(text, "too long", prompt=[1] * (max_len + 1)),
        of(chat, "too many tokens", max_tokens=max_len * 2),
        of(chat, "unknown model", status=404, model="no-such-model"),
    ]


# ------------------------------------------------------------------------------------------------------------ the
# server


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def serving(options: argparse.Namespace, log: Path) -> Any:
    """A server process of our own on a free port; stopped by SIGTERM, then killed if it must be."""
    port = free_port()
    command = [sys.executable, "-m", "tuili", "serve", options.model, "--port", str(port), *options.server]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


async def ready(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise TuiliError(f"the server ended with {process.returncode}: {log.read_text()[-500:]}")
        with contextlib.suppress(HttpError):
            if (await client.request("GET", "/health")).status == 200:
                return
        await asyncio.sleep(0.2)
    raise TuiliError(f"the server was not ready after 120 s: {log.read_text()[-500:]}")


async def metrics(client: Client) -> dict[str, float]:
    text = bytes((await client.request("GET", "/metrics")).body).decode()
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[:5] == "vllm:"}
    return {name: values[metric] for name, metric in (GAUGES | COUNTERS).items()}


async def watch(soak: Soak, process: subprocess.Popen[bytes], began: float, tick: Callable[[], None]) -> None:
    """Sample memory and gauges once a second until cancelled."""
    server = psutil.Process(process.pid)
    while True:
        sample = {"seconds": time.monotonic() - began, "rss": float(server.memory_info().rss)}
        with contextlib.suppress(HttpError, KeyError):
            sample |= await metrics(soak.client)
        sample |= {"threads": server.num_threads(), "files": server.num_fds(), "requests": sum(soak.sent.values())}
        soak.series.append(sample)
        tick()
        await asyncio.sleep(1.0)


async def drained(client: Client) -> dict[str, float]:
    """The metrics once all gauges are 0, or as they are after DRAIN_SECONDS."""
    end = time.monotonic() + DRAIN_SECONDS
    while True:
        seen = await metrics(client)
        if not any(seen[name] for name in GAUGES) or time.monotonic() > end:
            return seen
        await asyncio.sleep(0.25)


# --------------------------------------------------------------------------------------------------------------
# verdicts


def rss_growth(series: list[dict[str, float]]) -> dict[str, float]:
    """Median RSS in bytes of the second and of the last third of the run: the first third is warm-up."""
    third = len(series) // 3
    second, last = (median([s["rss"] for s in part]) for part in (series[third : 2 * third], series[2 * third :]))
    return {"second_third": second, "last_third": last, "growth": (last - second) / second if second else 0.0}


def verdicts(soak: Soak, idle: dict[str, float], exit_code: int | None, bound: float) -> dict[str, Any]:
    """Each promise, and whether it was kept."""
    growth = rss_growth(soak.series)
    errors = {status: count for status, count in soak.statuses.items() if status[0] == "5" and status != "503"}
    waited = any(sample.get("waiting") for sample in soak.series)
    return {
        "every request ended as it must": not soak.wrong,
        "nothing runs or waits when idle": idle["running"] == idle["waiting"] == 0,
        "no KV block leaked": idle["kv_usage"] == 0,
        "memory is flat": growth["growth"] <= bound,
        "no 5xx but 503": not errors,
        "the server was saturated": waited,
        "all kinds of clients came": all(soak.sent[kind.__name__] for kind, _ in soak.kinds()),
        "the server stopped by itself": exit_code == 0,
    }


async def soak_server(options: argparse.Namespace, process: subprocess.Popen[bytes], url: str, log: Path) -> Soak:
    client = Client(url)
    await ready(client, process, log)
    model = json.loads((await client.request("GET", "/v1/models")).body)["data"][0]
    soak = Soak(client, model["id"], model["max_model_len"], random.Random(options.seed))
    seconds = options.minutes * 60
    began = time.monotonic()
    with counting("seconds", int(seconds)) as tick:
        watcher = asyncio.create_task(watch(soak, process, began, tick))
        workers = [soak.worker(began + seconds) for _ in range(options.clients)]
        await asyncio.wait_for(asyncio.gather(*workers), seconds + REQUEST_SECONDS + 10)
        watcher.cancel()
    soak.series.append({"idle": 1.0, **await drained(client)})
    client.close()
    return soak


def main() -> int:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "soak-server.log"
    with serving(options, log) as (process, url):
        soak = asyncio.run(soak_server(options, process, url, log))
        process.send_signal(signal.SIGTERM)
        try:
            exit_code: int | None = process.wait(60)
        except subprocess.TimeoutExpired:
            exit_code = None
    idle = soak.series.pop()
    held = verdicts(soak, idle, exit_code, options.rss_bound)
    result = {
        "benchmark": "soak",
        "passed": all(held.values()),
        "verdicts": held,
        "minutes": options.minutes,
        "clients": options.clients,
        "sent": dict(soak.sent),
        "outcomes": dict(soak.outcomes),
        "statuses": dict(soak.statuses),
        "wrong": soak.wrong,
        "idle": idle,
        "rss": rss_growth(soak.series) | {"bound": options.rss_bound},
        "exit_code": exit_code,
        "provenance": provenance() | {"seed": options.seed, "server_options": options.server},
        "series": soak.series,
    }
    (options.out / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    for promise, kept in held.items():
        print(f"{'ok  ' if kept else 'FAIL'} {promise}")
    for message in soak.wrong[:10]:
        print(f"     {message}")
    print(json.dumps({key: result[key] for key in ("sent", "outcomes", "statuses", "rss")}))
    print(f"written to {options.out}/soak.json", file=sys.stderr)
    return 0 if result["passed"] else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=48, help="clients that are busy all the time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rss-bound", type=float, default=0.03, help="growth that still passes: last third over second"
    )
    parser.add_argument("--out", type=Path, default=results_folder(RESULTS))
    parser.add_argument("server", nargs="*", help=f"options of `tuili serve`, after --; default: {' '.join(SATURATED)}")
    options = parser.parse_args()
    options.server = options.server or SATURATED
    if not 0 < options.minutes <= 120 or not 0 < options.clients <= 1000:
        parser.error("the soak is bounded: up to 120 minutes and 1000 clients")
    return options


if __name__ == "__main__":
    sys.exit(main())
