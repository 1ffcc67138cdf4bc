"""What a machine is: memory, cores, instruction sets. No torch: the planner describes machines that are elsewhere."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from tuili.base import gpu
from tuili.base.cgroup import memory_limits


@dataclass(frozen=True)
class Hardware:
    """Memory in bytes; ``isa`` holds the CPU flags that matter here.

    ``gpu`` is the name of the card that CUDA takes first, or None; ``gpu_memory`` is all of its memory, ``gpu_free``
    what nobody has taken.
    """

    cpu: str
    cores: int
    isa: frozenset[str]
    total_memory: int
    available_memory: int
    gpu: str | None = None
    gpu_memory: int = 0
    gpu_free: int = 0

    @property
    def fast_bfloat16(self) -> bool:
        return bool(self.isa & {"avx512_bf16", "amx_bf16", "bf16"})

    @property
    def vectors(self) -> str:
        """What tells one kind of CPU from another: the instruction set of the C++ kernels that run on it (as
        ``cpu.use_isa`` names them), or its architecture where none do."""
        if self.isa >= {"avx512f", "avx512_vnni", "avx512_bf16"}:
            return "avx512"
        if self.isa >= {"avx2", "fma", "f16c"}:
            return "avxvnni" if "avx_vnni" in self.isa else "avx2"
        return platform.machine().lower()


#: CPU flags (as /proc/cpuinfo spells them) that decide which kernels run.
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "bf16")


def memory() -> tuple[int, int]:
    """Bytes of RAM that are free, and all of them, within the limits of the control groups around this process."""
    here, groups = psutil.virtual_memory(), memory_limits()
    available = min([here.available, *(group.limit - group.used for group in groups)])
    return max(0, available), min([here.total, *(group.limit for group in groups)])


def probe() -> Hardware:
    """This machine: its CPU and RAM, within the container's limits where there are some, and its first card."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    available, total = memory()
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1
    here = Hardware(name, cores, frozenset(flags & set(FLAGS)), total, available)
    card = gpu.find()
    return here if card is None else replace(here, gpu=card.name, gpu_memory=card.total, gpu_free=card.free)
