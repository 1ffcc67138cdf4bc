"""Every family against transformers: logits to 1e-4 in float32, 64 greedy tokens identical, halves within a bound."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from naive import Naive, greedy
from tiny_models import CASES, Tiny, max_model_len, prompt, reference_greedy, reference_logits

from tuili.layers.decoder import Decoder
from tuili.models.checkpoint import open_checkpoint
from tuili.models.weights import load_model


def load(path: Path, max_len: int = 256, dtype: str = "float32") -> Decoder:
    return load_model(open_checkpoint(path), dtype, max_len)


def difference(path: Path, model: Decoder, ids: list[int]) -> float:
    return float((Naive(model).feed(ids) - reference_logits(path, ids)).abs().max())


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tiny: Tiny) -> None:
    longest = max_model_len(case)
    model = load(tiny(case), longest)
    for length in (1, 9, 37, min(150, longest)):
        assert difference(tiny(case), model, prompt(length, length)) <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_64_greedy_tokens_equal_transformers(case: str, tiny: Tiny) -> None:
    """Prefilled whole and in chunks of 7; windows (8 and 30) are passed both in prefill and in decode."""
    model = load(tiny(case), max_model_len(case))
    ids = prompt(37)
    count = min(64, max_model_len(case) - len(ids))
    expected = reference_greedy(tiny(case), ids, count)
    assert len(set(expected)) > 8, "a flat model proves nothing"
    assert greedy(model, ids, count) == expected
    assert greedy(model, ids, count, chunk=7) == expected


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "llama3", "qwen3", "phi3"])
def test_chunks_do_not_change_a_bit(case: str, tiny: Tiny) -> None:
    model, ids = load(tiny(case)), prompt(90)
    whole = Naive(model).feed(ids)
    run = Naive(model)
    pieces = [run.feed(ids[a:b]) for a, b in ((0, 1), (1, 8), (8, 57), (57, 58), (58, 90))]
    assert torch.equal(torch.cat(pieces), whole)


def test_dynamic_rope_beyond_the_original_length(tiny: Tiny) -> None:
    """transformers stretches for the length at hand, we for max_model_len: equal where the two are the same."""
    path = tiny("llama-dynamic", max_position_embeddings=64)
    assert difference(path, load(path, 128), prompt(128)) <= 1e-4
    assert difference(path, load(path, 64), prompt(63)) <= 1e-4
    assert difference(path, load(path, 128), prompt(63)) > 1e-2


def test_longrope_beyond_the_original_length(tiny: Tiny) -> None:
    path = tiny("phi3-longrope")
    for length in (65, 150):
        assert difference(path, load(path, 256), prompt(length)) <= 1e-4
    # Short texts of an engine started for long ones use the long factors too, so that growing changes nothing.
    model, ids = load(path, 256), prompt(80)
    run = Naive(model)
    assert torch.equal(torch.cat([run.feed(ids[:60]), run.feed(ids[60:])]), Naive(model).feed(ids))


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.04), ("float16", 0.01)])
@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mistral"])
def test_halves_are_close(case: str, dtype: str, bound: float, tiny: Tiny) -> None:
    """Root mean square of the difference to transformers in the same dtype, over that of the logits."""
    path, ids = tiny(case, dtype=dtype), prompt(60)
    logits = Naive(load(path, dtype=dtype)).feed(ids)
    assert logits.dtype == getattr(torch, dtype)
    expected = reference_logits(path, ids, dtype)
    assert (logits.float() - expected).square().mean().sqrt() <= bound * expected.square().mean().sqrt()


def test_sharded_and_cast(tiny: Tiny) -> None:
    sharded = tiny("qwen2", shard="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    ids = prompt(20)
    assert torch.equal(Naive(load(sharded)).feed(ids), Naive(load(tiny("qwen2"))).feed(ids))
    half = load(tiny("qwen2"), dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
