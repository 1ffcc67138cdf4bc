"""Speed of the CPU kernels beside torch's own, alternating in one run so that a busy machine treats both alike.

    python benchmarks/kernels.py [--threads 2] [--repeats 7] [--only linear,attention] [--json FILE]

Each figure is the fastest of the repeats. GB/s counts weights (linear) or keys and values (attention) once; every call
of linear uses another matrix, so that they come from memory and not from a cache, as in a model's step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tuili import ops
from tuili.ops import cpu
from tuili.ops.cpu.store import round_int8
from tuili.ops.samples import paged
from tuili.quant.scheme import Scheme
from tuili.quant.weight import Weight

Arm = tuple[str, Callable[[], Any]]


def fastest(arms: list[Arm], repeats: int, calls: int) -> dict[str, float]:
    """Seconds per call of each arm: the best of ``repeats`` rounds, in each of which every arm has its turn.

    One thread alone is timed by the processor time it got, which a busy machine does not stretch.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = {name: float("inf") for name, _ in arms}
    for _ in range(repeats):
        for name, run in arms:
            began = clock()
            run()
            best[name] = min(best[name], (clock() - began) / calls)
    return best


def bandwidth(repeats: int) -> float:
    """Bytes per second that this machine reads now: a sum over 256 MiB by torch's threads."""
    data = torch.ones(64 << 20)
    return data.nbytes / fastest([("read", lambda: data.sum())], repeats, 1)["read"]


def linear_arms(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[list[Arm], int]:
    """The same products by torch, by oneDNN with its own packing, and by our kernel."""
    size = inputs * outputs * dtype.itemsize
    count = max(2, min(24, (96 << 20) // size)) if rows <= 32 else 2
    weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(count)]
    arena = cpu.Arena()
    tiles = [cpu.pack(w, arena.empty(cpu.packed_shape(outputs, inputs, dtype), dtype)) for w in weights]
    x = torch.randn(rows, inputs).to(dtype)
    mine = cpu.packed_linear.implementations["cpu"]
    arms: list[Arm] = [
        ("torch", lambda: [F.linear(x, w) for w in weights]),
        ("tuili", lambda: [mine(x, t, outputs) for t in tiles]),
    ]
    if dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        ready = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]
        product = torch.ops.mkldnn._linear_pointwise
        arms.append(("onednn", lambda: [product(x, w, None, "none", [], "") for w in ready]))
    return arms, count


def linear(args: argparse.Namespace) -> list[dict[str, Any]]:
    out = []
    for inputs, outputs in args.sizes:
        for dtype in (torch.bfloat16, torch.float32):
            for rows in args.rows:
                arms, count = linear_arms(rows, inputs, outputs, dtype)
                times = fastest(arms, args.repeats, count)
                name = f"linear {str(dtype).removeprefix('torch.')} {rows}x{inputs}x{outputs}"
                out.append(row(name, times, inputs * outputs * dtype.itemsize, 2 * rows * inputs * outputs))
    return out


def quantized_arms(rows: int, inputs: int, outputs: int, scheme: Scheme) -> tuple[list[Arm], int]:
    """Integer weights: torch's own weight-only product, and ours with int8 activations."""
    count = max(2, min(24, (64 << 20) // (inputs * outputs * (2 if scheme.format == "int8" else 1) // 2)))
    count = count if rows <= 32 else 2
    weights = [torch.randn(outputs, inputs) for _ in range(count)]
    arena = cpu.Arena()
    stored = [Weight.of(w.bfloat16(), scheme, arena) for w in weights]
    x = torch.randn(rows, inputs).bfloat16()
    arms: list[Arm] = [("tuili", lambda: [w.matmul(x) for w in stored])]
    if scheme.format == "int8":
        theirs = [(round_int8(w)[0], torch.rand(outputs).bfloat16()) for w in weights]
        arms.insert(0, ("torch", lambda: [torch._weight_int8pack_mm(x, w, s) for w, s in theirs]))
    else:
        codes = [torch.randint(0, 16, (outputs, inputs), dtype=torch.int32) for _ in weights]
        packed = [torch._convert_weight_to_int4pack_for_cpu(c, 2) for c in codes]
        scales = torch.rand(inputs // scheme.group, outputs, 2).bfloat16()
        product = torch._weight_int4pack_mm_for_cpu
        arms.insert(0, ("torch", lambda: [product(x, w, scheme.group, scales) for w in packed]))
    return arms, count


def quantized(args: argparse.Namespace) -> list[dict[str, Any]]:
    out = []
    for inputs, outputs in args.sizes:
        for scheme, bits in ((Scheme("int8"), 8), (Scheme("int4", 32), 4.5), (Scheme("int4", 128), 4.125)):
            for rows in args.rows:
                arms, count = quantized_arms(rows, inputs, outputs, scheme)
                with ops.use("cpu"):
                    times = fastest(arms, args.repeats, count)
                name = f"{scheme.format} g{scheme.group} {rows}x{inputs}x{outputs}"
                out.append(row(name, times, int(inputs * outputs * bits / 8), 2 * rows * inputs * outputs))
    return out


def attention(args: argparse.Namespace) -> list[dict[str, Any]]:
    cases = {
        "decode b1 ctx 2048": ([1], [2048]),
        "decode b8 ctx 512": ([1] * 8, [512] * 8),
        "decode b32 ctx 160": ([1] * 32, [160] * 32),
        "prefill 512": ([512], [512]),
        "prefill 2048": ([2048], [2048]),
    }
    out = []
    for name, (queries, contexts) in cases.items():
        for dtype in (torch.bfloat16, torch.float32):
            heads, kv_heads, dim = 16, 8, 128
            values = paged(torch.Generator().manual_seed(0), dtype, queries, contexts, heads, kv_heads, dim)
            entry = ops.paged_attention
            arms: list[Arm] = [
                ("torch", lambda v=values, e=entry: e.reference(*v, 128**-0.5)),  # type: ignore[misc]
                ("tuili", lambda v=values, e=entry: e.implementations["cpu"](*v, 128**-0.5)),  # type: ignore[misc]
            ]
            pairs = sum(q * (c - q) + q * (q + 1) // 2 for q, c in zip(queries, contexts, strict=True))
            bytes = 2 * sum(contexts) * kv_heads * dim * dtype.itemsize
            title = f"attention {name} {str(dtype).removeprefix('torch.')}"
            out.append(row(title, fastest(arms, args.repeats, 1), bytes, 4 * pairs * heads * dim))
    return out


def rowwise(args: argparse.Namespace) -> list[dict[str, Any]]:
    out = []
    for rows in (1, 32, 512):
        x, weight = torch.randn(rows, 1024).bfloat16(), torch.randn(1024).bfloat16()
        gate_up, heads = torch.randn(rows, 6144).bfloat16(), torch.randn(rows, 16, 128).bfloat16()
        angle = torch.rand(rows, 64)
        calls = {"rms_norm": (x, weight, 1e-6), "gated": (gate_up, "silu"), "rotate": (heads, angle.cos(), angle.sin())}
        for name, values in calls.items():
            entry = ops.table[name]
            arms: list[Arm] = [
                (arm, lambda f=f, v=values: [f(*v) for _ in range(20)])  # type: ignore[misc]
                for arm, f in (("torch", entry.reference), ("tuili", entry.implementations["cpu"]))
            ]
            bytes = values[0].nbytes * 2
            out.append(row(f"{name} {rows} rows", fastest(arms, args.repeats, 20), bytes, 0))
    return out


def row(name: str, times: dict[str, float], bytes: int, flops: int) -> dict[str, Any]:
    rates = "  ".join(
        f"{arm} {t * 1e6:9.1f} us {bytes / t / 1e9:6.1f} GB/s {flops / t / 1e9:6.0f} GF/s" for arm, t in times.items()
    )
    others = min(t for arm, t in times.items() if arm != "tuili")
    print(f"{name:44} {rates}  x{others / times['tuili']:.2f}", flush=True)
    return {"name": name, "seconds": times, "bytes": bytes, "flops": flops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--isa", default="")
    parser.add_argument("--only", default="linear,quantized,attention,rowwise")
    parser.add_argument("--rows", type=lambda s: [int(n) for n in s.split(",")], default=[1, 8, 32, 128, 512])
    parser.add_argument(
        "--sizes",
        type=lambda s: [tuple(map(int, p.split("x"))) for p in s.split(",")],
        default=[(1024, 3072), (2048, 8192)],
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu.set_threads(args.threads)
    if args.isa:
        cpu.use_isa(args.isa)
    print(cpu.describe(), f"reads {bandwidth(args.repeats) / 1e9:.1f} GB/s", flush=True)
    suites = {"linear": linear, "quantized": quantized, "attention": attention, "rowwise": rowwise}
    with torch.inference_mode():
        results = [entry for name in args.only.split(",") for entry in suites[name](args)]
    if args.json:
        args.json.write_text(
            json.dumps({"isa": cpu.describe().isa, "threads": args.threads, "rows": results}, indent=1)
        )


if __name__ == "__main__":
    main()
