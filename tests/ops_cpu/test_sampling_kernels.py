"""Argmax, draw and logprobs of the C++ library against naive arithmetic in float64, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from isas import ISAS

from tuili import ops
from tuili.ops import cpu

pytestmark = pytest.mark.skipif(not cpu.describe().built, reason=cpu.describe().why)

KERNELS = ops.kernels_of("cpu") if cpu.describe().built else ops.REFERENCE
VOCABS = [1, 2, 15, 17, 50, 511, 513, 1000, 4096, 9001]
DTYPES = [torch.float32, torch.bfloat16]
#: Exponentials in float32 move the border between two ids by less than this.
NEAR = 1e-6


@pytest.fixture(params=[f"{isa}-{threads}" for isa in ISAS for threads in (1, 2)], autouse=True)
def machine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each instruction set with one thread and with two."""
    isa, threads = request.param.split("-")
    cpu.use_isa(isa)
    cpu.set_threads(int(threads))
    yield
    cpu.use_isa("")
    cpu.set_threads(1)


def logits(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of all kinds: wide, flat, all equal, many ties, mostly ruled out, huge, tiny."""
    g = torch.Generator().manual_seed(seed * 1000 + vocab)
    x = torch.randn(rows, vocab, generator=g) * torch.tensor([3.0, 0.3, 0.0, 8.0])[torch.arange(rows) % 4].unsqueeze(1)
    x[1::5] = x[1::5].round()
    x[2::5] = torch.where(torch.rand(len(x[2::5]), vocab, generator=g) < 0.9, -torch.inf, x[2::5])
    x[2::5, vocab // 2] = 0.5
    x[3::7] *= 1e30
    x[4::7] -= 1e4
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_argmax_is_torch_s(vocab: int, dtype: torch.dtype) -> None:
    x = logits(40, vocab, dtype)
    ids, finite = KERNELS.argmax(x)
    assert torch.equal(ids, x.float().argmax(-1))
    assert finite.all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("vocab", [1, 17, 600, 4096])
def test_bad_rows_are_named_and_hurt_nobody(vocab: int, bad: float, dtype: torch.dtype) -> None:
    x = logits(9, vocab, dtype)
    good = KERNELS.argmax(x)[0]
    x[0, 0], x[4, vocab // 2], x[7, -1] = bad, bad, bad
    x[5] = -torch.inf
    ruined = torch.tensor([0, 4, 5, 7])
    wishes = (
        torch.ones(9),
        torch.zeros(9),
        torch.zeros(9, dtype=torch.long),
        torch.full((9,), 0.9),
        torch.rand(9).double(),
    )
    for ids, finite in (KERNELS.argmax(x), KERNELS.draw(x, *wishes)):
        assert (~finite).nonzero().flatten().tolist() == ruined.tolist()
        assert (ids[ruined] == 0).all()
        assert ((ids >= 0) & (ids < vocab)).all()
    kept = torch.tensor([i for i in range(9) if i not in ruined])
    assert torch.equal(KERNELS.argmax(x)[0][kept], good[kept])
    values, ranks, top, ids = KERNELS.logprobs(x, torch.zeros(9, dtype=torch.long), min(3, vocab))
    assert torch.isnan(values[ruined]).all()
    assert torch.isnan(top[ruined]).all()
    assert not torch.isnan(top[kept]).any()
    assert ((ids >= 0) & (ids < vocab) & (ranks >= 1).unsqueeze(1)).all()


def naive_draw(x: np.ndarray, temperature: float, min_p: float, top_k: int, top_p: float, u: float) -> int:
    """One row, in float64, sorted whole."""
    if temperature == 0:
        return int(x.argmax())
    with np.errstate(invalid="ignore"):
        scores = (x - x.max()).astype(np.float32) * (np.float32(1) / np.float32(temperature))
    keep = scores >= (math.log(min_p) if min_p else -math.inf)
    if 0 < top_k < len(x):
        keep &= scores >= np.sort(np.where(keep, scores, -np.inf))[-top_k]
    probs = np.where(keep, np.exp(scores.astype(np.float64)), 0)
    probs /= probs.sum()
    if top_p < 1:
        order = np.argsort(-probs, kind="stable")
        needed = int((probs[order].cumsum() < top_p).sum())
        probs = np.where(scores >= scores[order[min(needed, len(x) - 1)]], probs, 0)
    cumulative = probs.cumsum()
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


WISHES = [
    (1.0, 0.0, 0, 1.0),
    (0.01, 0.0, 0, 1.0),
    (1.9, 0.0, 0, 1.0),
    (1.0, 0.1, 0, 1.0),
    (1.0, 1.0, 0, 1.0),
    (1.0, 0.0, 1, 1.0),
    (1.0, 0.0, 40, 1.0),
    (0.7, 0.0, 0, 0.9),
    (1.9, 0.0, 0, 0.999),
    (1.3, 0.0, 0, 0.01),
    (0.8, 0.02, 30, 0.95),
    (1.0, 0.3, 5, 0.5),
    (0.0, 0.5, 3, 0.5),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_draws_are_the_naive_ones(vocab: int, dtype: torch.dtype) -> None:
    x = logits(3 * len(WISHES), vocab, dtype)
    wishes = WISHES * 3
    u = torch.rand(len(x), generator=torch.Generator().manual_seed(vocab), dtype=torch.float64)
    u[0], u[1] = 0.0, 1 - 2**-53
    columns = [torch.tensor(column) for column in zip(*wishes, strict=True)]
    ids, finite = KERNELS.draw(x, *columns, u)
    assert finite.all()
    for row, (t, m, k, p) in enumerate(wishes):
        scores, at = x[row].float().numpy(), float(u[row])
        p = float(np.float32(p))
        allowed = {
            naive_draw(scores, t, m, k, p + dp if p < 1 else p, min(max(at + du, 0.0), 1 - 2**-53))
            for dp in (-NEAR, 0.0, NEAR)
            for du in (-NEAR, 0.0, NEAR)
        }
        assert int(ids[row]) in allowed, f"row {row}: {wishes[row]}, u {at}"


def test_draws_equal_the_reference() -> None:
    """Token for token, at sizes of real vocabularies and all wishes."""
    for vocab in (4096, 32_000):
        x = logits(40, vocab, torch.bfloat16, seed=3)[[i for i in range(40) if i % 7 != 3]]
        wishes = [torch.tensor(c) for c in zip(*(WISHES[i % len(WISHES)] for i in range(len(x))), strict=True)]
        u = torch.rand(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        assert torch.equal(KERNELS.draw(x, *wishes, u)[0], ops.draw.reference(x, *wishes, u)[0])


def test_rows_do_not_see_their_batch_or_stride() -> None:
    wide = logits(len(WISHES) * 2, 4100, torch.bfloat16, seed=5)
    x = wide[:, 1:4097]
    wishes = [torch.tensor(c) for c in zip(*WISHES * 2, strict=True)]
    u = torch.rand(len(x), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens = torch.arange(len(x))
    whole = (*KERNELS.draw(x, *wishes, u), *KERNELS.logprobs(x, tokens, 7))
    for threads in (1, 2, 3):
        cpu.set_threads(threads)
        for i in range(len(x)):
            row = slice(i, i + 1)
            alone = (
                *KERNELS.draw(x[row], *(w[row] for w in wishes), u[row]),
                *KERNELS.logprobs(x[row], tokens[row], 7),
            )
            assert all(torch.equal(a, w[row]) for a, w in zip(alone, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("count", [0, 1, 5, 600, -1])
def test_logprobs_are_the_naive_ones(count: int, vocab: int, dtype: torch.dtype) -> None:
    x = logits(11, vocab, dtype)
    count = vocab if count < 0 else min(count, vocab)
    tokens = torch.randint(0, vocab, (len(x),), generator=torch.Generator().manual_seed(vocab))
    values, ranks, top, ids = KERNELS.logprobs(x, tokens, count)
    want = torch.log_softmax(x.double(), -1)
    for row, token in enumerate(tokens.tolist()):
        scores = x[row].float().numpy()
        assert int(ranks[row]) == 1 + int((scores > scores[token]).sum())
        assert ids[row].tolist() == np.argsort(-scores, kind="stable")[:count].tolist()
        assert torch.equal(values[row], top[row][ids[row] == token][0]) if token in ids[row] else True
    torch.testing.assert_close(values, want.gather(1, tokens.unsqueeze(1)).squeeze(1).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(top, want.gather(1, ids).float(), rtol=1e-6, atol=1e-6)


def test_other_dtypes_take_the_reference() -> None:
    x = logits(4, 50, torch.float32)[:1].half()
    assert torch.equal(KERNELS.argmax(x)[0], x.argmax(-1))
