"""When ``--compile`` pays: what it takes at the start, what a step gains by it, and after how many requests that is in.

One model, three ways to step it, which take turns: as the engine does by default (decode steps captured), eagerly, and
compiled. The gain is over the default.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tuili.base.config import Config
from tuili.bench.provenance import provenance
from tuili.bench.statistics import percentile
from tuili.core.params import SamplingParams
from tuili.core.plan import Chunk, StepPlan

if TYPE_CHECKING:
    from tuili.core.executor import Executor
    from tuili.layers.compiled import Compiled
    from tuili.layers.decoder import Decoder

WAYS = ("default", "eager", "compiled")


def compile_gain(
    config: Config, prompt: int, output: int, repeats: int, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Seconds to compile with an empty and with a filled cache; milliseconds of a step that decodes one request and of
    one that computes ``prompt`` tokens, each way; and after how much work compiling is paid for.

    A request is ``prompt`` tokens in and ``output`` out, alone. ConfigError where nothing can be compiled.
    """
    from torch._inductor.utils import fresh_cache

    from tuili.engine.build import load, open_executor, prepared
    from tuili.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(config.model, config.revision)
    blocks = -(-(prompt + 1) // config.block_size)
    small = config.with_(max_num_seqs=1, num_gpu_blocks_override=blocks, max_model_len=prompt + 1, compile=True)
    _, resolved, _ = prepared(small.with_(max_num_batched_tokens=prompt), checkpoint)
    plain = resolved.with_(compile=False)
    model = load(plain, checkpoint)
    executors = {"default": open_executor(plain, model)}
    eager = plain.with_(enforce_eager=True, max_cudagraph_capture_size=None)
    executors["eager"] = open_executor(eager, model)
    with fresh_cache():
        compiled, cold, warm = _compile(model)
        executors["compiled"] = open_executor(resolved, model)
        try:
            steps = _alternate(executors, compiled, prompt, repeats, tick)
        finally:
            for executor in executors.values():
                executor.close()
    return {
        "benchmark": "compile",
        "startup": {"empty_cache_s": cold, "filled_cache_s": warm},
        "steps": steps,
        "request": {"prompt": prompt, "output": output},
        "break_even": break_even(cold, steps, output),
        "provenance": provenance(config=resolved),
    }


def _compile(model: Decoder) -> tuple[Compiled, float, float]:
    """The model compiled, and the seconds that took: with nothing in torch's cache, and with what that left there."""
    import torch

    from tuili.layers.compiled import Compiled

    cold = Compiled(model)
    cold.off()
    torch._dynamo.reset()
    warm = Compiled(model)
    return warm, cold.seconds, warm.seconds


def _alternate(
    executors: dict[str, Executor], compiled: Compiled, prompt: int, repeats: int, tick: Callable[[], None]
) -> list[dict[str, Any]]:
    """Milliseconds of each kind of step, each way in turn; the first round warms up. Of all times the lower quartile:
    what else the machine does only adds to them."""
    times: dict[tuple[str, str], list[float]] = {}
    blocks = executors["default"].capacity.num_blocks
    plans = {"prefill": _step(0, prompt, tuple(range(blocks))), "decode": _step(prompt, 1)}
    for repeat in range(repeats + 1):
        for way, executor in executors.items():
            (compiled.on if way == "compiled" else compiled.off)()
            for kind, plan in plans.items():  # the prompt first: the next token needs its keys and values
                began = time.perf_counter()
                executor.execute(plan).result()
                if repeat:
                    times.setdefault((kind, way), []).append(time.perf_counter() - began)
        tick()
    return [
        {"kind": kind, "tokens": plans[kind].num_tokens}
        | {f"{way}_ms": 1000 * percentile(times[kind, way], 25) for way in WAYS}
        | {f"{way}_all_ms": [1000 * t for t in times[kind, way]] for way in WAYS}
        for kind in plans
    ]


def _step(start: int, count: int, new_blocks: tuple[int, ...] = ()) -> StepPlan:
    """``count`` tokens of one request from ``start`` on. To compute a step a second time changes nothing."""
    greedy = SamplingParams(temperature=0.0)
    return StepPlan(0, (Chunk("one", start, count, (0,) * count, 0, True, new_blocks, greedy, start or count),))


def break_even(startup: float, steps: list[dict[str, Any]], output: int) -> dict[str, float | None]:
    """After how many requests (a prompt's step and ``output`` decode steps), or decoded tokens, ``startup`` seconds of
    compiling are won back; None: never."""
    gains = {step["kind"]: (step["default_ms"] - step["compiled_ms"]) / 1000 for step in steps}
    request = gains["prefill"] + output * gains["decode"]
    return {
        "request_gain_ms": 1000 * request,
        "requests": startup / request if request > 0 else None,
        "decode_tokens": startup / gains["decode"] if gains["decode"] > 0 else None,
    }
