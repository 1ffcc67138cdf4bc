"""What takes a run's memory, estimated or measured; the table of it, and settings that fit. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from tuili.base.config import Config
from tuili.base.hardware import Hardware
from tuili.engine.captures import capture_sizes, on_device
from tuili.layers.sizes import pool_bytes, weight_bytes
from tuili.layers.spec import ModelSpec
from tuili.quant.formats import BYTES
from tuili.quant.scheme import scheme_of

#: What a process takes on a card before it computes anything, until it is measured: CUDA's context, kernels' code.
CONTEXT = 600 << 20
#: What a captured step takes beside its activations, until it is measured.
GRAPH = 8 << 20


@dataclass(frozen=True)
class Measured:
    """What a run was seen to take on its device, in bytes: ``activations`` at the most, ``graphs`` all captured steps,
    ``context`` what the process takes beside its tensors."""

    weights: int
    activations: int
    graphs: int
    context: int


@dataclass(frozen=True)
class MemoryTable:
    """What a run takes, in bytes: ``block`` is one KV block; ``share`` of ``total`` is what all of it may take.

    ``graphs`` and ``context`` are a card's; ``measured`` says whether they, weights and activations were. ``sure`` is
    what is certainly taken beside the KV cache: a saved config must not be refused for what was measured to fit (law
    12), because the estimate is higher.
    """

    total: int
    available: int
    share: float
    weights: int
    activations: int
    block: int
    block_size: int
    quantization: str = "none"
    graphs: int = 0
    context: int = 0
    measured: bool = False

    @property
    def budget(self) -> int:
        return min(self.available, int(self.total * self.share))

    @property
    def beside_kv(self) -> int:
        return self.weights + self.activations + self.graphs + self.context

    @property
    def sure(self) -> int:
        return self.beside_kv if self.measured or not self.context else self.weights

    @property
    def for_kv(self) -> int:
        return max(0, self.budget - self.beside_kv)


def memory_of(config: Config, spec: ModelSpec, hardware: Hardware, measured: Measured | None = None) -> MemoryTable:
    """The memory of a config whose dtype, device and step sizes are resolved."""
    cuda = config.device == "cuda"
    taken = measured or _estimated(config, spec)
    return MemoryTable(
        total=hardware.gpu_memory if cuda else hardware.available_memory,
        available=hardware.gpu_free if cuda else hardware.available_memory,
        share=config.gpu_memory_utilization,
        weights=taken.weights,
        activations=taken.activations,
        block=pool_bytes(spec, 1, config.block_size, config.kv_cache_dtype),
        block_size=config.block_size,
        quantization=config.quantization,
        graphs=taken.graphs,
        context=taken.context,
        measured=measured is not None,
    )


def _estimated(config: Config, spec: ModelSpec) -> Measured:
    scheme = scheme_of(config.quantization, config.quantization_group_size, config.dtype)
    weights = weight_bytes(spec, config.activation_dtype, scheme, kernels_of(config))
    activations, cuda = _activations(config, spec, BYTES[config.activation_dtype]), config.device == "cuda"
    graphs = len(capture_sizes(config)) * GRAPH if cuda else 0
    return Measured(weights, activations, graphs, CONTEXT if cuda else 0)


def kernels_of(config: Config) -> str:
    """Whose packing the weights of a resolved config get (``quant.formats.format_of``)."""
    return "triton" if on_device(config) else "cpu"


def _activations(config: Config, spec: ModelSpec, size: int) -> int:
    """The most that is alive at once in a step: of one layer's parts the largest, and the sampler's float32 copies."""
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    per_token = (4 * spec.hidden_size + max(3 * spec.intermediate_size, 2 * heads)) * size
    per_row = 4 * spec.vocab_size * 4
    return (config.max_num_batched_tokens or 0) * per_token + (config.max_num_seqs or 0) * per_row


def memory_table(memory: MemoryTable, num_blocks: int) -> str:
    """What takes the memory, as lines of text."""
    kv = num_blocks * memory.block
    source = "as measured" if memory.measured else "from --max-num-batched-tokens and --max-num-seqs"
    rows = [
        ("available", memory.available, ""),
        ("may be used", memory.budget, f"--gpu-memory-utilization {memory.share:g}"),
        ("weights", memory.weights, "" if memory.quantization == "none" else f"--quantization {memory.quantization}"),
        ("activations", memory.activations, source),
        ("captured steps", memory.graphs, "" if memory.measured else "estimated"),
        ("CUDA context", memory.context, "" if memory.measured else "estimated"),
        ("left for KV", memory.for_kv, f"{memory.for_kv // memory.block * memory.block_size} tokens"),
        ("KV per 1k tokens", memory.block * 1000 // memory.block_size, ""),
        ("KV cache", kv, f"{num_blocks} blocks of {memory.block_size} tokens"),
        ("free", max(0, memory.available - memory.beside_kv - kv), ""),
    ]
    shown = [row for row in rows if row[1] or row[0] not in ("captured steps", "CUDA context")]
    return "\n".join(f"  {name:<18}{in_mib(size):>14}  {note}".rstrip() for name, size, note in shown)


def in_mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def remedies(config: Config, spec: ModelSpec, memory: MemoryTable, blocks: int, longest: int) -> list[str]:
    """Settings that fit, computed; each alone is enough."""
    needed = longest * memory.block
    found = []
    if blocks >= 1:
        found.append(f"  --max-model-len {blocks * config.block_size}")
    if config.num_gpu_blocks_override is not None:
        found.append(f"  --num-gpu-blocks-override {longest}")
    elif config.kv_cache_memory_bytes is not None:
        found.append(f"  --kv-cache-memory-bytes {needed}")
    elif (short := memory.beside_kv + needed) <= memory.available and memory.share < 1:
        share = min(1.0, int(1000 * short / memory.total + 1) / 1000)
        found.append(f"  --gpu-memory-utilization {share:g}")
    rest = memory.beside_kv - memory.weights
    if config.dtype == "float32" and memory.budget >= rest + memory.weights // 2 + needed:
        found.append("  --dtype bfloat16 (halves the weights)")
    found += _smaller_weights(config, spec, memory, needed)
    if not found or blocks < 1:
        total = memory.beside_kv + needed
        found.append(f"  a machine with {in_mib(int(total / memory.share))} free, or a smaller model")
    return found


def _smaller_weights(config: Config, spec: ModelSpec, memory: MemoryTable, needed: int) -> list[str]:
    """The widest ``--quantization`` with which the weights leave ``needed`` bytes for the KV cache, where one does."""
    if config.quantization != "none" or spec.rounded or config.num_gpu_blocks_override or config.kv_cache_memory_bytes:
        return []
    for name in ("int8", "int4"):
        weights = weight_bytes(spec, config.activation_dtype, scheme_of(name), kernels_of(config))
        if memory.beside_kv - memory.weights + weights + needed <= memory.budget:
            return [f"  --quantization {name} (weights of {in_mib(weights)}; see docs/quantization.md)"]
    return []


# When it ends all the same --------------------------------------------------------------------------------------------

#: What the card's memory may end while doing, and so what there is to save.
LOADING, MEASURING = "loading the weights", "measuring the largest step"
ALLOCATING, COMPUTING = "making the KV cache and capturing steps", "computing a step"


def savings(config: Config, spec: ModelSpec, memory: MemoryTable, size: int, doing: str) -> str:
    """The table of what a resolved config takes, and settings that take ``size`` bytes less; each alone is enough.

    Where ``size`` is not known (0), a twentieth of the card.
    """
    size = size or memory.total // 20
    blocks = config.num_gpu_blocks_override or 0
    found = []
    if doing in (ALLOCATING, COMPUTING):
        found += _smaller_pool(config, memory, blocks, size)
        if memory.graphs >= size:
            found.append("  --enforce-eager (captures nothing; decoding is slower)")
    if doing != LOADING:
        found += _smaller_steps(config, spec, memory, size)
    found += _fewer_bits(config, spec, memory, size)
    if not found:
        found.append(f"  a card with {in_mib(size)} more free, or a smaller model")
    return "\n".join([memory_table(memory, blocks), "What would fit:", *found])


def _smaller_pool(config: Config, memory: MemoryTable, blocks: int, size: int) -> list[str]:
    fewer = blocks - -(-size // memory.block)
    if fewer * config.block_size < (config.max_model_len or 0):
        return []
    return [f"  --num-gpu-blocks-override {fewer}"]


def _smaller_steps(config: Config, spec: ModelSpec, memory: MemoryTable, size: int) -> list[str]:
    """Fewer tokens in a step: of the activations, the part that is not the sampler's grows with them."""
    rows, tokens = config.max_num_seqs or 0, config.max_num_batched_tokens or 0
    estimate = _activations(config, spec, BYTES[config.activation_dtype])
    per_token = (
        _activations(config.with_(max_num_batched_tokens=tokens + 1), spec, BYTES[config.activation_dtype]) - estimate
    )
    fewer = tokens - -(-size * estimate // max(1, memory.activations * per_token))
    longest = 0 if config.enable_chunked_prefill else config.max_model_len or 0
    return [f"  --max-num-batched-tokens {fewer}"] if fewer >= max(rows, longest, 1) else []


def _fewer_bits(config: Config, spec: ModelSpec, memory: MemoryTable, size: int) -> list[str]:
    if config.quantization != "none" or spec.rounded:
        return []
    kernels = kernels_of(config)
    smaller = {name: weight_bytes(spec, config.activation_dtype, scheme_of(name), kernels) for name in ("int8", "int4")}
    found = [name for name, weights in smaller.items() if memory.weights - weights >= size]
    return [f"  --quantization {found[0]} (see docs/quantization.md)"] if found else []
