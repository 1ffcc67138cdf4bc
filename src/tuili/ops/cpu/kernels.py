"""The op table's "cpu" implementations: check what the library takes, hand it pointers, else use the reference.

What a kernel takes depends on dtypes and layouts only, never on the number of rows: choosing by size would let a
request's neighbours change its bits (law 5).
"""

from __future__ import annotations

import torch

from tuili.ops.cpu import library as lib
from tuili.ops.cpu.packed import pack
from tuili.ops.table import implement, table

CODES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


def _suits(*tensors: torch.Tensor) -> bool:
    """All on the CPU, of one dtype that kernels take, and no gradient wanted."""
    dtype = tensors[0].dtype
    if dtype not in CODES or any(t.dtype != dtype or not t.is_cpu for t in tensors):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its last dimensions dense, so that one stride says where a row is."""
    size = 1
    for length, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if stride != size and length != 1:
            return x.contiguous()
        size *= length
    return x


@implement("packed_linear", "cpu")
def packed_linear(x: torch.Tensor, tiles: torch.Tensor, outputs: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not _suits(x, tiles) or (bias is not None and not _suits(x, bias)) or not tiles.is_contiguous():
        return table["packed_linear"].reference(x, tiles, outputs, bias)
    x = _rows(x)
    out = torch.empty(len(x), outputs, dtype=x.dtype)
    lib.call(
        "linear",
        lib.LinearArgs(
            *(x.data_ptr(), tiles.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr()),
            *(len(x), x.shape[1], outputs, x.stride(0), CODES[x.dtype]),
        ),
    )
    return out


@implement("linear", "cpu")
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Packs at every call: layers hold packed weights instead."""
    if not _suits(x, weight) or (bias is not None and not _suits(x, bias)):
        return table["linear"].reference(x, weight, bias)
    return packed_linear(x, pack(weight), len(weight), bias)


@implement("packed_embedding", "cpu")
def packed_embedding(tiles: torch.Tensor, inputs: int, ids: torch.Tensor) -> torch.Tensor:
    if not _suits(tiles) or ids.dtype != torch.int64 or not tiles.is_contiguous():
        return table["packed_embedding"].reference(tiles, inputs, ids)
    ids = ids.contiguous()
    out = torch.empty(len(ids), inputs, dtype=tiles.dtype)
    lib.call("gather", lib.GatherArgs(*(t.data_ptr() for t in (tiles, ids, out)), len(ids), inputs, CODES[out.dtype]))
    return out


def _integer(
    kernel: str,
    x: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    outputs: int,
    bias: torch.Tensor | None,
    bits: int,
    group: int,
) -> torch.Tensor | None:
    """The product, or None where kernels do not take the arguments."""
    if not _suits(x) or (bias is not None and not _suits(x, bias)) or not tiles.is_contiguous():
        return None
    if bits == 4 and scales.dtype != torch.float16:
        return None
    x = _rows(x)
    out = torch.empty(len(x), outputs, dtype=x.dtype)
    tensors = (x, tiles, scales, zeros, bias, out)
    sizes = (len(x), x.shape[1], outputs, x.stride(0), CODES[x.dtype], bits, group)
    lib.call(kernel, lib.QuantizedArgs(*(None if t is None else t.data_ptr() for t in tensors), *sizes))
    return out


def _int8(name: str, kernel: str) -> None:
    reference = table[name].reference

    def product(
        x: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, outputs: int, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = _integer(kernel, x, tiles, scales, None, outputs, bias, 8, 4)
        return reference(x, tiles, scales, outputs, bias) if out is None else out

    implement(name, "cpu")(product)


def _int4(name: str, kernel: str) -> None:
    reference = table[name].reference

    def product(
        x: torch.Tensor,
        tiles: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        outputs: int,
        group: int,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = _integer(kernel, x, tiles, scales, zeros, outputs, bias, 4, group)
        return reference(x, tiles, scales, zeros, outputs, group, bias) if out is None else out

    implement(name, "cpu")(product)


_int8("int8_linear", "quantized")
_int8("int8_weight_linear", "weight_only")
_int4("int4_linear", "quantized")
_int4("int4_weight_linear", "weight_only")


def _attention(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, ...],
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    kind: tuple[float, int | None, float | None],
) -> torch.Tensor:
    """``caches`` are K and V, and where they are int8 their scales; ``rows`` block table, query starts, contexts."""
    q, table = _rows(q), rows[0] if rows[0].stride(1) == 1 else rows[0].contiguous()
    n, heads, dim = q.shape
    _, kv_heads, _, block_size, _ = caches[0].shape
    out = torch.empty(n, heads, dim, dtype=q.dtype)
    k_scales, v_scales = (t.data_ptr() for t in caches[2:]) if len(caches) > 2 else (None, None)
    scale, window, softcap = kind
    lib.call(
        "attention",
        lib.AttentionArgs(
            *(t.data_ptr() for t in (q, *caches[:2], out, table, *rows[1:])),
            *(k_scales, v_scales, len(rows[2]), table.stride(0), block_size, heads, kv_heads, dim, CODES[q.dtype]),
            *(q.stride(0), window or 0, scale, softcap or 0.0),
        ),
    )
    return out


def _cached(*caches: torch.Tensor) -> bool:
    """Dense, and int8 with float32 scales if there are scales."""
    int8 = len(caches) == 2 or (caches[0].dtype == caches[1].dtype == torch.int8 and _suits(*caches[2:]))
    return int8 and all(t.is_contiguous() for t in caches)


@implement("paged_attention", "cpu")
def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    if not _suits(q, k_cache, v_cache) or not _cached(k_cache, v_cache):
        return table["paged_attention"].reference(
            q, k_cache, v_cache, block_table, query_start, context_len, scale, window, softcap
        )
    return _attention(q, (k_cache, v_cache), (block_table, query_start, context_len), (scale, window, softcap))


@implement("paged_attention_int8", "cpu")
def paged_attention_int8(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    caches = (k_cache, v_cache, k_scales, v_scales)
    if not _suits(q) or not _cached(*caches):
        return table["paged_attention_int8"].reference(
            q, *caches, block_table, query_start, context_len, scale, window, softcap
        )
    return _attention(q, caches, (block_table, query_start, context_len), (scale, window, softcap))


def _write(k: torch.Tensor, v: torch.Tensor, caches: tuple[torch.Tensor, ...], slots: torch.Tensor) -> None:
    k, v = _rows(k), _rows(v)
    pointers = (t.data_ptr() for t in (k, v, *caches[:2], slots))
    scales = (t.data_ptr() for t in caches[2:]) if len(caches) > 2 else (None, None)
    sizes = (*k.shape, caches[0].shape[3], k.stride(0), v.stride(0), CODES[k.dtype])
    lib.call("write_kv", lib.WriteArgs(*pointers, *scales, *sizes))


@implement("write_kv", "cpu")
def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    if not _suits(k, v, k_cache, v_cache) or not _cached(k_cache, v_cache):
        return table["write_kv"].reference(k, v, k_cache, v_cache, slots)
    return _write(k, v, (k_cache, v_cache), slots)


@implement("write_kv_int8", "cpu")
def write_kv_int8(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    caches = (k_cache, v_cache, k_scales, v_scales)
    if not _suits(k, v) or not _cached(*caches):
        return table["write_kv_int8"].reference(k, v, *caches, slots)
    return _write(k, v, caches, slots)


@implement("rms_norm", "cpu")
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    if not _suits(x, weight) or x.dim() not in (2, 3):
        return table["rms_norm"].reference(x, weight, eps, offset)
    x = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    heads = x.shape[1] if x.dim() == 3 else 1
    sizes = (len(x), heads, x.shape[-1], x.stride(0), CODES[x.dtype])
    lib.call("rms_norm", lib.NormArgs(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *sizes, eps, offset))
    return out


@implement("rotate", "cpu")
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    if not _suits(x) or not _suits(cos, sin) or cos.dtype != torch.float32:
        return table["rotate"].reference(x, cos, sin)
    x, cos, sin = _rows(x), cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    pointers = (t.data_ptr() for t in (x, cos, sin, out))
    lib.call("rotate", lib.RotateArgs(*pointers, *x.shape, cos.shape[-1], x.stride(0), CODES[x.dtype]))
    return out


@implement("gated", "cpu")
def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    if not _suits(gate_up) or activation not in ACTIVATIONS:
        return table["gated"].reference(gate_up, activation)
    x = gate_up.contiguous()
    rows, dim = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, dim, dtype=x.dtype)
    lib.call("gated", lib.GatedArgs(x.data_ptr(), out.data_ptr(), rows, dim, ACTIVATIONS[activation], CODES[x.dtype]))
    return out


def _store(matrix: torch.Tensor, bits: int, group: int, *targets: torch.Tensor | None) -> None:
    pointers = (None if t is None else t.data_ptr() for t in (matrix, *targets))
    lib.call("store", lib.StoreArgs(*pointers, *matrix.shape, matrix.stride(0), CODES[matrix.dtype], bits, group))


@implement("store_floats", "cpu")
def store_floats(matrix: torch.Tensor, tiles: torch.Tensor) -> None:
    if not _suits(matrix, tiles) or matrix.stride(1) != 1 or not tiles.is_contiguous():
        return table["store_floats"].reference(matrix, tiles)
    return _store(matrix, 0, 1, tiles, None, None)


@implement("store_int8", "cpu")
def store_int8(matrix: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor) -> None:
    matrix = matrix.float() if matrix.dtype == torch.float16 else matrix
    if not _suits(matrix) or matrix.stride(1) != 1 or not tiles.is_contiguous():
        return table["store_int8"].reference(matrix, tiles, scales)
    return _store(matrix, 8, 1, tiles, scales, None)


@implement("store_int4", "cpu")
def store_int4(
    matrix: torch.Tensor, group: int, tiles: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> None:
    matrix = matrix.float() if matrix.dtype == torch.float16 else matrix
    if not _suits(matrix) or matrix.stride(1) != 1 or not tiles.is_contiguous() or scales.dtype != torch.float16:
        return table["store_int4"].reference(matrix, group, tiles, scales, zeros)
    return _store(matrix, 4, group, tiles, scales, zeros)


def _lookup(
    ids: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    inputs: int,
    dtype: torch.dtype,
    bits: int,
    group: int,
) -> torch.Tensor:
    ids, out = ids.contiguous(), torch.empty(len(ids), inputs, dtype=dtype)
    pointers = (None if t is None else t.data_ptr() for t in (tiles, scales, zeros, ids, out))
    lib.call("lookup", lib.LookupArgs(*pointers, len(ids), inputs, CODES[dtype], bits, group))
    return out


@implement("int8_embedding", "cpu")
def int8_embedding(
    ids: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, inputs: int, dtype: torch.dtype
) -> torch.Tensor:
    if ids.dtype != torch.int64 or dtype not in CODES or not tiles.is_contiguous():
        return table["int8_embedding"].reference(ids, tiles, scales, inputs, dtype)
    return _lookup(ids, tiles, scales, None, inputs, dtype, 8, 4)


@implement("int4_embedding", "cpu")
def int4_embedding(
    ids: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    inputs: int,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    if ids.dtype != torch.int64 or dtype not in CODES or not tiles.is_contiguous() or scales.dtype != torch.float16:
        return table["int4_embedding"].reference(ids, tiles, scales, zeros, inputs, group, dtype)
    return _lookup(ids, tiles, scales, zeros, inputs, dtype, 4, group)
