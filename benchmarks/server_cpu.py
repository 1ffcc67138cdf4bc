"""CPU time that the HTTP server takes per request and per streamed token, the engine's thread excluded.

    python benchmarks/server_cpu.py [--requests 2000] [--tokens 400] [--http h11] [--profile FILE] [--out FOLDER]

A child serves the scripted model of ``tests/server/scripted.py`` (real text engine, loop and scheduler; an executor
without tensors), so that only the server counts; the load comes from this process. CPU time is the scheduler's own
(/proc/PID/task/TID/schedstat, ns), summed over all threads but the engine's, after a warm-up of each kind.

- request: chat, one token, not streamed, ``--clients`` kept connections;
- token: streamed chats of ``--tokens`` tokens, a step of 10 ms; 32 streams at once (a wake-up of the loop serves many),
  and one alone (each token pays for its own). The cost of the requests themselves is in it.

Writes ``server_cpu.json``: the median of ``--rounds`` and the raw rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuili.bench.http import Client
from tuili.bench.provenance import provenance, results_folder
from tuili.bench.statistics import median

HERE = Path(__file__).parent
SCRIPTED = HERE.parent / "tests" / "server"
RESULTS = HERE / "results"
CHAT = "/v1/chat/completions"
#: Seconds of a step: what a small model takes for a batch.
STEP_SECONDS = 0.01
#: Seconds that one round may take.
ROUND_SECONDS = 300.0
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell a story about a brave fox."}]
TARGETS = {"request": 1.0, "token of 32 streams": 0.08}


# ---------------------------------------------------------------------------------------------------------- the child


def serve(http: str, delay: float, profile: str | None) -> None:
    """Serve until SIGTERM; the first lines say which thread is the engine's, and the URL."""
    sys.path.insert(0, str(SCRIPTED))
    from scripted import make_engine

    from tuili.server import launch

    engine = make_engine(delay=delay, port=0)
    thread = next(thread for thread in threading.enumerate() if thread.name == "tuili-engine")
    print("engine", thread.native_id, flush=True)
    try:
        with launch.bind("127.0.0.1", 0) as sock:
            if profile is None:
                launch.serve(engine, sock, http=http)
            else:
                import cProfile

                profiler = cProfile.Profile(time.thread_time)
                profiler.runcall(launch.serve, engine, sock, http=http)
                profiler.dump_stats(profile)
    finally:
        engine.close()


@contextmanager
def serving(http: str, delay: float, profile: str | None = None) -> Iterator[tuple[int, int, str]]:
    """Process id, the engine's thread id, URL."""
    command = [sys.executable, __file__, "--serve", str(delay), "--http", http]
    process = subprocess.Popen(command + (["--profile", profile] if profile else []), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        engine, url = 0, ""
        for line in process.stdout:
            if line.startswith("engine "):
                engine = int(line.split()[1])
            elif found := re.search(r"http://127\.0\.0\.1:\d+", line):
                url = found[0]
            if line.startswith("  curl"):
                break
        yield process.pid, engine, url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def cpu_seconds(process: int, engine: int) -> float:
    """CPU time of all threads that live now, without the engine's."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks if int(task.name) != engine) / 1e9


# ----------------------------------------------------------------------------------------------------------- the load


async def post(client: Client, **fields: Any) -> int:
    """Events of the answer: 1 for a whole one."""
    body = json.dumps({"messages": HELLO, "temperature": 0, "ignore_eos": True, **fields}).encode()
    events = 0

    def count(piece: bytes, _: float) -> None:
        nonlocal events
        events += piece.count(b"data: {")

    response = await client.request("POST", CHAT, body, count)
    assert response.status == 200, response
    return events


async def requests(url: str, count: int, clients: int) -> None:
    client, left = Client(url), iter(range(count))

    async def worker() -> None:
        for _ in left:
            await post(client, max_tokens=1)

    await asyncio.gather(*(worker() for _ in range(clients)))
    client.close()


async def streams(url: str, count: int, tokens: int) -> None:
    client = Client(url)
    await asyncio.gather(*(post(client, max_tokens=tokens, stream=True) for _ in range(count)))
    client.close()


def milliseconds(serves: tuple[int, int, str], load: Any, per: int) -> float:
    """CPU per unit of ``load``, a coroutine."""
    process, engine, _ = serves
    before = cpu_seconds(process, engine)
    asyncio.run(asyncio.wait_for(load, ROUND_SECONDS))
    return (cpu_seconds(process, engine) - before) / per * 1e3


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    with serving(options.http, 0.0) as serves:
        asyncio.run(requests(serves[2], 200, options.clients))
        load = options.requests
        found["request"] = [
            milliseconds(serves, requests(serves[2], load, options.clients), load) for _ in range(options.rounds)
        ]
    with serving(options.http, STEP_SECONDS) as serves:
        asyncio.run(streams(serves[2], 32, 20))
        for count, name in ((32, "token of 32 streams"), (1, "token of one stream")):
            found[name] = [
                milliseconds(serves, streams(serves[2], count, options.tokens), count * options.tokens)
                for _ in range(options.rounds)
            ]
    return found


def main() -> int:
    options = arguments()
    if options.serve is not None:
        serve(options.http, options.serve, options.profile)
        return 0
    if options.profile:
        with serving(options.http, options.delay, options.profile) as serves:
            asyncio.run(requests(serves[2], 50, options.clients))
            if options.delay:
                asyncio.run(streams(serves[2], 32, options.tokens))
            else:
                asyncio.run(requests(serves[2], options.requests, options.clients))
        return 0
    found = measure(options)
    medians = {name: median(values) for name, values in found.items()}
    for name, value in medians.items():
        target = f" (target {TARGETS[name]:g})" if name in TARGETS else ""
        print(f"{options.http}: {value:.3f} ms per {name}{target}")
    result = {
        "benchmark": "server_cpu",
        "http": options.http,
        "ms": medians,
        "targets": TARGETS,
        "rounds": found,
        "provenance": provenance(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"server_cpu-{options.http}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}", file=sys.stderr)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--http", choices=("h11", "httptools"), default="h11", help="uvicorn's parser")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", help="write a cProfile of one round to this file instead")
    parser.add_argument(
        "--delay", type=float, default=0.0, help="with --profile: seconds per step; 0 profiles requests"
    )
    parser.add_argument("--out", type=Path, default=results_folder(RESULTS))
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (0 < options.requests <= 100_000 and 0 < options.tokens <= 900 and 0 < options.rounds <= 20):
        parser.error("the load is bounded: 100,000 requests, 900 tokens, 20 rounds")
    return options


if __name__ == "__main__":
    sys.exit(main())
