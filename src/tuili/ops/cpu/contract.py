"""What every kernel takes: one declaration per op, in the order of the op's arguments.

From it follow the structs of ``src/abi.h`` (``abi.py``), the checks of a call (``binding.py``), and the ranges that the
kernels themselves hold ids and slots to, in recorded programs too.

A shape is words: a name is bound by the first tensor that has it, or by an argument; ``a/b`` is rounded up, and terms
are worked off from left to right. ``even`` and ``side`` are a ``Storage``'s. ``heads?`` may be missing. ``...`` is any
shape, of ``count`` elements.
"""

from __future__ import annotations

from dataclasses import dataclass

#: The dtype of a call: float32 or bfloat16, one for all tensors that say so. For others torch's reference computes.
FLOATS = "floats"
#: The dtype that a weight, or a cache, of floats is stored in: a member of ``STORAGE``, or of ``CACHES``.
STORED, CACHED = "stored", "cached"
#: As float16; for other floats the reference computes, as files may hold wider scales.
SCALES = "scales"


@dataclass(frozen=True)
class Tensor:
    """``use``: "read" (made dense where it is not), "rows" (read; rows may be apart), "written" (must be dense), or
    "made" (by the call). Values are in [``low``, ``high``], C expressions of the sizes, where those are given."""

    name: str
    shape: str
    dtype: str = FLOATS
    use: str = "read"
    optional: bool = False
    low: str = ""
    high: str = ""


@dataclass(frozen=True)
class Absent:
    """A pointer of the struct that this op leaves null."""

    name: str


@dataclass(frozen=True)
class Size:
    """A whole number. None where it is ``optional`` crosses as 0; ``choices`` cross as their index, and for others the
    reference computes; ``fixed`` is no argument of the op."""

    name: str
    optional: bool = False
    choices: tuple[str, ...] = ()
    fixed: int | None = None


@dataclass(frozen=True)
class Real:
    """A float, ``default`` where it is left out; None where it is ``optional`` crosses as 0."""

    name: str
    default: float | None = None
    optional: bool = False


@dataclass(frozen=True)
class Dtype:
    """The dtype of the call, as an argument of its own."""

    name: str = "dtype"


Argument = Tensor | Absent | Size | Real | Dtype


@dataclass(frozen=True)
class Kernel:
    """Op ``name`` is ``tuili_{function}`` of a ``struct``; ``holds``: what else has to be true of its sizes."""

    name: str
    function: str
    struct: str
    arguments: tuple[Argument, ...]
    holds: tuple[str, ...] = ()


def read(name: str, shape: str, dtype: str = FLOATS, optional: bool = False, low: str = "", high: str = "") -> Tensor:
    return Tensor(name, shape, dtype, "read", optional, low, high)


def rows(name: str, shape: str, dtype: str = FLOATS) -> Tensor:
    return Tensor(name, shape, dtype, "rows")


def written(name: str, shape: str, dtype: str = FLOATS, optional: bool = False) -> Tensor:
    return Tensor(name, shape, dtype, "written", optional)


def made(name: str, shape: str, dtype: str = FLOATS) -> Tensor:
    return Tensor(name, shape, dtype, "made")


def ids(name: str, shape: str, below: str) -> Tensor:
    return Tensor(name, shape, "int64", low="0", high=f"{below} - 1")


@dataclass(frozen=True)
class Storage:
    """How floats of a dtype lie in a tile: inputs come in multiples of ``even``, ``side`` of them side by side.
    ``numbers``: what the C side calls them; ``dtypes``: of which activations the kernels multiply them."""

    numbers: int
    even: int
    side: int
    dtypes: tuple[str, ...]


STORAGE = {
    "float32": Storage(0, 1, 1, ("float32",)),
    "bfloat16": Storage(1, 2, 2, ("float32", "bfloat16")),
    "float16": Storage(2, 2, 1, ("float32",)),
}
#: Values come side by side in caches of 16 bits (``ops/kvcache.py``).
CACHES = {name: STORAGE[name] for name in ("float32", "bfloat16")}
#: Words of shapes that a dtype tells.
IN_DTYPE = {"even", "side"}
#: The last dimensions of a tile of floats.
WORDS = "inputs/even*even/side 16 side"

X, BIAS = rows("x", "rows inputs"), read("bias", "outputs", optional=True)
OUTPUTS, PRODUCT = Size("outputs"), made("out", "rows outputs")
TILES8 = "outputs/16 inputs/4 16 4"
TILES4, GROUPS = "outputs/16 inputs/group*group/8 16 4", "outputs/16 inputs/group 16"
#: Groups of 4-bit weights; a step of them is 8 inputs, and panels of 512 are whole groups.
GROUP = "group in (32, 64, 128)"
#: Sums of products of bytes stay in 32 bits.
EXACT = "0 < inputs <= 66000"
TILES4_GIVEN = (
    read("tiles", TILES4, "uint8"),
    read("scales", GROUPS, SCALES),
    read("zeros", GROUPS, "uint8", optional=True),
)


def _int8_product(name: str, function: str, *holds: str) -> Kernel:
    tensors = X, read("tiles", TILES8, "uint8"), read("scales", "outputs", "float32"), Absent("zeros")
    fixed = Size("numbers", fixed=8), Size("group", fixed=4)
    return Kernel(name, function, "QuantizedArgs", (*tensors, OUTPUTS, BIAS, PRODUCT, *fixed), holds)


def _int4_product(name: str, function: str) -> Kernel:
    arguments = X, *TILES4_GIVEN, OUTPUTS, Size("group"), BIAS, PRODUCT, Size("numbers", fixed=4)
    return Kernel(name, function, "QuantizedArgs", arguments, (GROUP, "inputs > 0"))


def _scales(dtype: str, use: str) -> tuple[Argument, ...]:
    """The scales of K and V, where the caches hold codes."""
    if dtype != "int8":
        return Absent("k_scales"), Absent("v_scales")
    return tuple(Tensor(name, "blocks kv_heads block_size", "float32", use) for name in ("k_scales", "v_scales"))


def _numbers(dtype: str) -> tuple[Argument, ...]:
    """What the caches are made of, where their dtype does not tell."""
    return (Size("numbers", fixed=8),) if dtype == "int8" else ()


def _caches(dtype: str, use: str) -> tuple[Argument, ...]:
    """K and V as ``ops/kvcache.py`` lays them out."""
    side = "side" if dtype == CACHED else "2"
    keys = Tensor("k_cache", f"blocks kv_heads dim/{side} block_size {side}", dtype, use)
    values = Tensor("v_cache", f"blocks kv_heads block_size/{side} dim {side}", dtype, use)
    return keys, values, *_scales(dtype, use)


def _attention(name: str, dtype: str) -> Kernel:
    return Kernel(
        name,
        "attention",
        "AttentionArgs",
        (
            rows("q", "rows heads dim"),
            *_caches(dtype, "read"),
            rows("block_table", "requests columns", "int64"),
            read("query_start", "requests+1", "int64"),
            read("context_len", "requests", "int64"),
            Real("scale"),
            Size("window", optional=True),
            Real("softcap", optional=True),
            made("out", "rows heads dim"),
            *_numbers(dtype),
        ),
        ("heads > 0", "kv_heads > 0", "block_size > 0", "dim > 0", "heads % kv_heads == 0"),
    )


def _write(name: str, dtype: str) -> Kernel:
    return Kernel(
        name,
        "write_kv",
        "WriteArgs",
        (
            rows("k", "count kv_heads dim"),
            rows("v", "count kv_heads dim"),
            *_caches(dtype, "written"),
            ids("slots", "count", "blocks * block_size"),
            *_numbers(dtype),
        ),
        ("block_size > 0",),
    )


def _store(name: str, numbers: int, *arguments: Argument) -> Kernel:
    given = rows("matrix", "rows inputs"), *arguments, Size("numbers", fixed=numbers)
    return Kernel(name, "store", "StoreArgs", given, (GROUP,) if numbers == 4 else ())


def _each(name: str, struct: str, *arguments: Argument) -> Kernel:
    """An op on elements."""
    return Kernel(name, name, struct, (*arguments, made("out", "...")))


LOGITS = rows("logits", "rows vocab")
CHOSEN = made("ids", "rows", "int64"), made("finite", "rows", "bool")

KERNELS = (
    Kernel(
        "packed_linear",
        "linear",
        "LinearArgs",
        (X, read("tiles", f"outputs/16 {WORDS}", STORED), OUTPUTS, BIAS, PRODUCT),
    ),
    _int8_product("int8_linear", "quantized", EXACT),
    _int4_product("int4_linear", "quantized"),
    _int8_product("int8_weight_linear", "widened"),
    _int4_product("int4_weight_linear", "widened"),
    Kernel(
        "packed_embedding",
        "lookup",
        "LookupArgs",
        (
            ids("ids", "count", "outputs"),
            read("tiles", f"outputs/16 {WORDS}", STORED),
            *(Absent("scales"), Absent("zeros"), OUTPUTS, Size("inputs"), Dtype(), made("out", "count inputs")),
            Size("group", fixed=1),
        ),
    ),
    _attention("paged_attention", CACHED),
    _attention("paged_attention_int8", "int8"),
    _write("write_kv", CACHED),
    _write("write_kv_int8", "int8"),
    Kernel(
        "rms_norm",
        "rms_norm",
        "NormArgs",
        (
            rows("x", "rows heads? dim"),
            read("weight", "dim"),
            Real("eps"),
            Real("offset", 0.0),
            made("out", "rows heads? dim"),
        ),
    ),
    Kernel(
        "rotate",
        "rotate",
        "RotateArgs",
        (
            rows("x", "rows heads dim"),
            read("cos", "rows half", "float32"),
            read("sin", "rows half", "float32"),
            made("out", "rows heads dim"),
        ),
        ("2 * half <= dim",),
    ),
    Kernel(
        "gated",
        "gated",
        "GatedArgs",
        (read("gate_up", "rows 2*dim"), Size("activation", choices=("silu", "gelu_tanh")), made("out", "rows dim")),
    ),
    _each("add", "AddArgs", read("x", "..."), read("y", "...")),
    _each("scale", "ScaleArgs", read("x", "..."), Real("factor")),
    _each("softcap", "SoftcapArgs", read("x", "..."), Real("cap")),
    Kernel(
        "embedding",
        "embedding",
        "EmbeddingArgs",
        (read("weight", "vocab dim"), ids("ids", "count", "vocab"), made("out", "count dim")),
    ),
    Kernel(
        "store_floats",
        "store",
        "StoreArgs",
        (
            rows("matrix", "rows inputs", STORED),
            written("tiles", f"rows/16 {WORDS}", STORED),
            *(Absent("scales"), Absent("zeros"), Size("group", fixed=1), Size("dtype", fixed=0)),
        ),
    ),
    _store(
        "store_int8",
        8,
        written("tiles", "rows/16 inputs/4 16 4", "uint8"),
        written("scales", "rows", "float32"),
        *(Absent("zeros"), Size("group", fixed=1)),
    ),
    _store(
        "store_int4",
        4,
        Size("group"),
        written("tiles", "rows/16 inputs/group*group/8 16 4", "uint8"),
        written("scales", "rows/16 inputs/group 16", SCALES),
        written("zeros", "rows/16 inputs/group 16", "uint8", optional=True),
    ),
    Kernel(
        "int8_embedding",
        "lookup",
        "LookupArgs",
        (
            ids("ids", "count", "outputs"),
            read("tiles", TILES8, "uint8"),
            read("scales", "outputs", "float32"),
            *(Absent("zeros"), Size("inputs"), Dtype(), made("out", "count inputs")),
            *(Size("numbers", fixed=8), Size("group", fixed=4)),
        ),
    ),
    Kernel(
        "int4_embedding",
        "lookup",
        "LookupArgs",
        (
            ids("ids", "count", "outputs"),
            *TILES4_GIVEN,
            *(OUTPUTS, Size("inputs"), Size("group"), Dtype(), made("out", "count inputs"), Size("numbers", fixed=4)),
        ),
        (GROUP,),
    ),
    Kernel("argmax", "argmax", "ArgmaxArgs", (LOGITS, *CHOSEN), ("vocab > 0",)),
    Kernel(
        "draw",
        "draw",
        "DrawArgs",
        (
            LOGITS,
            read("temperature", "rows", "float32", low="0", high="3e38"),
            read("min_p", "rows", "float32", low="0", high="1"),
            read("top_k", "rows", "int64"),
            read("top_p", "rows", "float32", low="0", high="1"),
            read("uniform", "rows", "float64", low="0", high="1"),
            *CHOSEN,
        ),
        ("vocab > 0",),
    ),
    Kernel(
        "logprobs",
        "logprobs",
        "LogprobsArgs",
        (
            LOGITS,
            ids("tokens", "rows", "vocab"),
            Size("count"),
            made("chosen", "rows", "float32"),
            made("rank", "rows", "int64"),
            made("top_values", "rows count", "float32"),
            made("top_ids", "rows count", "int64"),
        ),
        ("vocab > 0", "0 <= count <= vocab"),
    ),
)

#: No op of the table, but part of captured steps: what a step reads whose ``requests`` compute ``each`` as many
#: positions, from what the host knows of them: the positions, and the row of ``blocks`` of each request. ``slots``:
#: where K and V go; ``context``: the positions that a request has then; ``table``: its blocks, as many as it uses.
LOCATE = Kernel(
    "locate",
    "locate",
    "LocateArgs",
    (
        ids("positions", "requests each", "stride * block_size"),
        ids("rows", "requests", "lines"),
        read("blocks", "lines stride", "int64"),
        written("slots", "requests each", "int64"),
        written("context", "requests", "int64"),
        written("table", "requests stride", "int64"),
        Size("block_size"),
    ),
    ("block_size > 0", "each > 0"),
)
