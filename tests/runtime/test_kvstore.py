"""The KV pool: zeros at first, one view per layer, blocks copied in order."""

from __future__ import annotations

import pytest
import torch

from tuili.core.plan import BlockMove
from tuili.runtime.kvstore import KVStore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_are_zero_then_moved_in_order(dtype: torch.dtype) -> None:
    kv = KVStore(2, 4, 8, 3, 16, dtype)
    assert kv.nbytes == 2 * 2 * 4 * 8 * 3 * 16 * dtype.itemsize
    assert not kv.keys.any()
    assert not kv.values.any()
    for layer in range(2):
        keys, values = kv.layer(layer)
        assert keys.shape == (4, 8, 3, 16)
        keys[0], values[0] = layer + 1, -layer - 1
    kv.move([BlockMove(0, 2), BlockMove(2, 3)])
    for layer in range(2):
        keys, values = kv.layer(layer)
        for block in (2, 3):
            assert (keys[block] == layer + 1).all()
            assert (values[block] == -layer - 1).all()
        assert not keys[1].any()
