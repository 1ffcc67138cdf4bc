"""Hardware counters of a process through perf_event_open(2), where the kernel lets us: instructions, cycles, cache
misses. Where it does not, ``why`` says why and nothing is counted."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from pathlib import Path

#: Of PERF_TYPE_HARDWARE (0), in the numbers of linux/perf_event.h.
EVENTS = {"cycles": 0, "instructions": 1, "cache_references": 2, "cache_misses": 3}
#: The system call's number.
SYSCALL = {"x86_64": 298, "aarch64": 241}
#: Of struct perf_event_attr: its first published size, and the flags inherit, exclude_kernel and exclude_hv.
ATTR_BYTES, FLAGS = 64, 1 << 1 | 1 << 5 | 1 << 6


class Counters:
    """Of all threads that ``pid`` has now and of what they start later; user space only."""

    def __init__(self, pid: int):
        self.why = ""
        self._files: dict[str, list[int]] = {}
        number = SYSCALL.get(platform.machine())
        if number is None or not Path("/proc/sys/kernel/perf_event_paranoid").exists():
            self.why = "this system has no perf_event_open"
            return
        try:
            threads = [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
        except FileNotFoundError:
            self.why = f"process {pid} has ended"
            return
        for name, event in EVENTS.items():
            opened = [_open(number, event, thread) for thread in threads]
            self._files[name] = [file for file in opened if file >= 0]
            if not self._files[name]:
                del self._files[name]
                self.why = self.why or f"the kernel does not let us count {name}: {os.strerror(-opened[0])}"

    def read(self) -> dict[str, int]:
        """Counts since the start, by name, of what could be opened."""
        return {name: sum(_count(file) for file in files) for name, files in self._files.items()}

    def close(self) -> None:
        for files in self._files.values():
            for file in files:
                os.close(file)
        self._files = {}


def _open(number: int, event: int, thread: int) -> int:
    """A file that counts, or the negative error number."""
    attr = struct.pack("IIQQQQQ", 0, ATTR_BYTES, event, 0, 0, 0, FLAGS).ljust(ATTR_BYTES, b"\0")
    libc = ctypes.CDLL(None, use_errno=True)
    file = libc.syscall(number, ctypes.c_char_p(attr), thread, -1, -1, 0)
    return file if file >= 0 else -ctypes.get_errno()


def _count(file: int) -> int:
    return int.from_bytes(os.read(file, 8), "little")
