"""The shared library of CPU kernels: found, loaded and described here; where it is missing, ``why`` says why.

Built from ``src/`` by CMakeLists.txt with a plain C interface (``src/abi.h``): one struct of arguments per op.
Calls release the GIL. Nothing here is read from the environment. ``recorded`` writes calls down, and a ``Program`` of
them is made by one call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import c_char_p, c_double, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from tuili.base.errors import ConfigError, KernelError
from tuili.ops.cpu import abi
from tuili.ops.cpu.contract import KERNELS, LOCATE

PATH = Path(__file__).parent / "_kernels.so"
REBUILD = "rebuild it with `pip install -e .` in the checkout, or reinstall Tuili"


class ProgramCall(ctypes.Structure):
    """An entry of a program: a function's address and its arguments'."""

    _fields_ = [("function", c_void_p), ("args", c_void_p)]


class KernelFault(ctypes.Structure):
    """A value that a kernel refused."""

    _fields_ = [
        *((name, c_char_p) for name in ("kernel", "argument")),
        ("at", c_int64),
        *((name, c_double) for name in ("value", "low", "high")),
    ]

    def error(self) -> KernelError:
        kernel, argument = self.kernel.decode(), self.argument.decode()
        return KernelError(
            f"{kernel}: element {self.at} of {argument} is {self.value:g}, outside of {self.low:g} to {self.high:g}"
        )


@dataclass(frozen=True)
class LibrarySupport:
    """What runs: ``isa`` is "" where nothing does, and ``why`` then says why."""

    isa: str
    threads: int
    why: str

    @property
    def built(self) -> bool:
        return bool(self.isa)


def _declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the library's functions."""
    for kernel in (*KERNELS, LOCATE):
        call = getattr(library, f"tuili_{kernel.function}")
        call.argtypes, call.restype = [c_char_p], c_void_p
    library.tuili_probe_read.argtypes, library.tuili_probe_read.restype = [c_void_p, c_int64, c_int64], None
    library.tuili_probe_multiply.argtypes, library.tuili_probe_multiply.restype = [c_int64, c_int64], c_int64
    library.tuili_replay.argtypes, library.tuili_replay.restype = [ctypes.POINTER(ProgramCall), c_int64], c_void_p
    library.tuili_isa.restype = c_char_p
    library.tuili_use_isa.argtypes = [c_char_p]


def _load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    if not path.is_file():
        return None, (
            f"{path.name} was not built: the package was installed without a C++ compiler, or not on Linux x86-64. "
            "Install g++ (12 or newer) and reinstall Tuili; until then torch computes"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path} does not load ({error}); reinstall Tuili"
    if _version(library) != abi.version():
        return None, f"{path} was built from other sources than these; {REBUILD}; until then torch computes"
    _declare(library)
    if not library.tuili_isa():
        return None, "this CPU has neither AVX2 with FMA nor AVX-512 with VNNI and BF16; torch computes"
    return library, ""


def _version(library: ctypes.CDLL) -> str:
    """Of the C boundary that the library was built for; "" where it does not say."""
    try:
        told = library.tuili_abi
    except AttributeError:
        return ""
    told.restype = c_char_p
    return str(told().decode())


library, why = _load(PATH)


#: A call: the address of the kernel's function, and its struct.
Made = tuple[int, bytes]
_recording: ContextVar[list[Made] | None] = ContextVar("recording", default=None)


def launcher(function: str) -> Callable[[bytes], None]:
    """Runs kernel ``function`` on a struct's bytes. KernelError for a value that it refuses."""
    assert library is not None
    call = getattr(library, f"tuili_{function}")
    address, recording = ctypes.cast(call, c_void_p).value or 0, _recording.get

    def launch(args: bytes) -> None:
        fault = call(args)
        if fault:
            raise KernelFault.from_address(fault).error()
        calls = recording()
        if calls is not None:
            calls.append((address, args))

    return launch


@contextmanager
def recorded() -> Iterator[list[Made]]:
    """The calls that this thread makes in the block, in order. What their pointers mean is the caller's to keep."""
    calls: list[Made] = []
    token = _recording.set(calls)
    try:
        yield calls
    finally:
        _recording.reset(token)


class Program:
    """Recorded calls, made again by one call that releases the GIL: on the same memory, whatever is in it then. They
    were checked when they were recorded; values are checked each time."""

    def __init__(self, calls: Sequence[Made]):
        self._args = [args for _, args in calls]  # the library reads them where they are
        entries = (ProgramCall(address, ctypes.cast(c_char_p(args), c_void_p)) for address, args in calls)
        self._calls = (ProgramCall * len(calls))(*entries)

    def __len__(self) -> int:
        return len(self._calls)

    def run(self) -> None:
        """KernelError for a value that a kernel refuses; the calls after it were not made then."""
        assert library is not None
        fault = library.tuili_replay(self._calls, len(self._calls))
        if fault:
            raise KernelFault.from_address(fault).error()


def wake() -> None:
    """Let the team watch for work that comes within some microseconds, which spares its first op the waking."""
    assert library is not None
    library.tuili_wake()


def describe() -> LibrarySupport:
    if library is None:
        return LibrarySupport("", 0, why)
    return LibrarySupport(library.tuili_isa().decode(), library.tuili_threads(), "")


def set_threads(threads: int) -> None:
    """The size of the team that computes, the caller included."""
    if threads < 1:
        raise ConfigError(f"threads={threads}: at least 1 thread must compute")
    if library is not None:
        library.tuili_set_threads(threads)


def use_isa(name: str) -> None:
    """Choose "avx512" or "avx2" ("" for the best there is). ConfigError where the machine has it not."""
    if library is None or not library.tuili_use_isa(name.encode()):
        raise ConfigError(f"isa={name!r} can not run here: {why or 'this CPU does not have it'}")
