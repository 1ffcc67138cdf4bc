"""Every "auto" becomes a number, once (DESIGN.md 5). Pure: config, model and machine in, config out. No torch.

``resolve(resolve(c)) == resolve(c)``: the resolved config, dumped and loaded again, gives the same run (law 12).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tuili.base.config import Config
from tuili.base.errors import ConfigError
from tuili.base.hardware import Hardware
from tuili.base.log import get
from tuili.layers.sizes import pool_bytes, weight_bytes
from tuili.layers.spec import ModelSpec
from tuili.quant.scheme import scheme_of

log = get(__name__)
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DEFAULT_SEQS = {"cpu": 128, "cuda": 256}
DEFAULT_BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}
#: Most rows of a captured decode step, unless --max-cudagraph-capture-size says more.
CAPTURED_ROWS = 512
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
class Memory:
    """What a run takes, in bytes: ``block`` is one KV block; ``share`` of ``total`` is what all of it may take.

    ``graphs`` and ``context`` are a card's; ``measured`` says whether they, weights and activations were.
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
    def for_kv(self) -> int:
        return max(0, self.budget - self.beside_kv)


def resolve(config: Config, spec: ModelSpec, hardware: Hardware, measured: Measured | None = None) -> Config:
    """``config`` with a value for everything that shapes the run.

    ``measured``: what this run was seen to take; without it that is estimated. ``hardware`` is as it was before.
    ConfigError for settings that contradict each other or the model, and, with a table of what takes the memory, for
    those that do not fit the machine.
    """
    device = _device(config, hardware)
    scheme = scheme_of(config.quantization, config.quantization_group_size)
    if config.deterministic and config.compile:
        raise ConfigError("--deterministic and --compile: compiled parts may depend on the batch; use one of them")
    config = config.with_(
        device=device,
        dtype=_dtype(config, spec, device, hardware),
        served_model_name=config.served_model_name or config.model,
        max_model_len=_max_model_len(config, spec),
        threads=config.threads or hardware.cores,
        quantization_group_size=scheme.group or None,
    )
    config = _captured(_step_sizes(config))
    memory = memory_of(config, spec, hardware, measured)
    blocks = _num_blocks(config, spec, memory)
    return config.with_(num_gpu_blocks_override=blocks, kv_cache_memory_bytes=blocks * memory.block)


def _device(config: Config, hardware: Hardware) -> str:
    if config.device == "cuda" and hardware.gpu is None:
        raise ConfigError("--device cuda, but no CUDA device was found here; use --device cpu, or see `tuili doctor`")
    return config.device if config.device != "auto" else "cuda" if hardware.gpu else "cpu"


def _dtype(config: Config, spec: ModelSpec, device: str, hardware: Hardware) -> str:
    if config.dtype != "auto":
        return config.dtype
    if device == "cuda" or spec.dtype == "float32":
        return spec.dtype
    if not hardware.fast_bfloat16:
        log.info("dtype: %s computes %s slowly; using float32 (--dtype overrules)", hardware.cpu, spec.dtype)
        return "float32"
    if spec.dtype == "float16":
        log.info("dtype: float16 has no fast path on a CPU; using bfloat16 (--dtype overrules)")
    return "bfloat16"


def _max_model_len(config: Config, spec: ModelSpec) -> int:
    if config.max_model_len is not None and config.max_model_len > spec.max_model_len:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is more than the {spec.max_model_len} this model was made for; "
            f"use --max-model-len {spec.max_model_len} or less"
        )
    return config.max_model_len or spec.max_model_len


def _step_sizes(config: Config) -> Config:
    """Rows and tokens per step. Every running row gets a token, so the rows bound the tokens from below."""
    longest = config.max_model_len or 0
    seqs, budget = config.max_num_seqs, config.max_num_batched_tokens
    if budget is None:
        budget = max(DEFAULT_BATCHED_TOKENS[config.device], seqs or 0, 0 if config.enable_chunked_prefill else longest)
    if seqs is None:
        seqs = min(DEFAULT_SEQS[config.device], budget)
    if budget < seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {budget} is less than --max-num-seqs {seqs}, and each request computes a token "
            f"per step; use --max-num-seqs {budget} or --max-num-batched-tokens {seqs}"
        )
    if not config.enable_chunked_prefill and budget < longest:
        raise ConfigError(
            f"without chunked prefill --max-num-batched-tokens {budget} must hold the longest prompt; use at least "
            f"{longest}, a smaller --max-model-len, or --enable-chunked-prefill"
        )
    return config.with_(max_num_seqs=seqs, max_num_batched_tokens=budget)


def _captured(config: Config) -> Config:
    """The largest captured step of a device that pads steps to captured sizes; None where none is captured so."""
    largest = config.max_cudagraph_capture_size
    if captures(config):
        return config.with_(max_cudagraph_capture_size=largest or min(config.max_num_seqs or 0, CAPTURED_ROWS))
    if largest is not None:
        reference = "the reference ops are not captured" if config.kernels == "reference" else ""
        why = "--enforce-eager captures nothing" if config.enforce_eager else reference or "a CPU captures any number"
        raise ConfigError(f"--max-cudagraph-capture-size {largest} has no effect: {why}; leave it out")
    return config


def on_device(config: Config) -> bool:
    """Whether a resolved config runs on a ``Device``: on CUDA, and on a CPU where that path is tested."""
    return config.device == "cuda" or config.kernels == "triton"


def captures(config: Config) -> bool:
    """Whether decode steps are captured in some sizes, and padded to them."""
    return on_device(config) and config.kernels != "reference" and not config.enforce_eager


def capture_sizes(config: Config) -> tuple[int, ...]:
    """Rows of the captured steps of a resolved config, as vLLM chooses them: 1, 2, 4, every 8th up to 256, every 16th
    above; and the most rows that there are, so that every step up to them is captured."""
    most = min(config.max_cudagraph_capture_size or 0, config.max_num_seqs or 0)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)]
    return tuple(size for size in sizes if size < most) + ((most,) if most else ())


# --------------------------------------------------------------------------------------------------------- the memory


def memory_of(config: Config, spec: ModelSpec, hardware: Hardware, measured: Measured | None = None) -> Memory:
    """The memory of a config whose dtype, device and step sizes are resolved."""
    cuda = config.device == "cuda"
    taken = measured or _estimated(config, spec)
    kv_dtype = config.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    return Memory(
        total=hardware.gpu_memory if cuda else hardware.available_memory,
        available=hardware.gpu_free if cuda else hardware.available_memory,
        share=config.gpu_memory_utilization,
        weights=taken.weights,
        activations=taken.activations,
        block=pool_bytes(spec, 1, config.block_size, kv_dtype),
        block_size=config.block_size,
        quantization=config.quantization,
        graphs=taken.graphs,
        context=taken.context,
        measured=measured is not None,
    )


def _estimated(config: Config, spec: ModelSpec) -> Measured:
    weights = weight_bytes(spec, config.dtype, scheme_of(config.quantization, config.quantization_group_size))
    activations, cuda = _activations(config, spec, BYTES[config.dtype]), config.device == "cuda"
    graphs = len(capture_sizes(config)) * GRAPH if cuda else 0
    return Measured(weights, activations, graphs, CONTEXT if cuda else 0)


def _activations(config: Config, spec: ModelSpec, size: int) -> int:
    """The most that is alive at once in a step: of one layer's parts the largest, and the sampler's float32 copies."""
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    per_token = (4 * spec.hidden_size + max(3 * spec.intermediate_size, 2 * heads)) * size
    per_row = 4 * spec.vocab_size * 4
    return (config.max_num_batched_tokens or 0) * per_token + (config.max_num_seqs or 0) * per_row


def _num_blocks(config: Config, spec: ModelSpec, memory: Memory) -> int:
    """KV blocks: as told, else what all rows could need at once, as far as memory goes."""
    longest = -(-(config.max_model_len or 0) // config.block_size)
    if config.num_gpu_blocks_override is not None:
        blocks, source = config.num_gpu_blocks_override, "--num-gpu-blocks-override"
    elif config.kv_cache_memory_bytes is not None:
        blocks, source = config.kv_cache_memory_bytes // memory.block, "--kv-cache-memory-bytes"
    else:
        blocks, source = min((config.max_num_seqs or 0) * longest, _room(config, memory, longest)), "the memory"
    if blocks < longest:
        raise ConfigError(
            f"{source} gives {blocks * config.block_size} tokens of KV cache, and one request of --max-model-len "
            f"{config.max_model_len} needs {longest * config.block_size}.\n"
            + memory_table(memory, blocks)
            + "\n".join(["", "What would fit:", *_remedies(config, spec, memory, blocks, longest)])
        )
    taken = memory.beside_kv + blocks * memory.block
    if taken > memory.available:
        raise ConfigError(
            f"{source} asks for more memory than there is: {in_mib(taken)} of {in_mib(memory.available)}.\n"
            + memory_table(memory, blocks)
            + f"\nWhat would fit:\n  --num-gpu-blocks-override {memory.for_kv // memory.block}"
        )
    return blocks


def _room(config: Config, memory: Memory, longest: int) -> int:
    """Blocks that an automatic pool may take. RAM is everybody's: there half of it stays free, if one request fits."""
    fits = memory.for_kv // memory.block
    return fits if config.device == "cuda" else min(fits, max(longest, fits // 2))


def memory_table(memory: Memory, num_blocks: int) -> str:
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


def _remedies(config: Config, spec: ModelSpec, memory: Memory, blocks: int, longest: int) -> list[str]:
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
    if config.dtype == "float32" and memory.budget >= rest + (memory.weights + needed) // 2:
        found.append("  --dtype bfloat16 (halves weights and KV; slower where the CPU has no bfloat16)")
    found += _smaller_weights(config, spec, memory, needed)
    if not found or blocks < 1:
        total = memory.beside_kv + needed
        found.append(f"  a machine with {in_mib(int(total / memory.share))} free, or a smaller model")
    return found


def _smaller_weights(config: Config, spec: ModelSpec, memory: Memory, needed: int) -> list[str]:
    """The widest ``--quantization`` with which the weights leave ``needed`` bytes for the KV cache, where one does."""
    if config.quantization != "none" or config.num_gpu_blocks_override or config.kv_cache_memory_bytes:
        return []
    for name in ("int8", "int4"):
        weights = weight_bytes(spec, config.dtype, scheme_of(name))
        if memory.beside_kv - memory.weights + weights + needed <= memory.budget:
            return [f"  --quantization {name} (weights of {in_mib(weights)}; see docs/quantization.md)"]
    return []


def effective(config: Config) -> dict[str, Any]:
    """The resolved numbers by name, for logs and reports."""
    names = "model device dtype quantization threads max_model_len max_num_seqs max_num_batched_tokens"
    blocks = config.num_gpu_blocks_override or 0
    return {name: getattr(config, name) for name in names.split()} | {"kv_tokens": blocks * config.block_size}
