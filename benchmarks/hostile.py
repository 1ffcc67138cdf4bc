"""Hostile bodies in a row, and how long ``/health`` waits meanwhile: never more than 100 ms.

    python benchmarks/hostile.py [--count 100000] [--seed 0] [--largest 8000000] [--url http://127.0.0.1:8000]

Bodies come one after another over a kept connection, of all kinds of ``KINDS`` and of sizes from some bytes to
``--largest`` (small ones more often), the same for the same ``--seed``; another process asks for /health every 5 ms,
before (what the machine itself adds) and meanwhile. Without ``--url`` a child serves the scripted model
(``server_cpu.py``), so that only the server counts. Every body must end in a typed 4xx, in 503, or in 200 where it is
odd but good. Writes ``hostile.json``; exit code 1 when a promise is broken. Ends after ``--minutes`` at the latest.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from server_cpu import serving

from tuili.bench.provenance import provenance, results_folder
from tuili.cli.progress import counting

RESULTS = Path(__file__).parent / "results"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATHS = (TEXT, CHAT, "/tokenize", "/detokenize")
TARGET = 0.1
#: Seconds between two looks at /health.
EVERY = 0.005

Make = Callable[[random.Random, int], bytes]


def repeated(item: bytes, size: int, between: bytes = b",") -> bytes:
    """``item`` as often as fits into ``size`` bytes, at least twice."""
    return between.join([item] * max(2, size // (len(item) + len(between))))


def numbered(form: str, size: int) -> bytes:
    return ",".join(form % number for number in range(max(2, size // (len(form) + 3)))).encode()


def field(name: bytes, value: bytes) -> bytes:
    return (
        b'{"max_tokens":1,"prompt":"x","messages":[{"role":"user","content":"x"}],"tokens":[1],"'
        + name
        + b'":'
        + value
        + b"}"
    )


def instead(name: bytes, value: bytes) -> bytes:
    return b'{"max_tokens":1,"' + name + b'":' + value + b"}"


def nested(opening: bytes, closing: bytes, size: int) -> bytes:
    depth = max(2, size // (len(opening) + len(closing)))
    return opening * depth + b"1" + closing * depth


def cut(rng: random.Random, size: int) -> bytes:
    body = instead(b"prompt", b'"' + repeated("ab\\n推".encode(), size, b"") + b'"')
    return body[: rng.randrange(1, len(body))]


def noise(rng: random.Random, size: int) -> bytes:
    return rng.randbytes(min(size, 1 << 20)) + b"\xff" * max(0, size - (1 << 20))


KINDS: dict[str, Make] = {
    "the last key twice": lambda rng, size: b"{" + numbered('"k%d":1', size) + b',"k0":1}',
    "one key again and again": lambda rng, size: b"{" + repeated(b'"prompt":1', size) + b"}",
    "a key twice, deep inside": lambda rng, size: field(
        b"x", nested(b'{"a":[', b"]}", min(size, 500)).replace(b"1", b'{"b":1,"b":2}')
    ),
    "keys twice in many objects": lambda rng, size: field(b"x", b"[" + repeated(b'{"a":1,"a":1}', size) + b"]"),
    "many keys": lambda rng, size: b'{"prompt":"x",' + numbered('"k%d":null', size) + b"}",
    "a long key": lambda rng, size: field(b"k" * size, b"1"),
    "deep arrays": lambda rng, size: field(b"x", nested(b"[", b"]", size)),
    "deep objects": lambda rng, size: field(b"x", nested(b'{"a":', b"}", size)),
    "deep in the template": lambda rng, size: field(b"chat_template_kwargs", nested(b'{"a":', b"}", min(size, 500))),
    "empty lists": lambda rng, size: field(b"x", b"[" + repeated(b"[]", size) + b"]"),
    "empty objects": lambda rng, size: field(b"tools", b"[" + repeated(b"{}", size) + b"]"),
    "short strings": lambda rng, size: instead(b"prompt", b"[" + repeated(b'"x"', size) + b"]"),
    "short strings with escapes": lambda rng, size: instead(b"prompt", b"[" + repeated(b'"\\n"', size) + b"]"),
    "nulls": lambda rng, size: instead(b"prompt", b"[" + repeated(b"null", size) + b"]"),
    "small ids": lambda rng, size: instead(b"prompt", b"[" + repeated(b"1", size) + b"]"),
    "ids that are none": lambda rng, size: instead(b"prompt", b"[" + repeated(b"1.5", size) + b"]"),
    "ids, the last is none": lambda rng, size: instead(b"prompt", b"[" + repeated(b"65", size) + b",-1]"),
    "lists of ids": lambda rng, size: instead(b"prompt", b"[" + repeated(b"[65,66]", size) + b"]"),
    "mixed lists": lambda rng, size: instead(b"prompt", b"[" + repeated(b'1,"a",[null]', size) + b"]"),
    "tokens that are none": lambda rng, size: instead(b"tokens", b"[" + repeated(b'"1"', size) + b"]"),
    "messages that are none": lambda rng, size: instead(b"messages", b"[" + repeated(b"3", size) + b"]"),
    "messages without a role": lambda rng, size: instead(b"messages", b"[" + repeated(b'{"content":1}', size) + b"]"),
    "many good messages": lambda rng, size: instead(
        b"messages", b"[" + repeated(b'{"role":"user","content":"x"}', size) + b"]"
    ),
    "parts of another type": lambda rng, size: instead(
        b"messages", b'[{"role":"user","content":[' + repeated(b'{"type":"image_url"}', size) + b"]}]"
    ),
    "many good parts": lambda rng, size: instead(
        b"messages", b'[{"role":"user","content":[' + repeated(b'{"type":"text","text":"x"}', size) + b"]}]"
    ),
    "unknown fields in messages": lambda rng, size: instead(
        b"messages", b'[{"role":"user","content":"x",' + numbered('"k%d":1', size) + b"}]"
    ),
    "stop strings": lambda rng, size: field(b"stop", b"[" + numbered('"zq%dzq"', size) + b"]"),
    "stop strings that are none": lambda rng, size: field(b"stop", b"[" + repeated(b"1", size) + b"]"),
    "stop ids": lambda rng, size: field(b"stop_token_ids", b"[" + repeated(b"5", size) + b"]"),
    "allowed ids": lambda rng, size: field(b"allowed_token_ids", b"[" + repeated(b"5,6,7", size) + b"]"),
    "bad words": lambda rng, size: field(b"bad_words", b"[" + numbered('"w%d"', size) + b"]"),
    "biases": lambda rng, size: field(b"logit_bias", b"{" + numbered('"%d":1', size) + b"}"),
    "biases that are none": lambda rng, size: field(b"logit_bias", b"{" + numbered('"%d":"a"', size) + b"}"),
    "digits": lambda rng, size: field(b"top_k", b"9" * size),
    "digits of a fraction": lambda rng, size: field(b"temperature", b"0." + b"9" * size),
    "an exponent": lambda rng, size: field(b"temperature", b"1e" + b"9" * min(size, 1 << 16)),
    "infinite numbers": lambda rng, size: field(b"x", b"[" + repeated(b"1", size) + b",1e999]"),
    "not a number": lambda rng, size: field(b"x", b"[" + repeated(b"1.0", size) + b",NaN]"),
    "a long text": lambda rng, size: instead(b"prompt", b'"' + repeated(b"fox ", size, b"") + b'"'),
    "a text of escapes": lambda rng, size: instead(b"prompt", b'"' + repeated(b"\\n", size, b"") + b'"'),
    "a text of backslashes": lambda rng, size: instead(b"prompt", b'"' + repeated(b"\\\\", size, b"") + b'"'),
    "a text of escaped quotes": lambda rng, size: instead(b"prompt", b'"' + repeated(b'\\"', size, b"") + b'"'),
    "a text of surrogate pairs": lambda rng, size: instead(
        b"prompt", b'"' + repeated(b"\\ud83d\\ude00", size, b"") + b'"'
    ),
    "half a surrogate pair": lambda rng, size: instead(b"prompt", b'"' + b"a" * size + b'\\udc00"'),
    "not UTF-8": lambda rng, size: instead(b"prompt", b'"' + b"a" * size + b'\xff"'),
    "control characters": lambda rng, size: instead(b"prompt", b'"' + b"a" * size + b'\x01"'),
    "only spaces": lambda rng, size: b" " * size,
    "spaces around all": lambda rng, size: b" " * (size // 2) + instead(b"prompt", b'"x"') + b" " * (size // 2),
    "spaces between numbers": lambda rng, size: instead(
        b"prompt", b"[" + repeated(b"65", size, b" " * 60 + b",") + b"]"
    ),
    "commas": lambda rng, size: instead(b"prompt", b"[" + b"," * size + b"]"),
    "brackets": lambda rng, size: b"[" * size,
    "quotes": lambda rng, size: b'{"' + b'"' * size,
    "cut off": cut,
    "noise": noise,
}


def bodies(seed: int, count: int, largest: int) -> Iterator[tuple[str, str, bytes]]:
    """(kind, path, body): the same for the same seed."""
    rng = random.Random(seed)
    names = list(KINDS)
    for _ in range(count):
        name = rng.choice(names)
        size = int(min(largest, 10 * 1.6 ** rng.expovariate(1 / 6)))
        yield name, rng.choice(PATHS), KINDS[name](rng, size)


def connect(url: str) -> http.client.HTTPConnection:
    address = urlsplit(url)
    return http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)


def post(connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body; the connection must outlive any body."""
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def wrong(status: int, answer: bytes) -> bool:
    """Neither good, nor refused in the one shape that errors have."""
    if status == 200:
        return False
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return status not in (400, 404, 413, 503) or json.loads(answer)["error"]["code"] != status
    return True


# ---------------------------------------------------------------------------------------------------------- the probe


def probe(url: str) -> None:
    """Ask for /health until standard input ends; then print all waits (seconds) as JSON."""
    connection, waits, stopped = connect(url), [], False

    def wait_for_end() -> None:
        nonlocal stopped
        sys.stdin.read()
        stopped = True

    threading.Thread(target=wait_for_end, daemon=True).start()
    while not stopped:
        began = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        waits.append(time.perf_counter() - began)
        time.sleep(EVERY)
    print(json.dumps(waits))


@contextlib.contextmanager
def probing(url: str) -> Iterator[list[float]]:
    """Waits of /health, there when the block has ended."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--probe", url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    waits: list[float] = []
    try:
        yield waits
        waits += json.loads(process.communicate("", timeout=90)[0])
    finally:
        process.kill()
        process.wait()


def summary(waits: list[float]) -> dict[str, float]:
    ordered = sorted(waits)
    shares = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "worst": 1.0}
    found = {
        name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3, 2)
        for name, share in shares.items()
    }
    return {"count": len(waits), **found, "over_target": sum(wait > TARGET for wait in waits)}


# ---------------------------------------------------------------------------------------------------------------- run


def attack(url: str, options: argparse.Namespace) -> dict[str, Any]:
    statuses, broken = Counter[int](), []
    slowest: dict[str, tuple[float, int]] = {}  # by kind: seconds and bytes
    connection = connect(url)
    with probing(url) as idle:
        time.sleep(3)
    began, sent, size = time.monotonic(), 0, 0
    with probing(url) as waits, counting("bodies", options.count) as tick:
        for name, path, body in bodies(options.seed, options.count, options.largest):
            if time.monotonic() - began > options.minutes * 60:
                break
            sending = time.monotonic()
            status, answer = post(connection, path, body)
            took = time.monotonic() - sending, len(body)
            slowest[name] = max(took, slowest.get(name, took))
            statuses[status] += 1
            if wrong(status, answer):
                broken.append(f"{name} ({len(body)} bytes) at {path}: {status} {answer[:200]!r}")
            sent, size = sent + 1, size + len(body)
            tick()
    return {
        "sent": sent,
        "bytes": size,
        "seconds": round(time.monotonic() - began, 1),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "wrong": broken[:100],
        "slowest": sorted(((round(took, 3), size, name) for name, (took, size) in slowest.items()), reverse=True)[:10],
        "health_ms": summary(waits),
        "health_idle_ms": summary(idle),
    }


def main() -> int:
    options = arguments()
    if options.probe:
        probe(options.probe)
        return 0
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(serving(options.http, 0.0))[2]
        found = attack(url, options)
    passed = not found["wrong"] and found["sent"] == options.count and found["health_ms"]["worst"] <= TARGET * 1e3
    result = {"benchmark": "hostile", "passed": passed, "seed": options.seed, "http": options.http, **found}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "hostile.json"
    path.write_text(json.dumps({**result, "provenance": provenance()}, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"written to {path}", file=sys.stderr)
    return 0 if passed else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest", type=int, default=8_000_000, help="bytes of the largest bodies")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--url", help="a running server; default: a child with the scripted model")
    parser.add_argument("--http", choices=("h11", "httptools"), default="h11", help="the child's parser")
    parser.add_argument("--out", type=Path, default=results_folder(RESULTS))
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
