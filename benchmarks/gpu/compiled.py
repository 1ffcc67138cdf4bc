"""Compile every Triton kernel for an H200 (sm_90) without having one, and say what the compiler made of it.

    python benchmarks/gpu/compiled.py [--only NAME]

The launches are those of real shapes, on tensors of the CPU; nothing runs. Printed for each kernel: registers of a
thread, bytes that spill, shared memory, and how many tensor-core and asynchronous-copy instructions the code has.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"mma\.sync",
    "cp.async": r"cp\.async\.c[ag]",
    "ldmatrix": "ldmatrix",
}


class Driver:
    """A card that is not there: enough of Triton's driver to compile for it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


@contextmanager
def only_compiling(report: Callable[[str, Any], None]) -> Iterator[None]:
    """Launches compile, call ``report(kernel's name, compiled kernel)`` and run nothing."""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        report(self.fn.__name__, compiled)
        return compiled

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes per thread on the stack (spills)."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def show(name: str, compiled: Any) -> None:
    registers, stack = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    counts = {label: len(re.findall(pattern, ptx)) for label, pattern in INSTRUCTIONS.items()}
    made = " ".join(f"{label} {count}" for label, count in counts.items() if count)
    print(
        f"  {name:24} registers {registers:3} stack {stack:4} shared {compiled.metadata.shared:6} "
        f"warps {compiled.metadata.num_warps} stages {compiled.metadata.num_stages}  {made}",
        flush=True,
    )


def launches() -> dict[str, Callable[[], Any]]:
    """Calls of every op in the shapes of Llama-3.1-8B (32 heads, 8 KV heads of 128, hidden 4096)."""
    from tuili.ops.samples import paged
    from tuili.ops.table import table
    from tuili.ops.triton import about, attention, cache, layouts, products, rowwise, sampling  # noqa: F401

    about.INTERPRETED_PROCESSORS = 132
    half = torch.bfloat16
    calls: dict[str, Callable[[], Any]] = {}

    def add(name: str, op: str, *args: Any, backend: str = "triton", **kwargs: Any) -> None:
        calls[name] = lambda: table[op].implementations[backend](*args, **kwargs)

    x, norm = torch.zeros(4, 4096, dtype=half), torch.ones(4096, dtype=half)
    add("rms_norm", "rms_norm", x, norm, 1e-5)
    add("rms_norm of heads", "rms_norm", x.view(4, 32, 128), norm[:128], 1e-5)
    add("add_rms_norm", "add_rms_norm", x, x.clone(), norm, 1e-5)
    add("gated", "gated", torch.zeros(4, 28672, dtype=half), "silu")
    add("embedding", "embedding", x, torch.zeros(2, dtype=torch.long))
    add("softcap", "softcap", x, 30.0)
    angles = torch.zeros(2, 4, 64)
    add("rotate", "rotate", x.view(4, 32, 128), *angles)
    for name, queries, contexts in (
        ("decode", [1, 1], [5000, 3000]),
        ("prefill", [2048], [2048]),
        ("chunk of 16", [16, 16], [900, 900]),
    ):
        args = paged(torch.Generator(), half, queries, contexts, 32, 8, 128)
        caches = [torch.zeros(shape, dtype=half) for shape in cache.cache_shapes(400, 16, 8, 128)]
        rest = *args[3:], 0.1
        add(f"attention {name}", "paged_attention", args[0], *caches, *rest)
        add(f"attention {name}, invariant", "paged_attention", args[0], *caches, *rest, backend="triton_invariant")
        for kind, dtype in (("int8", torch.int8), ("fp8", layouts.FP8)):
            codes, steps = [c.to(dtype) for c in caches], [torch.ones(400, 8, 16)] * 2
            add(f"attention {name}, {kind}", f"paged_attention_{kind}", args[0], *codes, *steps, *rest)
            kv, slots = [torch.zeros(2, 8, 128, dtype=half)] * 2, torch.arange(2)
            add(f"write_kv_{kind}", f"write_kv_{kind}", *kv, *codes, *steps, slots)
    add("attention window, cap", "paged_attention", args[0], *caches, *rest, 512, 50.0)
    add("write_kv", "write_kv", *kv, *caches, slots)
    q = torch.zeros(2, 32, 128, dtype=half)
    add("rotate_write_kv", "rotate_write_kv", q, *kv, *angles[:, :2], *caches, slots)
    args = paged(torch.Generator(), half, [1, 1], [5000, 3000], 8, 4, 256)
    caches = [torch.zeros(shape, dtype=half) for shape in cache.cache_shapes(600, 16, 4, 256)]
    add("attention decode of 256 dimensions", "paged_attention", args[0], *caches, *args[3:], 0.1)
    one, some = torch.ones(2), torch.ones(2, dtype=torch.long)
    add("argmax", "argmax", torch.zeros(2, 128256, dtype=half))
    add("draw", "draw", torch.zeros(2, 128256, dtype=half), one, one, some, one, one.double())
    for rows in (1, 16, 256):
        x = torch.zeros(rows, 4096, dtype=half)
        for group in (128, 32):
            tiles = torch.zeros(64, 4096 // group, 64, group // 2, dtype=torch.uint8)
            scales, zeros = (torch.zeros(64, 4096 // group, 64, dtype=d) for d in (torch.float16, torch.uint8))
            add(f"int4 g{group} of {rows} rows", "int4_weight_only_linear", x, tiles, scales, zeros, 4096)
        for kind in (torch.int8, layouts.FP8):
            codes = torch.zeros(4096, 4096, dtype=torch.uint8).view(kind)
            for label, scales in (("", torch.ones(4096, 1)), (" blocks", torch.ones(32, 32))):
                name = f"{str(kind).removeprefix('torch.')}{label} of {rows} rows"
                add(f"{name}, weight only", "byte_weight_only_linear", x, codes, scales)
                add(name, "byte_linear", x, codes, scales)
    weight = torch.zeros(4096, 4096, dtype=half)
    add("floats, invariant", "linear", x, weight, backend="triton_invariant")
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="launches whose name contains this")
    wanted = parser.parse_args().only
    with only_compiling(show):
        for name, call in launches().items():
            if wanted in name:
                print(name, flush=True)
                call()


if __name__ == "__main__":
    main()
