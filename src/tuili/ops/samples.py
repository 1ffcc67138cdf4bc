"""Sample inputs of the ops: shapes that models use and shapes that break kernels (one row, odd sizes, both dtypes)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tuili.ops.table import Sample

DTYPES = (torch.float32, torch.bfloat16)


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def each_dtype(
    name: str, make: Callable[[torch.Generator, torch.dtype], tuple[Any, ...]], **kwargs: Any
) -> list[Sample]:
    """One sample per dtype; ``make(generator, dtype)`` returns the positional arguments."""

    def at(dtype: torch.dtype) -> Sample:
        return Sample(f"{name}-{str(dtype).removeprefix('torch.')}", lambda generator: (make(generator, dtype), kwargs))

    return [at(dtype) for dtype in DTYPES]


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
    g: torch.Generator, dtype: torch.dtype, queries: list[int], contexts: list[int], heads: int, kv_heads: int, dim: int
) -> tuple[Any, ...]:
    """Arguments of paged attention over shuffled blocks of 16: the ``queries[r]`` last positions of ``contexts[r]``."""
    blocks = [-(-c // 16) for c in contexts]
    pool = torch.randperm(sum(blocks) + 3, generator=g)
    table = torch.zeros(len(contexts), max(blocks), dtype=torch.long)
    used = 0
    for row, count in enumerate(blocks):
        table[row, :count] = pool[used : used + count]
        used += count
    cache = [randn(g, len(pool), 16, kv_heads, dim, dtype=dtype) for _ in range(2)]
    start = torch.tensor([0, *queries]).cumsum(0)
    return randn(g, sum(queries), heads, dim, dtype=dtype), *cache, table, start, torch.tensor(contexts)


def paged_attention() -> list[Sample]:
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
        for sample in each_dtype(
            name,
            partial(paged, queries=queries, contexts=contexts, heads=heads, kv_heads=kv_heads, dim=dim),
            scale=dim**-0.5,
            **wishes,
        )
    ]


def causal_attention() -> list[Sample]:
    def qkv(g: torch.Generator, d: torch.dtype) -> tuple[Any, ...]:
        return randn(g, 2, 21, 4, 32, dtype=d), randn(g, 2, 21, 2, 32, dtype=d), randn(g, 2, 21, 2, 32, dtype=d)

    plain = each_dtype("plain", qkv, scale=32**-0.5)
    return plain + each_dtype("window-softcap", qkv, scale=32**-0.5, window=7, softcap=15.0)


def write_kv() -> list[Sample]:
    def args(g: torch.Generator, d: torch.dtype) -> tuple[Any, ...]:
        new = [randn(g, 5, 2, 32, dtype=d) for _ in range(2)]
        cache = [torch.zeros(4, 16, 2, 32, dtype=d) for _ in range(2)]
        return *new, *cache, torch.randperm(64, generator=g)[:5]

    return each_dtype("scatter", args)
