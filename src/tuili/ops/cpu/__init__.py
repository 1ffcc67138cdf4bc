"""The op table's "cpu" backend: C++ kernels in a shared library (``src/``), where one was built for this machine.

``describe()`` says what runs; ``set_threads`` sizes the team. Without the library nothing registers and the references
compute.
"""

from tuili.ops.cpu.integer import int4_linear, int4_weight_linear, int8_linear, int8_weight_linear
from tuili.ops.cpu.library import LibrarySupport, Program, describe, recorded, set_threads, use_isa, wake
from tuili.ops.cpu.packed import Arena, pack, packed_embedding, packed_linear, unpack
from tuili.ops.cpu.packed import shape as packed_shape
from tuili.ops.cpu.probe import peak, read_bandwidth
from tuili.ops.cpu.store import store_floats, store_int4, store_int8

if describe().built:
    from tuili.ops.cpu import kernels  # noqa: F401 (registers them)

__all__ = [
    "Arena",
    "LibrarySupport",
    "Program",
    "describe",
    "int4_linear",
    "int4_weight_linear",
    "int8_linear",
    "int8_weight_linear",
    "pack",
    "packed_embedding",
    "packed_linear",
    "packed_shape",
    "peak",
    "read_bandwidth",
    "recorded",
    "set_threads",
    "store_floats",
    "store_int4",
    "store_int8",
    "unpack",
    "use_isa",
    "wake",
]
