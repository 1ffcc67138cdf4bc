"""``tuili doctor``: what this machine is, what will run where, what is missing and how to get it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tuili.base.errors import ConfigError

app = typer.Typer(add_completion=False)

PASS, WARN, FAIL = "pass", "warn", "fail"
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, the verdict, what was found, and what to do when it is not a pass."""

    name: str
    verdict: str
    found: str
    fix: str = ""


@app.command()
def doctor(json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> None:
    """Check this machine: cores, memory, instruction sets, torch, compiler, GPU, embedded model, disk. Exit 1 if one
    fails."""
    checks = list(examine())
    failed = any(check.verdict == FAIL for check in checks)
    if json_output:
        print(json.dumps({"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    else:
        _print(checks)
    raise typer.Exit(1 if failed else 0)


def examine() -> Iterator[Check]:
    """All checks, in the order in which they matter. A check that breaks is a failed check."""
    for look in (
        python,
        processor,
        memory,
        packages,
        torch_build,
        compiler,
        gpu,
        triton,
        backend,
        limits,
        plugins,
        embedded,
        disk,
    ):
        try:
            yield look()
        except Exception as error:  # the doctor must survive a sick machine
            name = look.__name__.replace("_", " ")
            yield Check(
                name, FAIL, f"could not look: {type(error).__name__}: {error}", "report this as a bug of tuili doctor"
            )


def python() -> Check:
    return Check("python", PASS, f"{platform.python_version()} at {sys.executable}")


def processor() -> Check:
    from tuili.base.hardware import probe

    here = probe()
    isa = " ".join(sorted(here.isa)) or "no known vector extension"
    found = f"{here.cpu}, {here.cores} cores, {platform.machine()} ({isa})"
    if platform.machine() in ("x86_64", "AMD64") and "avx2" not in here.isa:
        return Check("cpu", WARN, found, "no AVX2: the model runs, many times slower; use a machine from 2014 or later")
    if here.cores < 2:
        return Check("cpu", WARN, found, "with one core the server and the model take turns; two or more are better")
    return Check("cpu", PASS, found)


def memory() -> Check:
    from tuili.base.hardware import probe

    here = probe()
    found = f"{here.available_memory / GIB:.1f} GiB free of {here.total_memory / GIB:.1f} GiB"
    if here.available_memory < GIB // 2:
        return Check("memory", FAIL, found, "the embedded model needs about half a GiB: end other programs")
    if here.available_memory < 2 * GIB:
        return Check("memory", WARN, found, "enough for the embedded model, not for larger ones")
    return Check("memory", PASS, found)


#: What ``tuili serve`` imports beside torch.
_NEEDED: tuple[str, ...] = (
    "numpy",
    "safetensors",
    "tokenizers",
    "jinja2",
    "huggingface_hub",
    "pydantic",
    "uvicorn",
    "httpx",
    "prometheus_client",
    "typer",
    "rich",
    "psutil",
)
_REPAIR = "in the environment of tuili: pip install --force-reinstall tuili (from a checkout: make install)"


def packages() -> Check:
    from importlib import metadata

    missing = []
    for name in _NEEDED:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", FAIL, f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Check("packages", PASS, f"all {len(_NEEDED)} packages that serving needs")


def torch_build() -> Check:
    try:
        import torch
    except Exception as error:  # a broken wheel raises more than ImportError
        index = "https://download.pytorch.org/whl/cpu"
        return Check("torch", FAIL, f"cannot import: {error}", f"pip install 'torch>=2.8' --index-url {index}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    threads, isa = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    found = f"{torch.__version__}, {build} build, {threads} threads, {isa}"
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 8):
        return Check("torch", FAIL, found, "Tuili needs torch 2.8 or newer: pip install --upgrade torch")
    return Check("torch", PASS, found)


def compiler() -> Check:
    """One that builds the kernels where they came without, and what torch.compile writes."""
    from tuili.ops import cpu

    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            line = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
            return Check("compiler", PASS, f"{path}: {line.splitlines()[0] if line else 'unknown version'}")
    if cpu.describe().built:
        return Check("compiler", PASS, "no C++ compiler; the kernels are built, only --compile would need one")
    fix = "needed to build the C++ kernels when Tuili is installed from its source: apt install g++"
    return Check("compiler", WARN, "no C++ compiler", fix)


def gpu() -> Check:
    """The card that CUDA takes first, and whether this torch can compute on it."""
    from tuili.base.gpu import find

    card = find()
    if card is None:
        if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
            fix = "nvidia-smi says more; without it the CPU will be used"
            return Check("gpu", WARN, "an NVIDIA driver is here, but shows no card", fix)
        return Check("gpu", PASS, "none; the CPU will be used")
    import torch

    others = f", the first of {card.count}" if card.count > 1 else ""
    found = f"{card.name}, {card.free / GIB:.1f} GiB free of {card.total / GIB:.1f} GiB{others}"
    if torch.cuda.is_available():
        return Check("gpu", PASS, found)
    fix = "pip install torch (a CUDA build), or a newer driver; the CPU will be used"
    return Check("gpu", WARN, f"{found}; this torch cannot use it", fix)


def triton() -> Check:
    """Whether the kernels for CUDA run here."""
    from tuili.base.gpu import find
    from tuili.ops import table
    from tuili.ops.triton import FAST, describe

    here = describe()
    if not here.usable:
        why = Check("triton", WARN, "the GPU computes on torch's references, exact but slow", here.why)
        return why if find() else Check("triton", PASS, f"not used: {here.why}")
    kernels = sum(FAST in op.implementations for op in table.values())
    where = f"for {here.card}" if here.card else "interpreted on the CPU, to test them (TRITON_INTERPRET)"
    return Check("triton", PASS, f"{kernels} ops on Triton kernels, {where}")


def backend() -> Check:
    """What computes: the C++ kernels, or torch's references and why."""
    from tuili.ops import cpu, table

    found = cpu.describe()
    if not found.built:
        return Check("backend", WARN, f"{len(table)} ops on torch's references, exact but slow", found.why)
    kernels = sum("cpu" in op.implementations for op in table.values())
    computed = f"{kernels} of {len(table)} ops on C++ kernels ({found.isa}), the others on torch"
    return Check("backend", PASS, f"{computed}; of a bfloat16 checkpoint: {_arithmetic('bfloat16')}")


def _arithmetic(dtype: str) -> str:
    from tuili.base.config import Config
    from tuili.base.hardware import probe
    from tuili.engine.device import arithmetic
    from tuili.engine.resolve import activation_dtype

    config = Config(device="cpu", dtype=dtype)
    return arithmetic(config.with_(activation_dtype=activation_dtype(config, probe())))


def limits() -> Check:
    """What this machine reaches, where it was measured."""
    from tuili.base import limits as measured

    if not measured.PATH.exists():
        return Check("limits", PASS, "not measured; tuili bench machine does it in half a minute")
    try:
        found = measured.load()
    except ConfigError as error:
        return Check("limits", WARN, str(error), "tuili bench machine")
    peaks = ", ".join(f"{kind} {rate / 1e9:,.0f}" for kind, rate in found.peaks.items())
    about = f"reads {found.memory_bandwidth / 1e9:.1f} GB/s from memory, 10^9 operations/s: {peaks}"
    return Check("limits", PASS, f"{about} ({found.threads} threads, {found.date[:10]}, {measured.PATH})")


def plugins() -> Check:
    """Every file of the plugin folders imports."""
    from tuili.base.registry import Registry

    found: list[str] = []
    broken: dict[str, str] = {}
    for module in ("tuili.models", "tuili.core.policies", "tuili.quant.formats"):
        registries = [value for value in vars(importlib.import_module(module)).values() if isinstance(value, Registry)]
        for registry in registries:
            found.append(f"{len(registry.names())} of kind {registry.kind}")
            broken |= registry.broken()
    if broken:
        return Check("plugins", FAIL, "; ".join(f"{name}: {why}" for name, why in broken.items()), _REPAIR)
    return Check("plugins", PASS, ", ".join(found))


def embedded() -> Check:
    import tuili

    folder = Path(tuili.__file__).parent / "embedded" / "target"
    missing = [name for name in ("config.json", "tokenizer.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        fix = "install a complete package, or train it: tuili train pretrain recipes/target.toml"
        return Check("embedded model", FAIL, f"{folder} lacks {', '.join(missing)}", fix)
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return Check("embedded model", PASS, f"{folder} ({size / 1e6:.1f} MB)")


def disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / GIB:.1f} GiB free in {Path.cwd()}"
    if free < GIB // 2:
        return Check("disk", FAIL, found, "free half a GiB at least")
    if free < 4 * GIB:
        return Check("disk", WARN, found, "enough for the embedded model; checkpoints from the hub need more")
    return Check("disk", PASS, found)


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.text import Text

    console, colours = Console(highlight=False), {PASS: "green", WARN: "yellow", FAIL: "red"}
    for check in checks:
        line = Text.assemble((f"{check.verdict:<5}", colours[check.verdict]), f"{check.name:<15} {check.found}")
        console.print(line, soft_wrap=True)
        if check.fix:
            console.print(Text(f"{'':<21}-> {check.fix}"), soft_wrap=True)
