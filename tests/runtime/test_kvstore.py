"""The KV pool: zeros at first, one view per layer, blocks copied in order, and as large as resolve says."""

from __future__ import annotations

import pytest
import torch

from tuili import ops
from tuili.base.config import Config
from tuili.base.hardware import Hardware
from tuili.core.plan import BlockMove
from tuili.engine.resolve import resolve
from tuili.layers.kvspec import KVSpec, kv_specs
from tuili.layers.spec import ModelSpec, RopeSpec
from tuili.ops.attention import LARGEST
from tuili.ops.kvcache import cached_keys, cached_values
from tuili.runtime.attention.paged import OVER_CODES
from tuili.runtime.host import Host, Interpreter
from tuili.runtime.kvstore import CODES, KVStore

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]


def scaled(dtype: torch.dtype) -> bool:
    return dtype in CODES.values()


def layers(count: int, dim: int, dtype: torch.dtype) -> list[KVSpec]:
    """Of three heads."""
    names = {code: name for name, code in CODES.items()}
    return [KVSpec(3, dim, dim, names.get(dtype, str(dtype).removeprefix("torch.")))] * count


def parts(kv: KVStore, layer: int) -> tuple[torch.Tensor, ...]:
    return kv.layers[layer]


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_zero_then_moved_in_order(dtype: torch.dtype) -> None:
    kv = KVStore(layers(2, 16, dtype), 4, 8, Host())
    assert kv.nbytes == 2 * 2 * 4 * 8 * 3 * 16 * dtype.itemsize + (2 * 2 * 4 * 8 * 3 * 4 if scaled(dtype) else 0)
    for layer in range(2):
        for tensor in parts(kv, layer):
            assert not tensor.float().any()
            tensor[0] = layer + 1
    kv.move([BlockMove(0, 2), BlockMove(2, 3)])
    for layer in range(2):
        for tensor in parts(kv, layer):
            for block in (2, 3):
                assert (tensor[block].float() == layer + 1).all()
            assert not tensor[1].float().any()


#: The layouts of processors and of cards.
LAYOUTS = pytest.mark.parametrize("device", [Host(), Interpreter()], ids=["cpu", "card"])


def error(x: torch.Tensor, step: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far a rounded ``x`` may be off: half of what lies between neighbouring codes (E4M3: 3 bits of fraction)."""
    spacing = step if dtype == torch.int8 else torch.maximum(x.abs() / 8, step * 2**-9)
    return spacing * 0.500001


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block_size", "dim"), [(16, 64), (8, 24), (5, 7), (1, 2)])
def test_what_is_written_is_found(dtype: torch.dtype, block_size: int, dim: int, device: Host) -> None:
    """At any size of block and head, odd ones too; what is rounded is off by half a step at most."""
    kv = KVStore(layers(1, dim, dtype), 7, block_size, device)
    g = torch.Generator().manual_seed(dim)
    slots = torch.randperm(7 * block_size, generator=g)[:6]
    k, v = (torch.randn(6, 3, dim, generator=g) for _ in range(2))
    k[0] = 0
    if not scaled(dtype):
        k, v = k.to(dtype), v.to(dtype)
    (ops.table[OVER_CODES[dtype][0]] if scaled(dtype) else ops.write_kv)(k, v, *parts(kv, 0), slots)
    keys, values, *scales = parts(kv, 0)
    every = torch.arange(7)
    bits = torch.int8 if scaled(dtype) else dtype
    found = (
        cached_keys(keys.view(bits), every, dim).flatten(0, 1)[slots].view(dtype),
        cached_values(values.view(bits), every, block_size).flatten(0, 1)[slots].view(dtype),
    )
    if not scaled(dtype):
        assert torch.equal(found[0], k)
        assert torch.equal(found[1], v)
        return
    for x, codes, steps in zip((k, v), found, scales, strict=True):
        step = steps.transpose(1, 2).flatten(0, 1)[slots].unsqueeze(-1)
        assert torch.equal(step[..., 0], x.abs().amax(-1) / LARGEST[dtype])
        assert ((x - codes.float() * step).abs() <= error(x, step, dtype)).all()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "bfloat16 beside float32"])
@pytest.mark.parametrize(("block_size", "dim"), [(16, 64), (16, 80), (5, 7), (1, 2)])
def test_the_pool_takes_what_resolve_says(kind: str, block_size: int, dim: int) -> None:
    spec = ModelSpec("llama", 320, 64, 96, 3, 4, 2, dim, 256, RopeSpec(dim))
    dtype, cache = ("bfloat16", "int8") if kind == "int8" else (kind.split()[0], "auto")
    machine = Hardware("test", 2, frozenset({"avx2"} if "beside" in kind else {"amx_bf16"}), 1 << 30, 1 << 30)
    config = resolve(Config(dtype=dtype, kv_cache_dtype=cache, block_size=block_size), spec, machine)
    kept = {"float16": "float32"}.get(kind, kind.split()[0])  # no kernel reads a cache of float16 on a processor
    assert config.kv_cache_dtype == kept
    blocks = config.num_gpu_blocks_override
    assert blocks
    assert KVStore(kv_specs(spec, kept), blocks, block_size, Host()).nbytes == config.kv_cache_memory_bytes
