"""The arithmetic of the roofline and of decode predictions (INVENTORY row 15), by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuili.base import limits
from tuili.base.errors import ConfigError
from tuili.layers.spec import ModelSpec, RopeSpec
from tuili.plan.memory import Kept
from tuili.plan.roofline import decode_step, peak_kind
from tuili.quant.scheme import SCHEMES, Scheme

#: 2 layers, hidden 8, inner 16, 2 heads of 4, 1 KV head, vocabulary 32, head tied.
#: Matrices of a layer: 16 x 8, 8 x 8, 32 x 8, 8 x 16 = 576; embedding 256; norms 5 x 8.
SPEC = ModelSpec("LlamaForCausalLM", 32, 8, 16, 2, 2, 1, 4, 64, RopeSpec(4), tied=True)


def machine(**fields: Any) -> dict[str, Any]:
    reads = [{"threads": t, "bytes": b, "per_second": v * t} for t in (1, 2) for b, v in ((1024, 100.0), (4096, 40.0))]
    peaks = [{"threads": t, "kind": "float32", "per_second": 7.0 * t, "how": "x"} for t in (1, 2)]
    origin = {"date": "2026-01-01", "machine": {"cpu": "x"}}
    return {"reads": reads, "peaks": [*peaks, {**peaks[1], "per_second": 3.0}], "provenance": origin, **fields}


def test_bytes_of_a_step_by_hand() -> None:
    step = decode_step(SPEC, ("bfloat16", None), [10, 20])
    assert step.weights == 2 * (2 * 576 + 256 + 5 * 8)
    assert step.kv == 2 * 2 * (1 * 4) * 2 * (10 + 20)  # K and V, layers, values, bytes, positions
    assert step.operations == 2 * 2 * (2 * 576 + 256)
    assert step.rate(1e6) == pytest.approx(2 * 1e6 / (step.weights + step.kv))
    assert step.rate(1e6, peak=1e3) == pytest.approx(2 * 1e3 / step.operations)
    with pytest.raises(ConfigError, match="positive"):
        step.rate(0)


def test_qwen3_at_75_gb_per_second() -> None:
    """specs/rivals.md: 63 tokens/s in bfloat16, 124 in int8 for Qwen3-0.6B's shape."""
    spec = ModelSpec(
        "Qwen3ForCausalLM", 151_936, 1024, 3072, 28, 16, 8, 128, 40960, RopeSpec(128), tied=True, qk_norm=True
    )
    assert decode_step(spec, ("bfloat16", None), [1]).rate(75e9) == pytest.approx(63, rel=0.01)
    assert decode_step(spec, ("bfloat16", SCHEMES["int8"]), [1]).rate(75e9) == pytest.approx(124, rel=0.02)
    everything = "bfloat16", Scheme("int4", 32)  # the head, too
    assert decode_step(spec, everything, [1]).rate(75e9) == pytest.approx(224, rel=0.02)


def test_kinds() -> None:
    kept: list[Kept] = [("float32", None), ("bfloat16", None), *(("bfloat16", SCHEMES[n]) for n in ("int8", "int4"))]
    assert [peak_kind(each) for each in kept] == ["float32", "bfloat16", "int8", "int4"]
    assert peak_kind(("bfloat16", SCHEMES["int8_weight_only"])) == "bfloat16"  # nothing is rounded to int8


def test_limits_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    with pytest.raises(ConfigError, match="tuili bench machine"):
        limits.load(path)
    path.write_text(json.dumps(machine()))
    both, one = limits.load(path), limits.load(path, threads=1)
    assert (both.threads, both.peaks["float32"], one.peaks["float32"]) == (2, 14.0, 7.0)
    assert [both.bandwidth(size) for size in (1, 1024, 2048, 4096, 1 << 30)] == pytest.approx([200, 200, 140, 80, 80])
    assert both.memory_bandwidth == 80
    with pytest.raises(ConfigError, match="threads=3"):
        limits.load(path, threads=3)
    path.write_text('{"reads": 7}')
    with pytest.raises(ConfigError, match="holds no measured limits"):
        limits.load(path)


def test_the_roof() -> None:
    assert limits.attainable(2.0, bandwidth=10.0, peak=100.0) == 20.0
    assert limits.attainable(20.0, bandwidth=10.0, peak=100.0) == 100.0
    assert [limits.bound(i, 10.0, 100.0) for i in (2.0, 10.0, 20.0)] == ["memory", "compute", "compute"]
