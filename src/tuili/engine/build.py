"""From a config to a running engine: the only place that knows all the parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, cast

from tuili.base.clock import WallClock
from tuili.base.config import Config
from tuili.base.errors import ModelError
from tuili.base.hardware import Hardware, probe
from tuili.base.log import get
from tuili.base.threads import let_waiting_threads_sleep
from tuili.core.policies import policies
from tuili.core.scheduler import Scheduler
from tuili.engine.admission import Bounds
from tuili.engine.captures import capture_sizes, on_device
from tuili.engine.chat import find_template
from tuili.engine.client import EngineClient, ThreadClient
from tuili.engine.device import able, arithmetic, backend, open_device, place_of
from tuili.engine.engine import Engine, describe_error
from tuili.engine.generation_config import generation_defaults
from tuili.engine.memory import ALLOCATING, COMPUTING, LOADING, MEASURING, memory_of, memory_table, savings
from tuili.engine.resolve import effective, resolve
from tuili.engine.text import TextEngine
from tuili.engine.tokenizer import Tokenizer
from tuili.models.checkpoint import Checkpoint, open_checkpoint
from tuili.models.shards import weight_files
from tuili.quant.scheme import scheme_of

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
    policies.get(config.scheduling_policy)  # an unknown one is told before anything is read
    checkpoint = open_checkpoint(config.model, config.revision)
    tokenizer = Tokenizer.open(checkpoint.path)
    defaults = generation_defaults(config, checkpoint.generation_config)
    template = cache(
        lambda tools: find_template(checkpoint.path, checkpoint.tokenizer_config, config.chat_template, tools=tools)
    )
    template(False)  # a missing --chat-template is told before the weights are loaded
    weight_files(checkpoint.path)  # missing weights are told before what they would take
    config, resolved, machine = prepared(config, checkpoint)
    bounds = bounds_of(resolved, checkpoint, tokenizer, defaults.max_new_tokens)
    if resolved.device == "cuda":
        resolved, engine = start_on_card(config, resolved, checkpoint, machine, progress)
    else:
        engine = start(resolved, open_executor(resolved, load(resolved, checkpoint, progress), progress))
    log.info("%s", ", ".join(f"{name}={value}" for name, value in effective(resolved).items()))
    rounded = checkpoint.spec.rounded.method if checkpoint.spec.rounded else ""
    log.info("%s; KV cache %s", arithmetic(resolved, rounded), resolved.kv_cache_dtype)
    return TextEngine(client(engine), tokenizer, resolved, bounds, defaults, templates=template)


def prepared(config: Config, checkpoint: Checkpoint) -> tuple[Config, Config, Hardware]:
    """``config`` as this machine is able to run it, the same resolved, and the machine. Raises ConfigError."""
    able_config, machine = able(config, probe())
    return able_config, resolve(able_config, checkpoint.spec, machine), machine


def bounds_of(config: Config, checkpoint: Checkpoint, tokenizer: Tokenizer, max_new_tokens: int | None) -> Bounds:
    """What a request may ask. The text ends at the model's own ids and at the tokenizer's."""
    spec = checkpoint.spec
    ends = spec.eos_token_ids if tokenizer.eos is None else (*spec.eos_token_ids, tokenizer.eos)
    wrong = [id for id in ends if id >= spec.vocab_size]
    if wrong:
        raise ModelError(
            f"{checkpoint.path}: end-of-text ids {wrong} are outside of the vocabulary of {spec.vocab_size}"
        )
    queued = config.max_num_queued_reqs
    return Bounds(
        max_model_len=config.max_model_len or spec.max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        max_logprobs=config.max_logprobs,
        max_new_tokens=max_new_tokens,
        max_requests=None if queued is None else cast(int, config.max_num_seqs) + queued,
        priorities=config.scheduling_policy == "priority",
    )


def start_on_card(
    config: Config, resolved: Config, checkpoint: Checkpoint, machine: Hardware, progress: Progress | None = None
) -> tuple[Config, Engine]:
    """The engine of ``config`` on a card, and that config resolved: the KV cache gets what is seen to be left, unless
    ``config`` says how large it is. ``resolved`` is what was estimated. ConfigError with settings that fit where the
    memory ends."""
    from tuili.engine.profile import CudaMeter, describe_out_of_memory, explain_out_of_memory, is_out_of_memory, measure

    spec, meter = checkpoint.spec, CudaMeter()
    memory = memory_of(resolved, spec, machine)

    def advice(doing: str) -> Callable[[int], str]:
        return lambda size: savings(resolved, spec, memory, size, doing)

    before = meter.allocated()
    with explain_out_of_memory(LOADING, advice(LOADING)):
        model = load(resolved, checkpoint, progress)
    if config.num_gpu_blocks_override is None and config.kv_cache_memory_bytes is None:
        with explain_out_of_memory(MEASURING, advice(MEASURING)):
            outside = max(0, machine.gpu_memory - machine.gpu_free - before)
            measured = measure(resolved, partial(_open_small, resolved, model), meter, before, outside)
        resolved = resolve(config, spec, machine, measured)
        memory = memory_of(resolved, spec, machine, measured)
    log.info("memory of %s:\n%s", machine.gpu, memory_table(memory, resolved.num_gpu_blocks_override or 0))
    with explain_out_of_memory(ALLOCATING, advice(ALLOCATING)):
        executor = open_executor(resolved, model, progress)

    def explain(error: Exception) -> str:
        return (
            describe_out_of_memory(COMPUTING, error, advice(COMPUTING))
            if is_out_of_memory(error)
            else describe_error(error)
        )

    return resolved, start(resolved, executor, explain)


def _open_small(config: Config, model: Decoder, num_blocks: int, sizes: Sequence[int]) -> Executor:
    """An executor of ``num_blocks`` blocks that captures steps of ``sizes`` rows, to be measured."""
    return open_executor(config.with_(num_gpu_blocks_override=num_blocks), model, sizes=sizes)


def start(config: Config, executor: Executor, explain: Callable[[Exception], str] = describe_error) -> Engine:
    """The engine of a resolved config on the executor that was opened for it."""
    clock = WallClock()
    scheduler = Scheduler(
        executor.capacity,
        policies.get(config.scheduling_policy)(),
        max_num_batched_tokens=cast(int, config.max_num_batched_tokens),
        max_num_seqs=cast(int, config.max_num_seqs),
        enable_prefix_caching=config.enable_prefix_caching,
        reserve_kv=config.kv_cache_allocation == "reserved",
        enable_chunked_prefill=config.enable_chunked_prefill,
        clock=clock,
        max_queued=config.max_num_queued_reqs,
    )
    return Engine(scheduler, executor, clock, depth=2 if on_device(config) else 1, explain=explain)


def open_executor(
    config: Config, model: Decoder, progress: Progress | None = None, sizes: Sequence[int] | None = None
) -> Executor:
    """Where plans of a resolved config run on ``model``. ``sizes`` are those of the steps that a card captures, unless
    they are the config's."""
    numbers = (config.num_gpu_blocks_override, config.max_model_len, config.max_num_seqs)
    assert None not in numbers, "not resolved"
    num_blocks, max_model_len, max_num_seqs = cast(tuple[int, ...], numbers)
    from tuili.executors.local import LocalExecutor

    return LocalExecutor(
        model,
        open_device(config),
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        enforce_eager=config.enforce_eager or (config.compile and not on_device(config)),
        capture_sizes=capture_sizes(config) if sizes is None else sizes,
        kv_cache_dtype=config.kv_cache_dtype,
        progress=progress,
    )


def load(config: Config, checkpoint: Checkpoint, progress: Progress | None = None) -> Decoder:
    """The model of a resolved config, on its device and with the kernels that compute it.

    The C++ kernels get the weights in their order. Their threads are the process's: the engine started last decides.
    """
    let_waiting_threads_sleep()
    import torch

    from tuili import ops
    from tuili.models.weights import load_model
    from tuili.ops import cpu

    threads = cast(int, config.threads)
    torch.set_num_threads(threads)
    kernels = ops.kernels_of(backend(config))
    if kernels.backend == "cpu":
        cpu.set_threads(threads)
    scheme = scheme_of(config.quantization, config.quantization_group_size, config.dtype)
    if kernels.backend == "reference" and config.quantization != "none":
        log.info("quantization: %s on torch's references, exact and slow", config.quantization)
    activations = config.activation_dtype
    plain = kernels.backend != "cpu" and scheme.format == "dense" and config.dtype == activations
    watch = progress and (lambda name, done, total: progress("loading weights", done, total))
    length = cast(int, config.max_model_len)
    model = load_model(checkpoint, activations, length, watch, None if plain else scheme, place_of(config), kernels)
    if config.compile:
        from tuili.layers.compiled import Compiled

        log.info("compiled in %.1f s; `tuili bench compile` says when that pays", Compiled(model).seconds)
    return model
