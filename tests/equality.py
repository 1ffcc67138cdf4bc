"""For the equality suites: small random models, a naive loop as the oracle, a driver for scheduler and executor."""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tuili import ops
from tuili.base.clock import WallClock
from tuili.core.executor import Executor
from tuili.core.params import SamplingParams
from tuili.core.plan import Chunk, StepPlan
from tuili.core.policies import policies
from tuili.core.request import FinishReason, Request, Update
from tuili.core.scheduler import Scheduler
from tuili.executors.local import LocalExecutor
from tuili.layers.build import Build
from tuili.layers.decoder import Decoder
from tuili.layers.spec import ModelSpec, RopeSpec
from tuili.ops import REFERENCE, Kernels, cpu
from tuili.quant.scheme import SCHEMES, Scheme
from tuili.runtime.attention.paged import PagedAttention
from tuili.runtime.batch import ForwardBatch, assemble
from tuili.runtime.device import Device
from tuili.runtime.host import Host

VOCAB, LONGEST, BLOCK = 97, 160, 8

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "max_model_len": LONGEST,
    "rope": RopeSpec(32),
}

#: What families differ in, as far as the engine can notice: head grouping, windows, caps, norms, partial rope, dtype.
SPECS: dict[str, tuple[ModelSpec, torch.dtype]] = {
    "llama-f32": (ModelSpec("llama", tied=True, **_SHAPE), torch.float32),
    "llama-bf16": (ModelSpec("llama", tied=True, **_SHAPE), torch.bfloat16),
    "qwen3-f32": (ModelSpec("qwen3", qk_norm=True, **{**_SHAPE, "num_kv_heads": 4}), torch.float32),
    "gemma-f32": (
        ModelSpec(
            "gemma",
            post_norms=True,
            norm_offset=1.0,
            embed_scale=8.0,
            attention_softcap=20.0,
            logit_softcap=30.0,
            activation="gelu_tanh",
            windows=(19, None),
            window_rope=RopeSpec(32, theta=500.0),
            **_SHAPE,
        ),
        torch.float32,
    ),
    "phi-bf16": (
        ModelSpec("phi", windows=(23, 23), qkv_bias=True, **{**_SHAPE, "num_kv_heads": 1, "rope": RopeSpec(24)}),
        torch.bfloat16,
    ),
}


#: Every spec on torch's references and, with these endings, on the C++ kernels with its weights packed for them: decode
#: steps captured, as they are by default, or eager.
KERNELS, EAGER = "+cpu", "+cpu+eager"
ON_KERNELS = [name + KERNELS for name in SPECS] if cpu.describe().built else []
EAGERLY = [name + EAGER for name in SPECS] if cpu.describe().built else []
#: The same with rounded weights, by ``--quantization``: on kernels where there are some.
ON_BEST = KERNELS if ON_KERNELS else ""
QUANTIZED = [f"llama-bf16{ON_BEST}+int8", f"gemma-f32{ON_BEST}+int4"]
WEIGHT_ONLY = [f"qwen3-f32{ON_BEST}+int8_weight_only", f"phi-bf16{ON_BEST}+int4_weight_only"]
#: And those that only torch's references multiply on a CPU.
WEIGHT_ONLY += [f"llama-bf16{ON_BEST}+fp8", "qwen3-f32+fp8_weight_only"]
#: The same over an int8 KV cache (``--kv-cache-dtype``): what a step writes is rounded before anybody reads it, so the
#: naive loop, whose whole sequence is one chunk, sees the same keys and values.
KV8 = "+kv8"
ON_INT8_KV = [f"llama-bf16{KERNELS if ON_KERNELS else ''}{KV8}", f"gemma-f32{KV8}"]
#: Weights that stay bfloat16, or float16, where activations are float32; K and V beside the former are bfloat16 too.
STORED = {"bf16": Scheme(dtype="bfloat16"), "f16": Scheme(dtype="float16")}
ON_BF16 = [f"llama-f32{ON_BEST}+bf16", "gemma-f32+bf16"]
ON_F16 = [f"qwen3-f32{ON_BEST}+f16"]
#: And over a float8 one, which torch's references write and read.
KV_FP8 = "+kvfp8"
ON_FP8_KV = [f"llama-bf16{KV_FP8}", f"gemma-f32{KV_FP8}"]


def kv_cache_dtype(name: str) -> str:
    kinds = {KV_FP8: "fp8", KV8: "int8", "+bf16": "bfloat16"}
    return next((kind for end, kind in kinds.items() if name.endswith(end)), "auto")


@functools.cache
def model(name: str, backend: str = "") -> Decoder:
    """A random model whose greedy text wanders (weights large enough that no token dominates), on the kernels that its
    name asks for, or those called ``backend``."""
    plain, *ways = name.split("+")
    spec, dtype = SPECS[plain]
    decoder = Decoder(spec, Build(ops.kernels_of(backend or ("cpu" if KERNELS in name else "reference"))))
    generator = torch.Generator().manual_seed(len(plain))
    for key, parameter in decoder.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (1 - spec.norm_offset + noise * 0.1) if "norm" in key else noise * 0.25
        parameter.requires_grad_(False)
    decoder = decoder.to(dtype).eval()
    decoder.prepare(LONGEST)
    if ways:
        decoder.store((SCHEMES | STORED).get(ways[-1], Scheme()))
    return decoder


@functools.cache
def naive(name: str, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Greedy text by computing the whole sequence anew for every token: no cache, no batch, no scheduler."""
    tokens = list(prompt)
    for _ in range(count):
        blocks = -(-len(tokens) // BLOCK)
        executor = LocalExecutor(model(name), Host(), **sizes(name, blocks, 1))
        params = SamplingParams(temperature=0.0)
        chunk = Chunk("naive", 0, len(tokens), tuple(tokens), 0, True, tuple(range(blocks)), params, len(prompt))
        tokens += executor.execute(StepPlan(0, (chunk,))).result().tokens["naive"]
    return tuple(tokens[len(prompt) :])


def load(requests: int, seed: int = 0) -> list[tuple[tuple[int, ...], int]]:
    """(prompt, output length) pairs, half of them with one of two shared beginnings."""
    rng = random.Random(seed)
    beginnings = [tuple(rng.randrange(VOCAB) for _ in range(n)) for n in (24, 41)]
    out = []
    for i in range(requests):
        own = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 40)))
        out.append(((beginnings[i // 2 % 2] if i % 2 else ()) + own, rng.randint(8, 26)))
    return out


def engine(
    name: str,
    *,
    budget: int,
    blocks: int,
    rows: int = 6,
    reuse: bool = True,
    policy: str = "fcfs",
    chunked: bool = True,
) -> tuple[Scheduler, LocalExecutor]:
    executor = LocalExecutor(model(name), Host(), **sizes(name, blocks, rows), enforce_eager=name.endswith(EAGER))
    return scheduler_for(executor, budget, rows, reuse, policy, chunked), executor


def device_engine(
    name: str,
    device: Device,
    capture_sizes: Sequence[int] = (),
    *,
    budget: int,
    blocks: int,
    rows: int = 6,
    backend: str = "",
    decoder: Any = None,
) -> tuple[Scheduler, LocalExecutor]:
    executor = LocalExecutor(
        decoder or model(name, backend),
        device,
        **sizes(name, blocks, rows),
        capture_sizes=capture_sizes,
    )
    return scheduler_for(executor, budget, rows), executor


def sizes(name: str, blocks: int, rows: int) -> dict[str, Any]:
    """An executor's."""
    lengths = {"num_blocks": blocks, "block_size": BLOCK, "max_model_len": LONGEST, "max_num_seqs": rows}
    return {**lengths, "kv_cache_dtype": kv_cache_dtype(name)}


def scheduler_for(
    executor: Executor, budget: int, rows: int, reuse: bool = True, policy: str = "fcfs", chunked: bool = True
) -> Scheduler:
    return Scheduler(
        executor.capacity,
        policies.get(policy)(),
        max_num_batched_tokens=budget,
        max_num_seqs=rows,
        enable_prefix_caching=reuse,
        enable_chunked_prefill=chunked,
        clock=WallClock(),
    )


def drive(scheduler: Scheduler, executor: Executor, depth: int = 1) -> list[Update]:
    """Run until nothing is left, with up to ``depth`` plans in flight."""
    updates: list[Update] = []
    flying: deque = deque()
    while scheduler.has_work:
        while len(flying) < depth and (plan := scheduler.schedule()) is not None:
            flying.append((plan, executor.execute(plan)))
        assert flying, "work is left and nothing can be scheduled"
        plan, future = flying.popleft()
        updates += scheduler.update(plan, future.result())
    return updates


def request(id: str, prompt: tuple[int, ...], priority: int = 0, **wishes: object) -> Request:
    params = SamplingParams(**{"temperature": 0.0, **wishes})  # type: ignore[arg-type]
    return Request(id, len(prompt), list(prompt), params, priority)


def outputs(updates: list[Update]) -> dict[str, tuple[int, ...]]:
    """Tokens by request; asserts law 7: exactly one final update each, and that it is not an error."""
    tokens: dict[str, list[int]] = {}
    finals: dict[str, FinishReason] = {}
    for update in updates:
        assert update.id not in finals, f"{update.id} said something after its end"
        tokens.setdefault(update.id, []).extend(update.tokens)
        if update.finish is not None:
            finals[update.id] = update.finish
            assert update.finish is not FinishReason.ERROR, update.error
    assert finals.keys() == tokens.keys()
    return {id: tuple(out) for id, out in tokens.items()}


def batch_of(
    starts: Sequence[int], counts: Sequence[int], table: np.ndarray, kernels: Kernels = REFERENCE
) -> ForwardBatch:
    """The batch of requests that compute ``counts[i]`` positions from ``starts[i]``; ``table`` [r, blocks] int64."""
    bounds = np.concatenate(([0], np.cumsum(counts)))
    places = (torch.from_numpy(np.asarray(part, np.int64)) for part in (range(len(starts)), starts, bounds))
    return assemble(*places, sum(counts), max(counts), torch.from_numpy(table), BLOCK, PagedAttention(kernels))
