"""Every Triton kernel against its op's reference, on every sample of the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpu.place import Entry, Place, poisoned
from tuili import ops
from tuili.ops.triton import FAST, INVARIANT


def run(place: Place, shard: int = 0, shards: int = 1) -> None:
    """One entry per op and backend; of them each ``shards``-th, from ``shard`` on."""
    pairs = [(entry, backend) for entry in ops.table.values() for backend in backends(entry)]
    for entry, backend in pairs[shard::shards]:
        samples = entry.samples()[:2] if place.tiny else entry.samples()
        place.attempt(f"{entry.name} {backend}", lambda e=entry, b=backend, s=samples: check(e, b, s, place.device))


def backends(entry: Any) -> list[str]:
    """Those that have an implementation of their own."""
    functions = {entry.implementations[name]: name for name in (INVARIANT, FAST) if name in entry.implementations}
    return list(functions.values())


def check(entry: Any, backend: str, samples: list[Any], device: str) -> Entry:
    """How many samples agree; each that does not, with why. Raises RuntimeError where there is one."""
    failures = []
    for sample in samples:
        try:
            error, allowed = difference(entry, entry.implementations[backend], sample, device)
        except Exception as problem:  # a kernel that does not compile must not hide the others
            failures.append(f"{sample.name}: {type(problem).__name__}: {problem}")
            if device == "cuda" and poisoned():
                break
            continue
        if not error <= allowed:
            failures.append(f"{sample.name}: off by {error:.2e}, allowed {allowed:.2e}")
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(samples)} samples\n" + "\n".join(failures))
    return {"samples": len(samples)}


def difference(entry: Any, implementation: Callable[..., Any], sample: Any, device: str) -> tuple[float, float]:
    """The largest relative error of a sample computed on ``device``, and what is allowed."""
    args, kwargs = sample.make(torch.Generator().manual_seed(0))
    want = _tensors(args, entry.reference(*args, **kwargs))
    args, kwargs = sample.make(torch.Generator().manual_seed(0))
    args = tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
    have = _tensors(args, implementation(*args, **kwargs))
    errors = [
        float((h - w).abs().max()) / max(1.0, float(w.abs().max()))
        for h, w in zip(have, want, strict=True)
        if w.numel()
    ]
    return max(errors, default=0.0), max(entry.tolerance, 2**-7 if sample.name.endswith("16") else 0.0)


def _tensors(args: tuple[Any, ...], made: Any) -> list[torch.Tensor]:
    """What a call returned and may have written, in float32 on the CPU."""
    returned = made if isinstance(made, tuple) else () if made is None else (made,)
    return [t.float().cpu() for t in (*returned, *args) if isinstance(t, torch.Tensor)]
