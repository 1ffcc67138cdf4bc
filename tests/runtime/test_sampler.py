"""The sampler against naive one-row arithmetic, its distribution, and its independence of the batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tuili import ops
from tuili.core.params import SamplingParams
from tuili.ops.sampling import cut_min_p, cut_top_k, cut_top_p
from tuili.runtime.rows import Row
from tuili.runtime.sampler import Sampled, choose_tokens, rank, read_logprobs, read_tokens, settings, uniform

VOCAB = 50


def row(tokens: list[int] | None = None, prompt_len: int = 0, **wishes: Any) -> Row:
    params = SamplingParams(**{"max_tokens": 100, **wishes})
    return Row(0, params, prompt_len, list(tokens or ()))


def sample(logits: torch.Tensor, rows: list[Row], positions: list[int]) -> Sampled:
    """One token per row, as a step on the CPU does it."""
    wishes = settings([row.params for row in rows], positions)
    return read_tokens(choose_tokens(logits, rows, positions, [torch.from_numpy(wish) for wish in wishes]), rows)


def adjust(scores: torch.Tensor, row: Row, position: int) -> None:
    for rule in row.rules:
        if rule.applies(row, position):
            rule.apply(scores, row, position)


def scores(seed: int = 0, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def nucleus(probs: np.ndarray, p: float) -> set[int]:
    """The smallest set of most likely ids whose mass reaches p, one id at a time."""
    chosen, mass = set[int](), 0.0
    for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if mass >= p:
            break
        chosen.add(i)
        mass += probs[i]
    return chosen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("vocab", [50, 700])
def test_top_p_is_the_naive_nucleus(seed: int, p: float, vocab: int) -> None:
    x = scores(seed, vocab=vocab)
    kept = cut_top_p(x, torch.tensor([p]))[0].isfinite().nonzero().flatten().tolist()
    assert set(kept) == nucleus(torch.softmax(x[0].double(), -1).numpy(), p)


def test_top_p_reaches_beyond_the_candidates() -> None:
    flat = torch.zeros(1, 1000) + torch.arange(1000) * -1e-4
    kept = cut_top_p(flat, torch.tensor([0.5]))[0].isfinite().sum().item()
    assert kept == len(nucleus(torch.softmax(flat[0].double(), -1).numpy(), 0.5)) > 400


def test_top_k_and_min_p() -> None:
    x = scores(3, rows=3)
    kept = cut_top_k(x, torch.tensor([1, 7, 0])).isfinite().sum(-1).tolist()
    assert kept == [1, 7, VOCAB]
    probs = torch.softmax(x, -1)
    kept_min = cut_min_p(x, torch.tensor([0.0, 0.2, 1.0])).isfinite()
    assert kept_min[0].all()
    assert torch.equal(kept_min[1], probs[1] >= 0.2 * probs[1].max())
    assert kept_min[2].sum() == 1


@pytest.mark.parametrize("wishes", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}])
def test_draws_follow_the_distribution(wishes: dict[str, Any]) -> None:
    """Chi-squared of 20,000 draws against the naive distribution; positions give independent uniforms."""
    vocab, n = 12, 20_000
    x = scores(1, vocab=vocab) / 2
    expected = x[0].double() / wishes.get("temperature", 1.0)
    probs = torch.softmax(expected, -1).numpy()
    if "top_k" in wishes:
        probs = np.where(probs >= np.sort(probs)[-wishes["top_k"]], probs, 0)
    if "top_p" in wishes:
        inside = nucleus(probs, wishes["top_p"])
        probs = np.array([p if i in inside else 0 for i, p in enumerate(probs)])
    if "min_p" in wishes:
        probs = np.where(probs >= wishes["min_p"] * probs.max(), probs, 0)
    probs = probs / probs.sum()
    params = SamplingParams(seed=7, **wishes)
    tokens, finite = ops.draw(x.expand(n, -1).contiguous(), *map(torch.from_numpy, settings([params] * n, range(n))))
    assert finite.all()
    counts = np.bincount(tokens.numpy(), minlength=vocab)
    assert (counts[probs == 0] == 0).all()
    used = probs > 0
    chi = (((counts - n * probs) ** 2)[used] / (n * probs[used])).sum()
    freedom = used.sum() - 1
    # Wilson-Hilferty: the 99.99th percentile of chi-squared.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi < limit


def test_a_row_does_not_depend_on_its_batch() -> None:
    x = scores(5, rows=40, vocab=300)
    rows = [
        row(temperature=t, top_p=p, top_k=k, min_p=m, seed=i, logprobs=3)
        for i, (t, p, k, m) in enumerate(
            [(0.0, 1.0, 0, 0.0), (1.0, 1.0, 0, 0.0), (0.7, 0.9, 0, 0.0), (1.3, 0.8, 20, 0.05)] * 10
        )
    ]
    together = sample(x, rows, [10 + i for i in range(40)])
    for i in range(40):
        alone = sample(x[i : i + 1], rows[i : i + 1], [10 + i])
        assert alone.tokens == together.tokens[i : i + 1]
        assert alone.logprobs == together.logprobs[i : i + 1]


def test_seeds_and_positions_decide() -> None:
    x = scores(2).expand(64, -1).contiguous() / 10
    first = sample(x, [row(seed=1)] * 64, list(range(64))).tokens
    assert first == sample(x, [row(seed=1)] * 64, list(range(64))).tokens
    assert first != sample(x, [row(seed=2)] * 64, list(range(64))).tokens
    assert len(set(first)) > 10


def test_uniform_is_uniform() -> None:
    u = uniform(np.repeat(np.arange(100), 100), np.tile(np.arange(100), 100))
    assert 0 <= u.min() < 0.001
    assert 0.999 < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.04


def test_greedy_is_argmax_and_ties_take_the_first() -> None:
    x = torch.zeros(2, 5)
    x[1, 3] = 1
    assert sample(x, [row(temperature=0.0), row(temperature=1e-6)], [0, 0]).tokens == [0, 3]


def test_penalties_against_naive() -> None:
    tokens, prompt_len = [1, 2, 2, 3, 4, 4, 4], 3
    x = scores(4)[0]
    wishes = {"repetition_penalty": 1.5, "frequency_penalty": 0.4, "presence_penalty": 0.3}
    got = x.clone()
    adjust(got, row(tokens, prompt_len, **wishes), len(tokens))
    for i in range(VOCAB):
        want = float(x[i])
        if i in tokens:
            want = want / 1.5 if want > 0 else want * 1.5
        count = tokens[prompt_len:].count(i)
        want -= 0.4 * count + 0.3 * (count > 0)
        assert float(got[i]) == pytest.approx(want, abs=1e-5)


def test_penalty_counts_are_incremental() -> None:
    r = row([1, 2], 1, frequency_penalty=1.0)
    adjust(torch.zeros(VOCAB), r, 2)
    r.tokens += [2, 5]
    got = torch.zeros(VOCAB)
    adjust(got, r, 4)
    assert (got[2], got[5], got[1]) == (-2, -1, 0)


def test_masks_and_biases() -> None:
    x = torch.zeros(VOCAB)
    got = x.clone()
    adjust(got, row(allowed_token_ids=[3, 4], logit_bias={4: 2.0, 9: 5.0}), 0)
    assert got.isfinite().nonzero().flatten().tolist() == [3, 4]
    assert got[4] == 2
    got = x.clone()
    adjust(got, row([7, 8], 1, bad_words_ids=((5,), (8, 6), (7, 9))), 2)
    assert (~got.isfinite()).nonzero().flatten().tolist() == [5, 6]
    got = x.clone()
    adjust(got, row([1], 1, min_tokens=2, eos_token_ids=(0,), stop_token_ids=(2,)), 2)
    assert (~got.isfinite()).nonzero().flatten().tolist() == [0, 2]
    got = x.clone()
    adjust(got, row([1, 1, 1], 1, min_tokens=2, eos_token_ids=(0,)), 3)
    assert got.isfinite().all()


def test_logprobs_are_of_the_raw_logits() -> None:
    x = scores(6, rows=2)
    rows = [row(temperature=0.0, logprobs=4, logit_bias={7: 100.0}), row(temperature=0.0, logprobs=-1)]
    out = sample(x, rows, [0, 0])
    first, second = out.logprobs
    assert out.tokens[0] == 7
    assert first is not None
    assert second is not None
    raw = torch.log_softmax(x.double(), -1)
    assert first.logprob == pytest.approx(float(raw[0, 7]), abs=1e-5)
    assert first.rank == 1 + int((raw[0] > raw[0, 7]).sum())
    assert [t for t, _ in first.top] == raw[0].topk(4).indices.tolist()
    assert len(second.top) == VOCAB
    assert sum(math.exp(v) for _, v in second.top) == pytest.approx(1, abs=1e-5)


def test_top_logprobs_counts_per_row() -> None:
    entries = read_logprobs(rank(scores(8, rows=3), torch.tensor([1, 2, 3]), 5), [0, 2, 5])
    assert [len(e.top) for e in entries] == [0, 2, 5]


def test_bad_logits_fail_their_row_only() -> None:
    x = scores(9, rows=3)
    x[1] = torch.nan
    out = sample(x, [row(logprobs=1), row(logprobs=1), row(temperature=0.0)], [0, 0, 0])
    assert out.tokens[1] is None
    assert out.tokens[0] is not None
    assert out.tokens[2] == int(x[2].argmax())
    everything_ruled_out = row(allowed_token_ids=[3], bad_words_ids=((3,),))
    assert sample(x[:1], [everything_ruled_out], [0]).tokens == [None]
