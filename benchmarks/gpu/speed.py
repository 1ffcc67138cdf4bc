"""Tuili's engine on a model with random weights: decode and prefill, and what the host adds to a step.

Entries hold tokens per second beside the bytes and operations that a step needs (``plan.roofline``); the report divides
by the card's measured limits.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu import shapes
from gpu.place import Entry, LeftOut, Place
from tuili import ops
from tuili.base.clock import WallClock
from tuili.core.params import SamplingParams
from tuili.core.policies import policies
from tuili.core.request import Request
from tuili.core.scheduler import Scheduler
from tuili.engine.engine import Engine
from tuili.executors.local import LocalExecutor
from tuili.layers.decoder import Decoder
from tuili.layers.sizes import kv_bytes_per_position, step_products, step_weight_bytes
from tuili.ops.triton import FAST
from tuili.plan.roofline import decode_step
from tuili.runtime.device import Cuda
from tuili.runtime.host import Interpreter

#: Positions of a KV block.
BLOCK = 16
#: Prompts are split into chunks of at most so many tokens.
BUDGET = 8192


@dataclass(frozen=True)
class Decode:
    """``requests`` at once, of ``prompt`` tokens, that say ``output`` tokens each."""

    requests: int
    prompt: int
    output: int

    @property
    def name(self) -> str:
        return f"decode {self.requests} x {self.prompt}+{self.output}"


def scenarios(tiny: bool) -> tuple[list[Decode], list[int], list[Decode]]:
    """What is measured, in the order of its weight: decode, prompts of a prefill, decode that costs long prefills."""
    if tiny:
        return [Decode(1, 6, 4), Decode(3, 6, 4)], [20], [Decode(2, 20, 4)]
    short = [Decode(n, 128, 128) for n in (1, 256, 8, 64)]
    return short, [8192, 2048], [Decode(256, 1024, 64), Decode(1, 8192, 64), Decode(32, 8192, 64)]


def run(place: Place, arm: shapes.Arm) -> None:
    """A model in a width: decode at short contexts, prefill, and what the host adds to a step."""
    short, prompts, _ = scenarios(place.tiny)
    bench = start(place, arm, short, prompts)
    if bench is None:
        return
    for work in short:
        place.attempt(work.name, lambda work=work: bench.decode(work))
    for prompt in prompts:
        place.attempt(f"prefill {prompt}", lambda prompt=prompt: bench.prefill(prompt))
    for work in short[:1] if place.tiny else short[:2]:
        place.attempt(f"device time of {work.name}", lambda work=work: bench.device_time(work))


def run_long(place: Place, arm: shapes.Arm) -> None:
    """Decode at long contexts, whose prefill is what takes the time."""
    _, _, long = scenarios(place.tiny)
    bench = start(place, arm, long, [])
    for work in long if bench else []:
        place.attempt(work.name, lambda work=work: bench.decode(work))


def start(place: Place, arm: shapes.Arm, works: list[Decode], prompts: list[int]) -> Bench | None:
    """The model and its engine; None, and noted, where that fails."""
    held: list[Bench] = []

    def make() -> Entry:
        held.append(Bench(arm, works, prompts, place))
        return held[0].about()

    place.entries.pop("start", None)  # a process that starts anew needs the model again
    place.attempt("start", make)
    return held[0] if held else None


class Bench:
    """A model, an engine at depth 2 on it, and what a step of it must move and compute."""

    def __init__(self, arm: shapes.Arm, works: list[Decode], prompts: list[int], place: Place):
        self.arm, self.place = arm, place
        self.spec = shapes.spec_of(arm.model, place.tiny)
        self.longest = max([*(w.prompt + w.output for w in works), *(p + 1 for p in prompts)])
        began = time.perf_counter()
        self.model = shapes.build(self.spec, arm.scheme, place.device, self.longest, ops.kernels_of(FAST))
        self.seconds = round(time.perf_counter() - began, 1)
        self.blocks = self._fitting(max(self.blocks_of(w) for w in works))
        self.rows = max(w.requests for w in works)
        sizes = sorted({w.requests for w in works})
        self.engine = engine_on(self.model, place.device, self.blocks, self.rows, self.longest, sizes)
        self.names = itertools.count()

    def about(self) -> Entry:
        held = sum(t.nbytes for t in tensors_of(self.model))
        return {"weights": held, "blocks": self.blocks, "build_seconds": self.seconds}

    def blocks_of(self, work: Decode) -> int:
        return work.requests * -(-(work.prompt + work.output) // BLOCK)

    def _fitting(self, wanted: int) -> int:
        """``wanted`` blocks, or as many as four fifths of the free memory hold."""
        if self.place.device != "cuda":
            return wanted
        torch.cuda.empty_cache()
        block = BLOCK * kv_bytes_per_position(self.spec, "bfloat16")
        return min(wanted, int(0.8 * torch.cuda.mem_get_info()[0]) // block)

    # What is measured

    def decode(self, work: Decode) -> Entry:
        """Tokens per second while all requests decode, and from the start of the first to the end of the last."""
        if self.blocks_of(work) > self.blocks:
            raise LeftOut(f"needs {self.blocks_of(work)} KV blocks, the card has room for {self.blocks}")
        if not self.place.tiny:  # compiles: with short prompts, since long ones take long
            self._generate(Decode(work.requests, min(work.prompt, 128), 4))
        steps = self._generate(work)
        rate, step_seconds = steady(steps, work)
        middle = work.prompt + work.output // 2
        step = decode_step(self.spec, ("bfloat16", self.arm.scheme), [middle] * work.requests)
        return {
            "requests": work.requests,
            "context": middle,
            "tokens_per_second": rate,
            "step_seconds": step_seconds,
            "whole_tokens_per_second": work.requests * work.output / (steps[-1][0] - steps[0][0]),
            "bytes": step.bytes,
            "operations": step.operations,
        }

    def prefill(self, prompt: int) -> Entry:
        """Prompt tokens per second: from the request to its first token, the best of three."""
        times = []
        for _ in range(1 if self.place.tiny else 4):
            steps = self._generate(Decode(1, prompt, 1))
            times.append(steps[-1][0] - steps[0][0])
        head = 2 * self.spec.vocab_size * self.spec.hidden_size
        pairs = prompt * (prompt + 1) / 2
        attention = 4 * pairs * self.spec.num_heads * self.spec.head_dim * self.spec.num_layers
        return {
            "tokens_per_second": prompt / min(times),
            "seconds_of_all": times,
            "operations": prompt * (step_products(self.spec) - head) + head + attention,
            "bytes": step_weight_bytes(self.spec, "bfloat16", self.arm.scheme, prompt),
        }

    def device_time(self, work: Decode) -> Entry:
        """What the kernels of a decode step take, by the profiler; beside the steps' own time at depth 2 and 1."""
        told: list[float] = []
        self.engine.listeners = [lambda plan, result, stats: told.append(stats.device_seconds)]
        steps = self._generate(work)
        self.engine.listeners, self.engine.depth = [], 1
        shallow = self._generate(work)
        self.engine.depth = 2
        return {
            "step_seconds": steady(steps, work)[1],
            "step_seconds_depth_1": steady(shallow, work)[1],
            "device_seconds": self._profiled(work),
            "device_seconds_by_events": statistics.median(told),
        }

    def _profiled(self, work: Decode) -> float | None:
        """Seconds per step in which the card computes; None where the profiler sees no card."""
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CUDA] if self.place.device == "cuda" else [ProfilerActivity.CPU]
        self._submit(work)
        engine = self.engine
        while engine.scheduler.num_waiting:
            engine.step()
        for _ in range(2):  # past prefill
            engine.step()
        self._synchronize()
        count = min(64, work.output // 2 - 1)
        with profile(activities=kinds) as watched:
            for _ in range(count):  # each launches one step and takes the result of the one before
                engine.step()
            self._synchronize()
        for _ in drain(engine):
            pass
        kernels = [e for e in watched.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(e.time_range.elapsed_us() for e in kernels)
        return busy / 1e6 / count if busy else None

    def _synchronize(self) -> None:
        if self.place.device == "cuda":
            torch.cuda.synchronize()

    def _submit(self, work: Decode) -> None:
        generator = torch.Generator().manual_seed(next(self.names))
        params = SamplingParams(temperature=0.0, max_tokens=work.output, ignore_eos=True)
        for _ in range(work.requests):
            prompt = torch.randint(0, self.spec.vocab_size, (work.prompt,), generator=generator).tolist()
            self.engine.add(Request(f"r{next(self.names)}", len(prompt), prompt, params))

    def _generate(self, work: Decode) -> list[Step]:
        """(time, tokens that came, requests that ended) of every step; the first is the start, with no tokens."""
        self._submit(work)
        steps: list[Step] = [(time.perf_counter(), 0, 0)]
        for updates in drain(self.engine):
            failed = [u.error for u in updates if u.error]
            if failed:
                raise RuntimeError(f"a request failed: {failed[0]}")
            steps.append(
                (time.perf_counter(), sum(len(u.tokens) for u in updates), sum(bool(u.finish) for u in updates))
            )
        return steps


Step = tuple[float, int, int]


def steady(steps: list[Step], work: Decode) -> tuple[float, float]:
    """Tokens per second, and seconds per step, from when every request has its first token to the first one's end."""
    full = [i for i, (_, tokens, ended) in enumerate(steps) if tokens == work.requests and not ended]
    # The first full step may still have prefilled beside: count from its end.
    first, last = full[0], full[-1]
    if last - first < 1:
        raise RuntimeError(f"{work.name}: the requests never decoded all together")
    elapsed = steps[last][0] - steps[first][0]
    return (last - first) * work.requests / elapsed, elapsed / (last - first)


def drain(engine: Engine) -> Any:
    """The updates of each step until nothing is left."""
    while engine.has_work:
        yield engine.step()


def tensors_of(model: Decoder) -> list[torch.Tensor]:
    """All weights, as they are stored."""
    stored = [t for m in model.modules() if getattr(m, "stored", None) is not None for t in m.stored.tensors.values()]
    return [*model.parameters(), *stored]


def engine_on(model: Decoder, device: str, blocks: int, rows: int, longest: int, sizes: Sequence[int]) -> Engine:
    """Two steps in flight, decode steps of ``sizes`` rows captured, no prefix reuse."""
    on = Cuda() if device == "cuda" else Interpreter()
    executor = LocalExecutor(
        model,
        on,
        num_blocks=blocks,
        block_size=BLOCK,
        max_model_len=longest,
        max_num_seqs=rows,
        capture_sizes=sizes,
    )
    clock = WallClock()
    scheduler = Scheduler(
        executor.capacity,
        policies.get("fcfs")(),
        max_num_batched_tokens=max(BUDGET, rows),
        max_num_seqs=rows,
        enable_prefix_caching=False,
        clock=clock,
    )
    return Engine(scheduler, executor, clock, depth=2)
