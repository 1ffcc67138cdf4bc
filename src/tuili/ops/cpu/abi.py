"""The C boundary as ``contract.py`` tells it: ``src/abi.h``, and how Python writes the same structs.

``make abi`` writes the header anew (a test holds it). A library says which header it was built from.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from struct import Struct

from tuili.ops.cpu.contract import CACHED, FLOATS, IN_DTYPE, KERNELS, LOCATE, STORED, Absent, Kernel, Real, Size, Tensor

HEADER = Path(__file__).parent / "src" / "abi.h"
#: In C++.
C_TYPES = {"int64": "int64_t", "float32": "float", "float64": "double", "bool": "uint8_t"}

PREAMBLE = """\
// Written by `make abi` from contract.py: change that. What crosses the C boundary: one plain struct
// of arguments per op, passed by pointer, so that a call can be recorded (copy the struct) and replayed. Python checks
// shapes and dtypes before it calls; what only the values tell, a kernel checks itself. Sizes and strides in elements;
// dtype 0 is float32, 1 is bfloat16; numbers: what a weight or a cache is made of, as contract.py says. A size that an
// op may leave out is then 0.
#pragma once
#include <stdint.h>

extern "C" {

// A value that is outside of [low, high]: element `at` of an argument. Null stands for "there is none".
struct Fault {
    const char *kernel, *argument;
    int64_t at;
    double value, low, high;
};

// One call of a recorded program: a function of this library and its arguments.
struct Call {
    const Fault* (*function)(const void* args);
    const void* args;
};
"""
CHECKS = """}

// This thread's fault, until its next.
const Fault* fault(const char* kernel, const char* argument, int64_t at, double value, double low, double high);

// The first of `n` values that is not in [low, high].
template <class T>
inline const Fault* outside(const char* kernel, const char* argument, const T* values, int64_t n, T low, T high) {
    for (int64_t i = 0; i < n; i++) {
        T x = values[i];
        if (!(x >= low && x <= high)) return fault(kernel, argument, i, (double)x, (double)low, (double)high);
    }
    return nullptr;
}
"""


def pointers(kernel: Kernel) -> list[Tensor | Absent]:
    return [argument for argument in kernel.arguments if isinstance(argument, Tensor | Absent)]


def sizes(kernel: Kernel) -> list[str]:
    """The whole numbers of a kernel's struct, sorted: of shapes, of strides, and those that are arguments."""
    tensors = [tensor for tensor in pointers(kernel) if isinstance(tensor, Tensor)]
    words = {word for tensor in tensors for word in re.findall(r"[a-z_]+", tensor.shape)} - IN_DTYPE
    words |= {f"{tensor.name}_stride" for tensor in tensors if tensor.use == "rows"}
    words |= {argument.name for argument in kernel.arguments if isinstance(argument, Size)}
    words |= {"count" for tensor in tensors if tensor.shape == "..."}
    words |= {"numbers" for tensor in tensors if tensor.dtype in (STORED, CACHED)}
    return sorted(words | {"dtype" for tensor in tensors if tensor.dtype == FLOATS})


def reals(kernel: Kernel) -> list[str]:
    return [argument.name for argument in kernel.arguments if isinstance(argument, Real)]


def layout(kernel: Kernel) -> Struct:
    """Writes the struct: pointers, sizes, floats; as long as C makes it."""
    return Struct(f"@{len(pointers(kernel))}P{len(sizes(kernel))}q{len(reals(kernel))}f0q")


def header() -> str:
    """The text of ``src/abi.h``."""
    by_struct = groupby(sorted((*KERNELS, LOCATE), key=lambda kernel: kernel.struct), lambda kernel: kernel.struct)
    kernels = [list(group) for _, group in by_struct]
    functions = sorted({(kernel.function, kernel.struct) for kernel in (*KERNELS, LOCATE)})
    parts = [PREAMBLE, *(_struct(group) for group in kernels)]
    parts.append("".join(f"const Fault* tuili_{name}(const {struct}*);\n" for name, struct in functions) + CHECKS)
    parts += [check for group in kernels for check in _check(group[0])]
    text = "\n".join(parts)
    return f'{text}\n#define TUILI_ABI "{_digest(text)}"\n'


def version() -> str:
    """What a library of this contract answers."""
    return header().rsplit('"', 2)[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _struct(kernels: list[Kernel]) -> str:
    """The struct that these kernels share. AssertionError where they do not agree."""
    first = kernels[0]
    assert all([p.name for p in pointers(k)] == [p.name for p in pointers(first)] for k in kernels), first.struct
    assert all((sizes(k), reals(k)) == (sizes(first), reals(first)) for k in kernels), first.struct
    lines = [f"// {', '.join(kernel.name for kernel in kernels)}.", f"struct {first.struct} {{"]
    for same in zip(*(pointers(kernel) for kernel in kernels), strict=True):
        lines.append(_pointer([tensor for tensor in same if isinstance(tensor, Tensor)]))
    lines.append(f"    int64_t {', '.join(sizes(first))};")
    if reals(first):
        lines.append(f"    float {', '.join(reals(first))};")
    return "\n".join([*lines, "};\n"])


def _pointer(tensors: list[Tensor]) -> str:
    kinds = {C_TYPES.get(tensor.dtype, "void") for tensor in tensors}
    kind = kinds.pop() if len(kinds) == 1 else "void"
    const = "" if tensors[0].use in ("written", "made") else "const "
    shapes = dict.fromkeys(f"[{tensor.shape}]{' or none' * tensor.optional}" for tensor in tensors)
    return f"    {const}{kind}* {tensors[0].name};  // {'; '.join(shapes)}"


def _check(kernel: Kernel) -> Iterator[str]:
    """The values of a kernel's struct are in their ranges."""
    held = [tensor for tensor in pointers(kernel) if isinstance(tensor, Tensor) and tensor.high]
    if not held:
        return
    lines = [f"inline const Fault* check(const {kernel.struct}& a) {{", "    const Fault* found = nullptr;"]
    for tensor in held:
        kind = C_TYPES[tensor.dtype]
        count = " * ".join(f"a.{word}" for word in tensor.shape.split())
        low, high = (re.sub(r"\b([a-z_]\w*)", r"a.\1", bound) for bound in (tensor.low, tensor.high))
        call = f'outside<{kind}>("{kernel.function}", "{tensor.name}", a.{tensor.name}, {count}, {low}, {high})'
        lines.append(f"    if (!found) found = {call};")
    yield "\n".join([*lines, "    return found;", "}\n"])
