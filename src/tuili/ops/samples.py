"""Sample inputs of the ops: shapes that models use and shapes that break kernels (one row, odd sizes, both dtypes)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tuili.ops.kvcache import key_shape, value_shape
from tuili.ops.table import Sample

DTYPES = (torch.float32, torch.bfloat16)


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def each_dtype(
    name: str,
    make: Callable[[torch.Generator, torch.dtype], tuple[Any, ...]],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    **kwargs: Any,
) -> list[Sample]:
    """One sample per dtype; ``make(generator, dtype)`` returns the positional arguments."""

    def at(dtype: torch.dtype) -> Sample:
        return Sample(f"{name}-{str(dtype).removeprefix('torch.')}", lambda generator: (make(generator, dtype), kwargs))

    return [at(dtype) for dtype in dtypes]


def _matrix(g: torch.Generator, d: torch.dtype, rows: int, into: int, out: int) -> tuple[Any, ...]:
    return randn(g, rows, into, dtype=d), randn(g, out, into, dtype=d) / into**0.5


def linear() -> list[Sample]:
    shapes = ((1, 64, 96), (3, 64, 96), (8, 256, 768), (17, 37, 41), (129, 128, 64))
    plain = [
        sample
        for rows, into, out in shapes
        for sample in each_dtype(f"{rows}x{into}x{out}", partial(_matrix, rows=rows, into=into, out=out))
    ]
    return plain + each_dtype("bias", lambda g, d: (*_matrix(g, d, 5, 64, 32), randn(g, 32, dtype=d)))


def embedding() -> list[Sample]:
    return each_dtype("ids", lambda g, d: (randn(g, 100, 32, dtype=d), torch.randint(0, 100, (13,), generator=g)))


def rms_norm() -> list[Sample]:
    def args(g: torch.Generator, d: torch.dtype, rows: int, dim: int) -> tuple[Any, ...]:
        return randn(g, rows, dim, dtype=d), randn(g, dim, dtype=d), 1e-6

    return [
        sample
        for rows, dim in ((1, 64), (7, 256), (33, 37))
        for offset in (0.0, 1.0)
        for sample in each_dtype(f"{rows}x{dim}-offset{offset:g}", partial(args, rows=rows, dim=dim), offset=offset)
    ]


def add_rms_norm() -> list[Sample]:
    def args(g: torch.Generator, d: torch.dtype, rows: int, dim: int) -> tuple[Any, ...]:
        return randn(g, rows, dim, dtype=d), randn(g, rows, dim, dtype=d), randn(g, dim, dtype=d), 1e-6

    odd = each_dtype("odd", partial(args, rows=3, dim=37), offset=1.0)
    return each_dtype("5x96", partial(args, rows=5, dim=96)) + odd


def rotate() -> list[Sample]:
    def args(g: torch.Generator, dtype: torch.dtype, rotary: int, dim: int) -> tuple[Any, ...]:
        angle = torch.rand(5, rotary // 2, generator=g) * 6
        return randn(g, 5, 3, dim, dtype=dtype), angle.cos(), angle.sin()

    return each_dtype("full", lambda g, d: args(g, d, 64, 64)) + each_dtype("partial", lambda g, d: args(g, d, 24, 32))


def gated() -> list[Sample]:
    silu = each_dtype("silu", lambda g, d: (randn(g, 9, 128, dtype=d), "silu"))
    gelu = each_dtype("gelu_tanh", lambda g, d: (randn(g, 9, 128, dtype=d), "gelu_tanh"))
    return silu + gelu


def add() -> list[Sample]:
    return each_dtype("odd", lambda g, d: (randn(g, 7, 37, dtype=d), randn(g, 7, 37, dtype=d))) + each_dtype(
        "many", lambda g, d: (randn(g, 200, 257, dtype=d), randn(g, 200, 257, dtype=d))
    )


def scale() -> list[Sample]:
    return each_dtype("sqrt", lambda g, d: (randn(g, 5, 37, dtype=d), 37**0.5))


def softcap() -> list[Sample]:
    return each_dtype("cap30", lambda g, d: (randn(g, 4, 50, dtype=d) * 40, 30.0))


def paged(
    g: torch.Generator,
    dtype: torch.dtype,
    queries: list[int],
    contexts: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int = 16,
    int8: bool = False,
    kept: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """Arguments of paged attention over shuffled blocks: the ``queries[r]`` last positions of ``contexts[r]``; over
    caches of ``kept`` (None: ``dtype``)."""
    blocks = [-(-c // block_size) for c in contexts]
    pool = torch.randperm(sum(blocks) + 3, generator=g)
    table = torch.zeros(len(contexts), max(blocks), dtype=torch.long)
    used = 0
    for row, count in enumerate(blocks):
        table[row, :count] = pool[used : used + count]
        used += count
    kinds = (key_shape, value_shape)
    shapes = [shape(len(pool), block_size, kv_heads, dim, torch.int8 if int8 else kept or dtype) for shape in kinds]
    if int8:
        cache = [torch.randint(-127, 128, shape, generator=g, dtype=torch.int8) for shape in shapes]
        cache += [(0.1 + torch.rand(len(pool), kv_heads, block_size, generator=g)) / 100 for _ in shapes]
    else:
        cache = [randn(g, *shape, dtype=kept or dtype) for shape in shapes]
    start = torch.tensor([0, *queries]).cumsum(0)
    return randn(g, sum(queries), heads, dim, dtype=dtype), *cache, table, start, torch.tensor(contexts)


def each_cache(name: str, make: Callable[..., tuple[Any, ...]], int8: bool = False, **kwargs: Any) -> list[Sample]:
    """One sample per dtype, the caches of int8 or of the same dtype; and float32 beside caches of bfloat16."""
    plain = each_dtype(name, partial(make, int8=int8), **kwargs)
    if int8:
        return plain
    narrow = partial(make, kept=torch.bfloat16)
    return plain + each_dtype(f"{name}-bfloat16-kv", narrow, (torch.float32,), **kwargs)


def paged_attention(int8: bool = False) -> list[Sample]:
    cases: dict[str, tuple[list[int], list[int], int, int, int, dict[str, Any]]] = {
        "decode": ([1, 1, 1], [5, 33, 80], 4, 2, 64, {}),
        "prefill": ([40], [40], 4, 4, 32, {}),
        "mixed": ([1, 17, 1, 3], [70, 17, 16, 50], 6, 2, 32, {}),
        "window": ([1, 20], [90, 40], 4, 1, 32, {"window": 24}),
        "softcap": ([1, 20], [90, 40], 4, 1, 32, {"softcap": 20.0}),
    }
    return [
        sample
        for name, (queries, contexts, heads, kv_heads, dim, wishes) in cases.items()
        for sample in each_cache(
            name,
            partial(paged, queries=queries, contexts=contexts, heads=heads, kv_heads=kv_heads, dim=dim),
            int8,
            scale=dim**-0.5,
            **wishes,
        )
    ]


def paged_attention_int8() -> list[Sample]:
    return paged_attention(int8=True)


def causal_attention() -> list[Sample]:
    def qkv(g: torch.Generator, d: torch.dtype) -> tuple[Any, ...]:
        return randn(g, 2, 21, 4, 32, dtype=d), randn(g, 2, 21, 2, 32, dtype=d), randn(g, 2, 21, 2, 32, dtype=d)

    plain = each_dtype("plain", qkv, scale=32**-0.5)
    return plain + each_dtype("window-softcap", qkv, scale=32**-0.5, window=7, softcap=15.0)


def rotate_write_kv() -> list[Sample]:
    def args(g: torch.Generator, d: torch.dtype, rotary: int) -> tuple[Any, ...]:
        angle = torch.rand(5, rotary // 2, generator=g) * 6
        _, *cache, _, _, _ = paged(g, d, [1], [48], 2, 2, 32)
        new = [randn(g, 5, heads, 32, dtype=d) for heads in (6, 2, 2)]
        return *new, angle.cos(), angle.sin(), *cache, torch.randperm(48, generator=g)[:5]

    return [s for dim in (32, 24) for s in each_dtype(f"rotary{dim}", partial(args, rotary=dim))]


def write_kv(int8: bool = False) -> list[Sample]:
    def args(g: torch.Generator, d: torch.dtype, block_size: int, **cache_kind: Any) -> tuple[Any, ...]:
        new = [randn(g, 21, 2, 24, dtype=d) for _ in range(2)]
        _, *cache, _, _, _ = paged(g, d, [1], [3 * block_size], 2, 2, 24, block_size, **cache_kind)
        slots = torch.cat((torch.arange(5, 5 + 16), torch.randperm(5, generator=g)))
        return *new, *cache, slots

    return [
        sample
        for size in (16, 8, 5)
        for sample in each_cache(f"blocks of {size}", partial(args, block_size=size), int8)
    ]


def write_kv_int8() -> list[Sample]:
    return write_kv(int8=True)


def _as_fp8(samples: list[Sample]) -> list[Sample]:
    """With the codes of int8 caches as float8."""

    def change(g: torch.Generator, sample: Sample) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = sample.make(g)
        int8 = [isinstance(a, torch.Tensor) and a.dtype == torch.int8 for a in args]
        fp8 = torch.float8_e4m3fn
        return tuple(a.float().to(fp8) if codes else a for a, codes in zip(args, int8, strict=True)), kwargs

    return [Sample(sample.name, partial(change, sample=sample)) for sample in samples]


def paged_attention_fp8() -> list[Sample]:
    return _as_fp8(paged_attention_int8())


def write_kv_fp8() -> list[Sample]:
    return _as_fp8(write_kv_int8())
