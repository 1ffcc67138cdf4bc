"""``tuili bench machine|monitor``, ``tuili plan``: options, clean JSON, files and exit codes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tuili import LLM
from tuili.base import hardware, limits
from tuili.bench import machine
from tuili.bench.compile import WAYS
from tuili.engine.device import no_compiler
from tuili.layers.linear import Matrix
from tuili.models.checkpoint import open_checkpoint
from tuili.models.shards import weight_files
from tuili.ops import cpu

if TYPE_CHECKING:
    from conftest import Invoke
    from tiny_models import Tiny


def test_machine(tuili: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "machine.json"
    words = ("bench", "machine", "--threads", "1,2", "--seconds", "0.001", "--largest-mib", 8, "--save-result", file)
    result = tuili(*words, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(file.read_text())
    found = limits.load(file, threads=1)
    assert found.memory_bandwidth > 1e7
    assert set(found.peaks) == {"float32", "bfloat16", "int8", "int4"}
    assert all(rate > 1e8 for rate in found.peaks.values())
    table = tuili(*words, env={"COLUMNS": "150"}).stdout
    for part in ("read 8 MiB", "write", "copy", "bfloat16 (torch.mm)", "1 thread", "2 threads"):
        assert part in table


@pytest.mark.skipif(sys.platform != "linux", reason="the monitor reads /proc")
def test_monitor_of_a_command(tuili: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    words = ("bench", "monitor", "--output", file, "--interval", "0.05", "--")
    result = tuili(*words, sys.executable, "-c", "import sys, time; time.sleep(0.3); sys.exit(3)")
    assert result.exit_code == 3, result.output
    assert "peak memory" in result.stderr
    assert len(file.read_text().splitlines()) >= 3
    missing = tuili(*words, "no-such-command-of-ours")
    assert "cannot run 'no-such-command-of-ours'" in str(missing.exception)


def test_throughput_and_latency_are_monitored(tuili: Invoke, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    words = ("--model", tiny("llama"), "--threads", 1, "--json", "--monitor", file)
    result = tuili("bench", "latency", *words, "--num-iters", 1, "--input-len", 4, "--output-len", 4)
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text().splitlines()[-1])["process"]["rss"] > 1 << 20
    file.unlink()
    sizes = ("--num-prompts", 2, "--max-len", 64, "--concurrency", 1, "--repeats", 1)
    assert tuili("bench", "throughput", *words, *sizes).exit_code == 0
    assert json.loads(file.read_text().splitlines()[0])["kind"] == "monitor"


def test_plan_memory(tuili: Invoke, tiny: Tiny) -> None:
    path = tiny("gemma2")
    words = ("plan", "memory", path, "--context", 100, "--concurrency", 3)
    result = tuili(*words, "--dtype", "float32,int4", "--kv-cache-dtype", "bfloat16", "--json")
    assert result.exit_code == 0, result.output
    plain, coded = json.loads(result.stdout)["plans"]
    # 100 positions are 7 blocks of 16; 4 layers, K and V of 2 heads of 32 in bfloat16; windows of 8 in two layers.
    assert (plain["kv_request"], plain["kv"]) == (7 * 16 * 4 * 2 * 2 * 32 * 2, 3 * plain["kv_request"])
    assert plain["kv_window"] == (8 + 100 + 8 + 100) * 2 * 2 * 32 * 2
    assert plain["total"] == plain["weights"] + plain["kv"] + plain["activations"]
    assert coded["weights"] < plain["weights"] / 3
    assert plain["fits"]
    # The same from config.json alone.
    alone = tuili("plan", "memory", path / "config.json", "--dtype", "float32", "--context", 100, "--json")
    assert json.loads(alone.stdout)["plans"][0]["weights"] == plain["weights"]
    table = tuili(*words, env={"COLUMNS": "150"}).stdout
    for part in ("weights", "KV cache", "within its windows", "int4 g32", "most requests"):
        assert part in table


def test_plan_memory_on_a_card(tuili: Invoke, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's free memory is what there is, and what CUDA itself takes is counted."""
    card = replace(hardware.probe(), gpu="H200", gpu_memory=8 << 30, gpu_free=4 << 30)
    monkeypatch.setattr(hardware, "probe", lambda: card)
    plan = json.loads(tuili("plan", "memory", tiny("llama"), "--dtype", "bfloat16", "--json").stdout)["plans"][0]
    assert plan["available"] == 4 << 30
    assert plan["total"] == sum(plan[part] for part in ("weights", "kv", "activations", "graphs", "cuda"))
    assert plan["max_concurrency"] == (plan["available"] - plan["total"] + plan["kv"]) // plan["kv_request"]
    table = tuili("plan", "memory", tiny("llama"), env={"COLUMNS": "150"}).stdout
    assert "captured steps" in table
    assert "CUDA context" in table


def test_plan_memory_is_close_to_the_files(tuili: Invoke, tiny: Tiny) -> None:
    path = tiny("qwen3")
    got = json.loads(tuili("plan", "memory", path, "--dtype", "float32", "--json").stdout)["plans"][0]
    files = sum(file.stat().st_size for file in weight_files(open_checkpoint(path).path))
    assert abs(files - got["weights"]) < 8192  # the files' headers, and what whole tiles are padded by


@pytest.mark.parametrize("flags", ["avx2", "avx512_bf16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_plan_memory_is_what_is_allocated(
    tuili: Invoke, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, dtype: str, flags: str
) -> None:
    """Weights and KV, also where they are stored in another type than is computed in."""
    stored = dtype if "float" in dtype else "bfloat16"
    path = tiny("qwen2", dtype=stored)
    here = replace(hardware.probe(), gpu=None, isa=frozenset({flags}))
    monkeypatch.setattr(hardware, "probe", lambda: here)
    monkeypatch.setattr("tuili.engine.build.probe", lambda: here)
    words = ("--dtype", dtype, "--context", 64, "--concurrency", 3, "--json")
    plan = json.loads(tuili("plan", "memory", path, *words).stdout)["plans"][0]
    quantization = "none" if dtype == stored else dtype
    with LLM(str(path), quantization=quantization, device="cpu", max_model_len=64, max_num_seqs=3) as llm:
        runner = llm.engine.client.engine.executor.runner
        matrices = [m.stored.nbytes for m in runner.model.modules() if isinstance(m, Matrix) and m.stored]
        assert plan["weights"] == sum(matrices) + sum(p.nbytes for p in runner.model.parameters())
        assert plan["kv"] == runner.kv.nbytes == llm.engine.config.kv_cache_memory_bytes
        assert plan["kv_dtype"] == llm.engine.config.kv_cache_dtype
        if dtype != "float32" and flags == "avx2" and cpu.describe().built:
            assert llm.engine.config.activation_dtype == "float32"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("no/where/here",), "no directory or config.json"),
        (("embedded", "--dtype", "int5"), "unknown width 'int5'"),
        (("embedded", "--context", 10**9), "this model was made for"),
        (("embedded", "--kv-cache-dtype", "int3"), "unknown KV dtype"),
        (("embedded", "--dtype", "int4", "--group", 48), "48"),
    ],
)
def test_plan_memory_refuses(tuili: Invoke, words: tuple[object, ...], why: str) -> None:
    result = tuili("plan", "memory", *words)
    assert result.exit_code == 1
    assert why in str(result.exception)


def test_plan_decode_is_bandwidth_over_bytes(tuili: Invoke, tiny: Tiny, tmp_path: Path) -> None:
    words = ("plan", "decode", tiny("qwen3"), "--dtype", "bfloat16,int4", "--concurrency", "1,4", "--context", 50)
    result = tuili(*words, "--bandwidth", "0.5", "--peak", "1e6", "--json")
    assert result.exit_code == 0, result.output
    arms = json.loads(result.stdout)["arms"]
    assert [(arm["width"], arm["concurrency"]) for arm in arms] == [
        *(("bfloat16", 1), ("bfloat16", 4), ("int4 g32", 1), ("int4 g32", 4))
    ]
    for arm in arms:
        rate = arm["concurrency"] * 0.5e9 / (arm["weights"] + arm["kv"])
        assert (arm["bound"], arm["tokens_per_second"]) == ("memory", pytest.approx(rate))
    file = tmp_path / "machine.json"
    missing = tuili(*words, "--machine", file)
    assert "tuili bench machine" in str(missing.exception)
    reads = [{"threads": 1, "bytes": 1 << 20, "per_second": 2e9}]
    peaks = [{"threads": 1, "kind": kind, "per_second": 1.0} for kind in ("bfloat16", "int8")]
    origin = {"date": "2026-01-01", "machine": {"cpu": "x"}}
    file.write_text(json.dumps({"reads": reads, "peaks": peaks, "provenance": origin}))
    arm = json.loads(tuili(*words, "--machine", file, "--json").stdout)["arms"][1]
    assert (arm["bandwidth"], arm["bound"]) == (2e9, "compute")
    assert arm["tokens_per_second"] == pytest.approx(4 / arm["operations"])
    assert arm["peak"] == 1.0, "int4 was not measured then: that of int8"
    table = tuili(*words, "--machine", file, env={"COLUMNS": "120"}).stdout
    assert "tok/s predicted" in table
    assert "limits of x, 1 threads, measured 2026-01-01" in table


def test_plan_decode_without_measured_limits_measures(
    tuili: Invoke, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this machine, also where those that are kept are another's; and keeps nothing."""
    file = tmp_path / "machine.json"
    monkeypatch.setattr(limits, "PATH", file)
    monkeypatch.setattr(machine, "limits", partial(machine.limits, sizes=[1 << 20], seconds=0.001))
    words = ("plan", "decode", tiny("qwen3"), "--dtype", "bfloat16,int8,int4", "--concurrency", 1, "--threads", 1)
    reads = [{"threads": 1, "bytes": 1 << 20, "per_second": 2.0}]
    peaks = [{"threads": 1, "kind": kind, "per_second": 1.0} for kind in ("bfloat16", "int8")]
    kept = {"reads": reads, "peaks": peaks, "provenance": {"date": "2026-01-01", "machine": {"cpu": "another"}}}
    for text in (None, json.dumps(kept)):
        if text is not None:
            file.write_text(text)
        result = json.loads(tuili(*words, "--json").stdout)
        assert (result["limits"]["cpu"], result["limits"]["threads"]) == (hardware.probe().cpu, 1)
        assert all(arm["bandwidth"] > 1e7 and arm["peak"] > 1e8 for arm in result["arms"])
        assert file.exists() == (text is not None)
    kept["provenance"]["machine"]["cpu"] = hardware.probe().cpu
    file.write_text(json.dumps(kept))
    assert json.loads(tuili(*words, "--json").stdout)["limits"]["date"] == "2026-01-01"


def test_kernels_under_the_roofline(tuili: Invoke, tmp_path: Path) -> None:
    file, picture = tmp_path / "r.json", tmp_path / "r.png"
    words = ("bench", "kernels", "--size", "64x96", "--rows", "1,8", "--seconds", "0.001", "--cold-mib", 1)
    result = tuili(*words, "--threads", 1, "--save-result", file, "--json")
    assert result.exit_code == 0, result.output
    got = json.loads(result.stdout)
    assert got == json.loads(file.read_text())
    assert [(p["arm"], p["rows"]) for p in got["points"]] == [
        (arm, rows) for arm in ("f32", "bf16", "int8", "int4") for rows in (1, 8)
    ]
    first = got["points"][0]  # 96 x 64 floats, one row in and one out
    assert (first["bytes"], first["operations"]) == (4 * (96 * 64 + 64 + 96), 2 * 96 * 64)
    assert first["roof"] == pytest.approx(min(got["peaks"]["float32"], first["intensity"] * got["bandwidth"]))
    assert first["share"] == pytest.approx(first["operations"] / first["seconds"] / first["roof"])
    table = tuili(*words, env={"COLUMNS": "150"}).stdout
    assert "op/byte" in table
    assert "bound by" in table
    pytest.importorskip("matplotlib")
    assert tuili(*words, "--plot", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_decode_beside_its_prediction(tuili: Invoke, tiny: Tiny) -> None:
    words = ("bench", "decode", "--model", tiny("llama"), "--dtype", "float32", "--threads", 1, "--repeats", 1)
    result = tuili(*words, "--concurrency", "1,2", "--prompt", 4, "--output", 6, "--json")
    assert result.exit_code == 0, result.output
    for arm in json.loads(result.stdout)["arms"]:
        slower = max(arm["step_bytes"] / arm["bandwidth"], arm["operations"] / arm["peak"])
        assert arm["predicted"] == pytest.approx(arm["concurrency"] / slower)
        assert arm["ratio"] == pytest.approx(arm["tokens_per_second"] / arm["predicted"])


def test_a_random_checkpoint_runs(tuili: Invoke, tmp_path: Path) -> None:
    from tuili.bench.checkpoint import SCALED, write_random
    from tuili.plan.model import open_spec

    small = SCALED | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "torch_dtype": "float32"}
    folder = write_random(tmp_path / "m", small)
    assert open_spec(str(folder)).hidden_size == 64
    result = tuili("run", folder, "--prompt", "Hello", "--max-tokens", 3, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["usage"]["completion_tokens"] >= 1


def test_the_doctor_shows_measured_limits(tuili: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuili.cli import doctor

    file = tmp_path / "machine.json"
    monkeypatch.setattr(limits, "PATH", file)
    assert doctor.limits().found.startswith("not measured")
    file.write_text("{}")
    assert doctor.limits().verdict == doctor.WARN


@pytest.mark.skipif(not cpu.describe().built, reason=cpu.describe().why)
@pytest.mark.parametrize(("flag", "computed"), [("avx2", "float32"), ("avx512_bf16", "bfloat16")])
def test_the_doctor_says_storage_and_arithmetic(flag: str, computed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuili.cli import doctor

    here = replace(hardware.probe(), gpu=None, isa=frozenset({flag}))
    monkeypatch.setattr(hardware, "probe", lambda: here)
    said = f"weights bfloat16, computed in {computed} by the {cpu.describe().isa} kernels"
    assert said in doctor.backend().found


@pytest.mark.slow
@pytest.mark.skipif(bool(no_compiler()), reason=no_compiler())
def test_when_compiling_pays(tuili: Invoke, tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "compile.json"
    words = ("bench", "compile", "--model", tiny("llama"), "--input-len", 40, "--repeats", 2, "--threads", 1)
    result = tuili(*words, "--save-result", file, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads(file.read_text())
    assert [(step["kind"], step["tokens"]) for step in found["steps"]] == [("prefill", 40), ("decode", 1)]
    assert all(step[f"{way}_ms"] > 0 and len(step[f"{way}_all_ms"]) == 2 for step in found["steps"] for way in WAYS)
    assert all(seconds > 0 for seconds in found["startup"].values())
    assert found["provenance"]["config"]["compile"]
