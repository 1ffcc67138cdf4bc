"""Law 5 on a device: with ``--deterministic`` (``triton_invariant``) greedy text equals a naive loop on that device.

In every width and kind of KV cache, whatever budget, pool, reuse, chunking, depth or capture. On the card where there
is one and ``TRITON_INTERPRET=0`` (`make gpu-check`); else interpreted, one small case. What the kernels say beside
torch's references is tested in ``runtime/test_device_triton.py``.
"""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
from equality import BLOCK, LONGEST, drive, load, model, outputs, request, scheduler_for

from tuili.core.params import SamplingParams
from tuili.core.plan import Chunk, StepPlan
from tuili.executors.local import LocalExecutor
from tuili.layers.decoder import Decoder
from tuili.ops import triton
from tuili.quant.scheme import SCHEMES
from tuili.runtime.device import Cuda, Device
from tuili.runtime.host import Interpreter

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
#: Model, width of its matrices and kind of KV cache.
Arm = tuple[str, str, str]
DETERMINISTIC = [
    ("llama-bf16", "none", "auto"),
    ("gemma-f32", "none", "auto"),
    ("phi-bf16", "none", "auto"),
    ("llama-bf16", "int8", "auto"),
    ("llama-bf16", "int8_weight_only", "int8"),
    ("llama-bf16", "int4_weight_only", "fp8"),
    ("llama-bf16", "fp8", "auto"),
]


@functools.cache
def device() -> Device:
    return Cuda() if ON_CARD else Interpreter()


@functools.cache
def decoder(name: str, width: str) -> Decoder:
    made = copy.deepcopy(model(name, triton.INVARIANT)).to(device().torch_device)
    made.prepare(LONGEST)
    if width != "none":
        made.store(SCHEMES[width])
    return made


def executor(arm: Arm, blocks: int, rows: int, captured: bool) -> LocalExecutor:
    name, width, kv = arm
    return LocalExecutor(
        decoder(name, width),
        device(),
        num_blocks=blocks,
        block_size=BLOCK,
        max_model_len=LONGEST,
        max_num_seqs=rows,
        capture_sizes=(1, 2, 4, 6) if captured else (),
        kv_cache_dtype=kv,
    )


@functools.cache
def naive(arm: Arm, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """As ``equality.naive``, on the device: all of the text anew for every token, alone."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        blocks = -(-len(tokens) // BLOCK)
        params = SamplingParams(temperature=0.0)
        chunk = Chunk("naive", 0, len(tokens), tuple(tokens), 0, True, tuple(range(blocks)), params, len(prompt))
        runs = executor(arm, blocks, 1, captured=False)
        tokens += runs.execute(StepPlan(0, (chunk,))).result().tokens["naive"]
    return tuple(tokens[len(prompt) :])


def ways() -> list[Any]:
    """On a card every way for the first arm, and some for the others."""
    if not ON_CARD:
        return [(DETERMINISTIC[0], SOME[0])]
    return [(arm, way) for n, arm in enumerate(DETERMINISTIC) for way in (SOME if n else EVERYTHING)]


@pytest.mark.parametrize(("arm", "way"), ways(), ids=str)
def test_deterministic_text_equals_the_naive_loop(arm: Arm, way: tuple[Any, ...]) -> None:
    budget, pool, reuse, chunked, depth, captured = way
    runs = executor(arm, POOLS[pool], 6, captured)
    scheduler = scheduler_for(runs, budget, 6, reuse, "fcfs", chunked)
    for i, (prompt, count) in enumerate(LOAD):
        scheduler.add(request(str(i), prompt, max_tokens=count))
    got = outputs(drive(scheduler, runs, depth))
    scheduler.check_integrity()
    for i, (prompt, count) in enumerate(LOAD):
        assert got[str(i)] == naive(arm, prompt, count), f"request {i}"
