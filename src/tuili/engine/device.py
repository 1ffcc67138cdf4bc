"""Where a config computes and on which ops, as far as torch, Triton and a compiler are able to here."""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tuili.base.config import Config
from tuili.base.errors import ConfigError
from tuili.base.hardware import Hardware
from tuili.base.log import get
from tuili.base.threads import let_waiting_threads_sleep
from tuili.engine.captures import on_device
from tuili.quant.scheme import scheme_of

if TYPE_CHECKING:
    from tuili.runtime.device import Device

log = get(__name__)


def able(config: Config, machine: Hardware) -> tuple[Config, Hardware]:
    """``config`` and ``machine`` as they can be used: without a card that this torch can not compute on, and with
    torch's references where Triton does not run. What is left out is told; ConfigError where it was asked for."""
    let_waiting_threads_sleep()
    if config.compile and (why := no_compiler()):
        raise ConfigError(f"--compile: {why}; or leave it out")
    if config.device != "cpu" and machine.gpu is not None and (why := _no_cuda()):
        if config.device == "cuda":
            raise ConfigError(f"--device cuda: {machine.gpu} is here, but {why}; or use --device cpu")
        log.warning("%s is not used: %s", machine.gpu, why)
        machine = replace(machine, gpu=None, gpu_memory=0, gpu_free=0)
    if config.device != "cpu" and machine.gpu is not None:
        return _able_on_cuda(config), machine
    if config.kernels == "triton" and (why := _no_triton(interpreted=True)):
        raise ConfigError(f"--kernels triton on a CPU is interpreted, to test it: {why}")
    return _able_on_cpu(config), machine


def _able_on_cpu(config: Config) -> Config:
    from tuili.ops import cpu

    if config.kernels != "auto" or cpu.describe().built:
        return config
    log.warning("kernels: torch's references, exact and slow: %s", cpu.describe().why)
    return config.with_(kernels="reference")


def _able_on_cuda(config: Config) -> Config:
    why = "" if config.kernels == "reference" else _no_triton(interpreted=False)
    if why and config.kernels == "triton":
        raise ConfigError(f"--kernels triton: {why}")
    if why:
        log.warning("kernels: torch's references, exact and slow: %s", why)
        config = config.with_(kernels="reference")
    if config.deterministic and config.kernels == "reference":
        raise ConfigError(
            "--deterministic on CUDA is a property of the Triton kernels, and torch's references compute here"
            + (f": {why}" if why else "; leave --kernels reference out")
        )
    return config


def _no_cuda() -> str:
    """Why this torch can not use the card; "" where it can."""
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA: pip install torch from the index for CUDA"
    return f"torch {torch.__version__} can not use it: its CUDA {torch.version.cuda} may need a newer driver"


def _no_triton(interpreted: bool) -> str:
    """Why Triton's kernels do not run here as they have to, compiled or ``interpreted``; "" where they do."""
    from tuili.ops.triton import describe

    found = describe()
    if found.usable and found.interpreted == interpreted:
        return ""
    if interpreted:
        return "set TRITON_INTERPRET=1" if found.usable or "TRITON_INTERPRET" in found.why else found.why
    return "TRITON_INTERPRET is set, so they would be interpreted on the CPU; unset it" if found.usable else found.why


def no_compiler() -> str:
    """Why torch.compile can not build what it writes; "" where it can. On CUDA too: Triton builds its launchers."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        return f"there is no C++ compiler {name!r}: apt install g++, or name another in the environment variable CXX"
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        return f"{include} lacks Python.h, which compiled parts include: apt install python3-dev"
    return ""


def backend(config: Config) -> str:
    """The backend of the op table that computes a resolved config for which this process is ``able``."""
    from tuili.ops import cpu

    if config.kernels == "reference":
        return "reference"
    if config.device == "cuda" or config.kernels == "triton":
        return "triton_invariant" if config.deterministic else "triton"
    return "cpu" if cpu.describe().built else "reference"


def arithmetic(config: Config, rounded: str = "") -> str:
    """In words, what a resolved config's weights are stored in, what is computed in, and by whom. ``rounded``: the
    method by which the checkpoint was quantized."""
    from tuili.ops import cpu

    scheme = scheme_of(config.quantization, config.quantization_group_size, config.dtype)
    stored = f"as {rounded} rounded them, others {config.dtype}" if rounded else str(scheme)
    kind = "fp8" if scheme.format == "fp8" else "int8"
    rounds = scheme.format != "dense" and not scheme.weight_only and (scheme.format != "int4" or not on_device(config))
    multiplied = f"multiplied by activations rounded to {kind}, all else " if rounds else ""
    names = {"cpu": f"the {cpu.describe().isa} kernels", "reference": "torch's references"}
    who = names.get(backend(config), "the Triton kernels")
    return f"weights {stored}, {multiplied}computed in {config.activation_dtype} by {who}"


def place_of(config: Config) -> str:
    """Where the tensors of a resolved config are, as torch calls it."""
    return "cuda" if config.device == "cuda" else "cpu"


def open_device(config: Config) -> Device:
    """The device of a resolved config."""
    from tuili.runtime.device import Cuda
    from tuili.runtime.host import Host, Interpreter

    if config.device == "cuda":
        return Cuda()
    return Interpreter() if on_device(config) else Host()
