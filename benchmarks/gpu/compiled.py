"""Compile every Triton kernel for an H200 (sm_90) without having one, and say what the compiler made of it.

    python benchmarks/gpu/compiled.py [--only NAME] [--models | --samples]

The launches are those of real shapes, on tensors of the CPU; nothing runs. With ``--models`` they are all that the
engine launches when gpu-check measures its models, of one layer each; with ``--samples`` those of every sample of every
op, which gpu-check compares with the references. Printed for each kernel: registers of a
thread, bytes that spill, shared memory, and how many tensor-core and asynchronous-copy instructions the code has.
Exits with 1 where one does not compile or would not start: more shared memory than a block may have.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
#: Bytes of shared memory that a block may have.
MOST_SHARED = 227 * 1024
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


#: Kernels that were shown.
seen: set[str] = set()


def show(name: str, compiled: Any) -> None:
    if compiled.hash in seen:
        return
    seen.add(compiled.hash)
    registers, stack = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    counts = {label: len(re.findall(pattern, ptx)) for label, pattern in INSTRUCTIONS.items()}
    made = " ".join(f"{label} {count}" for label, count in counts.items() if count)
    print(
        f"  {name:24} registers {registers:3} stack {stack:4} shared {compiled.metadata.shared:6} "
        f"warps {compiled.metadata.num_warps} stages {compiled.metadata.num_stages}  {made}",
        flush=True,
    )
    if compiled.metadata.shared > MOST_SHARED:
        raise RuntimeError(f"{name} takes {compiled.metadata.shared} bytes of shared memory, of {MOST_SHARED}")


Calls = dict[str, Callable[[], Any]]
HALF = torch.bfloat16
BACKENDS = ("triton", "triton_invariant")


def launches() -> Calls:
    """Calls of every op in the shapes of Llama-3.1-8B (32 heads, 8 KV heads of 128, hidden 4096), and what differs in
    others: head dimensions, groups, dtypes."""
    # Without a card they are not imported by themselves.
    from tuili.ops.triton import about, attention, cache, products, rowwise, sampling  # noqa: F401

    about.INTERPRETED_PROCESSORS = 132
    return {**row_calls(), **attention_calls(), **sampling_calls(), **product_calls()}


def call(op: str, *args: Any, backend: str = "triton", **kwargs: Any) -> Callable[[], Any]:
    from tuili.ops.table import table

    return lambda: table[op].implementations[backend](*args, **kwargs)


def row_calls() -> Calls:
    x, norm, angles = torch.zeros(4, 4096, dtype=HALF), torch.ones(4096, dtype=HALF), torch.zeros(2, 4, 64)
    return {
        "rms_norm": call("rms_norm", x, norm, 1e-5),
        "rms_norm of 1024": call("rms_norm", x[:, :1024], norm[:1024], 1e-5),
        "rms_norm of heads": call("rms_norm", x.view(4, 32, 128), norm[:128], 1e-5),
        "add_rms_norm": call("add_rms_norm", x, x.clone(), norm, 1e-5),
        "locate": call("locate", *(torch.zeros(size, dtype=torch.long) for size in ((4, 256), 257, (257, 512))), 16),
        **{name: call("gated", torch.zeros(4, 28672, dtype=HALF), name) for name in ("silu", "gelu_tanh", "gelu")},
        "embedding": call("embedding", x, torch.zeros(2, dtype=torch.long)),
        "softcap": call("softcap", x, 30.0),
        "rotate": call("rotate", x.view(4, 32, 128), *angles),
        "rotate of 256": call("rotate", x.view(4, 16, 256), *torch.zeros(2, 4, 128)),
        "rotate in part": call("rotate", x.view(4, 32, 128), *angles[..., :48]),
    }


#: Queries and contexts of a batch; ``split``: few tiles, so that keys are split.
BATCHES = {
    "decode": ([1, 1], [5000, 3000]),
    "decode of 256": ([1] * 256, [300] * 256),
    "prefill": ([2048], [2048]),
    "chunk of 16": ([16, 16], [900, 900]),
    "mixed": ([1, 1, 510], [5000, 300, 510]),
}


def attention_calls() -> Calls:
    made: Calls = {}
    for name in BATCHES:
        made |= _attention(f"attention {name}", name, 32, 8, 128)
    for name in ("decode", "prefill"):
        made |= _attention(f"attention {name}, group 2", name, 16, 8, 128, kinds=("",))
        made |= _attention(f"attention {name}, 64 dimensions", name, 32, 8, 64)
        made |= _attention(f"attention {name}, 256 dimensions", name, 8, 4, 256)
        made |= _attention(f"attention {name}, window and cap", name, 16, 8, 128, ("",), HALF, 512, 50.0)
        for dtype in (torch.float32, torch.float16):
            made |= _attention(f"attention {name}, {dtype}", name, 32, 8, 128, ("", "_fp8"), dtype)
    return made


def _attention(
    label: str,
    batch: str,
    heads: int,
    kv_heads: int,
    dim: int,
    kinds: tuple[str, ...] = ("", "_int8", "_fp8"),
    dtype: torch.dtype = HALF,
    *more: Any,
) -> Calls:
    """Attention and cache writes over each kind of cache, on both backends."""
    from tuili.ops import kvcache
    from tuili.ops.samples import paged
    from tuili.ops.triton import layouts

    q, _, _, *rest = paged(torch.Generator(), dtype, *BATCHES[batch], heads, kv_heads, dim)
    blocks = int(rest[0].max()) + 1
    made = {}
    k, v = torch.zeros(2, len(q), kv_heads, dim, dtype=dtype)
    slots, angles = torch.arange(len(q)), torch.zeros(2, len(q), dim // 2)
    for kind in kinds:
        held = {"": dtype, "_int8": torch.int8, "_fp8": layouts.FP8}[kind]
        caches = [torch.zeros(shape, dtype=held) for shape in kvcache.row_shapes(blocks, 16, kv_heads, dim, dim, held)]
        if kind:
            caches += [torch.ones(blocks, kv_heads, 16) for _ in range(2)]
        for backend in BACKENDS:
            name = f"{label}{kind}" + (", invariant" if backend == BACKENDS[1] else "")
            made[name] = call(f"paged_attention{kind}", q, *caches, *rest, 0.1, *more, backend=backend)
        made[f"{label}, write_kv{kind}"] = call(f"write_kv{kind}", k, v, *caches, slots)
        if not kind:
            made[f"{label}, rotate_write_kv"] = call("rotate_write_kv", q, k, v, *angles, *caches, slots)
    return made


def sampling_calls() -> Calls:
    made: Calls = {}
    one, some = torch.ones(2), torch.ones(2, dtype=torch.long)
    for dtype in (HALF, torch.float32):
        logits = torch.zeros(2, 128256, dtype=dtype)
        made[f"argmax {dtype}"] = call("argmax", logits)
        made[f"draw {dtype}"] = call("draw", logits, one, one, some, one, one.double())
        made[f"logprobs {dtype}"] = call("logprobs", logits, some, 5)
    made["logprobs, the best"] = call("logprobs", logits, some, 1)
    made["logprobs of none"] = call("logprobs", logits, some, 0)
    return made


def product_calls() -> Calls:
    from tuili.ops.triton import layouts

    made: Calls = {}
    for rows in (1, 8, 16, 64, 256):
        x = torch.zeros(rows, 4096, dtype=HALF)
        for group in (128, 64, 32):
            tiles = torch.zeros(64, 4096 // group, 64, group // 2, dtype=torch.uint8)
            scales, zeros = (torch.zeros(64, 4096 // group, 64, dtype=d) for d in (torch.float16, torch.uint8))
            weight = tiles, scales, zeros if group < 128 else None, 4096
            for backend in BACKENDS:
                name = f"int4 g{group} of {rows} rows" + (", invariant" if backend == BACKENDS[1] else "")
                made[name] = call("int4_weight_only_linear", x, *weight, backend=backend)
        for kind in (torch.int8, layouts.FP8):
            codes = torch.zeros(4096, 4096, dtype=torch.uint8).view(kind)
            for label, scales in (
                ("", torch.ones(4096, 1)),
                (" blocks", torch.ones(32, 32)),
                (" groups", torch.ones(4096, 128)),
            ):
                for backend in BACKENDS:
                    name = f"{str(kind).removeprefix('torch.')}{label} of {rows} rows"
                    name += ", invariant" if backend == BACKENDS[1] else ""
                    made[f"{name}, weight only"] = call("byte_weight_only_linear", x, codes, scales, backend=backend)
                    made[name] = call("byte_linear", x, codes, scales, backend=backend)
        zeros, codes = torch.zeros(4096, 32, dtype=torch.int8), torch.zeros(4096, 4096, dtype=torch.int8)
        args = x, codes, torch.ones(4096, 32), None, zeros
        made[f"int8 groups and zeros of {rows} rows"] = call("byte_weight_only_linear", *args)
    for dtype in (HALF, torch.float16, torch.float32):
        x, weight = torch.zeros(64, 4096, dtype=dtype), torch.zeros(4096, 4096, dtype=dtype)
        made[f"floats {dtype}, invariant"] = call(
            "linear", x, weight, torch.zeros(4096, dtype=dtype), backend=BACKENDS[1]
        )
    return made


def model_calls() -> Calls:
    """The engine on each model and width of gpu-check, with one layer and a small vocabulary: prefill and decode."""
    # The package, without its folder staying on the path (see check.py).
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from gpu.pieces import ARMS

    sys.path.pop(0)
    return {f"engine, {name}": lambda arm=arm: run_engine(arm) for name, arm in ARMS.items()}


def sample_calls() -> Calls:
    """Every sample of every op on every Triton backend."""
    from tuili.ops.table import table

    def launch(function: Callable[..., Any], sample: Any) -> Callable[[], Any]:
        def call() -> Any:
            args, kwargs = sample.make(torch.Generator().manual_seed(0))
            return function(*args, **kwargs)

        return call

    return {
        f"{entry.name} {backend} {sample.name}": launch(entry.implementations[backend], sample)
        for entry in table.values()
        for backend in {f: b for b, f in entry.implementations.items() if b in BACKENDS}.values()
        for sample in entry.samples()
    }


def run_engine(arm: Any) -> None:
    """What kernels would write is ones: ids that are in the vocabulary, logits that are finite."""
    from unittest.mock import patch

    from gpu import shapes, speed
    from tuili.ops import Kernels

    def ones(x: torch.Tensor, *size: Any, **more: Any) -> torch.Tensor:
        return x.new_ones(size[0] if isinstance(size[0], tuple) else size, **more)

    real = shapes.spec_of(arm.model, False)
    spec = replace(real, num_layers=1, vocab_size=8192)
    kernels = Kernels("triton")  # its own, one of whose ops is replaced
    vars(kernels)["linear"] = lambda x, weight, bias=None: x.new_ones(len(x), len(weight))
    model = shapes.build(spec, arm.scheme, "cpu", 8200, kernels)
    with patch.object(torch, "empty", torch.ones), patch.object(torch.Tensor, "new_empty", ones):
        engine = speed.engine_on(model, "cpu", 4096, 256, 8200, [1, 8, 64, 256])
        for requests, prompt in ((1, 128), (8, 128), (64, 128), (256, 128), (1, 8192)):
            params = speed.SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
            for i in range(requests):
                engine.add(speed.Request(f"{requests} {prompt} {i}", prompt, [1] * prompt, params))
            for updates in speed.drain(engine):
                wrong = [update.error for update in updates if update.error]
                if wrong:
                    raise RuntimeError(wrong[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="launches whose name contains this")
    parser.add_argument("--models", action="store_true", help="what the engine launches on the models of gpu-check")
    parser.add_argument("--samples", action="store_true", help="every sample of every op")
    options = parser.parse_args()
    wanted = options.only
    failures = []
    with only_compiling(show):
        calls = launches()
        calls = model_calls() if options.models else sample_calls() if options.samples else calls
        for name, launch in calls.items():
            if wanted not in name:
                continue
            print(name, flush=True)
            try:
                launch()
            except Exception as error:  # one that does not compile must not hide the others
                failures.append(name)
                print(f"  FAILED {type(error).__name__}: {error}", flush=True)
    if failures:
        print(f"{len(failures)} failed: {'; '.join(failures)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
