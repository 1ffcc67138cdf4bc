"""The first card is found by the driver's libraries, whatever of them is there; here they are fakes."""

from __future__ import annotations

import ctypes
import uuid
from typing import Any

import pytest

from tuili.base import gpu, hardware
from tuili.base.gpu import Card, find

FIRST, SECOND = uuid.UUID(int=1), uuid.UUID(int=2)


class Driver:
    """libcuda of a machine with ``cards``: names, bytes and uuids, in CUDA's order."""

    def __init__(self, *cards: tuple[str, int, uuid.UUID], broken: str = ""):
        self.cards, self.broken = cards, broken

    def cuInit(self, flags: int) -> int:
        return 100 if self.broken == "cuInit" else 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.cards)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        assert len(self.cards[device.value][0]) < length
        name.value = self.cards[device.value][0].encode()
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:
        size._obj.value = self.cards[device.value][1]
        return 0

    def cuDeviceGetUuid(self, id: Any, device: Any) -> int:
        id.raw = self.cards[device.value][2].bytes
        return 1 if self.broken == "cuDeviceGetUuid" else 0


class Management:
    """NVML that knows the free bytes of devices by the names it gives them."""

    def __init__(self, free: dict[str, int], broken: bool = False):
        self.free, self.broken, self.names, self.open = free, broken, list(free), 0

    def nvmlInit_v2(self) -> int:
        self.open += not self.broken
        return 999 if self.broken else 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        if name.decode() not in self.free:
            return 6
        handle._obj.value = 1 + self.names.index(name.decode())
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.free = self.free[self.names[handle.value - 1]]
        return 0


def libraries(cuda: Driver | None, nvml: Management | None = None) -> Any:
    def load(name: str) -> Any:
        found = {"libcuda.so.1": cuda, "libnvidia-ml.so.1": nvml}[name]
        if found is None:
            raise OSError(f"{name}: cannot open shared object file")
        return found

    return load


TWO = Driver(("H200", 141 << 30, FIRST), ("A100", 80 << 30, SECOND))


@pytest.mark.parametrize(
    "cuda",
    [None, Driver(("H200", 1, FIRST), broken="cuInit"), Driver(), Driver(("H200", 1, FIRST), broken="cuDeviceGetUuid")],
)
def test_without_driver_card_or_answer_there_is_none(cuda: Driver | None) -> None:
    assert find(libraries(cuda)) is None


def test_free_memory_is_of_the_card_that_cuda_takes_first() -> None:
    """NVML numbers the cards otherwise than CUDA: only the uuid tells which is meant."""
    nvml = Management({f"GPU-{SECOND}": 5 << 30, f"GPU-{FIRST}": 99 << 30})
    assert find(libraries(TWO, nvml)) == Card("H200", 141 << 30, 99 << 30, count=2)
    assert nvml.open == 0, "NVML is shut again"


def test_a_part_of_a_card_is_found_under_its_own_name() -> None:
    nvml = Management({f"GPU-{SECOND}": 5 << 30, f"MIG-{FIRST}": 7 << 30})
    assert find(libraries(Driver(("H200 MIG 1g", 16 << 30, FIRST)), nvml)) == Card("H200 MIG 1g", 16 << 30, 7 << 30)


@pytest.mark.parametrize("nvml", [None, Management({}, broken=True), Management({f"GPU-{SECOND}": 1})])
def test_where_nvml_says_nothing_all_memory_counts_as_free(nvml: Management | None) -> None:
    assert find(libraries(TWO, nvml)) == Card("H200", 141 << 30, 141 << 30, count=2)


def test_the_structure_is_nvmls() -> None:
    assert ctypes.sizeof(gpu._NvmlMemory) == 24
    assert [gpu._NvmlMemory.total.offset, gpu._NvmlMemory.free.offset, gpu._NvmlMemory.used.offset] == [0, 8, 16]


def test_probe_tells_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.gpu, "find", lambda: Card("H200", 141 << 30, 99 << 30))
    here = hardware.probe()
    assert (here.gpu, here.gpu_memory, here.gpu_free) == ("H200", 141 << 30, 99 << 30)
    monkeypatch.setattr(hardware.gpu, "find", lambda: None)
    assert (hardware.probe().gpu, hardware.probe().gpu_memory) == (None, 0)
