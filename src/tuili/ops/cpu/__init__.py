"""The op table's "cpu" backend: C++ kernels in a shared library (``src/``), where one was built for this machine.

``describe()`` says what runs; ``set_threads`` sizes the team. Without the library nothing registers and the references
compute.
"""

from tuili.ops.cpu.integer import int4_linear, int8_linear
from tuili.ops.cpu.library import Description, describe, set_threads, use_isa
from tuili.ops.cpu.packed import Arena, pack, packed_embedding, packed_linear, unpack
from tuili.ops.cpu.packed import shape as packed_shape

if describe().built:
    from tuili.ops.cpu import kernels, sampling  # noqa: F401 (register them)

__all__ = [
    "Arena",
    "Description",
    "describe",
    "int4_linear",
    "int8_linear",
    "pack",
    "packed_embedding",
    "packed_linear",
    "packed_shape",
    "set_threads",
    "unpack",
    "use_isa",
]
