"""The C++ kernels against their references: every sample, every instruction set of this machine, odd shapes, teams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from isas import EVERY, ISAS

from tuili import ops
from tuili.base.errors import ConfigError
from tuili.ops import cpu
from tuili.ops.cpu import library
from tuili.ops.cpu.contract import STORAGE
from tuili.ops.cpu.integer import by_tile, pack_int4, pack_int8
from tuili.ops.cpu.packed import shape
from tuili.ops.kvcache import cached_keys
from tuili.ops.samples import paged, randn

DTYPES = [torch.float32, torch.bfloat16]
#: Of activations, and of the weights that they are multiplied by; the caches that they attend over.
STORED = [(getattr(torch, dtype), getattr(torch, name)) for name, how in STORAGE.items() for dtype in how.dtypes]
KEPT = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
needs_library = pytest.mark.skipif(not cpu.describe().built, reason=cpu.describe().why)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.use_isa(request.param)
    yield request.param
    cpu.use_isa("")


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    cpu.set_threads(request.param)
    yield request.param
    cpu.set_threads(1)


def close(have: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, tolerance: float = 1e-5) -> None:
    assert have.shape == want.shape
    assert have.dtype == want.dtype
    assert torch.isfinite(have).all()
    scale = max(1.0, float(want.float().abs().max()))
    assert float((have.float() - want.float()).abs().max()) <= (tolerance if dtype == torch.float32 else 2**-7) * scale


# Packing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (16, 2), (17, 3), (41, 37), (96, 64), (1000, 129)], ids=str)
def test_packing_is_a_bijection(size: tuple[int, int], dtype: torch.dtype) -> None:
    weight = randn(generator(), *size, dtype=dtype)
    tiles = cpu.pack(weight)
    assert tuple(tiles.shape) == shape(*size, dtype)
    assert torch.equal(cpu.unpack(tiles, *size), weight)
    assert int((tiles != 0).sum()) == int((weight != 0).sum())  # the rest is padding, and zero


def test_arena_keeps_tensors_apart_and_alive() -> None:
    arena = cpu.Arena()
    tensors = [arena.empty((n, 3), torch.bfloat16).fill_(n) for n in (1, 7, 5000, 40_000_000 // 6, 2)]
    del arena
    for tensor, n in zip(tensors, (1, 7, 5000, 40_000_000 // 6, 2), strict=True):
        assert tensor.data_ptr() % 64 == 0
        assert float(tensor[0, 0]) == float(tensor[-1, -1]) == float(torch.tensor(n).bfloat16())


# Against the references -----------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize(
    ("entry", "sample"),
    [
        pytest.param(entry, sample, id=f"{entry.name}-{sample.name}")
        for entry in ops.table.values()
        if "cpu" in entry.implementations
        for sample in entry.samples()
    ],
)
def test_every_sample(entry: ops.Op, sample: ops.Sample, isa: str, threads: int) -> None:
    results = []
    for function in (entry.reference, entry.implementations["cpu"]):
        args, kwargs = sample.make(generator())
        out = function(*args, **kwargs)
        made = out if isinstance(out, tuple) else (out,)
        results.append([t for t in (*made, *args) if isinstance(t, torch.Tensor)])
    for want, have in zip(*results, strict=True):
        close(have, want, have.dtype, max(entry.tolerance, 1e-5))


SIZES = [(1, 1, 1), (2, 3, 17), (5, 33, 15), (7, 64, 65), (13, 127, 129), (31, 515, 50), (100, 96, 200)]


@needs_library
@pytest.mark.parametrize(("dtype", "stored"), STORED, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_of_odd_sizes_and_strides(
    size: tuple[int, int, int], dtype: torch.dtype, stored: torch.dtype, isa: str
) -> None:
    rows, inputs, outputs = size
    g = generator()
    wide = randn(g, rows, inputs + 5, dtype=dtype)
    x, weight = wide[:, 3 : 3 + inputs], randn(g, outputs, inputs, dtype=stored) / inputs**0.5
    bias = randn(g, outputs, dtype=dtype)
    kernels = ops.kernels_of("cpu")
    have = kernels.packed_linear(x, cpu.pack(weight), outputs, bias)
    close(have, ops.linear.reference(x, weight.to(dtype), bias), dtype)


@needs_library
@pytest.mark.parametrize(("dtype", "kept"), [*KEPT, *((dtype, torch.int8) for dtype in DTYPES)], ids=str)
@pytest.mark.parametrize("dim", [8, 24, 40, 64, 80, 128, 256])
@pytest.mark.parametrize("kind", [{}, {"window": 40}, {"softcap": 15.0}], ids=str)
def test_attention_of_every_head_size(
    kind: dict[str, Any], dim: int, dtype: torch.dtype, kept: torch.dtype, isa: str
) -> None:
    int8 = kept is torch.int8
    entry = ops.paged_attention_int8 if int8 else ops.paged_attention
    args = paged(generator(), dtype, [1, 70, 1, 5], [1300, 90, 3, 600], 6, 2, dim, int8=int8, kept=kept)
    have = entry.implementations["cpu"](*args, dim**-0.5, **kind)
    close(have, entry.reference(*args, dim**-0.5, **kind), dtype, entry.tolerance)


@needs_library
def test_a_cache_of_bfloat16_holds_the_rounded_numbers(isa: str) -> None:
    """Floats that are written there are rounded to nearest, ties to even; and attended over as the numbers that they
    became, which a cache of float32 holds as well."""
    kernels, calls = ops.kernels_of("cpu"), []
    q = randn(generator(3), 75, 6, 40)
    k, v = (randn(generator(seed), 160, 2, 40) for seed in (1, 2))
    k[:, :, :4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20])  # ties, and just above one
    rounded = k.bfloat16().float(), v.bfloat16().float()
    for kept, (keys, values) in {torch.bfloat16: (k, v), torch.float32: rounded}.items():
        _, *cache, table, start, lengths = paged(generator(), torch.float32, [1, 74], [70, 90], 6, 2, 40, kept=kept)
        for r, part in enumerate((slice(0, 70), slice(70, 160))):
            at = torch.arange(part.stop - part.start)
            slots = table[r][at // 16] * 16 + at % 16
            kernels.write_kv(keys[part], values[part], *cache, slots)
            assert torch.equal(cached_keys(cache[0], table[r], 40).flatten(0, 1)[at].float(), rounded[0][part])
        calls.append((q, *cache, table, start, lengths, 0.2))
    narrow, wide = calls
    close(kernels.paged_attention(*narrow), ops.paged_attention.reference(*wide), torch.float32, 1e-5)


@needs_library
@pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_blocks_of_any_size(dtype: torch.dtype, int8: bool, isa: str) -> None:
    """The block size is where keys lie, not what is computed: the same bits as from blocks of 16."""
    entry = ops.paged_attention_int8 if int8 else ops.paged_attention
    queries, contexts, dim = [1, 40, 5], [700, 90, 33], 32
    found = []
    for size in (16, 1, 5, 8, 32, 48):
        q, *cache, table, start, lengths = paged(generator(), dtype, queries, contexts, 4, 2, dim, size, int8)
        for r, context in enumerate(contexts):  # the same K and V, at other places
            g, at = generator(r), torch.arange(context)
            k, v = (randn(g, context, 2, dim, dtype=dtype) for _ in range(2))
            slots = table[r][at // size] * size + at % size
            (ops.write_kv_int8 if int8 else ops.write_kv)(k, v, *cache, slots)
        found.append(
            entry.implementations["cpu"](randn(generator(9), *q.shape, dtype=dtype), *cache, table, start, lengths, 0.2)
        )
    assert all(torch.equal(have, found[0]) for have in found)


@needs_library
def test_not_a_number_stays_in_its_row(isa: str) -> None:
    for entry in (ops.paged_attention, ops.paged_attention_int8):
        q, *rest = paged(generator(), torch.float32, [1, 5], [40, 90], 4, 2, 32, int8=entry is ops.paged_attention_int8)
        kernel = entry.implementations["cpu"]
        expected = kernel(q, *rest, 0.2)
        q[0] = torch.nan
        have = kernel(q, *rest, 0.2)
        assert torch.isnan(have[0]).all()
        assert torch.equal(have[1:], expected[1:])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_an_earlier_owner_left_is_not_read(dtype: torch.dtype, isa: str) -> None:
    """Not even not-a-number in the rest of a block reaches a request."""
    q, k, v, table, start, lengths = paged(generator(), dtype, [1, 5], [37, 90], 4, 2, 32)
    kernels = ops.kernels_of("cpu")
    expected = kernels.paged_attention(q, k, v, table, start, lengths, 0.2)
    for blocks, context in zip(table, (37, 90), strict=True):
        past = blocks[context // 16] * 16 + torch.arange(context % 16, 16)
        junk = torch.full((len(past), 2, 32), torch.nan, dtype=dtype)
        kernels.write_kv(junk, junk, k, v, past)
    assert torch.equal(kernels.paged_attention(q, k, v, table, start, lengths, 0.2), expected)


# Invariance, bit for bit ----------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize(("dtype", "stored"), STORED, ids=str)
@pytest.mark.parametrize("size", [(64, 96), (37, 41), (512, 200), (256, 1000), (1100, 33)], ids=str)
def test_linear_rows_do_not_see_their_batch(
    size: tuple[int, int], dtype: torch.dtype, stored: torch.dtype, isa: str
) -> None:
    g = generator()
    x, weight = randn(g, 300, size[0], dtype=dtype), cpu.pack(randn(g, size[1], size[0], dtype=stored))
    kernels = ops.kernels_of("cpu")
    whole = kernels.packed_linear(x, weight, size[1])
    for threads in (1, 2, 3):
        cpu.set_threads(threads)
        for count in (1, 2, 3, 5, 6, 7, 8, 12, 13, 64, 65, 300):
            for first in {0, 1, 300 - count} if count < 300 else {0}:
                part = slice(first, first + count)
                assert torch.equal(kernels.packed_linear(x[part], weight, size[1]), whole[part])
    cpu.set_threads(1)


def integer_arguments(op: str, inputs: int, outputs: int, group: int, zeros: bool) -> tuple[Any, ...]:
    g = generator(1)
    if op.startswith("int8"):
        codes = torch.randint(-127, 128, (outputs, inputs), generator=g, dtype=torch.int8)
        return pack_int8(codes), torch.rand(outputs, generator=g) / 999, outputs
    codes = torch.randint(0, 16, (outputs, inputs), generator=g, dtype=torch.uint8)
    scales = (torch.rand(outputs, -(-inputs // group), generator=g) / 99).half()
    points = by_tile(torch.randint(0, 16, scales.shape, generator=g, dtype=torch.uint8)) if zeros else None
    return pack_int4(codes, group), by_tile(scales), points, outputs, group


@needs_library
@pytest.mark.parametrize("op", ["int8_linear", "int4_linear", "int8_weight_linear", "int4_weight_linear"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1100, 200, 32), (1024, 64, 128), (100, 41, 64)], ids=str)
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
def test_integer_rows_do_not_see_their_batch(
    op: str, dtype: torch.dtype, shape: tuple[int, int, int], zeros: bool, isa: str
) -> None:
    """More rows than a panel serves, more inputs than one holds; and what is computed is what the reference means."""
    args = integer_arguments(op, *shape, zeros)
    x, bias = randn(generator(), 300, shape[0], dtype=dtype), randn(generator(2), shape[1], dtype=dtype)
    product = ops.table[op].implementations["cpu"]
    whole = product(x, *args, bias)
    close(whole, ops.table[op].reference(x, *args, bias), dtype)
    for threads in (1, 2):
        cpu.set_threads(threads)
        for count in (1, 2, 3, 4, 6, 7, 13, 64, 193):
            for part in (slice(0, count), slice(300 - count, 300)):
                assert torch.equal(product(x[part], *args, bias), whole[part])
    cpu.set_threads(1)


@needs_library
@pytest.mark.parametrize(
    ("dtype", "kept", "kind"),
    [(*pair, kind) for pair in KEPT for kind in ({}, {"window": 100}, {"softcap": 15.0})]
    + [(dtype, torch.int8, {"window": 100}) for dtype in DTYPES],
    ids=str,
)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)], ids=str)
def test_attention_does_not_see_chunks_batch_or_team(
    kind: dict[str, Any], heads: tuple[int, int], dtype: torch.dtype, kept: torch.dtype, isa: str
) -> None:
    contexts, int8 = [1100, 30, 513, 64], kept is torch.int8
    entry = ops.paged_attention_int8 if int8 else ops.paged_attention
    q, *cache, table, start, lengths = paged(generator(), dtype, contexts, contexts, *heads, 48, int8=int8, kept=kept)
    kernel = entry.implementations["cpu"]
    cpu.set_threads(2)
    whole = kernel(q, *cache, table, start, lengths, 0.15, **kind)
    for threads in (1, 3):
        cpu.set_threads(threads)
        for r, context in enumerate(contexts):
            for size in (1, 7, 64, 200):
                for end in sorted({size, context // 2, context - 1, context}):
                    if not size <= end <= context:
                        continue
                    rows = slice(int(start[r]) + end - size, int(start[r]) + end)
                    bounds, length = torch.tensor([0, size]), torch.tensor([end])
                    have = kernel(q[rows], *cache, table[r : r + 1], bounds, length, 0.15, **kind)
                    assert torch.equal(have, whole[rows]), f"request {r}, {size} queries to {end}"
    cpu.set_threads(1)


@pytest.mark.parametrize("isa", EVERY)
def test_what_this_machine_has_runs_all_cases(isa: str) -> None:
    """The others are skipped here, once."""
    if isa not in ISAS:
        with pytest.raises(ConfigError, match=isa):
            cpu.use_isa(isa)
        pytest.skip(f"the kernels for {isa} do not run here")


def test_describe_says_what_runs() -> None:
    about = cpu.describe()
    assert about.built == bool(about.isa)
    assert about.built or "torch computes" in about.why or "reinstall" in about.why
    if about.built:
        with pytest.raises(ConfigError, match="isa='sse'"):
            cpu.use_isa("sse")
    with pytest.raises(ConfigError, match="threads=0"):
        cpu.set_threads(0)


def test_the_library_of_a_checkout_is_current() -> None:
    """Where there is one, or else the tests of kernels would be skipped without a word."""
    assert cpu.describe().why == "" or "rebuild" not in cpu.describe().why, cpu.describe().why


def test_a_library_of_other_sources_is_not_used() -> None:
    found, why = library._load(Path(torch._C.__file__))
    assert found is None
    assert "rebuild it" in why


@needs_library
def test_the_machine_is_probed(isa: str) -> None:
    assert cpu.read_bandwidth(1 << 20, 0.02) > 1e8
    assert all(cpu.peak(kind, 0.02) > 1e8 for kind in ("float32", "bfloat16", "int8", "int4"))
    with pytest.raises(ConfigError, match="kind='int9'"):
        cpu.peak("int9")
