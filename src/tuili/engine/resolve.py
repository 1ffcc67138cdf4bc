"""Every "auto" becomes a number, once (DESIGN.md 5). Pure: config, model and machine in, config out. No torch.

``resolve(resolve(c)) == resolve(c)``: the resolved config, dumped and loaded again, gives the same run (law 12).
"""

from __future__ import annotations

from typing import Any

from tuili.base.config import Config
from tuili.base.errors import ConfigError
from tuili.base.hardware import Hardware
from tuili.base.log import get
from tuili.engine.captures import with_captures
from tuili.engine.memory import Measured, MemoryTable, in_mib, memory_of, memory_table, remedies
from tuili.layers.spec import ModelSpec, refuse_rounding_twice
from tuili.quant.scheme import scheme_of

log = get(__name__)
DEFAULT_SEQS = {"cpu": 128, "cuda": 256}
DEFAULT_BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}


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
    refuse_rounding_twice(config.quantization, spec)
    config = config.with_(
        device=device,
        served_model_name=config.served_model_name or config.model,
        max_model_len=_max_model_len(config, spec),
        threads=config.threads or hardware.cores,
        quantization_group_size=scheme.group or None,
    )
    config = with_captures(_step_sizes(with_dtypes(config, spec, hardware)))
    memory = memory_of(config, spec, hardware, measured)
    blocks = _num_blocks(config, spec, memory)
    return config.with_(num_gpu_blocks_override=blocks, kv_cache_memory_bytes=blocks * memory.block)


def _device(config: Config, hardware: Hardware) -> str:
    if config.device == "cuda" and hardware.gpu is None:
        raise ConfigError("--device cuda, but no CUDA device was found here; use --device cpu, or see `tuili doctor`")
    return config.device if config.device != "auto" else "cuda" if hardware.gpu else "cpu"


def with_dtypes(config: Config, spec: ModelSpec, hardware: Hardware) -> Config:
    """``config``, whose device is resolved, with the dtypes of weights, of activations, and of K and V."""
    config = config.with_(dtype=_dtype(config, spec, hardware))
    config = config.with_(activation_dtype=activation_dtype(config, hardware))
    return config.with_(kv_cache_dtype=_kv_cache_dtype(config))


def _dtype(config: Config, spec: ModelSpec, hardware: Hardware) -> str:
    """What dense weights are stored in. Where the matrices are rounded, what is left of a float16 checkpoint is little:
    it is bfloat16 where that is multiplied by pairs, so that the activations are."""
    if config.dtype != "auto":
        return config.dtype
    rounded = config.quantization != "none" or spec.rounded is not None
    if rounded and spec.dtype == "float16" and _by_pairs(config, hardware):
        return "bfloat16"
    return spec.dtype


def _by_pairs(config: Config, hardware: Hardware) -> bool:
    """Whether the C++ kernels compute here, with instructions that multiply pairs of bfloat16."""
    return config.device == "cpu" and config.kernels == "auto" and hardware.fast_bfloat16


def activation_dtype(config: Config, hardware: Hardware) -> str:
    """What activations are, where device and dtype are resolved. The C++ kernels widen a weight of 16 bits while they
    multiply it; a card and torch's references compute in the weights' own type."""
    dtype, cuda = config.dtype, config.device == "cuda"
    if config.activation_dtype == "auto":
        if cuda or config.kernels != "auto":
            return dtype
        return dtype if dtype == "bfloat16" and _by_pairs(config, hardware) else "float32"
    if config.activation_dtype != dtype and (cuda or config.activation_dtype != "float32"):
        raise ConfigError(
            f"--activation-dtype {config.activation_dtype} with weights in {dtype} (--dtype): activations are in the "
            f"weights' type{'' if cuda else ' or float32'}; use --activation-dtype {dtype}, or auto"
        )
    return config.activation_dtype


def _kv_cache_dtype(config: Config) -> str:
    """What K and V are kept in. Activations that are wider than the weights are rounded to the weights' bfloat16 there:
    half of the bytes, and as exact as the model was trained."""
    activations = config.activation_dtype
    narrow = "bfloat16" if (config.dtype, activations) == ("bfloat16", "float32") else activations
    if config.kv_cache_dtype == "auto":
        return narrow
    if config.kv_cache_dtype not in (narrow, activations, "int8", "fp8"):
        raise ConfigError(
            f"--kv-cache-dtype {config.kv_cache_dtype} with activations in {activations}: K and V are kept in "
            f"{' or '.join(dict.fromkeys((narrow, activations)))}, int8 or fp8"
        )
    return config.kv_cache_dtype


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


def _num_blocks(config: Config, spec: ModelSpec, memory: MemoryTable) -> int:
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
            + "\n".join(["", "What would fit:", *remedies(config, spec, memory, blocks, longest)])
        )
    taken = memory.sure + blocks * memory.block
    if taken > memory.available:
        raise ConfigError(
            f"{source} asks for more memory than there is: {in_mib(taken)} of {in_mib(memory.available)}.\n"
            + memory_table(memory, blocks)
            + f"\nWhat would fit:\n  --num-gpu-blocks-override {memory.for_kv // memory.block}"
        )
    return blocks


def _room(config: Config, memory: MemoryTable, longest: int) -> int:
    """Blocks that an automatic pool may take, one less than fit on a device: it has one for padding. RAM is
    everybody's: there half of it stays free, if one request fits.

    What a card was not yet seen to take may be estimated too high: one request has room if it fits beside the weights.
    """
    fits = memory.for_kv // memory.block
    if config.device == "cpu":
        return min(fits, max(longest, fits // 2))
    return max(fits - 1, longest) if memory.sure + longest * memory.block <= memory.budget else fits - 1


def effective(config: Config) -> dict[str, Any]:
    """The resolved numbers by name, for logs and reports."""
    names = "model device dtype activation_dtype quantization threads max_model_len max_num_seqs max_num_batched_tokens"
    blocks = config.num_gpu_blocks_override or 0
    return {name: getattr(config, name) for name in names.split()} | {"kv_tokens": blocks * config.block_size}
