"""The shared library of CPU kernels: found, loaded and described here; where it is missing, ``why`` says why.

Built from ``src/`` by CMakeLists.txt with a plain C interface (``src/abi.h``): one struct of arguments per op.
Calls release the GIL. Nothing here is read from the environment. ``recorded`` writes calls down, and a ``Program`` of
them is made by one call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from tuili.base.errors import ConfigError

PATH = Path(__file__).parent / "_kernels.so"


def _struct(name: str, pointers: str, sizes: str, floats: str = "") -> type[ctypes.Structure]:
    fields = [
        *((field, c_void_p) for field in pointers.split()),
        *((field, c_int64) for field in sizes.split()),
        *((field, c_float) for field in floats.split()),
    ]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# In the order of abi.h.
LinearArgs = _struct("LinearArgs", "x weight bias out", "rows inputs outputs x_stride dtype")
QuantizedArgs = _struct(
    "QuantizedArgs",
    "x weight scales zeros bias out",
    "rows inputs outputs x_stride dtype bits group values factors sums",
)
GatherArgs = _struct("GatherArgs", "weight ids out", "count inputs dtype")
AttentionArgs = _struct(
    "AttentionArgs",
    "q k v out table query_start context_len k_scales v_scales",
    "requests table_stride block_size heads kv_heads dim dtype q_stride window",
    "scale softcap",
)
NormArgs = _struct("NormArgs", "x weight out", "rows heads dim x_stride dtype", "eps offset")
RotateArgs = _struct("RotateArgs", "x cos sin out", "rows heads dim half x_stride dtype")
GatedArgs = _struct("GatedArgs", "x out", "rows dim activation dtype")
AddArgs = _struct("AddArgs", "a b out", "rows dim dtype")
ScaleArgs = _struct("ScaleArgs", "x out", "rows dim dtype", "factor")
SoftcapArgs = _struct("SoftcapArgs", "x out", "rows dim dtype", "cap")
EmbeddingArgs = _struct("EmbeddingArgs", "weight ids out", "count bytes")
StoreArgs = _struct("StoreArgs", "matrix tiles scales zeros", "rows inputs stride dtype bits group")
LookupArgs = _struct("LookupArgs", "tiles scales zeros ids out", "count inputs dtype bits group")
ArgmaxArgs = _struct("ArgmaxArgs", "logits ids finite", "rows vocab stride dtype")
DrawArgs = _struct("DrawArgs", "logits temperature min_p top_k top_p uniform ids finite", "rows vocab stride dtype")
LogprobsArgs = _struct("LogprobsArgs", "logits tokens chosen rank top_values top_ids", "rows vocab stride dtype count")
WriteArgs = _struct(
    "WriteArgs",
    "k v k_cache v_cache slots k_scales v_scales",
    "count heads dim block_size k_stride v_stride dtype",
)

CALLS = {
    "linear": LinearArgs,
    "quantized": QuantizedArgs,
    "weight_only": QuantizedArgs,
    "gather": GatherArgs,
    "attention": AttentionArgs,
    "rms_norm": NormArgs,
    "rotate": RotateArgs,
    "gated": GatedArgs,
    "add": AddArgs,
    "scale": ScaleArgs,
    "softcap": SoftcapArgs,
    "embedding": EmbeddingArgs,
    "write_kv": WriteArgs,
    "store": StoreArgs,
    "lookup": LookupArgs,
    "argmax": ArgmaxArgs,
    "draw": DrawArgs,
    "logprobs": LogprobsArgs,
}
# No op of the table, but part of captured steps.
LocateArgs = _struct("LocateArgs", "positions rows blocks slots context table", "count stride block_size")
CALLS["locate"] = LocateArgs


class Call(ctypes.Structure):
    """An entry of a program: a function's address and its arguments'."""

    _fields_ = [("function", c_void_p), ("args", c_void_p)]


@dataclass(frozen=True)
class Description:
    """What runs: ``isa`` is "" where nothing does, and ``why`` then says why."""

    isa: str
    threads: int
    why: str

    @property
    def built(self) -> bool:
        return bool(self.isa)


def _declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the library's functions. AttributeError: it lacks one."""
    for name, struct in CALLS.items():
        call = getattr(library, f"tuili_{name}")
        call.argtypes, call.restype = [ctypes.POINTER(struct)], None
    library.tuili_probe_read.argtypes, library.tuili_probe_read.restype = [c_void_p, c_int64, c_int64], None
    library.tuili_probe_multiply.argtypes, library.tuili_probe_multiply.restype = [c_int64, c_int64], c_int64
    library.tuili_replay.argtypes, library.tuili_replay.restype = [ctypes.POINTER(Call), c_int64], None
    library.tuili_isa.restype = ctypes.c_char_p
    library.tuili_use_isa.argtypes = [ctypes.c_char_p]


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
    try:
        _declare(library)
    except AttributeError as error:
        return None, f"{path} was built from other sources ({error}); reinstall Tuili, until then torch computes"
    if not library.tuili_isa():
        return None, "this CPU has neither AVX2 with FMA nor AVX-512 with VNNI and BF16; torch computes"
    return library, ""


library, why = _load(PATH)


#: A call: the kernel's name and its arguments.
Made = tuple[str, ctypes.Structure]
_recording: ContextVar[list[Made] | None] = ContextVar("recording", default=None)


def call(name: str, args: ctypes.Structure) -> None:
    """Run kernel ``name``; only reached where the library is there."""
    getattr(library, f"tuili_{name}")(args)
    calls = _recording.get()
    if calls is not None:
        calls.append((name, args))


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
    """Recorded calls, made again by one call that releases the GIL: on the same memory, whatever is in it then."""

    def __init__(self, calls: Sequence[Made]):
        self._args = [args for _, args in calls]  # the library reads them where they are
        self._calls = (Call * len(calls))(*(Call(_address(name), ctypes.addressof(args)) for name, args in calls))

    def __len__(self) -> int:
        return len(self._calls)

    def run(self) -> None:
        assert library is not None
        library.tuili_replay(self._calls, len(self._calls))


def wake() -> None:
    """Let the team watch for work that comes within some microseconds, which spares its first op the waking."""
    assert library is not None
    library.tuili_wake()


def _address(name: str) -> int | None:
    return ctypes.cast(getattr(library, f"tuili_{name}"), c_void_p).value


def describe() -> Description:
    if library is None:
        return Description("", 0, why)
    return Description(library.tuili_isa().decode(), library.tuili_threads(), "")


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
