"""Speed of the CPU kernels beside torch's own, alternating in one run so that a busy machine treats both alike.

    python benchmarks/kernels.py [--quick] [--threads 2] [--repeats 5] [--only linear,attention] [--json FILE]

Each figure is the fastest of the repeats. GB/s counts weights (linear) or keys and values (attention) once; every call
of few rows uses another matrix, so that they come from memory and not from a cache, as in a model's step. Products also
say which share they reach of this machine's limits, probed in the same rounds: of the read bandwidth (up to 8 rows) or
of the peak of products in registers (from there on).
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
from tuili.bench.provenance import provenance
from tuili.ops import cpu
from tuili.ops.rounding import round_blocks
from tuili.ops.samples import paged
from tuili.quant.scheme import Scheme
from tuili.quant.weight import Weight

KERNELS = ops.kernels_of("cpu")

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


PEAKS: dict[str, float] = {}
MEMORY = 256 << 20  # bytes of different weights that calls of few rows run through: many times the caches


def probes() -> dict[str, float]:
    """Operations per second of products in registers, by kind."""
    return {kind: cpu.peak(kind) for kind in ("float32", "bfloat16", "int8")}


def copies(rows: int, bytes: int, quick: bool) -> int:
    """How many matrices of ``bytes`` to take in turn."""
    return max(2, min(64, (MEMORY // (4 if quick else 1)) // bytes)) if rows <= 32 else 2


def linear_arms(rows: int, inputs: int, outputs: int, dtype: torch.dtype, quick: bool) -> tuple[list[Arm], int]:
    """The same products by torch, by oneDNN with its own packing, and by our kernel."""
    size = inputs * outputs * dtype.itemsize
    count = copies(rows, size, quick)
    weights = [torch.empty(outputs, inputs, dtype=dtype).uniform_(-1, 1) for _ in range(count)]
    arena = cpu.Arena(KERNELS)
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
                arms, count = linear_arms(rows, inputs, outputs, dtype, args.quick)
                times, read = limited(arms, args.repeats, count)
                name = f"linear {str(dtype).removeprefix('torch.')} {rows}x{inputs}x{outputs}"
                limit = (rows, read, str(dtype).removeprefix("torch."))
                out.append(row(name, times, inputs * outputs * dtype.itemsize, 2 * rows * inputs * outputs, limit))
    return out


def limited(arms: list[Arm], repeats: int, calls: int) -> tuple[dict[str, float], float]:
    """As ``fastest``, and the bytes per second that the machine read meanwhile, at best."""
    seconds, read = {name: float("inf") for name, _ in arms}, 0.0
    for _ in range(repeats):
        read = max(read, cpu.read_bandwidth(seconds=0, memory=PROBED[0]))
        for name, time_ in fastest(arms, 1, calls).items():
            seconds[name] = min(seconds[name], time_)
    return seconds, read


def quantized_arms(rows: int, inputs: int, outputs: int, scheme: Scheme, quick: bool) -> tuple[list[Arm], int]:
    """Integer weights: torch's own weight-only product, and ours with int8 and with bfloat16 activations."""
    count = copies(rows, inputs * outputs * (2 if scheme.format == "int8" else 1) // 2, quick)
    arena, weight = cpu.Arena(KERNELS), torch.randn(outputs, inputs).bfloat16()
    stored = [Weight.of(weight, scheme, arena).tensors for _ in range(count)]
    x = torch.randn(rows, inputs).bfloat16()
    if scheme.format == "int8":
        codes, scale = round_blocks(weight, torch.int8, 1, weight.shape[1])[0], torch.rand(outputs).bfloat16()
        theirs = [codes.clone() for _ in range(count)]
        torch_arm: Arm = ("torch", lambda: [torch._weight_int8pack_mm(x, w, scale) for w in theirs])
        ours = (cpu.int8_linear, cpu.int8_weight_linear)
        values = [(t["tiles"], t["scales"], outputs) for t in stored]
    else:
        numbers = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
        theirs = [torch._convert_weight_to_int4pack_for_cpu(numbers, 2) for _ in range(count)]
        scale = torch.rand(inputs // scheme.group, outputs, 2).bfloat16()
        product = torch._weight_int4pack_mm_for_cpu
        torch_arm = ("torch", lambda: [product(x, w, scheme.group, scale) for w in theirs])
        ours = (cpu.int4_linear, cpu.int4_weight_linear)  # type: ignore[assignment]
        values = [(t["tiles"], t["scales"], None, outputs, scheme.group) for t in stored]  # type: ignore[misc]
    with_int8, as_is = (entry.implementations["cpu"] for entry in ours)
    mine: Arm = ("tuili", lambda: [with_int8(x, *v) for v in values])
    return [torch_arm, ("a16", lambda: [as_is(x, *v) for v in values]), mine], count


def quantized(args: argparse.Namespace) -> list[dict[str, Any]]:
    out = []
    for inputs, outputs in args.sizes:
        for scheme, bits in ((Scheme("int8"), 8), (Scheme("int4", 32), 4.5), (Scheme("int4", 128), 4.125)):
            for rows in args.rows:
                arms, count = quantized_arms(rows, inputs, outputs, scheme, args.quick)
                times, read = limited(arms, args.repeats, count)
                name = f"{scheme.format} g{scheme.group} {rows}x{inputs}x{outputs}"
                size, limit = int(inputs * outputs * bits / 8), (rows, read, "int8")
                out.append(row(name, times, size, 2 * rows * inputs * outputs, limit))
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


PROBED: list[torch.Tensor] = []  # what `limited` reads


def row(
    name: str, times: dict[str, float], bytes: int, flops: int, limit: tuple[int, float, str] | None = None
) -> dict[str, Any]:
    """Print and keep a line. ``limit``: rows, bytes per second that can be read, what is multiplied."""
    rates = "  ".join(
        f"{arm} {t * 1e6:9.1f} us {bytes / t / 1e9:6.1f} GB/s {flops / t / 1e9:6.0f} GF/s" for arm, t in times.items()
    )
    entry: dict[str, Any] = {"name": name, "seconds": times, "bytes": bytes, "flops": flops}
    if limit:
        rows, read, kind = limit
        entry["read"] = read
        entry["share"] = bytes / times["tuili"] / read if rows <= 8 else flops / times["tuili"] / PEAKS[kind]
        rates += f"  {entry['share']:.0%} of {f'{read / 1e9:.1f} GB/s' if rows <= 8 else f'{kind} peak'}"
    others = min(t for arm, t in times.items() if arm not in ("tuili", "a16"))
    print(f"{name:44} {rates}  x{others / times['tuili']:.2f}", flush=True)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two sizes, three numbers of rows, two repeats")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--isa", default="")
    parser.add_argument("--only", default="linear,quantized,attention,rowwise")
    parser.add_argument("--rows", type=lambda s: [int(n) for n in s.split(",")])
    parser.add_argument("--sizes", type=lambda s: [tuple(map(int, p.split("x"))) for p in s.split(",")])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.repeats = args.repeats or (2 if args.quick else 4)
    args.rows = args.rows or ([1, 32, 128] if args.quick else [1, 8, 32, 128, 512])
    args.sizes = args.sizes or ([(1024, 3072)] if args.quick else [(1024, 4096), (3072, 1024), (2048, 8192)])
    torch.set_num_threads(args.threads)
    cpu.set_threads(args.threads)
    if args.isa:
        cpu.use_isa(args.isa)
    PEAKS.update(probes())
    PROBED.append(cpu.Arena().empty((MEMORY,), torch.uint8).fill_(1))
    print(cpu.describe(), {kind: f"{rate / 1e9:.0f} G/s" for kind, rate in PEAKS.items()}, flush=True)
    suites = {"linear": linear, "quantized": quantized, "attention": attention, "rowwise": rowwise}
    with torch.inference_mode():
        results = [entry for name in args.only.split(",") for entry in suites[name](args)]
    if args.json:
        about = {"benchmark": "kernels", "provenance": provenance(), "isa": cpu.describe().isa, "threads": args.threads}
        args.json.write_text(json.dumps(about | {"peaks": PEAKS, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
