"""Law 5 on a device, with Triton's kernels: greedy text equals a naive loop, token for token.

On the card where there is one and ``TRITON_INTERPRET=0`` (`make gpu-check`); else interpreted, a few small ones.
``--deterministic`` (the backend ``triton_invariant``) must hold in every width, held to a naive loop on the device; the
fast kernels round by the batch, so they are held to torch's references in float32, where that decides no token.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from equality import BLOCK, LONGEST, drive, load, model, naive, outputs, request

from tuili import ops
from tuili.base.clock import WallClock
from tuili.core.params import SamplingParams
from tuili.core.plan import Chunk, StepPlan
from tuili.core.policies import policies
from tuili.core.scheduler import Scheduler
from tuili.executors.device import DeviceExecutor
from tuili.layers.decoder import Decoder
from tuili.ops import triton
from tuili.quant.scheme import SCHEMES
from tuili.runtime.device import Cuda, Device
from tuili.runtime.host import Host

ON_CARD = triton.describe().usable and not triton.describe().interpreted
pytestmark = pytest.mark.skipif(not triton.describe().usable, reason=triton.describe().why)

#: Requests, and pools in blocks of 8: the tight one forces preemptions.
LOAD = load(7) if ON_CARD else [(prompt[:7], 3) for prompt, _ in load(2)]
POOLS = {"tight": 15 if ON_CARD else 3, "ample": 200}
#: Budget, pool, prefix reuse, chunked prefill, plans in flight, captured steps.
EVERYTHING = list(itertools.product((6, 19, 512), POOLS, (True, False), (True, False), (1, 2), (True, False)))
SOME = [
    (6, "tight", True, True, 2, True),
    (19, "ample", True, True, 2, False),
    (512, "tight", False, False, 1, True),
    (512, "ample", False, True, 2, True),
]
#: Model, width and kind of KV cache, on the invariant kernels.
DETERMINISTIC = [
    ("llama-bf16", "none", "auto"),
    ("gemma-f32", "none", "auto"),
    ("phi-bf16", "none", "auto"),
    ("llama-bf16", "int8", "auto"),
    ("llama-bf16", "int8_weight_only", "int8"),
    ("llama-bf16", "int4_weight_only", "fp8"),
    ("llama-bf16", "fp8", "auto"),
]
FAST = [(name, "none", "auto") for name in ("llama-f32", "qwen3-f32", "gemma-f32")]


@functools.cache
def device() -> Device:
    return Cuda() if ON_CARD else Host()


@functools.cache
def decoder(name: str, width: str, backend: str) -> Decoder:
    made = copy.deepcopy(model(name)).to(device().torch_device)
    made.prepare(LONGEST)
    if width != "none":
        with ops.use(backend):
            made.store(SCHEMES[width])
    return made


def executor(arm: tuple[str, str, str], backend: str, blocks: int, rows: int, captured: bool) -> DeviceExecutor:
    name, width, kv = arm
    return DeviceExecutor(
        decoder(name, width, backend),
        device(),
        num_blocks=blocks,
        block_size=BLOCK,
        max_model_len=LONGEST,
        max_num_seqs=rows,
        capture_sizes=(1, 2, 4, 6) if captured else (),
        kv_cache_dtype=kv,
    )


@functools.cache
def naive_there(arm: tuple[str, str, str], prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """As ``equality.naive``, on the device and the invariant kernels: all of the text anew for every token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        blocks = -(-len(tokens) // BLOCK)
        runs = executor(arm, triton.INVARIANT, blocks, 1, captured=False)
        params = SamplingParams(temperature=0.0)
        chunk = Chunk("naive", 0, len(tokens), tuple(tokens), 0, True, tuple(range(blocks)), params, len(prompt))
        tokens += runs.execute(StepPlan(0, (chunk,))).result().tokens["naive"]
    return tuple(tokens[len(prompt) :])


def text(arm: tuple[str, str, str], backend: str, way: tuple[Any, ...]) -> dict[str, tuple[int, ...]]:
    """What the requests of ``LOAD`` get, served together in one ``way`` (of ``EVERYTHING``)."""
    budget, pool, reuse, chunked, depth, captured = way
    runs = executor(arm, backend, POOLS[pool], 6, captured)
    scheduler = Scheduler(
        runs.capacity,
        policies.get("fcfs")(),
        max_num_batched_tokens=budget,
        max_num_seqs=6,
        enable_prefix_caching=reuse,
        enable_chunked_prefill=chunked,
        clock=WallClock(),
    )
    for i, (prompt, count) in enumerate(LOAD):
        scheduler.add(request(str(i), prompt, max_tokens=count))
    got = outputs(drive(scheduler, runs, depth))
    scheduler.check_integrity()
    return got


def check(
    arm: tuple[str, str, str], backend: str, way: tuple[Any, ...], oracle: Callable[..., tuple[int, ...]]
) -> None:
    with ops.use(backend):
        got = text(arm, backend, way)
    for i, (prompt, count) in enumerate(LOAD):
        assert got[str(i)] == oracle(prompt, count), f"request {i}"


def arms(several: list[tuple[str, str, str]], few: list[int]) -> list[Any]:
    """Every way for the first arm on a card, some for the others; interpreted, ``few`` of them, one way each."""
    if not ON_CARD:
        return [(several[n], SOME[n % len(SOME)]) for n in few]
    return [(arm, way) for n, arm in enumerate(several) for way in (SOME if n else EVERYTHING)]


@pytest.mark.parametrize(("arm", "way"), arms(DETERMINISTIC, [0]), ids=str)
def test_deterministic_text_equals_the_naive_loop_on_the_device(
    arm: tuple[str, str, str], way: tuple[Any, ...]
) -> None:
    def oracle(prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
        with ops.use(triton.INVARIANT):
            return naive_there(arm, prompt, count)

    check(arm, triton.INVARIANT, way, oracle)


@pytest.mark.parametrize(("arm", "way"), arms(FAST, [2]), ids=str)
def test_text_equals_the_references_naive_loop(arm: tuple[str, str, str], way: tuple[Any, ...]) -> None:
    check(arm, triton.FAST, way, functools.partial(naive, arm[0]))
