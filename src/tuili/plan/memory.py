"""What a model takes in memory, by weight format, KV dtype, context and concurrency; before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tuili.base.config import Config
from tuili.base.errors import ConfigError, nearest
from tuili.base.hardware import Hardware
from tuili.engine.captures import with_captures
from tuili.engine.memory import kernels_of, memory_of
from tuili.engine.resolve import DEFAULT_BATCHED_TOKENS, with_dtypes
from tuili.layers.kvspec import SCALED
from tuili.layers.sizes import kv_bytes_per_position, parameter_count, pool_bytes, step_kv_bytes, weight_bytes
from tuili.layers.spec import ModelSpec, refuse_rounding_twice
from tuili.models.fields import DTYPES
from tuili.quant.scheme import SCHEMES, Scheme, scheme_of

KV_DTYPES = ("auto", *DTYPES, *SCALED)

#: How a model is kept: the dtype of what is not rounded, and the scheme of matrices (None: none is rounded but by the
#: checkpoint). What is computed in follows from the machine.
Kept = tuple[str, Scheme | None]


def ways_to_keep(
    spec: ModelSpec, names: str | None, default: str, group: int = 32, symmetric: bool = True
) -> dict[str, Kept]:
    """The ways called ``names``, between commas: dtypes and kinds of ``--quantization``, of a bfloat16 checkpoint;
    ``group``, ``symmetric`` are int4's. None: ``default``; of a checkpoint that is quantized already, as
    it is, in its own dtype. ConfigError where ``names`` would round such a one again."""
    found: dict[str, Kept] = {}
    for name in (names or (spec.dtype if spec.rounded else default)).split(","):
        dtype, scheme = _way(name.strip(), group, symmetric)
        refuse_rounding_twice(scheme.format if scheme else "none", spec)
        kind = dtype if scheme is None else str(scheme)
        found[f"{spec.rounded.method} {kind}" if spec.rounded else kind] = dtype, scheme
    return found


def _way(name: str, group: int, symmetric: bool) -> Kept:
    if name in DTYPES:
        return name, None
    known = (*DTYPES, *(kind for kind in SCHEMES if kind != "none"))
    if name not in known:
        raise ConfigError(f"unknown width {name!r}.{nearest(name, known)}")
    scheme = SCHEMES[name]
    return "bfloat16", replace(scheme_of(name, group), symmetric=symmetric) if scheme.group else scheme


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, but ``parameters`` and ``max_concurrency`` are counts.

    ``kv_request`` is one request's KV at ``context``, in whole blocks; ``kv_window`` the part of it within the layers'
    windows, which is all that attention reads. ``graphs`` (captured steps) and ``cuda`` (its context) are a card's.
    """

    width: str
    kv_dtype: str
    context: int
    concurrency: int
    parameters: int
    weights: int
    kv_token: int
    kv_request: int
    kv_window: int
    kv: int
    activations: int
    graphs: int
    cuda: int
    available: int

    @property
    def beside_kv(self) -> int:
        return self.weights + self.activations + self.graphs + self.cuda

    @property
    def total(self) -> int:
        return self.beside_kv + self.kv

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    @property
    def max_concurrency(self) -> int:
        """Requests of ``context`` whose KV fits beside all the rest."""
        return max(0, self.available - self.beside_kv) // self.kv_request


def plan_memory(
    spec: ModelSpec,
    name: str,
    kept: Kept,
    hardware: Hardware,
    *,
    kv_dtype: str = "auto",
    context: int | None = None,
    concurrency: int = 1,
    block_size: int = 16,
) -> MemoryPlan:
    """The memory of ``concurrency`` requests of ``context`` tokens (None: the model's longest) on ``hardware``: on its
    card, where it has one; of the model ``kept`` so, which is called ``name``.

    Raises ConfigError for what the model cannot do.
    """
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(f"unknown KV dtype {kv_dtype!r}.{nearest(kv_dtype, KV_DTYPES)}")
    dtype, scheme = kept
    context = context or spec.max_model_len
    if not 0 < context <= spec.max_model_len:
        raise ConfigError(f"context={context}: this model was made for 1 to {spec.max_model_len} tokens")
    device = "cuda" if hardware.gpu else "cpu"
    tokens = max(concurrency, DEFAULT_BATCHED_TOKENS[device])
    plain = Config(device=device, max_num_seqs=concurrency, max_num_batched_tokens=tokens)
    step = with_captures(with_dtypes(plain.with_(dtype="auto" if dtype == spec.dtype else dtype), spec, hardware))
    kv_dtype = step.kv_cache_dtype if kv_dtype == "auto" else kv_dtype
    request = pool_bytes(spec, -(-context // block_size), block_size, kv_dtype)
    memory = memory_of(step.with_(kv_cache_dtype=kv_dtype), spec, hardware)
    if scheme is None and device == "cpu":
        scheme = Scheme(dtype=step.dtype)
    return MemoryPlan(
        width=name,
        kv_dtype=kv_dtype,
        context=context,
        concurrency=concurrency,
        parameters=parameter_count(spec),
        weights=weight_bytes(spec, step.activation_dtype, scheme, kernels_of(step)),
        kv_token=kv_bytes_per_position(spec, kv_dtype),
        kv_request=request,
        kv_window=step_kv_bytes(spec, [context], kv_dtype),
        kv=concurrency * request,
        activations=memory.activations,
        graphs=memory.graphs,
        cuda=memory.context,
        available=memory.available,
    )
