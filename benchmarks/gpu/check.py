"""`make gpu-check`: the kernels against their references on the card, then what the card can do.

    python benchmarks/gpu/check.py [--only OP]

Refuses where there is no CUDA device. Writes ``benchmarks/results/gpu/<card>/check.json``. Not here yet, because they
need the engine on the card: the equality matrix, and tokens per second beside transformers (docs/gpu.md).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu"


def tensors(args: tuple[Any, ...], made: Any) -> list[torch.Tensor]:
    """What a call returned and may have written, in float32 on the CPU."""
    returned = made if isinstance(made, tuple) else () if made is None else (made,)
    return [t.float().cpu() for t in (*returned, *args) if isinstance(t, torch.Tensor)]


def difference(entry: Any, implementation: Callable[..., Any], sample: Any, device: str) -> tuple[float, float]:
    """The largest relative error of a sample computed on ``device``, and what is allowed."""
    args, kwargs = sample.make(torch.Generator().manual_seed(0))
    want = tensors(args, entry.reference(*args, **kwargs))
    args, kwargs = sample.make(torch.Generator().manual_seed(0))
    args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
    have = tensors(args, implementation(*args, **kwargs))
    errors = [
        float((h - w).abs().max()) / max(1.0, float(w.abs().max()))
        for h, w in zip(have, want, strict=True)
        if w.numel()
    ]
    return max(errors, default=0.0), max(entry.tolerance, 2**-7 if sample.name.endswith("16") else 0.0)


def check_ops(device: str, only: str = "") -> list[dict[str, Any]]:
    """Every Triton implementation on every sample of its op; one entry per failure or error."""
    from tuili import ops
    from tuili.ops.triton import FAST, INVARIANT

    failures = []
    for entry in ops.table.values():
        for backend in (FAST, INVARIANT):
            if backend not in entry.implementations or only not in entry.name:
                continue
            for sample in entry.samples():
                name = {"op": entry.name, "backend": backend, "sample": sample.name}
                try:
                    error, allowed = difference(entry, entry.implementations[backend], sample, device)
                except Exception as problem:  # a kernel that does not compile must not hide the others
                    failures.append({**name, "problem": f"{type(problem).__name__}: {problem}"})
                    continue
                if not error <= allowed:
                    failures.append({**name, "problem": f"off by {error:.2e}, allowed {allowed:.2e}"})
    return failures


def seconds(call: Callable[[], Any]) -> float:
    """Median time of ``call`` on the card."""
    from triton.testing import do_bench

    return do_bench(call, return_mode="median") / 1000


def peaks() -> dict[str, float]:
    """Copy bandwidth in bytes per second, and bfloat16 matrix products in operations per second."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return {
        "copy_bytes_per_second": 2 * source.nbytes / seconds(lambda: target.copy_(source)),
        "bfloat16_operations_per_second": 2 * 8192**3 / seconds(lambda: a @ b),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="ops whose name contains this")
    only = parser.parse_args().only
    os.environ["TRITON_INTERPRET"] = "0"
    if not torch.cuda.is_available():
        print(f"gpu-check needs an NVIDIA GPU, and torch {torch.__version__} sees none. Without one, the kernels are")
        print("tested by Triton's interpreter (make test) and compiled by benchmarks/gpu/compiled.py.")
        return 2
    from tuili.ops import triton
    from tuili.ops.triton.tuning import slug

    about = triton.describe()
    if not about.usable:
        print(f"gpu-check: {about.why}")
        return 2
    began = time.perf_counter()
    failures = check_ops("cuda", only)
    for failure in failures:
        print("FAILED {op} {backend} {sample}: {problem}".format(**failure))
    print(f"ops: {len(failures)} failures, {time.perf_counter() - began:.0f} s")
    measured = peaks()
    print(", ".join(f"{name} {value:.3e}" for name, value in measured.items()))
    folder = RESULTS / slug(about.card)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"card": about.card, "torch": torch.__version__, "failures": failures, **measured}
    (folder / "check.json").write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
