"""A kernel's declaration becomes the function that is called: it checks what it is given, makes the outputs, writes the
struct down and calls. Written as Python source, once per kernel, so that a call pays for its own checks only.

A call that no kernel is for (another dtype of floats, a gradient that is wanted) goes to the torch reference. Any other
breach of the contract is a KernelError that names the op, the argument and what it is.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tuili.base.errors import KernelError
from tuili.ops.cpu import abi
from tuili.ops.cpu.contract import (
    CACHED,
    CACHES,
    FLOATS,
    IN_DTYPE,
    SCALES,
    STORAGE,
    STORED,
    Absent,
    Dtype,
    Kernel,
    Real,
    Size,
    Tensor,
)

#: How the C side calls the dtypes of a call.
CODES = {torch.float32: 0, torch.bfloat16: 1}
#: What the C side calls the numbers of a stored weight, how they lie, and of which activations it multiplies them.
STORES = {
    getattr(torch, name): (at.numbers, at.even, at.side, tuple(getattr(torch, dtype) for dtype in at.dtypes))
    for name, at in STORAGE.items()
}
KEPT = {dtype: how for dtype, how in STORES.items() if str(dtype).removeprefix("torch.") in CACHES}
#: Numbers that the C side adds and multiplies with others stay below this.
LARGE = 1 << 40


def bind(kernel: Kernel, launch: Callable[[bytes], None], reference: Callable[..., Any] | None) -> Callable[..., Any]:
    """The function of op ``kernel.name``; ``launch`` runs the kernel on a struct's bytes."""
    scope = {
        "codes": CODES,
        STORED: STORES,
        CACHED: KEPT,
        "nothing": (None, 1, 1, ()),
        "pack": abi.layout(kernel).pack,
        "launch": launch,
        "reference": reference,
        "empty": torch.empty,
        "grad_enabled": torch.is_grad_enabled,
        "unfit": lambda *args: _unfit(kernel, *args),
        "broken": lambda *args: _broken(kernel, *args),
        "unpackable": struct.error,
        **{f"{tensor.name}_told": tensor for tensor in _given(kernel)},
        **{f"{name}_": getattr(torch, name) for name in ("float32", "float64", "float16", "int64", "int8", "uint8")},
        "bool_": torch.bool,
    }
    source = "\n".join([f"def {kernel.name}({_parameters(kernel)}):", *(f"    {line}" for line in _body(kernel))])
    exec(compile(source, f"<kernel {kernel.name}>", "exec"), scope)
    function: Callable[..., Any] = scope[kernel.name]
    return function


def _unfit(kernel: Kernel, tensor: Tensor, have: torch.Tensor, known: dict[str, Any]) -> KernelError:
    words = [word for word in re.findall(r"[a-z_]+", tensor.shape) if isinstance(known.get(word), int)]
    sizes = ", ".join(f"{word}={known[word]}" for word in dict.fromkeys(words))
    dtype = str(known["dtype"]).removeprefix("torch.") if tensor.dtype == FLOATS else tensor.dtype
    dense = ", dense" if tensor.use == "written" else ""
    found = f"{str(have.dtype).removeprefix('torch.')} {list(have.shape)}" + (
        f" on {have.device}" if not have.is_cpu else "" if have.is_contiguous() else f" with strides {have.stride()}"
    )
    wanted = f"{dtype} [{tensor.shape}]{dense}, on the CPU" + (f", with {sizes}" if sizes else "")
    return KernelError(f"{kernel.name}: {tensor.name} is {found}; it has to be {wanted}")


def _broken(kernel: Kernel, law: str, known: dict[str, Any]) -> KernelError:
    words = dict.fromkeys(word for word in re.findall(r"[a-z_]+", law) if word in known)
    return KernelError(f"{kernel.name}: {', '.join(f'{word}={known[word]}' for word in words)}; it takes {law}")


# The source of a function --------------------------------------------------------------------------------------------


def _given(kernel: Kernel) -> list[Tensor]:
    return [a for a in kernel.arguments if isinstance(a, Tensor) and a.use != "made"]


def _made(kernel: Kernel) -> list[Tensor]:
    return [a for a in kernel.arguments if isinstance(a, Tensor) and a.use == "made"]


def _arguments(kernel: Kernel) -> list[Tensor | Size | Real | Dtype]:
    """What the caller gives."""
    return [
        a
        for a in kernel.arguments
        if not isinstance(a, Absent)
        and not (isinstance(a, Tensor) and a.use == "made")
        and not (isinstance(a, Size) and a.fixed is not None)
    ]


def _parameters(kernel: Kernel) -> str:
    """With defaults for those at the end that may be left out."""
    found, may = [], True
    for argument in reversed(_arguments(kernel)):
        default = getattr(argument, "default", None)
        may = may and (default is not None or getattr(argument, "optional", False))
        found.append(f"{argument.name}={default}" if may else argument.name)
    return ", ".join(reversed(found))


def _body(kernel: Kernel) -> Iterator[str]:
    yield from _choose(kernel)
    known = {a.name for a in kernel.arguments if isinstance(a, Size)}
    yield from (f"{a.name} = {a.fixed}" for a in kernel.arguments if isinstance(a, Size) and a.fixed is not None)
    later = []
    for tensor in _given(kernel):
        fresh = _fresh(tensor, known)
        known.update(name for name in fresh if name)
        yield from _bind(tensor, fresh)
        if not all(fresh) or tensor.optional or "2*" in tensor.shape:
            later.append(tensor)
    for law in kernel.holds:
        yield f"if not ({law}): raise broken({law!r}, locals())"
    for argument in kernel.arguments:
        if isinstance(argument, Size | Real) and argument.optional:
            yield f"if {argument.name} is None: {argument.name} = 0"
            law = f"0 < {argument.name} < {LARGE}"
            yield f"elif not {law}: raise broken({law!r}, locals())"
    for tensor in _given(kernel):
        yield from _guarded(tensor, _fit(kernel, tensor, tensor in later))
    yield from _launch(kernel)


def _choose(kernel: Kernel) -> Iterator[str]:
    """Whether the kernel is for this call, or the reference is."""
    floats = [tensor for tensor in _given(kernel) if tensor.dtype == FLOATS]
    passed = ", ".join(argument.name for argument in _arguments(kernel))
    other = []
    if any(isinstance(argument, Dtype) for argument in kernel.arguments):
        yield "code = codes.get(dtype)"
        other.append("code is None")
    elif floats:
        yield f"dtype = {floats[0].name}.dtype"
        yield "code = codes.get(dtype)"
        other += ["code is None", f"not {floats[0].name}.is_cpu"]
    for tensor in floats[1:]:
        differs = f"({tensor.name}.dtype is not dtype or not {tensor.name}.is_cpu)"
        other.append(f"({tensor.name} is not None and {differs})" if tensor.optional else differs)
    stored = [tensor for tensor in _given(kernel) if tensor.dtype in (STORED, CACHED)]
    if stored:
        yield f"numbers, even, side, multiplied = {stored[0].dtype}.get({stored[0].name}.dtype, nothing)"
        other += ["numbers is None"] + ["dtype not in multiplied"] * ("code is None" in other)
        other += [f"{tensor.name}.dtype is not {stored[0].name}.dtype" for tensor in stored[1:]]
    other += [f"{tensor.name}.dtype is not float16_" for tensor in _given(kernel) if tensor.dtype == SCALES]
    other += [f"{tensor.name}.ndim not in (2, 3)" for tensor in _given(kernel) if "?" in tensor.shape]
    for argument in kernel.arguments:
        if isinstance(argument, Size) and argument.choices:
            other.append(f"{argument.name} not in {argument.choices}")
    if other:
        yield f"if {' or '.join(other)}: return reference({passed})"
    wanted = [
        f"({tensor.name} is not None and {tensor.name}.requires_grad)"
        if tensor.optional
        else f"{tensor.name}.requires_grad"
        for tensor in floats
    ]
    if wanted:
        yield f"if grad_enabled() and ({' or '.join(wanted)}): return reference({passed})"
    for argument in kernel.arguments:
        if isinstance(argument, Size) and argument.choices:
            yield f"{argument.name} = {argument.choices}.index({argument.name})"


def _fresh(tensor: Tensor, known: set[str]) -> list[str]:
    """The sizes that this tensor is the first to tell, by dimension; "" where a dimension tells none."""
    if tensor.optional:
        return [""] * len(tensor.shape.split())
    if tensor.shape == "...":
        return ["" if "count" in known else "count"]
    words = [re.fullmatch(r"(?:2\*)?([a-z_]+)\??", word) for word in tensor.shape.split()]
    return [word[1] if word is not None and word[1] not in known | IN_DTYPE else "" for word in words]


def _bind(tensor: Tensor, fresh: list[str]) -> Iterator[str]:
    name, targets = tensor.name, [word or "_" for word in fresh]
    if not any(fresh):
        return
    if tensor.shape == "...":
        yield from (f"count = {name}.numel()", f"whole = {name}.shape")
    elif "?" in tensor.shape:
        yield f"if {name}.ndim == 3: {', '.join(targets)} = {name}.shape"
        yield f"else: ({targets[0]}, {targets[2]}), {targets[1]} = {name}.shape, 1"
    else:
        yield f"if {name}.ndim != {len(fresh)}: raise unfit({name}_told, {name}, locals())"
        yield f"{', '.join(targets)}{',' * (len(fresh) == 1)} = {name}.shape"
        yield from (f"{word[2:]} //= 2" for word in tensor.shape.split() if word.startswith("2*"))


def _size(word: str) -> str:
    """A word of a shape in Python: ``a/b*c`` from left to right, rounded up."""
    first, *rest = re.findall(r"[a-z_]+|\d+|[/*+]", word)
    source = first
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        source = f"-(-{source} // {term})" if operator == "/" else f"({source} {operator} {term})"
    return source


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(_size, tensor.shape.split()))},)"


def _guarded(tensor: Tensor, lines: Iterator[str]) -> Iterator[str]:
    if not tensor.optional:
        yield from lines
        return
    yield f"if {tensor.name} is not None:"
    yield from (f"    {line}" for line in lines)


def _fit(kernel: Kernel, tensor: Tensor, shape_too: bool) -> Iterator[str]:
    """Its dtype, shape and density."""
    name = tensor.name
    unfit = [] if tensor.dtype in (FLOATS, SCALES, STORED, CACHED) else [f"{name}.dtype is not {tensor.dtype}_"]
    unfit += [] if tensor.dtype == FLOATS else [f"not {name}.is_cpu"]
    if tensor.shape == "...":
        unfit.append(f"{name}.shape != whole")
    elif shape_too and "?" not in tensor.shape:
        unfit.append(f"{name}.shape != {_shape(tensor)}")
    refuse = f"raise unfit({name}_told, {name}, locals())"
    if tensor.use == "written":
        unfit.append(f"not {name}.is_contiguous()")
    if unfit:
        yield f"if {' or '.join(unfit)}: {refuse}"
    if tensor.use == "read":
        yield f"if not {name}.is_contiguous(): {name} = {name}.contiguous()"
    elif tensor.use == "rows":
        yield from _apart(tensor)


def _apart(tensor: Tensor) -> Iterator[str]:
    """How far rows are apart, which are dense themselves."""
    name, words = tensor.name, [word.strip("?") for word in tensor.shape.split()]
    last = f"last != 1 and {words[-1]} != 1"
    if len(words) == 2:
        yield f"{name}_stride, last = {name}.stride()"
        yield f"if {last}: {name} = {name}.contiguous(); {name}_stride = {words[1]}"
        return
    copy = f"{name} = {name}.contiguous(); {name}_stride = {words[1]} * {words[2]}"
    both = f"if ({last}) or (middle != {words[2]} and {words[1]} != 1): {copy}"
    if "?" not in tensor.shape:
        yield from (f"{name}_stride, middle, last = {name}.stride()", both)
        return
    yield f"if {name}.ndim == 3:"
    yield from (f"    {name}_stride, middle, last = {name}.stride()", f"    {both}")
    yield "else:"
    yield from (f"    {name}_stride, last = {name}.stride()", f"    if {last}: {copy}")


def _launch(kernel: Kernel) -> Iterator[str]:
    lead = _given(kernel)[0].name
    for tensor in _made(kernel):
        like = tensor.shape == "..." or "?" in tensor.shape
        dtype = "dtype" if tensor.dtype == FLOATS else f"{tensor.dtype}_"
        yield f"{tensor.name} = empty({f'{lead}.shape' if like else _shape(tensor)}, dtype={dtype})"
    at = []
    for pointer in abi.pointers(kernel):
        address = f"{pointer.name}.data_ptr()"
        if isinstance(pointer, Absent):
            address = "0"
        elif pointer.optional:
            address = f"0 if {pointer.name} is None else {address}"
        at.append(address)
    code = not any(isinstance(argument, Size) and argument.name == "dtype" for argument in kernel.arguments)
    values = ["code" if size == "dtype" and code else size for size in abi.sizes(kernel)] + abi.reals(kernel)
    yield f"try: args = pack({', '.join(at + values)})"
    yield "except (unpackable, OverflowError) as error: raise broken(str(error), locals()) from error"
    yield "launch(args)"
    if _made(kernel):
        yield f"return {', '.join(tensor.name for tensor in _made(kernel))}"
