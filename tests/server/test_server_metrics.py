"""/metrics: it parses, has vLLM's names, and its sums are those of the log of finished requests (interfaces.md 5.5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted import LINE, Server

from tuili.core.plan import StepStats
from tuili.engine.outputs import Finished
from tuili.server.metrics import one_two_five

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GAUGES = ("num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc")
COUNTERS = (
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "prompt_tokens_by_source",
    "prompt_tokens_cached",
    "prompt_tokens_cached_by_source",
    "generation_tokens",
    "request_success",
    "admission_rejections",
)
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "request_num_preemptions",
    "request_prefill_kv_computed_tokens",
)


class Run:
    """A server after a mixed load, its log, and its metrics as a dict of samples."""

    def __init__(self, server: Server):
        self.steps: list[StepStats] = []
        server.engine.on_step.append(lambda plan, result, stats: self.steps.append(stats))
        prompt = [80] * 30
        for body in (
            {"prompt": prompt, "max_tokens": 7},
            {"prompt": prompt, "max_tokens": 5, "n": 3, "temperature": 1},
            {"prompt": ["a", "bb", "ccc"], "max_tokens": 1},
            {"prompt": "x", "max_tokens": 200},
            {"prompt": "x", "stop": "met", "max_tokens": 50, "stream": True},
            {"prompt": "FAIL", "max_tokens": 50},
            {"prompt": "x", "temperature": 9},
        ):
            server.post(TEXT, {"temperature": 0, **body})
        server.wait_idle()
        self.log: list[Finished] = server.finished
        self.text = server.get("/metrics").text
        self.families = {family.name: family for family in text_string_to_metric_families(self.text)}

    def value(self, name: str, **labels: str) -> float:
        found = [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert found, f"no {name} {labels}"
        return sum(found)

    def histogram(self, name: str) -> tuple[float, float]:
        return self.value(name + "_count"), self.value(name + "_sum")


@pytest.fixture(scope="module")
def load() -> Iterator[Run]:
    from scripted import make_engine

    server = Server(make_engine())
    yield Run(server)
    server.engine.close()


def test_names_and_labels(load: Run) -> None:
    for name in (*GAUGES, *COUNTERS, *HISTOGRAMS, "cache_config_info"):
        family = load.families[f"vllm:{name}"]
        assert family.documentation
        for sample in family.samples:
            assert (sample.labels["model_name"], sample.labels["engine"]) == ("scripted", "0")
    for name in COUNTERS:
        assert load.families[f"vllm:{name}"].type == "counter"
    for name in HISTOGRAMS:
        assert load.families[f"vllm:{name}"].type == "histogram"
    assert {"process_resident_memory_bytes", "http_requests", "http_request_duration_seconds"} <= load.families.keys()
    assert load.value("vllm:cache_config_info", block_size="4", num_gpu_blocks="4096") == 1


def test_buckets(load: Run) -> None:
    def bounds(name: str) -> list[float]:
        return [float(s.labels["le"]) for s in load.families[name].samples if s.name.endswith("_bucket")][:-1]

    assert bounds("vllm:inter_token_latency_seconds")[:3] == [0.01, 0.025, 0.05]
    assert len(bounds("vllm:time_to_first_token_seconds")) == 22
    assert bounds("vllm:e2e_request_latency_seconds")[-1] == 7680
    assert bounds("vllm:request_prompt_tokens") == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert bounds("vllm:iteration_tokens_total") == [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    assert one_two_five(7) == (1, 2, 5)


def test_counters_equal_the_log(load: Run) -> None:
    usages = [done.usage for done in load.log]
    assert len(usages) == 10
    assert load.value("vllm:prompt_tokens_total") == sum(u.prompt_tokens for u in usages)
    assert load.value("vllm:prompt_tokens_cached_total") == sum(u.cached_tokens for u in usages) > 0
    assert load.value("vllm:prompt_tokens_by_source_total") == sum(u.prompt_tokens for u in usages)
    assert load.value("vllm:generation_tokens_total") == sum(u.completion_tokens for u in usages)
    for reason, count in {"stop": 2, "length": 7, "error": 1, "abort": 0}.items():
        assert load.value("vllm:request_success_total", finished_reason=reason) == count
    assert load.value("vllm:prefix_cache_hits_total") >= load.value("vllm:prompt_tokens_cached_total")
    assert load.value("vllm:kv_cache_usage_perc") == 0


HISTOGRAM_OF: dict[str, Callable[[Finished], Any]] = {
    "vllm:time_to_first_token_seconds": lambda d: d.timing.first_token - d.arrival,
    "vllm:e2e_request_latency_seconds": lambda d: d.ended - d.arrival,
    "vllm:request_queue_time_seconds": lambda d: d.timing.scheduled - d.timing.queued,
    "vllm:request_prefill_time_seconds": lambda d: d.timing.first_token - d.timing.scheduled,
    "vllm:request_decode_time_seconds": lambda d: d.timing.last_token - d.timing.first_token,
    "vllm:request_inference_time_seconds": lambda d: d.timing.last_token - d.timing.scheduled,
    "tuili:request_frontend_time_seconds": lambda d: d.ended - d.arrival - (d.timing.last_token - d.timing.queued),
    "vllm:request_prompt_tokens": lambda d: d.usage.prompt_tokens,
    "vllm:request_generation_tokens": lambda d: d.usage.completion_tokens,
    "vllm:request_params_max_tokens": lambda d: d.params.max_tokens,
    "vllm:request_num_preemptions": lambda d: d.preemptions,
    "vllm:request_prefill_kv_computed_tokens": lambda d: d.usage.prompt_tokens - d.usage.cached_tokens,
}


@pytest.mark.parametrize("name", HISTOGRAM_OF)
def test_histograms_equal_the_log(load: Run, name: str) -> None:
    values = [HISTOGRAM_OF[name](done) for done in load.log]
    total = 0.0
    for value in values:  # in the order in which they were observed
        total += value
    assert load.histogram(name) == (len(values), total)


def test_the_parts_of_a_request_add_up(load: Run) -> None:
    def total(name: str) -> float:
        return load.histogram(f"vllm:request_{name}_time_seconds")[1]

    span = sum(done.timing.last_token - done.timing.queued for done in load.log)  # type: ignore[operator,misc]
    assert total("queue") + total("prefill") + total("decode") == pytest.approx(span, abs=1e-9)
    assert total("inference") == pytest.approx(total("prefill") + total("decode"), abs=1e-9)
    e2e = load.histogram("vllm:e2e_request_latency_seconds")[1]
    frontend = load.histogram("tuili:request_frontend_time_seconds")[1]
    assert frontend == pytest.approx(e2e - span, abs=1e-9)
    assert all(done.ended >= done.timing.last_token >= done.timing.queued >= done.arrival for done in load.log)  # type: ignore[operator]


def test_time_per_token_skips_requests_of_one(load: Run) -> None:
    longer = [done for done in load.log if done.usage.completion_tokens > 1]
    count, total = load.histogram("vllm:request_time_per_output_token_seconds")
    assert count == len(longer) == 7
    expected = sum(
        (d.timing.last_token - d.timing.first_token) / (d.usage.completion_tokens - 1)  # type: ignore[operator]
        for d in longer
    )
    assert total == pytest.approx(expected, abs=1e-12)


def test_frontend_histograms(load: Run) -> None:
    n = [1, 3, 1, 1, 1, 1, 1]  # per prompt; the failed call and the refused one are not counted
    assert load.histogram("vllm:request_params_n") == (len(n), sum(n))
    assert load.histogram("vllm:request_max_num_generation_tokens")[1] == 7 + 5 + 3 * 1 + len(LINE) + 1 + 16
    between = sum(done.usage.completion_tokens - 1 for done in load.log)
    assert load.histogram("vllm:inter_token_latency_seconds")[0] == between


def test_step_histograms_equal_the_records(load: Run) -> None:
    for name, field in (
        ("vllm:iteration_tokens_total", "num_tokens"),
        ("tuili:step_schedule_seconds", "schedule_seconds"),
        ("tuili:step_device_seconds", "device_seconds"),
        ("tuili:step_update_seconds", "update_seconds"),
    ):
        values = [getattr(stats, field) for stats in load.steps]
        assert load.histogram(name) == (len(values), pytest.approx(sum(values), abs=1e-12))
    assert load.value("tuili:steps_total") == len(load.steps)
    assert load.value("tuili:step_prefill_tokens_total") + load.value("tuili:step_decode_tokens_total") == sum(
        stats.num_tokens for stats in load.steps
    )


def test_http_metrics_have_routes_not_paths(load: Run) -> None:
    assert load.value("http_requests_total", handler=TEXT, method="POST", status="2xx") == 5
    assert load.value("http_requests_total", handler=TEXT, method="POST", status="4xx") == 1
    assert load.value("http_requests_total", handler=TEXT, method="POST", status="5xx") == 1


def test_paths_of_clients_make_no_series(make_server: Callable[..., Server]) -> None:
    server = make_server()
    for number in range(20):
        server.get(f"/nowhere/{number}")
        server.send(f"ODD{number}", "/health")
    lines = [line for line in server.get("/metrics").text.splitlines() if line.startswith("http_requests_total")]
    assert len(lines) == 2, lines


def test_two_apps_do_not_share(make_server: Callable[..., Server]) -> None:
    one, two = make_server(), make_server()
    one.post(TEXT, {"prompt": "x", "max_tokens": 1})
    for server, count in ((one, 1), (two, 0)):
        line = f'vllm:time_to_first_token_seconds_count{{engine="0",model_name="scripted"}} {count}.0'
        assert line in server.get("/metrics").text
