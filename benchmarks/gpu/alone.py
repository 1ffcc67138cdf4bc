"""Kernels alone, beside their limits: attention, and torch's own beside it; products at the shapes of the 8B model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gpu.place import Entry, LeftOut, Place, seconds
from gpu.shapes import spec_of
from tuili import ops
from tuili.layers.sizes import block_parameters
from tuili.ops import kvcache
from tuili.ops.triton import FAST, layouts
from tuili.ops.triton.products import kernel_of

#: Dtype of the cache by the ending of the op's name.
CACHES = {"": torch.bfloat16, "_fp8": layouts.FP8, "_int8": torch.int8}
BLOCK = 16
#: Makes a weight [outputs, inputs] on a device: the op that multiplies by it, and what follows the rows in its call.
Make = Callable[[int, int, str], tuple[str, tuple[Any, ...]]]


def attention(place: Place) -> None:
    """Decode over the KV cache of one layer (bytes of K and V per second), and a prompt at once (operations); beside
    torch's scaled_dot_product_attention, whose K and V lie in one piece."""
    spec = spec_of("Llama-3.1-8B", place.tiny)
    sizes = [(1, 40), (3, 70)] if place.tiny else [(1, 8192), (1, 131072), (8, 32768), (32, 8192), (256, 1024)]
    for requests, context in sizes:
        for kind, dtype in CACHES.items():
            name = f"attention{kind} {requests} x {context}"
            place.attempt(name, lambda r=requests, c=context, k=kind, d=dtype: _attention(spec, r, c, k, d, place))
        place.attempt(f"sdpa {requests} x {context}", lambda r=requests, c=context: _sdpa(spec, r, c, 1, place))
    for length in (70,) if place.tiny else (2048, 8192):
        place.attempt(f"prefill attention {length}", lambda n=length: _prefill(spec, n, place))
        place.attempt(f"prefill sdpa {length}", lambda n=length: _sdpa(spec, 1, n, n, place))


def _attention(spec: Any, requests: int, context: int, kind: str, dtype: torch.dtype, place: Place) -> Entry:
    heads, dim = spec.num_kv_heads, spec.head_dim
    if place.device == "cuda" and 8 * requests * context * heads * dim > torch.cuda.mem_get_info()[0]:
        raise LeftOut("the card has no room for it")
    sizes = spec.num_heads, heads, dim
    call = attention_call(kind, [1] * requests, [context] * requests, *sizes, place.device)
    moved = 2 * requests * context * heads * (dim * dtype.itemsize + (4 if kind else 0))
    return {"bytes": moved, "seconds_alone": seconds(call, place.device)}


def _prefill(spec: Any, length: int, place: Place) -> Entry:
    sizes = spec.num_heads, spec.num_kv_heads, spec.head_dim
    call = attention_call("", [length], [length], *sizes, place.device)
    return {**_prompt(spec, length), "seconds_alone": seconds(call, place.device)}


def _prompt(spec: Any, length: int) -> Entry:
    """Bytes of q, k, v and the result; operations of the two products of causal attention: half of the square."""
    heads, dim = spec.num_heads, spec.head_dim
    moved = 2 * 2 * length * (heads + spec.num_kv_heads) * dim
    return {"bytes": moved, "operations": 2 * heads * dim * length * (length + 1)}


def _sdpa(spec: Any, requests: int, context: int, queries: int, place: Place) -> Entry:
    """torch's attention in bfloat16: ``queries`` 1, or all of the context."""
    heads, dim, device = spec.num_kv_heads, spec.head_dim, place.device
    if device == "cuda" and 8 * requests * context * heads * dim > torch.cuda.mem_get_info()[0]:
        raise LeftOut("the card has no room for it")
    q = torch.randn(requests, spec.num_heads, queries, dim, device=device).bfloat16()
    k, v = (torch.randn(requests, heads, context, dim, device=device).bfloat16() for _ in range(2))

    def call() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True)

    work = _prompt(spec, context) if queries > 1 else {"bytes": k.nbytes + v.nbytes}
    return {**work, "seconds_alone": seconds(call, device)}


def attention_call(
    kind: str, queries: list[int], contexts: list[int], heads: int, kv_heads: int, dim: int, device: str
) -> Callable[[], Any]:
    """Attention of a batch over a random cache of ``kind``, its blocks in random order."""
    each = -(-max(contexts) // BLOCK)
    blocks = len(contexts) * each
    shapes = kvcache.row_shapes(blocks, BLOCK, kv_heads, dim, dim, CACHES[kind])
    caches = [(torch.randn(shape, device=device) * 30).to(CACHES[kind]) for shape in shapes]
    if kind:
        caches += [torch.rand(blocks, kv_heads, BLOCK, device=device) / 30 for _ in range(2)]
    q = torch.randn(sum(queries), heads, dim, device=device).bfloat16()
    table = torch.randperm(blocks, device=device).view(len(contexts), each)
    start = torch.tensor([0, *itertools.accumulate(queries)], device=device)
    lengths = torch.tensor(contexts, device=device)
    kernel = ops.table[f"paged_attention{kind}"].implementations[FAST]
    return lambda: kernel(q, *caches, table, start, lengths, dim**-0.5)


def products(place: Place) -> None:
    """Each matrix of the 8B model's block at some numbers of rows, in each format: bytes and operations per second."""
    spec = spec_of("Llama-3.1-8B", place.tiny)
    shapes = {name: shape for name, shape in block_parameters(spec).items() if len(shape) == 2}
    for rows in (2, 20) if place.tiny else (1, 8, 64, 256, 8192):
        for name, (out, into) in shapes.items():
            for kind, make in PRODUCTS.items():
                label = f"{kind} {rows} x {name.removesuffix('.weight')}"
                place.attempt(label, lambda r=rows, o=out, i=into, m=make: _product(m, r, o, i, place.device))


def _product(make: Make, rows: int, out: int, into: int, device: str) -> Entry:
    x, (op, weight) = _rows(rows, into, device), make(out, into, device)
    kernel = ops.table[op].implementations[FAST]
    moved = sum(t.nbytes for t in weight if isinstance(t, torch.Tensor)) + 2 * rows * (into + out)
    taken = seconds(lambda: kernel(x, *weight), device)
    return {"bytes": moved, "operations": 2 * rows * out * into, "seconds_alone": taken}


def product_call(make: Make, rows: int, out: int, into: int, device: str) -> Callable[[], Any]:
    """A product with random data."""
    x, (op, weight) = _rows(rows, into, device), make(out, into, device)
    kernel = ops.table[op].implementations[FAST]
    return lambda: kernel(x, *weight)


def product_kernel(make: Make) -> str:
    """What a card's file calls the kernel."""
    op, weight = make(1, 128, "cpu")
    return kernel_of(op, weight[0].dtype)


def _rows(rows: int, into: int, device: str) -> torch.Tensor:
    return torch.randn(rows, into, device=device).bfloat16()


def _bfloat16(out: int, into: int, device: str) -> tuple[str, tuple[Any, ...]]:
    return "linear", (torch.randn(out, into, device=device).bfloat16(),)


def _int4(out: int, into: int, device: str) -> tuple[str, tuple[Any, ...]]:
    codes = torch.randint(0, 16, (out, into), dtype=torch.uint8, device=device)
    scales = layouts.by_tile(torch.rand(out, -(-into // 128), device=device).half())
    return "int4_weight_only_linear", (layouts.pack_int4(codes, 128), scales, None, out)


def _bytes(op: str, dtype: torch.dtype) -> Callable[..., Any]:
    def make(out: int, into: int, device: str) -> tuple[str, tuple[Any, ...]]:
        codes = (torch.randn(out, into, device=device) * 40).clamp(-127, 127).to(dtype)
        return op, (codes, torch.rand(out, 1, device=device))

    return make


PRODUCTS = {
    "bfloat16": _bfloat16,
    "W4A16": _int4,
    "W8A8": _bytes("byte_linear", torch.int8),
    "FP8": _bytes("byte_linear", layouts.FP8),
    "W8A16": _bytes("byte_weight_only_linear", torch.int8),
}
