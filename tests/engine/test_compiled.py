"""``--compile``: the same numbers as op by op, two compilations per part, and none after the start."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from copy import deepcopy

import numpy as np
import pytest
import torch
from equality import BLOCK, LONGEST, batch_of, model
from tiny_models import prompt, reference_greedy
from torch._dynamo.utils import counters

from tuili.base.config import Config
from tuili.core.params import SamplingParams
from tuili.engine.build import build
from tuili.engine.device import no_compiler
from tuili.layers.compiled import ROWS, Compiled
from tuili.layers.decoder import Decoder
from tuili.layers.kvspec import kv_specs
from tuili.ops import cpu
from tuili.ops.triton import describe
from tuili.quant.scheme import SCHEMES
from tuili.runtime.host import Host
from tuili.runtime.kvstore import KVStore

pytestmark = pytest.mark.skipif(bool(no_compiler()), reason=no_compiler())
KERNELS = "+cpu" if cpu.describe().built else ""
#: Parts of a block: before attention, and after it.
PARTS = 2
STEPS = (1, 2, 3, 7, 8, 9, 33, 64)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No test finds what another one compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


@torch.inference_mode()
def logits(decoder: Decoder, rows: int) -> torch.Tensor:
    """Of a prompt of ``rows`` tokens."""
    spec = decoder.spec
    kv = KVStore(kv_specs(spec, str(decoder.dtype).removeprefix("torch.")), LONGEST // BLOCK, BLOCK, Host())
    batch = batch_of([0], [rows], np.arange(LONGEST // BLOCK)[None], decoder.kernels)
    ids = torch.arange(rows) * 7 % spec.vocab_size
    return decoder.logits(decoder.forward(decoder.embed(ids), batch, kv))


@pytest.mark.parametrize(
    "name",
    [
        f"llama-f32{KERNELS}",
        pytest.param("gemma-f32", marks=pytest.mark.slow),
        pytest.param("qwen3-f32", marks=pytest.mark.slow),
        pytest.param(f"gemma-f32{KERNELS}+int4", marks=pytest.mark.slow),
        pytest.param(f"qwen3-f32{KERNELS}+int8_weight_only", marks=pytest.mark.slow),
    ],
)
def test_compiled_it_computes_the_same_for_any_number_of_rows(name: str) -> None:
    """INVENTORY 149. What is stored by a scheme is an opaque call, what is not is dense torch code."""
    decoder = model(name)
    expected = {rows: logits(decoder, rows) for rows in STEPS}
    before = compilations()
    compiled = Compiled(decoder)
    try:
        assert compilations() - before == PARTS * len(ROWS), "blocks share what was compiled"
        for rows, want in expected.items():
            have = logits(decoder, rows)
            assert float((have - want).abs().max()) <= 1e-5 * max(1.0, float(want.abs().max()))
        assert compilations() - before == PARTS * len(ROWS), "a number of rows was compiled for"
    finally:
        compiled.off()
    for rows, want in expected.items():
        assert torch.equal(logits(decoder, rows), want), "op by op again"


@pytest.mark.slow
@pytest.mark.skipif(not describe().interpreted, reason=describe().why or "Triton is not interpreted")
@pytest.mark.parametrize("scheme", ["none", "int4_weight_only", "fp8"])
def test_compiled_around_the_kernels_of_a_card(scheme: str) -> None:
    """As on CUDA: dense matrices are compiled, packed ones are multiplied by the Triton kernels."""
    decoder = deepcopy(model("qwen3-f32", "triton"))
    decoder.store(SCHEMES[scheme])
    rows = (1, 9)
    expected = [logits(decoder, n) for n in rows]
    Compiled(decoder)
    for n, want in zip(rows, expected, strict=True):
        assert float((logits(decoder, n) - want).abs().max()) <= 1e-5 * max(1.0, float(want.abs().max()))


def test_an_engine_compiles_at_its_start_and_never_again(tiny, caplog) -> None:
    """Also in the thread that steps it, whatever the batches: and the text is transformers'."""
    prompts = [prompt(length, seed=length) for length in (3, 40, 17, 1)]
    small = {"threads": 1, "max_num_seqs": 4, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 64}
    with caplog.at_level("INFO", "tuili"):
        engine = build(Config(model=str(tiny("llama")), device="cpu", compile=True, **small))
    assert "compiled in" in caplog.text
    before = compilations()

    async def text(ids: list[int], name: str) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        return [id async for delta in engine.generate(ids, params, request_id=name) for id in delta.token_ids]

    async def everything() -> list[list[int]]:
        return await asyncio.gather(*(text(ids, str(i)) for i, ids in enumerate(prompts)))

    try:
        found = asyncio.run(everything())
    finally:
        engine.close()
    assert found == [reference_greedy(tiny("llama"), ids, 12) for ids in prompts]
    assert compilations() == before
