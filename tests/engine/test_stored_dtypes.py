"""Checkpoints of 16 bits stay so where activations are float32, and answer as their numbers in float32 do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import Tiny, prompt

from tuili import LLM, SamplingParams
from tuili.base.hardware import probe
from tuili.layers.linear import Matrix
from tuili.layers.sizes import weight_bytes
from tuili.ops import cpu
from tuili.quant.scheme import scheme_of

pytestmark = pytest.mark.skipif(not cpu.describe().built, reason=cpu.describe().why)

PROMPTS = [prompt(40), prompt(9, seed=2), prompt(1, seed=3)]
Opened = Callable[..., LLM]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    """An engine as on a processor without instructions for bfloat16."""
    here = replace(probe(), gpu=None, isa=frozenset({"avx2", "fma", "f16c"}))
    monkeypatch.setattr("tuili.engine.build.probe", lambda: here)
    return lambda path, **options: LLM(str(path), max_model_len=64, **options)


def stored(llm: LLM) -> list[Any]:
    """Its matrices."""
    model = llm.engine.client.engine.executor.runner.model
    return [module.stored for module in model.modules() if isinstance(module, Matrix) and module.stored is not None]


def scores(llm: LLM) -> list[float]:
    """Logprobs of every token of the prompts, and of two that follow."""
    params = SamplingParams(max_tokens=2, temperature=0.0, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    found = []
    for out in llm.generate(PROMPTS, params, use_tqdm=False):
        for entry in [*(out.prompt_logprobs or []), *(out.outputs[0].logprobs or [])]:
            found += [value.logprob for value in (entry or {}).values()]
    return found


@pytest.mark.parametrize(
    ("dtype", "options", "bound"),
    [("float16", {}, 2e-5), ("bfloat16", {"kv_cache_dtype": "float32"}, 2e-5), ("bfloat16", {}, 0.04)],
    ids=["float16", "bfloat16", "bfloat16 and its KV"],
)
@pytest.mark.parametrize("case", ["qwen2", "gemma2"])
def test_half_of_the_bytes_and_the_same_answers(
    case: str,
    dtype: str,
    options: dict[str, Any],
    bound: float,
    tiny: Tiny,
    opened: Opened,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Weights are the same numbers in both arms: what differs is the order of sums, and what KV is rounded to (by
    bfloat16 no more than a whole model is, `test_oracle.py`)."""
    path: Path = tiny(case, dtype=dtype)
    with caplog.at_level(logging.INFO, "tuili"), opened(path, **options) as llm:
        kept = {"float16": "float32"}.get(dtype, options.get("kv_cache_dtype", dtype))
        said = f"weights {dtype}, computed in float32 by the {cpu.describe().isa} kernels; KV cache {kept}"
        assert said in caplog.messages
        config = llm.engine.config
        assert (config.dtype, config.activation_dtype) == (dtype, "float32")
        assert {str(tensor.dtype) for weight in stored(llm) for tensor in weight.tensors.values()} == {f"torch.{dtype}"}
        half, have = sum(weight.nbytes for weight in stored(llm)), scores(llm)
        model = llm.engine.client.engine.executor.runner.model
        every = half + sum(parameter.nbytes for parameter in model.parameters())
        assert weight_bytes(model.spec, "float32", scheme_of("none", None, dtype)) == every
    with opened(path, dtype="float32") as llm:
        assert sum(weight.nbytes for weight in stored(llm)) == 2 * half
        want = scores(llm)
    assert len(have) == len(want) == 50 - 3 + 6
    assert have == pytest.approx(want, abs=bound)


@pytest.mark.parametrize("quantization", ["int8", "int4_weight_only"])
def test_rounded_weights_do_not_depend_on_what_is_computed_in(quantization: str, tiny: Tiny, opened: Opened) -> None:
    """They are rounded from the checkpoint's own numbers."""
    with opened(tiny("qwen2", dtype="float16"), quantization=quantization) as llm:
        first = stored(llm)
    with opened(tiny("qwen2", dtype="float16"), quantization=quantization, dtype="bfloat16") as llm:
        for have, want in zip(stored(llm), first, strict=True):
            assert all((tensor == want.tensors[name]).all() for name, tensor in have.tensors.items())
