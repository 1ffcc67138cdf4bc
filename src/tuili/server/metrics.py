"""/metrics with vLLM's names, buckets and definitions (interfaces.md 5.5), and our own under ``tuili:``.

All are views of three records: ``StepStats`` (one per step), ``Finished`` (one per engine request: n choices make n),
and the deltas as the frontend gives them out (inter-token latency, generated tokens: known before a request ends).
Gauges and totals of the engine are read from its snapshot at each scrape. One registry per app.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client import generate_latest as _text
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from tuili.base.clock import Clock
from tuili.base.config import Config
from tuili.core.params import SamplingParams
from tuili.core.plan import StepPlan, StepResult, StepStats
from tuili.engine.outputs import Finished

if TYPE_CHECKING:
    from tuili.engine.engine import Snapshot

FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
INTER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
ITERATION = (1, 8, *(1 << power for power in range(4, 15)))
CHOICES = (1, 2, 5, 10, 20)
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
#: Seconds of the parts of a step and of the frontend's share: far below a request's times.
PARTS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1, 2, 5)
HTTP = (0.1, 0.5, 1)
SOURCES = ("local_compute", "local_cache_hit")

CACHE_INFO = (
    "block_size",
    "gpu_memory_utilization",
    "enable_prefix_caching",
    "num_gpu_blocks_override",
    "kv_cache_memory_bytes",
)


def one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 ... up to ``limit``."""
    values, power = [], 1
    while power <= limit:
        values += [step * power for step in (1, 2, 5) if step * power <= limit]
        power *= 10
    return tuple(values)


class Count:
    """A counter's value. One thread counts, any may read; so with ``Spread``: prometheus_client's own take a lock and
    several calls for each observation, which is half of what a streamed token costs the server."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount


class Spread:
    """A histogram's counts by bucket, and the sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(map(float, bounds))
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds and how many were not above, as Prometheus wants them."""
        return list(zip(map(floatToGoString, (*self.bounds, math.inf)), accumulate(self.counts), strict=True))


V = TypeVar("V", Count, Spread)


class MetricFamily(Generic[V]):
    """One metric with its labels: a value for each combination that occurred. A prometheus collector."""

    def __init__(self, registry: CollectorRegistry, name: str, help: str, labels: Sequence[str], make: Callable[[], V]):
        self.name, self.help, self.labels = name, help, labels
        self.make: Callable[[], V] = make
        self.values: dict[tuple[str, ...], V] = {}
        registry.register(self)

    def of(self, *labels: str) -> V:
        found = self.values.get(labels)
        if found is None:
            found = self.values[labels] = self.make()
        return found

    def collect(self) -> Iterator[Metric]:
        histogram = isinstance(self.make(), Spread)
        family: Any = (HistogramMetricFamily if histogram else CounterMetricFamily)(
            self.name, self.help, labels=self.labels
        )
        for labels, value in list(self.values.items()):
            if isinstance(value, Spread):
                family.add_metric(labels, value.buckets(), value.sum)
            else:
                family.add_metric(labels, value.value)
        yield family


class Labelled:
    """Makes metrics with the two labels that vLLM gives to all, ``model_name`` and ``engine``, bound at once."""

    names = ("model_name", "engine")

    def __init__(self, registry: CollectorRegistry, values: tuple[str, str]):
        self.registry = registry
        self.values = values

    def counter(self, name: str, help: str) -> Count:
        return MetricFamily(self.registry, name, help, self.names, Count).of(*self.values)

    def counters(self, name: str, help: str, label: str, known: Iterable[str] = ()) -> Callable[[str], Count]:
        """A counter with one more label; ``known`` values show from the start, with 0."""
        family = MetricFamily(self.registry, name, help, (*self.names, label), Count)
        for value in known:
            family.of(*self.values, value)
        return lambda value: family.of(*self.values, value)

    def histogram(self, name: str, help: str, buckets: Sequence[float]) -> Spread:
        return MetricFamily[Spread](self.registry, name, help, self.names, lambda: Spread(buckets)).of(*self.values)


class RequestSeries:
    """What a finished request leaves behind."""

    def __init__(self, make: Labelled, max_model_len: int):
        tokens, h = one_two_five(max_model_len), make.histogram
        self.first_token = h("vllm:time_to_first_token_seconds", "Arrival at the frontend to first token.", FIRST_TOKEN)
        self.e2e = h("vllm:e2e_request_latency_seconds", "Arrival at the frontend to end.", REQUEST)
        self.queue = h("vllm:request_queue_time_seconds", "Queued to first scheduled.", REQUEST)
        self.prefill = h("vllm:request_prefill_time_seconds", "First scheduled to first token.", REQUEST)
        self.decode = h("vllm:request_decode_time_seconds", "First to last token.", REQUEST)
        self.inference = h("vllm:request_inference_time_seconds", "First scheduled to last token.", REQUEST)
        self.frontend = h(
            "tuili:request_frontend_time_seconds",
            "e2e - (queue + prefill + decode): tokenize, hand over, detokenize, wait for the loop.",
            PARTS,
        )
        self.per_token = h(
            "vllm:request_time_per_output_token_seconds", "Decode time / (output tokens - 1), per request.", INTER_TOKEN
        )
        self.prompt = h("vllm:request_prompt_tokens", "Prompt tokens per request.", tokens)
        self.generation = h("vllm:request_generation_tokens", "Output tokens per request.", tokens)
        self.max_tokens = h("vllm:request_params_max_tokens", "max_tokens per request, as resolved.", tokens)
        self.computed = h("vllm:request_prefill_kv_computed_tokens", "Prompt tokens that no cache had.", tokens)
        self.preemptions = h("vllm:request_num_preemptions", "Preemptions per request.", PREEMPTIONS)
        self.prompt_tokens = make.counter(
            "vllm:prompt_tokens", "Prompt tokens of ended requests, cached ones included."
        )
        self.cached_tokens = make.counter("vllm:prompt_tokens_cached", "Prompt tokens whose KV was reused.")
        self.by_source = make.counters(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where their KV came from.", "source", SOURCES
        )
        self.cached_by_source = make.counters(
            "vllm:prompt_tokens_cached_by_source", "Reused prompt tokens by where the KV was.", "source", ("device",)
        )
        reasons = ("stop", "length", "abort", "error")
        self.success = make.counters("vllm:request_success", "Ended requests by reason.", "finished_reason", reasons)

    def finish(self, done: Finished) -> None:
        usage, timing = done.usage, done.timing
        self.success(done.finish_reason).inc()
        self.e2e.observe(done.ended - done.arrival)
        self.max_tokens.observe(done.params.max_tokens or 0)
        self.preemptions.observe(done.preemptions)
        self.prompt.observe(usage.prompt_tokens)
        self.generation.observe(usage.completion_tokens)
        if timing.scheduled is not None:
            self.queue.observe(timing.scheduled - timing.queued)
            self._count_prompt(usage.prompt_tokens, usage.cached_tokens)
        if timing.scheduled is None or timing.first_token is None or timing.last_token is None:
            return
        decode = timing.last_token - timing.first_token
        self.first_token.observe(timing.first_token - done.arrival)
        self.prefill.observe(timing.first_token - timing.scheduled)
        self.decode.observe(decode)
        self.inference.observe(timing.last_token - timing.scheduled)
        self.frontend.observe(done.ended - done.arrival - (timing.last_token - timing.queued))
        if usage.completion_tokens > 1:
            self.per_token.observe(decode / (usage.completion_tokens - 1))

    def _count_prompt(self, prompt: int, cached: int) -> None:
        self.computed.observe(prompt - cached)
        self.prompt_tokens.inc(prompt)
        self.cached_tokens.inc(cached)
        self.by_source("local_compute").inc(prompt - cached)
        self.by_source("local_cache_hit").inc(cached)
        self.cached_by_source("device").inc(cached)


class StepMetrics:
    """What a step leaves behind."""

    def __init__(self, make: Labelled):
        self.tokens = make.histogram("vllm:iteration_tokens_total", "Tokens computed per step.", ITERATION)
        self.schedule = make.histogram("tuili:step_schedule_seconds", "Host time to make the plan of a step.", PARTS)
        self.device = make.histogram("tuili:step_device_seconds", "Model and sampling time of a step.", PARTS)
        self.update = make.histogram("tuili:step_update_seconds", "Host time to take in the result of a step.", PARTS)
        self.prefill = make.counter("tuili:step_prefill_tokens", "Tokens computed for prompts.")
        self.decode = make.counter("tuili:step_decode_tokens", "Tokens computed for outputs.")
        self.padding = make.counter("tuili:step_padding_tokens", "Rows computed for nobody (static batching).")

    def step(self, plan: StepPlan, result: StepResult, stats: StepStats) -> None:
        self.tokens.observe(stats.num_tokens)
        self.schedule.observe(stats.schedule_seconds)
        self.device.observe(stats.device_seconds)
        self.update.observe(stats.update_seconds)
        self.prefill.inc(stats.num_prefill_tokens)
        self.decode.inc(stats.num_decode_tokens)
        self.padding.inc(stats.padding_tokens)


class FrontendMetrics:
    """What the frontend sees: tokens as they pass, calls with their n choices, refusals, HTTP."""

    def __init__(self, make: Labelled, max_model_len: int):
        tokens = one_two_five(max_model_len)
        self.inter_token = make.histogram(
            "vllm:inter_token_latency_seconds", "Between two deltas of a choice, at the frontend.", INTER_TOKEN
        )
        self.generation_tokens = make.counter("vllm:generation_tokens", "Output tokens that reached the frontend.")
        self.n = make.histogram("vllm:request_params_n", "n per prompt.", CHOICES)
        self.longest = make.histogram(
            "vllm:request_max_num_generation_tokens", "Output tokens of the longest choice of a prompt.", tokens
        )
        self.rejections = make.counters(
            "vllm:admission_rejections", "Requests refused because the server is full.", "reason", ("queue_full",)
        )
        labels = ("handler", "method")
        self.http_requests = MetricFamily(
            make.registry, "http_requests", "HTTP requests by route.", (*labels, "status"), Count
        )
        self.http_seconds = MetricFamily[Spread](
            make.registry,
            "http_request_duration_seconds",
            "Until the last byte of the answer.",
            labels,
            lambda: Spread(HTTP),
        )

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        self.http_requests.of(handler, method, f"{status // 100}xx").inc()
        self.http_seconds.of(handler, method).observe(seconds)


class Prompt(Protocol):
    """What ``Watch`` knows of a job."""

    @property
    def first(self) -> int: ...
    @property
    def params(self) -> SamplingParams: ...


class Watch:
    """Follows the deltas of one call."""

    def __init__(self, metrics: FrontendMetrics, clock: Clock, prompts: Sequence[Prompt]):
        self.metrics = metrics
        self.clock = clock
        self.prompts = prompts
        self.last: dict[int, float] = {}
        self.counts: dict[int, int] = {}

    def delta(self, choice: int, tokens: int) -> None:
        if not tokens:
            return
        now = self.clock.now()
        before = self.last.get(choice)
        if before is not None:
            self.metrics.inter_token.observe(now - before)
        self.last[choice] = now
        self.counts[choice] = self.counts.get(choice, 0) + tokens
        self.metrics.generation_tokens.inc(tokens)

    def done(self) -> None:
        for prompt in self.prompts:
            n = prompt.params.n
            self.metrics.n.observe(n)
            self.metrics.longest.observe(max(self.counts.get(prompt.first + index, 0) for index in range(n)))


class EngineState:
    """A prometheus collector: the engine's snapshot, taken once per scrape."""

    def __init__(self, snapshot: Callable[[], Snapshot], config: Config, labels: tuple[str, str]):
        self.snapshot = snapshot
        self.labels = labels
        self.info = {name: str(getattr(config, name)) for name in CACHE_INFO}

    def collect(self) -> Iterator[Metric]:
        now = self.snapshot()
        for name, value, help in (
            ("vllm:num_requests_running", now.num_running, "Requests in the batch."),
            ("vllm:num_requests_waiting", now.num_waiting, "Requests in the queue."),
            ("vllm:kv_cache_usage_perc", now.kv_usage, "Share of KV blocks in use, 0 to 1."),
            ("tuili:kv_blocks_used", now.kv_blocks_used, "KV blocks in use."),
            ("tuili:kv_blocks_total", now.kv_blocks_total, "KV blocks there are."),
        ):
            yield self._family(GaugeMetricFamily(name, help, labels=Labelled.names), value)
        for name, value, help in (
            ("vllm:prefix_cache_queries", now.prefix_queries, "Prompt tokens looked up in the prefix cache."),
            ("vllm:prefix_cache_hits", now.prefix_hits, "Prompt tokens found in the prefix cache."),
            ("vllm:num_preemptions", now.preemptions, "Preemptions since the start."),
            ("tuili:steps", now.steps, "Steps since the start."),
        ):
            yield self._family(CounterMetricFamily(name, help, labels=Labelled.names), value)
        yield self._waiting(now)
        yield self._cache_info(now)

    def _family(self, family: Any, value: float) -> Metric:
        family.add_metric(self.labels, value)
        return family

    def _waiting(self, now: Snapshot) -> Metric:
        family = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Requests in the queue by reason.",
            labels=(*Labelled.names, "reason"),
        )
        family.add_metric((*self.labels, "capacity"), now.num_waiting)
        family.add_metric((*self.labels, "deferred"), 0)
        return family

    def _cache_info(self, now: Snapshot) -> Metric:
        values = {**self.info, "num_gpu_blocks": str(now.kv_blocks_total)}
        family = GaugeMetricFamily("vllm:cache_config_info", "KV cache settings.", labels=(*Labelled.names, *values))
        family.add_metric((*self.labels, *values.values()), 1)
        return family


class Metrics:
    """All metrics of one app."""

    def __init__(self, config: Config, model_name: str, max_model_len: int, snapshot: Callable[[], Snapshot]):
        self.registry = CollectorRegistry()
        labels = (model_name, "0")
        make = Labelled(self.registry, labels)
        self.requests = RequestSeries(make, max_model_len)
        self.steps = StepMetrics(make)
        self.frontend = FrontendMetrics(make, max_model_len)
        self.registry.register(EngineState(snapshot, config, labels))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def watch(self, clock: Clock, prompts: Sequence[Prompt]) -> Watch:
        return Watch(self.frontend, clock, prompts)

    def rejected(self) -> None:
        self.frontend.rejections("queue_full").inc()

    def text(self) -> bytes:
        return _text(self.registry)
