"""Sample inputs of the ops: shapes that models use and shapes that break kernels (one row, odd sizes, both dtypes)."""

from __future__ import annotations

from collections.abc import Callable
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


def linear() -> list[Sample]:
    shapes = ((1, 64, 96), (3, 64, 96), (8, 256, 768), (17, 37, 41), (129, 128, 64))
    plain = [
        s
        for n, i, o in shapes
        for s in each_dtype(
            f"{n}x{i}x{o}",
            lambda g, d, n=n, i=i, o=o: (randn(g, n, i, dtype=d), randn(g, o, i, dtype=d) / i**0.5),
        )
    ]
    bias = each_dtype(
        "bias", lambda g, d: (randn(g, 5, 64, dtype=d), randn(g, 32, 64, dtype=d) / 8, randn(g, 32, dtype=d))
    )
    return plain + bias


def embedding() -> list[Sample]:
    return each_dtype("ids", lambda g, d: (randn(g, 100, 32, dtype=d), torch.randint(0, 100, (13,), generator=g)))


def rms_norm() -> list[Sample]:
    samples = []
    for n, d in ((1, 64), (7, 256), (33, 37)):
        for offset in (0.0, 1.0):
            samples += each_dtype(
                f"{n}x{d}-offset{offset:g}",
                lambda g, t, n=n, d=d: (randn(g, n, d, dtype=t), randn(g, d, dtype=t), 1e-6),
                offset=offset,
            )
    return samples


def rotate() -> list[Sample]:
    def args(g: torch.Generator, dtype: torch.dtype, rotary: int, dim: int) -> tuple[Any, ...]:
        angle = torch.rand(5, rotary // 2, generator=g) * 6
        return randn(g, 5, 3, dim, dtype=dtype), angle.cos(), angle.sin()

    return each_dtype("full", lambda g, d: args(g, d, 64, 64)) + each_dtype("partial", lambda g, d: args(g, d, 24, 32))


def gated() -> list[Sample]:
    silu = each_dtype("silu", lambda g, d: (randn(g, 9, 128, dtype=d), "silu"))
    gelu = each_dtype("gelu_tanh", lambda g, d: (randn(g, 9, 128, dtype=d), "gelu_tanh"))
    return silu + gelu


def softcap() -> list[Sample]:
    return each_dtype("cap30", lambda g, d: (randn(g, 4, 50, dtype=d) * 40, 30.0))


def paged(
    g: torch.Generator, dtype: torch.dtype, queries: list[int], contexts: list[int], heads: int, kv_heads: int, dim: int
) -> tuple[Any, ...]:
    """Arguments of paged attention over a shuffled pool of blocks of 16: ``queries[r]`` last positions of ``contexts[r]``."""
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
        s
        for name, (q, c, h, kv, dim, kw) in cases.items()
        for s in each_dtype(
            name, lambda g, d, q=q, c=c, h=h, kv=kv, dim=dim: paged(g, d, q, c, h, kv, dim), scale=dim**-0.5, **kw
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
