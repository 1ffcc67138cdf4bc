"""The op table's contract: every implementation equals its reference, and every reference obeys law 5 to the bit.

"Invariant" means: a row's result does not depend on which rows are beside it, on how a prompt was cut into chunks, on
where its blocks lie, or on how wide the block table is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tuili import ops
from tuili.ops import cpu, triton
from tuili.ops.kvcache import cached_keys, cached_values
from tuili.ops.samples import paged, randn

DTYPES = [torch.float32, torch.bfloat16]
SUBSETS = [1, 2, 3, 5, 8, 17, 64]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Every implementation against its reference ---------------------------------------------------------------------------


def slow(backend: str, sample: ops.Sample) -> bool:
    """Where Triton interprets, rows of thousands of ids take seconds."""
    return backend.startswith("triton") and triton.describe().interpreted and "33x4096" in sample.name


#: A kernel may serve several backends.
IMPLEMENTATIONS = [
    pytest.param(
        entry,
        backend,
        sample,
        id=f"{entry.name}-{backend}-{sample.name}",
        marks=[pytest.mark.slow] if slow(backend, sample) else [],
    )
    for entry in ops.table.values()
    for backend in {function: name for name, function in reversed(entry.implementations.items())}.values()
    for sample in entry.samples()
]


def results(function: Callable[..., Any], sample: ops.Sample) -> list[torch.Tensor]:
    """What ``function`` returns and what it leaves in its (possibly written) tensor arguments."""
    args, kwargs = sample.make(generator())
    out = function(*args, **kwargs)
    made = out if isinstance(out, tuple) else () if out is None else (out,)
    return [t for t in (*made, *args) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize(("entry", "backend", "sample"), IMPLEMENTATIONS)
def test_implementation_equals_reference(entry: ops.Op, backend: str, sample: ops.Sample) -> None:
    expected = results(entry.reference, sample)
    for found, meant in zip(results(entry.implementations[backend], sample), expected, strict=True):
        assert found.dtype == meant.dtype
        # Halves may round the last bit another way; the tolerance of the op is for float32.
        loose, have, want = 2**-7 if found.dtype.itemsize == 2 else 0.0, found.float(), meant.float()
        scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
        assert float((have - want).abs().max()) <= max(entry.tolerance, loose) * scale
        assert torch.isfinite(have).all()


FUSED = [entry for entry in ops.table.values() if entry.parts is not None]


@pytest.mark.parametrize("entry", FUSED, ids=lambda entry: entry.name)
def test_the_parts_of_a_fused_op_give_its_bits(entry: ops.Op) -> None:
    """On the references; and where the C++ kernels compute, which lack it, its parts are called."""
    for sample in entry.samples():
        parts = functools.partial(entry.parts, ops.REFERENCE)
        for have, want in zip(results(parts, sample), results(entry.reference, sample), strict=True):
            assert torch.equal(have, want), sample.name
    if cpu.describe().built:
        found = getattr(ops.kernels_of("cpu"), entry.name)
        assert found is entry.implementations["cpu"] if "cpu" in entry.implementations else found.func is entry.parts


def test_triton_is_among_the_implementations() -> None:
    if not triton.describe().usable:
        pytest.skip(triton.describe().why)
    for name in ("linear", "paged_attention", "write_kv", "rms_norm", "rotate", "gated", "embedding"):
        assert {triton.FAST, triton.INVARIANT} <= set(ops.table[name].implementations), name


def test_samples_cover_both_dtypes() -> None:
    for name, entry in ops.table.items():
        kinds = {sample.name.rsplit("-", 1)[-1] for sample in entry.samples()}
        assert kinds >= {"float32", "bfloat16"}, name


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Torch cuts work at other places with other thread counts, and kernels treat the ends of a piece differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


# Row-wise ops ---------------------------------------------------------------------------------------------------------


def row_ops(dtype: torch.dtype) -> dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]]:
    """Name to (function of rows, 300 rows of each of its arguments)."""
    g = generator(1)
    weights = {
        (i, o): randn(g, o, i, dtype=dtype) / i**0.5 for i, o in ((64, 96), (256, 768), (96, 64), (37, 41), (128, 1024))
    }
    table: dict[str, Any] = {
        f"linear-{i}x{o}": (lambda x, w=w: ops.linear(x, w), (randn(g, 300, i, dtype=dtype),))
        for (i, o), w in weights.items()
    }
    bias, norm = randn(g, 96, dtype=dtype), randn(g, 128, dtype=dtype)
    angle = torch.rand(300, 16, generator=g) * 6
    heads = randn(g, 300, 3, 48, dtype=dtype)
    return table | {
        "linear-bias": (lambda x: ops.linear(x, weights[64, 96], bias), (randn(g, 300, 64, dtype=dtype),)),
        "rms_norm": (lambda x: ops.rms_norm(x, norm, 1e-6, 1.0), (randn(g, 300, 128, dtype=dtype),)),
        "rms_norm-heads": (lambda x: ops.rms_norm(x, norm[:48], 1e-6), (heads,)),
        **{
            f"gated-{act}-{width}": (lambda x, act=act: ops.gated(x, act), (randn(g, 300, 2 * width, dtype=dtype) * 4,))
            for act in ("silu", "gelu_tanh", "gelu")
            for width in (37, 344, 1000)
        },
        "rotate": (ops.rotate, (heads, angle.cos(), angle.sin())),
        "softcap": (lambda x: ops.softcap(x, 30.0), (randn(g, 300, 101, dtype=dtype) * 40,)),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", row_ops(torch.float32))
def test_rows_do_not_see_their_batch(name: str, dtype: torch.dtype) -> None:
    check_rows(*row_ops(dtype)[name], SUBSETS)


#: Without linear-37x41: with three threads or more, torch's float32 matmul is not invariant where the input size is odd
#: (measured: 33, 37, 39, 41). No model has such a size.
THREADED = [name for name in row_ops(torch.float32) if name != "linear-37x41" and not name.endswith("-37")]


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("name", THREADED)
def test_rows_do_not_see_their_batch_with_threads(name: str) -> None:
    check_rows(*row_ops(torch.float32)[name], [1, 5, 64])


def check_rows(function: Callable[..., torch.Tensor], rows: tuple[torch.Tensor, ...], sizes: list[int]) -> None:
    whole = function(*rows)
    for size in sizes:
        for first in (0, 1, 7, 300 - size):
            at = slice(first, first + size)
            assert torch.equal(function(*(r[at] for r in rows)), whole[at]), f"{size} rows from {first}"
        scattered = torch.randperm(300, generator=generator(size))[:size]
        assert torch.equal(function(*(r[scattered] for r in rows)), whole[scattered]), f"{size} scattered rows"


# Attention ------------------------------------------------------------------------------------------------------------

SHAPES = [(4, 4, 16), (6, 2, 32), (5, 1, 24)]
KINDS: list[dict[str, Any]] = [{}, {"window": 24}, {"softcap": 15.0}, {"window": 70, "softcap": 8.0}]
CONTEXT = 300


def one_request(dtype: torch.dtype, shape: tuple[int, int, int]) -> tuple[Any, ...]:
    """A prompt of CONTEXT tokens, all of them queries."""
    return paged(generator(2), dtype, [CONTEXT], [CONTEXT], *shape)


def attend(args: tuple[Any, ...], first: int, last: int, **kind: Any) -> torch.Tensor:
    """Queries ``first .. last`` of the one request of ``args``."""
    q, k, v, table = args[:4]
    start, context = torch.tensor([0, last - first]), torch.tensor([last])
    return ops.paged_attention(q[first:last], k, v, table, start, context, q.shape[-1] ** -0.5, **kind)


def naive_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """One query at a time, float64: ``q`` [n, heads, dim] are the last positions of ``k``, ``v`` [c, kv_heads, dim]."""
    q, k, v = q.double(), k.double(), v.double()
    group, before = q.shape[1] // k.shape[1], len(k) - len(q)
    out = torch.empty_like(q)
    for i in range(len(q)):
        first = 0 if window is None else max(0, before + i + 1 - window)
        for head in range(q.shape[1]):
            scores = k[first : before + i + 1, head // group] @ q[i, head] * scale
            scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
            out[i, head] = scores.softmax(0) @ v[first : before + i + 1, head // group]
    return out


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_attention_equals_float64_softmax(dtype: torch.dtype, kind: dict[str, Any]) -> None:
    queries, contexts = [1, 17, 1, 3, 40, 1], [70, 17, 16, 50, 131, 1]
    q, k, v, table, start, lengths = paged(generator(3), dtype, queries, contexts, 6, 2, 32)
    out = ops.paged_attention(q, k, v, table, start, lengths, 32**-0.5, **kind)
    assert out.dtype == dtype
    for r, (blocks, context) in enumerate(zip(table, contexts, strict=True)):
        keys = cached_keys(k, blocks, 32).flatten(0, 1)[:context]
        values = cached_values(v, blocks, 16).flatten(0, 1)[:context]
        rows = slice(start[r], start[r + 1])
        expected = naive_attention(q[rows], keys, values, 32**-0.5, **kind)
        assert float((out[rows] - expected).abs().max()) <= (2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_attention_equals_float64_softmax(dtype: torch.dtype, kind: dict[str, Any]) -> None:
    g = generator(4)
    q, k, v = (randn(g, 2, 83, heads, 32, dtype=dtype) for heads in (4, 2, 2))
    out = ops.causal_attention(q, k, v, 32**-0.5, **kind)
    for b in range(2):
        expected = naive_attention(q[b], k[b], v[b], 32**-0.5, **kind)
        assert float((out[b] - expected).abs().max()) <= (2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
class TestPagedAttentionIsInvariant:
    def test_to_chunks_down_to_decode(
        self, dtype: torch.dtype, shape: tuple[int, int, int], kind: dict[str, Any]
    ) -> None:
        """A whole prefill, chunks of 7, 64 and 129, and decode row by row: the same bits."""
        args = one_request(dtype, shape)
        whole = attend(args, 0, CONTEXT, **kind)
        for size in (1, 7, 64, 129):
            pieces = [attend(args, a, min(a + size, CONTEXT), **kind) for a in range(0, CONTEXT, size)]
            wrong = (torch.cat(pieces) != whole).flatten(1).any(1).nonzero().flatten().tolist()
            assert not wrong, f"chunks of {size} differ at positions {wrong[:10]}"

    def test_to_the_batch(self, dtype: torch.dtype, shape: tuple[int, int, int], kind: dict[str, Any]) -> None:
        """Each request alone gives what it gives among others, whatever their lengths."""
        queries, contexts = [1, 17, 1, 3, 1, 90, 1], [70, 17, 16, 150, 299, 90, 1]
        q, k, v, table, start, lengths = paged(generator(5), dtype, queries, contexts, *shape)
        scale = shape[2] ** -0.5
        together = ops.paged_attention(q, k, v, table, start, lengths, scale, **kind)
        for r, count in enumerate(queries):
            rows = slice(start[r], start[r + 1])
            alone = torch.tensor([0, count])
            out = ops.paged_attention(q[rows], k, v, table[r : r + 1], alone, lengths[r : r + 1], scale, **kind)
            assert torch.equal(out, together[rows]), f"request {r}"

    def test_to_where_blocks_lie(self, dtype: torch.dtype, shape: tuple[int, int, int], kind: dict[str, Any]) -> None:
        """Blocks moved within the pool, and a table with more columns than the context needs."""
        q, k, v, table, start, lengths = paged(generator(6), dtype, [1, 40, 1], [130, 70, 33], *shape)
        scale = shape[2] ** -0.5
        expected = ops.paged_attention(q, k, v, table, start, lengths, scale, **kind)
        order = torch.randperm(len(k), generator=generator(7))
        where = torch.argsort(order)
        moved = ops.paged_attention(q, k[order], v[order], where[table], start, lengths, scale, **kind)
        assert torch.equal(moved, expected)
        for extra in (1, 5, 40):
            junk = torch.randint(0, len(k), (len(table), extra), generator=generator(extra))
            wide = torch.cat((table, junk), 1)
            assert torch.equal(ops.paged_attention(q, k, v, wide, start, lengths, scale, **kind), expected)

    def test_to_what_lies_past_the_context(
        self, dtype: torch.dtype, shape: tuple[int, int, int], kind: dict[str, Any]
    ) -> None:
        """Slots that are not written yet may hold anything that an earlier owner left, not-a-number too."""
        q, k, v, table, start, lengths = paged(generator(8), dtype, [1, 40, 1], [130, 70, 33], *shape)
        expected = ops.paged_attention(q, k, v, table, start, lengths, shape[2] ** -0.5, **kind)
        for blocks, context in zip(table, (130, 70, 33), strict=True):
            past = blocks[context // 16] * 16 + torch.arange(context % 16, 16)
            junk = torch.full((len(past), *shape[1:]), torch.nan, dtype=dtype)
            ops.write_kv(junk, junk, k, v, past)
        assert torch.equal(ops.paged_attention(q, k, v, table, start, lengths, shape[2] ** -0.5, **kind), expected)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("backend", sorted(ops.paged_attention.implementations))
def test_not_even_nan_left_by_an_earlier_owner_is_read(backend: str) -> None:
    """Neither in the rest of the last block nor where a shorter request is padded to a longer one's blocks."""
    contexts = [37, 90, 5]
    q, k, v, table, start, lengths = paged(generator(), torch.float32, [1, 5, 1], contexts, 4, 2, 32)
    kernels = ops.kernels_of(backend)
    expected = kernels.paged_attention(q, k, v, table, start, lengths, 0.2)
    for blocks, context in zip(table, contexts, strict=True):
        past = blocks[context // 16] * 16 + torch.arange(context % 16, 16)
        junk = torch.full((len(past), 2, 32), torch.nan)
        kernels.write_kv(junk, junk, k, v, past)
    assert torch.equal(kernels.paged_attention(q, k, v, table, start, lengths, 0.2), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_attention_is_invariant_to_chunks_and_threads(dtype: torch.dtype) -> None:
    args = one_request(dtype, (8, 2, 64))
    whole = attend(args, 0, CONTEXT)
    for size in (1, 129):
        pieces = [attend(args, a, min(a + size, CONTEXT)) for a in range(0, CONTEXT, size)]
        assert torch.equal(torch.cat(pieces), whole)
    torch.set_num_threads(1)
    assert torch.equal(attend(args, 0, CONTEXT), whole)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_equals_torch_in_float64(activation: str) -> None:
    """Also in more rows than one piece holds, for inputs of any size, and in its gradient."""
    gate = torch.linspace(-300, 300, 60 * 2001).view(60, 2001)
    a, b = (torch.cat((gate, torch.ones_like(gate)), 1).requires_grad_() for _ in range(2))
    have, (left, right) = ops.gated(a, activation), b.double().chunk(2, 1)
    want = ACTIVATIONS[activation](left) * right
    torch.testing.assert_close(have, want.float(), rtol=1e-6, atol=1e-6)
    have.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_use_chooses_a_backend_and_gives_it_back() -> None:
    from tuili.base.errors import ConfigError

    with pytest.raises(ConfigError, match="Did you mean 'reference'"):
        ops.kernels_of("referense")
    with pytest.raises(AttributeError, match="Did you mean 'linear'"):
        getattr(ops.REFERENCE, "liner")  # noqa: B009
