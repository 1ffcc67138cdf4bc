"""From a config to a running engine: the only place that knows all the parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, cast

from tuili.base.clock import WallClock
from tuili.base.config import Config
from tuili.base.errors import ModelError
from tuili.base.hardware import probe
from tuili.base.log import get
from tuili.base.threads import let_waiting_threads_sleep
from tuili.core.policies import policies
from tuili.core.scheduler import Scheduler
from tuili.engine.chat import find_template
from tuili.engine.client import EngineClient, ThreadClient
from tuili.engine.device import able, backend, open_device
from tuili.engine.engine import Engine
from tuili.engine.generation_config import generation_defaults
from tuili.engine.prepare import Limits
from tuili.engine.resolve import capture_sizes, effective, on_device, resolve
from tuili.engine.text import TextEngine
from tuili.engine.tokenizer import Tokenizer
from tuili.models.checkpoint import Checkpoint, open_checkpoint
from tuili.models.weights import weight_files
from tuili.quant.scheme import Scheme, scheme_of

if TYPE_CHECKING:
    from tuili.core.executor import Executor
    from tuili.layers.decoder import Decoder

log = get(__name__)
#: Called with what is being loaded, and the bytes done and in all.
Progress = Callable[[str, int, int], None]


def build(
    config: Config, progress: Progress | None = None, client: Callable[[Engine], EngineClient] = ThreadClient
) -> TextEngine:
    """Open the checkpoint, resolve the config, load the weights, start the engine. Raises ConfigError, ModelError."""
    checkpoint = open_checkpoint(config.model, config.revision)
    tokenizer = Tokenizer.open(checkpoint.path)
    defaults = generation_defaults(config, checkpoint.generation_config)
    template = cache(
        lambda tools: find_template(checkpoint.path, checkpoint.tokenizer_config, config.chat_template, tools=tools)
    )
    template(False)  # a missing --chat-template is told before the weights are loaded
    weight_files(checkpoint.path)  # missing weights are told before what they would take
    config, machine = able(config, probe())
    resolved = resolve(config, checkpoint.spec, machine)
    log.info("%s", ", ".join(f"{name}={value}" for name, value in effective(resolved).items()))
    limits = limits_of(resolved, checkpoint, tokenizer, defaults.max_new_tokens)
    return TextEngine(
        client(start(resolved, checkpoint, progress)), tokenizer, resolved, limits, defaults, templates=template
    )


def limits_of(config: Config, checkpoint: Checkpoint, tokenizer: Tokenizer, max_new_tokens: int | None) -> Limits:
    """What a request may ask. The text ends at the model's own ids and at the tokenizer's."""
    spec = checkpoint.spec
    ends = spec.eos_token_ids if tokenizer.eos is None else (*spec.eos_token_ids, tokenizer.eos)
    wrong = [id for id in ends if id >= spec.vocab_size]
    if wrong:
        raise ModelError(
            f"{checkpoint.path}: end-of-text ids {wrong} are outside of the vocabulary of {spec.vocab_size}"
        )
    return Limits(
        max_model_len=config.max_model_len or spec.max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        max_logprobs=config.max_logprobs,
        max_new_tokens=max_new_tokens,
    )


def start(config: Config, checkpoint: Checkpoint, progress: Progress | None = None) -> Engine:
    """The engine of a resolved config, its weights loaded."""
    executor = open_executor(config, load(config, checkpoint, progress))
    clock = WallClock()
    scheduler = Scheduler(
        executor.capacity,
        policies.get(config.scheduling_policy)(),
        max_num_batched_tokens=cast(int, config.max_num_batched_tokens),
        max_num_seqs=cast(int, config.max_num_seqs),
        enable_prefix_caching=config.enable_prefix_caching,
        enable_chunked_prefill=config.enable_chunked_prefill,
        clock=clock,
        max_queued=config.max_num_queued_reqs,
    )
    return Engine(scheduler, executor, clock, depth=2 if on_device(config) else 1)


def open_executor(config: Config, model: Decoder) -> Executor:
    """Where plans of a resolved config run on ``model``: a device, or this process."""
    sizes = (config.num_gpu_blocks_override, config.max_model_len, config.max_num_seqs)
    assert None not in sizes, "not resolved"
    num_blocks, max_model_len, max_num_seqs = cast(tuple[int, ...], sizes)
    if on_device(config):
        from tuili.executors.device import DeviceExecutor

        return DeviceExecutor(
            model,
            open_device(config),
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            capture_sizes=capture_sizes(config),
            kv_cache_dtype=config.kv_cache_dtype,
        )
    from tuili.executors.local import LocalExecutor

    return LocalExecutor(
        model,
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        enforce_eager=config.enforce_eager or config.compile,
        kv_cache_dtype=config.kv_cache_dtype,
    )


def load(config: Config, checkpoint: Checkpoint, progress: Progress | None = None) -> Decoder:
    """The model of a resolved config, on its device and on the ops that compute from now on.

    The C++ kernels get the weights in their order. The choice of ops is the process's: the engine started last decides.
    """
    let_waiting_threads_sleep()
    import torch

    from tuili import ops
    from tuili.models.weights import load_model
    from tuili.ops import cpu

    threads = cast(int, config.threads)
    torch.set_num_threads(threads)
    chosen = backend(config)
    if chosen == "cpu":
        cpu.set_threads(threads)
    ops.choose(chosen)
    scheme = scheme_of(config.quantization, config.quantization_group_size)
    if chosen == "reference" and config.quantization != "none":
        log.info("quantization: %s on torch's references, exact and slow", config.quantization)
    plain = chosen != "cpu" and scheme == Scheme()
    watch = progress and (lambda name, done, total: progress("loading weights", done, total))
    return load_model(
        checkpoint, config.dtype, cast(int, config.max_model_len), watch, scheme=None if plain else scheme
    )
