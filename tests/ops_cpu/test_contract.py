"""The contract of the CPU kernels: whatever a call gives them, they compute what the reference computes, or refuse it
by name. One test per kernel, argument and breach, from the table itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tuili import ops
from tuili.base.errors import KernelError
from tuili.ops import cpu
from tuili.ops.cpu import abi, library
from tuili.ops.cpu.contract import CACHED, FLOATS, KERNELS, SCALES, STORED, Kernel, Size, Tensor

pytestmark = pytest.mark.skipif(not cpu.describe().built, reason=f"the C++ kernels: {cpu.describe().why}")

OTHER = {"int64": torch.int32, "float32": torch.float64, "float64": torch.float32, "uint8": torch.int8}
OTHER |= {"int8": torch.uint8}
Arguments = dict[str, Any]
TORCHS = RuntimeError, IndexError, ValueError


def arguments(kernel: Kernel, which: int = 0) -> Arguments:
    """Of the op's sample ``which``, by name; tensors that may be left out are there where any sample has them."""
    names = list(inspect.signature(ops.table[kernel.name].reference).parameters)
    for sample in (*ops.table[kernel.name].samples()[which:], *ops.table[kernel.name].samples()[:which]):
        args, kwargs = sample.make(torch.Generator().manual_seed(0))
        found = dict(zip(names, args, strict=False)) | kwargs
        if all(found.get(tensor.name) is not None for tensor in given(kernel)):
            return found
    raise AssertionError(f"no sample of {kernel.name} has all its tensors")


def given(kernel: Kernel) -> list[Tensor]:
    return [a for a in kernel.arguments if isinstance(a, Tensor) and a.use != "made"]


def copied(found: Arguments) -> Arguments:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in found.items()}


def run(function: Callable[..., Any], found: Arguments) -> list[torch.Tensor]:
    """What it returns, and its arguments after it."""
    out = function(**found)
    made = out if isinstance(out, tuple) else () if out is None else (out,)
    return [*made, *(value for value in found.values() if isinstance(value, torch.Tensor))]


def same(have: list[torch.Tensor], want: list[torch.Tensor], entry: ops.Op[..., Any]) -> bool:
    """Within what the op's tests allow."""
    for a, b in zip(have, want, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.numel() == 0:
            continue
        loose = max(entry.tolerance, 1e-5) if a.dtype != torch.bfloat16 else 2**-7
        if not torch.allclose(a.double(), b.double(), rtol=loose, atol=loose * max(1.0, float(b.double().abs().max()))):
            return False
    return True


def refused_or_right(kernel: Kernel, found: Arguments) -> str:
    """The message of the refusal, or "" where the result is the reference's."""
    entry = ops.table[kernel.name]
    wanted = copied(found)
    try:
        have = run(entry.implementations["cpu"], found)
    except KernelError as error:
        return str(error)
    except TORCHS as error:  # the reference was asked
        with pytest.raises(type(error)):
            run(entry.reference, wanted)
        return str(error)
    try:
        want = run(entry.reference, wanted)
    except TORCHS:
        assert have[0].numel() == 0, "torch can not do it"  # torch finds no shape for nothing
        return ""
    assert same(have, want, entry), "a wrong result"
    return ""


def each_tensor(*uses: str) -> list[Any]:
    return [
        pytest.param(kernel, tensor, id=f"{kernel.name}-{tensor.name}")
        for kernel in KERNELS
        for tensor in given(kernel)
        if tensor.use in uses
    ]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_has_the_arguments_of_its_op(kernel: Kernel) -> None:
    entry = ops.table[kernel.name]
    reference = inspect.signature(entry.reference).parameters
    names = [name for name in reference if name in {a.name for a in kernel.arguments}]
    assert names == list(reference)
    assert refused_or_right(kernel, arguments(kernel)) == ""


@pytest.mark.parametrize(("kernel", "tensor"), each_tensor("read", "rows", "written"))
def test_another_dtype(kernel: Kernel, tensor: Tensor) -> None:
    """Floats of the call's dtype may be others for the reference; everything else is refused."""
    found = arguments(kernel)
    if tensor.dtype in (FLOATS, SCALES, STORED, CACHED):
        wide = [t.name for t in given(kernel) if t.dtype == tensor.dtype]
        found |= {name: found[name].double() for name in wide}
        entry = ops.table[kernel.name]
        wanted = run(entry.reference, copied(found))
        assert same(run(entry.implementations["cpu"], found), wanted, entry)
        return
    found[tensor.name] = found[tensor.name].to(OTHER[tensor.dtype])
    assert f"{tensor.name} is {OTHER[tensor.dtype]}".replace("torch.", "") in refused_or_right(kernel, found)
    found[tensor.name] = torch.empty(arguments(kernel)[tensor.name].shape, device="meta")
    assert f"{tensor.name} is" in refused_or_right(kernel, found)


def other_shapes(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Longer and shorter in each dimension; empty; with a dimension more, and less."""
    for dim in range(tensor.dim()):
        yield torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim)
        yield tensor.narrow(dim, 0, tensor.shape[dim] - 1).contiguous()
        yield tensor.narrow(dim, 0, 0).contiguous()
    yield tensor.unsqueeze(0)
    yield tensor[0].contiguous() if len(tensor) else tensor.flatten()


@pytest.mark.parametrize(("kernel", "tensor"), each_tensor("read", "rows", "written"))
def test_another_shape(kernel: Kernel, tensor: Tensor) -> None:
    others = other_shapes(arguments(kernel)[tensor.name])
    refusals = [refused_or_right(kernel, copied(arguments(kernel)) | {tensor.name: other}) for other in others]
    assert any(refusals) or tensor.shape == "..."


def apart(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The same values: rows with something between, elements with something between, and turned in memory."""
    wide = torch.empty(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype)
    yield wide[..., : tensor.shape[-1]].copy_(tensor)
    twice = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    yield twice[..., ::2].copy_(tensor)
    yield tensor.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize(("kernel", "tensor"), each_tensor("read", "rows"))
def test_strides_change_no_bit(kernel: Kernel, tensor: Tensor) -> None:
    product = ops.table[kernel.name].implementations["cpu"]
    want = run(product, copied(arguments(kernel)))
    for strided in apart(arguments(kernel)[tensor.name]):
        have = run(product, copied(arguments(kernel)) | {tensor.name: strided})
        assert all(map(torch.equal, have, want)), strided.stride()


@pytest.mark.parametrize(("kernel", "tensor"), each_tensor("written"))
def test_what_is_written_to_is_dense(kernel: Kernel, tensor: Tensor) -> None:
    for strided in apart(arguments(kernel)[tensor.name]):
        if not strided.is_contiguous():
            assert "dense" in refused_or_right(kernel, arguments(kernel) | {tensor.name: strided})


@pytest.mark.parametrize(
    ("kernel", "size"),
    [
        pytest.param(kernel, argument.name, id=f"{kernel.name}-{argument.name}")
        for kernel in KERNELS
        for argument in kernel.arguments
        if isinstance(argument, Size) and argument.fixed is None and not argument.choices
    ],
)
def test_another_size(kernel: Kernel, size: str) -> None:
    value = arguments(kernel).get(size) or 24
    for other in (value - 1, value + 1, value + 16, 2 * value, 0, -1, -20, 10**6, 1 << 62, 10**30):
        found = arguments(kernel) | {size: other}
        if size == "window" and other >= value:
            assert refused_or_right(kernel, found) == "" or other > 1 << 40
        else:
            refused_or_right(kernel, found)
    assert refused_or_right(kernel, arguments(kernel) | {size: 10**6 if size != "window" else 0})


def bad_values(tensor: Tensor, values: torch.Tensor) -> list[float]:
    if tensor.dtype == "int64":
        return [-1, -(1 << 62), 1 << 62, 10**6]
    return [-0.5, float("nan"), float("inf"), -float("inf")]


HELD = [
    pytest.param(kernel, name, id=f"{kernel.name}-{name}")
    for kernel in KERNELS
    for name in [t.name for t in given(kernel) if t.high]
    + (["block_table", "query_start", "context_len"] if kernel.function == "attention" else [])
]


@pytest.mark.parametrize(("kernel", "name"), HELD)
def test_values_out_of_range_are_refused(kernel: Kernel, name: str) -> None:
    tensor = next(t for t in given(kernel) if t.name == name)
    plain = arguments(kernel)
    for bad in bad_values(tensor, plain[name]):
        for at in {0, plain[name].numel() - 1}:
            found = copied(plain)
            found[name].view(-1)[at] = bad
            before = copied(found)
            with pytest.raises(KernelError, match=rf"{kernel.function}: element \d+ of \w+ is \S+, outside of "):
                ops.table[kernel.name].implementations["cpu"](**found)
            for key, value in before.items():  # nothing was written
                if isinstance(value, torch.Tensor) and key != name:
                    assert torch.equal(found[key], value)


def test_the_first_id_outside_is_named() -> None:
    weight, ids = torch.randn(100, 8), torch.tensor([5, 99, 100, -1])
    with pytest.raises(KernelError, match="embedding: element 2 of ids is 100, outside of 0 to 99"):
        ops.embedding.implementations["cpu"](weight, ids)
    with pytest.raises(KernelError, match="element 0 of ids is -1, outside"):
        cpu.packed_embedding.implementations["cpu"](ids.flip(0), cpu.pack(weight), 100, 8, weight.dtype)
    with pytest.raises(KernelError, match="outside of 0 to 99"):  # the tiles hold 112 rows
        cpu.packed_embedding.implementations["cpu"](ids[:3], cpu.pack(weight), 100, 8, weight.dtype)


@pytest.mark.parametrize(("kernel", "name"), HELD)
def test_a_replay_checks_values_again(kernel: Kernel, name: str) -> None:
    found = arguments(kernel)
    with cpu.recorded() as calls:
        kept = ops.table[kernel.name].implementations["cpu"](**found)
    program = cpu.Program(calls)
    assert len(program) == 1
    program.run()
    found[name].view(-1)[0] = -1
    with pytest.raises(KernelError, match=rf"{kernel.function}: element 0 of {name} is -1, outside of"):
        program.run()
    del kept


def test_steps_are_located_within_the_table() -> None:
    """Of three requests that compute two positions each."""
    blocks = torch.arange(40).view(5, 8)
    positions, rows = torch.tensor([[3, 4], [126, 127], [15, 16]]), torch.tensor([4, 0, 2])
    slots, context = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    table = torch.full((3, 8), -1)
    made = {"slots": slots, "context": context, "table": table}
    cpu.kernels.locate(positions, rows, blocks, **made, block_size=16)
    assert slots.tolist() == [[32 * 16 + 3, 32 * 16 + 4], [7 * 16 + 14, 7 * 16 + 15], [16 * 16 + 15, 17 * 16]]
    assert context.tolist() == [5, 128, 17]
    assert table.tolist() == [[32, *[-1] * 7], list(range(8)), [16, 17, *[-1] * 6]]
    for argument, at, bad in (("positions", 3, 128), ("positions", 0, -1), ("rows", 2, 5), ("rows", 0, -1)):
        given = {"positions": positions.clone(), "rows": rows.clone()}
        given[argument].view(-1)[at] = bad
        with pytest.raises(KernelError, match=f"locate: element {at} of {argument} is {bad}, outside"):
            cpu.kernels.locate(**given, blocks=blocks, **made, block_size=16)
    with pytest.raises(KernelError, match=r"table is int64 \[3, 7\]; it has to be int64 \[requests stride\], dense"):
        cpu.kernels.locate(positions, rows, blocks, slots, context, table[:, :7].clone(), 16)
    with pytest.raises(KernelError, match="each=0"):
        cpu.kernels.locate(positions[:, :0], rows, blocks, **(made | {"slots": slots[:, :0]}), block_size=16)


def test_a_gradient_is_the_references() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8, requires_grad=True)
    ops.rms_norm.implementations["cpu"](x, weight, 1e-6).sum().backward()
    assert weight.grad is not None


def test_the_header_is_current() -> None:
    """``make abi`` writes it."""
    assert abi.HEADER.read_text() == abi.header()


def test_an_outdated_library_says_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library._load(library.PATH)[0] is not None
    monkeypatch.setattr(abi, "version", lambda: "of another contract")
    found, why = library._load(library.PATH)
    assert found is None
    assert "rebuild it" in why
