"""The engine beside a process that burns one core: what is left of its throughput, and whether that is its share.

    python benchmarks/busy.py [--threads 2] [--pairs 5] [--concurrency 8] [--out FOLDER]

Runs alternate, idle and busy, so that a drift of the machine hits both alike; one engine serves all of them. With two
threads on two cores the engine's share beside one busy process is half of what it has alone: it should keep 0.45 of it.
Writes ``busy.json`` with the raw runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuili.base import log
from tuili.base.config import Config
from tuili.bench import offline
from tuili.bench.arms import open_engine, vocabulary
from tuili.bench.provenance import provenance, results_folder
from tuili.bench.statistics import median
from tuili.bench.workload import Span, fixed_random

RESULTS = Path(__file__).parent / "results"
#: The part of its idle throughput that an engine of two threads has to keep.
SHARE = 0.45


@contextmanager
def burning() -> Iterator[None]:
    """One core of this machine is busy with something else."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    config = Config(model=options.model, threads=options.threads)
    engine = open_engine(config, options.concurrency)
    try:
        lengths = Span(options.prompt, options.prompt), Span(options.output, options.output)
        work = fixed_random(options.concurrency, *lengths, vocab=vocabulary(engine))
        offline.throughput(engine, work)  # warm-up
        pairs = []
        for number in range(options.pairs):
            idle = offline.throughput(engine, work)
            with burning():
                busy = offline.throughput(engine, work)
            pairs.append({"idle": idle, "busy": busy, "ratio": _rate(busy) / _rate(idle)})
            print(f"pair {number}: idle {_rate(idle):.0f}, busy {_rate(busy):.0f} tokens/s: {pairs[-1]['ratio']:.2f}")
    finally:
        engine.close()
    ratio = median([pair["ratio"] for pair in pairs])
    return {
        "benchmark": "busy",
        "idle_throughput": median([_rate(pair["idle"]) for pair in pairs]),
        "busy_throughput": median([_rate(pair["busy"]) for pair in pairs]),
        "ratio": ratio,
        "share": SHARE,
        "passed": ratio >= SHARE,
        "pairs": pairs,
        "provenance": provenance(work, engine.config),
    }


def _rate(run: dict[str, Any]) -> float:
    return float(run["output_throughput"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=8, help="requests at once")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--output", type=int, default=256, help="tokens")
    parser.add_argument("--out", type=Path, default=results_folder(RESULTS), help="folder of the results")
    options = parser.parse_args()
    log.setup(default="ERROR")
    report = measure(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "busy.json").write_text(json.dumps(report, indent=1) + "\n")
    verdict = "kept its share" if report["passed"] else f"fell below its share of {SHARE}"
    print(f"{report['ratio']:.2f} of {report['idle_throughput']:.0f} tokens/s: {verdict}")
    sys.exit(not report["passed"])


if __name__ == "__main__":
    main()
