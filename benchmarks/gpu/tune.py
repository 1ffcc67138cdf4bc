"""Measure tiles of products and attention on the card at hand, for the shapes of the models of gpu-check.

    python benchmarks/gpu/tune.py [--minutes M] [--only NAME] [--workers N] [--out FOLDER]

First all candidates are compiled by several processes, then each job (a kernel, a shape, a number of rows) is measured
alone, the jobs that weigh most first. What was measured is written after each job, and not measured again: to go on
later, call it again. Writes ``cards/<card>.json`` of the package, which ``tuning.py`` reads; a guessed tile is in there
where it is the fastest. ``--tiny`` runs tiny jobs by Triton's interpreter into ``--out``: it shows that this works.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# See check.py.
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]
import gpu  # noqa: E402

sys.path.remove(str(HERE.parent))
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1" if "--tiny" in sys.argv else "0"

import torch  # noqa: E402

from gpu import alone  # noqa: E402
from gpu.place import seconds  # noqa: E402
from gpu.shapes import CONFIGS, spec_of  # noqa: E402
from tuili.layers.sizes import block_parameters  # noqa: E402
from tuili.ops.triton import describe, tuning  # noqa: E402

Tile = tuning.Tile | tuning.AttentionTile


@dataclass(frozen=True)
class Job:
    """What is measured: a product of ``kind`` (of ``alone.PRODUCTS``) of ``shape`` (outputs, inputs) with ``count``
    rows, or attention over a cache of ``kind`` (of ``alone.CACHES``) of ``shape`` (heads of a KV head, dimensions,
    KV heads) for ``count`` requests (``context`` keys each) or queries per request."""

    phase: str
    kind: str
    shape: tuple[int, ...]
    count: int
    context: int = 0

    @property
    def name(self) -> str:
        return f"{self.phase} {self.kind or 'bfloat16'} {'x'.join(map(str, self.shape))} {self.count}"


# Candidates -----------------------------------------------------------------------------------------------------------


def candidates(job: Job) -> list[Tile]:
    """Tiles that are worth a try, the guess among them."""
    made = products(job) if job.phase == "product" else spans(job)
    return list(dict.fromkeys([guess(job), *made]))


def guess(job: Job) -> Tile:
    if job.phase == "product":
        return tuning.guess(job.count, *job.shape, processors())
    return tuning.guess_attention(1 if job.phase == "decode" else job.count, *job.shape[:2])


def products(job: Job) -> Iterator[Tile]:
    outputs, inputs = job.shape
    if job.count <= 64:
        rows = max(16, 1 << (job.count - 1).bit_length())
        for wide, step, warps, stages in (
            (64, 128, 4, 4),
            (64, 128, 4, 6),
            (128, 128, 4, 4),
            (128, 128, 8, 3),
            (64, 64, 4, 6),
        ):
            tiles = -(-outputs // wide)
            whole = [s for s in (1, 2, 4, 8) if s <= inputs // (2 * step)] or [1]
            # Splits that fill the card once to four times; fewer programs than multiprocessors are never best.
            fitting = [s for s in whole if tiles * s >= processors() / 2] or whole[-1:]
            yield from (tuning.Tile(wide, rows, step, s, warps, stages) for s in fitting[:3])
        return
    for wide, rows, warps in ((128, 128, 8), (128, 256, 8), (64, 128, 4), (128, 64, 4), (64, 256, 4)):
        for step, stages in ((64, 3), (64, 4), (128, 3)):
            yield tuning.Tile(wide, rows, step, 1, warps, stages)


def spans(job: Job) -> Iterator[Tile]:
    group = job.shape[0]
    if job.phase == "decode":
        rows = max(16, 1 << (group - 1).bit_length())
        for keys, warps, stages in ((64, 4, 3), (32, 4, 4), (128, 4, 2), (64, 2, 3), (32, 2, 4), (128, 8, 2)):
            yield from (tuning.AttentionTile(rows, keys, waves, warps, stages) for waves in (2, 4, 8))
        return
    eight, four = ((64, 3), (128, 2), (64, 2), (32, 4)), ((64, 3), (128, 2), (32, 4))
    tried = [(128, 8, *pair) for pair in eight] + [(64, 4, *pair) for pair in four]
    for rows, warps, keys, stages in tried:
        yield tuning.AttentionTile(max(rows, group), keys, 2, warps, stages)


# Measuring ------------------------------------------------------------------------------------------------------------


def jobs(tiny: bool) -> list[Job]:
    """For the models of gpu-check, the largest first; of a kind, small numbers of rows first."""
    made = []
    for model in CONFIGS:
        spec = spec_of(model, tiny)
        shapes = sorted({shape for shape in block_parameters(spec).values() if len(shape) == 2})
        group, dim = spec.num_heads // spec.num_kv_heads, spec.head_dim
        counts = (2, 70) if tiny else (1, 16, 64, 256, 8192)
        for count in counts:
            for kind in list(alone.PRODUCTS)[1:]:
                made += [Job("product", kind, shape, count) for shape in shapes]
        for kind in alone.CACHES:
            for count, context in ((2, 40),) if tiny else ((1, 8192), (8, 8192), (32, 4096), (256, 1024)):
                made.append(Job("decode", kind, (group, dim, spec.num_kv_heads), count, context))
            for count in (20,) if tiny else (16, 512, 8192):
                made.append(Job("prefill", kind, (group, dim, spec.num_kv_heads), count))
    return made[:: 7 if tiny else 1]


def prepared(job: Job, device: str) -> tuple[dict[Any, Any], str, int, Callable[[], Any]]:
    """The card's entries that the job is about, its key and number there, and a call on random data."""
    card = tuning.card(describe().card)
    if job.phase == "product":
        call = alone.product_call(alone.PRODUCTS[job.kind], job.count, *job.shape, device)
        return card.entries, _key(job), job.count, call
    group, dim, heads = job.shape
    queries = [1] * job.count if job.phase == "decode" else [job.count]
    contexts = [job.context] * job.count if job.phase == "decode" else [job.count]
    call = alone.attention_call(job.kind, queries, contexts, group * heads, heads, dim, device)
    return card.attention, _key(job), job.count, call


def _key(job: Job) -> str:
    """Of its entry in a card's file."""
    if job.phase == "product":
        return tuning.key(alone.product_kernel(alone.PRODUCTS[job.kind]), *job.shape)
    dtype = str(alone.CACHES[job.kind]).removeprefix("torch.")
    return tuning.attention_key(job.phase, dtype, *job.shape[:2])


def measure(job: Job, device: str, timer: Callable[[Callable[[], Any]], float]) -> Tile | None:
    """The fastest candidate; ``timer`` gives a call's seconds. A candidate that does not run is not the fastest."""
    entries, key, count, call = prepared(job, device)
    before = dict(entries.get(key, {}))

    def taken(tile: Tile) -> float:
        entries[key] = {count: tile}
        try:
            return timer(call)
        except Exception as error:  # too much shared memory, or registers
            print(f"    {tile}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", flush=True)
            return float("inf")

    best = tuning.fastest(candidates(job), taken)
    entries[key] = before | ({count: best} if best else {})
    return best


def compile_all(names: list[Job], device: str) -> None:
    """Run every candidate once, in a process of its own: Triton keeps what it compiled."""
    for job in names:
        measure(job, device, lambda call: float(call() is None))


def processors() -> int:
    from tuili.ops.triton.about import processors as count

    return count(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def tune(
    todo: list[Job], device: str, folder: Path, deadline: float, timer: Callable[[Callable[[], Any]], float]
) -> int:
    """Measure ``todo`` until ``deadline`` (of ``time.monotonic``). Returns how many were left."""
    import triton

    for left, job in zip(range(len(todo), 0, -1), todo, strict=True):
        if time.monotonic() > deadline:
            return left
        try:
            best = measure(job, device, timer)
        except Exception as error:
            print(f"{job.name}: FAILED {type(error).__name__}: {error}", flush=True)
            continue
        print(f"{job.name}: {best}", flush=True)
        known = tuning.card(describe().card)
        tuning.CardTiles(describe().card or "interpreted", triton.__version__, known.entries, known.attention).save(
            folder
        )
    return 0


def undone(all_jobs: list[Job], path: Path) -> list[Job]:
    """Those that the file at ``path`` does not hold."""
    known = tuning.load(path) if path.exists() else tuning.CardTiles("")

    entries: dict[str, Any] = {**known.entries, **known.attention}
    return [job for job in all_jobs if job.count not in entries.get(_key(job), {})]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="after this no job begins")
    parser.add_argument("--only", default="", help="jobs whose name contains this")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--out", type=Path, default=tuning.SHIPPED, help="folder of the card's file")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not describe().usable or (describe().interpreted and not options.tiny):
        print(f"tune needs an NVIDIA GPU: {describe().why or 'Triton is interpreted'}")
        return 2
    device, deadline = "cpu" if options.tiny else "cuda", time.monotonic() + 60 * options.minutes
    path = options.out / f"{tuning.slug(describe().card or 'interpreted')}.json"
    todo = [job for job in undone(jobs(options.tiny), path) if options.only in job.name]
    print(f"{len(todo)} jobs", flush=True)
    compile_ahead(todo, device, 1 if options.tiny else options.workers, deadline)
    left = tune(todo, device, options.out, deadline, lambda call: seconds(call, device))
    print(f"{left} jobs left; {path}")
    return 0


def compile_ahead(todo: list[Job], device: str, workers: int, deadline: float) -> None:
    """Compile what ``todo`` will try, in ``workers`` processes, for a third of the time at most. Kernels do not depend
    on the shape, so one job of each kind and number is enough."""
    first = list({(job.phase, job.kind, job.count): job for job in reversed(todo)}.values())
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    began = time.monotonic()
    futures = [pool.submit(compile_all, first[n::workers], device) for n in range(workers)]
    wait(futures, timeout=max(1.0, (deadline - began) / 3))
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"compiled ahead: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    assert gpu.__file__
    sys.exit(main())
