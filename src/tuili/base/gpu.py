"""The NVIDIA card that CUDA takes first here, asked of the driver's own libraries: no torch, no context, no subprocess.

The CUDA driver says which card that is (it knows CUDA_VISIBLE_DEVICES and its own order), NVML what is free on it.
Function names and signatures: CUDA Driver API and NVML API references, docs.nvidia.com.
"""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tuili.base.log import get

log = get(__name__)
#: Opens a shared library by name, as ``ctypes.CDLL`` does: OSError where there is none.
Open = Callable[[str], Any]


@dataclass(frozen=True)
class Card:
    """``total`` and ``free`` memory in bytes; ``count`` of the cards that CUDA shows to this process."""

    name: str
    total: int
    free: int
    count: int = 1


class _Refused(Exception):
    """A call into a driver library that did not answer 0."""


class _NvmlMemory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def find(load: Open = ctypes.CDLL) -> Card | None:
    """The first card that CUDA would use; None where there is no driver, no card, or none visible.

    Without NVML (containers may lack it) all of the card's memory counts as free.
    """
    try:
        cuda = load("libcuda.so.1")
    except OSError:
        return None
    try:
        _call(cuda, "cuInit", 0)
        count, device, total = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        _call(cuda, "cuDeviceGetCount", ctypes.byref(count))
        if not count.value:
            return None
        _call(cuda, "cuDeviceGet", ctypes.byref(device), 0)
        name, id = ctypes.create_string_buffer(256), ctypes.create_string_buffer(16)
        _call(cuda, "cuDeviceGetName", name, len(name), device)
        _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(total), device)
        _call(cuda, "cuDeviceGetUuid", id, device)
    except _Refused as error:
        log.debug("no card: the NVIDIA driver answers %s", error)
        return None
    free = _free(load, uuid.UUID(bytes=id.raw))
    return Card(name.value.decode(errors="replace"), total.value, total.value if free is None else free, count.value)


def _free(load: Open, id: uuid.UUID) -> int | None:
    """Free bytes of the card (or its part) ``id``; None where NVML does not say."""
    try:
        nvml = load("libnvidia-ml.so.1")
    except OSError:
        return None
    try:
        _call(nvml, "nvmlInit_v2")
    except _Refused:
        return None
    try:
        for kind in ("GPU", "MIG"):
            handle, memory = ctypes.c_void_p(), _NvmlMemory()
            try:
                _call(nvml, "nvmlDeviceGetHandleByUUID", f"{kind}-{id}".encode(), ctypes.byref(handle))
                _call(nvml, "nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
            except _Refused:
                continue
            return memory.free
        return None
    finally:
        nvml.nvmlShutdown()


def _call(library: Any, function: str, *arguments: Any) -> None:
    code = getattr(library, function)(*arguments)
    if code:
        raise _Refused(f"{function}: {code}")
