"""A server under load, from outside: warm up, run each workload, report in the fields of ``vllm bench serve``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuili.base.errors import ConfigError
from tuili.bench.http import Client
from tuili.bench.load import LoadRun, OpenAISender, Record, offer
from tuili.bench.provenance import provenance
from tuili.bench.report import detail, failures, over_repeats, summarize
from tuili.bench.workload import Span, Workload, fixed_random, poisson


@dataclass(frozen=True, slots=True)
class Plan:
    """How to load which server. ``rate`` in requests per second (inf: as the workload's arrivals say), ``timeout`` in
    seconds.

    ``concurrency`` None is no limit; with an infinite rate and a concurrency this is a closed loop.
    """

    base_url: str
    model: str | None = None
    chat: bool = False
    api_key: str | None = None
    rate: float = math.inf
    burstiness: float = 1.0
    concurrency: int | None = None
    ignore_eos: bool = True
    warmups: int = 1
    timeout: float = 600.0
    goodput: dict[str, float] = field(default_factory=dict)
    detailed: bool = False


async def measure(
    plan: Plan, workloads: Sequence[Workload], done: Callable[[Record], None] = lambda record: None
) -> dict[str, Any]:
    """One run per workload, one after the other, and medians over them. ConfigError when no server answers."""
    headers = {"Authorization": f"Bearer {plan.api_key}"} if plan.api_key else {}
    client = Client(plan.base_url, headers)
    try:
        sender = OpenAISender(client, plan.model or await first_model(client), plan.chat, ignore_eos=plan.ignore_eos)
        if plan.warmups:
            warm = fixed_random(plan.warmups, Span(16, 16), Span(4, 4), seed=-1)
            await offer(sender, warm.items, concurrency=1, timeout=plan.timeout)
        runs = [await _run(plan, sender, workload, done) for workload in workloads]
    finally:
        client.close()
    records = [record for run in runs for record in run.records]
    summary = over_repeats([summarize(run, plan.goodput) for run in runs])
    return {
        **_header(plan, sender.model, workloads),
        **summary,
        "failures": failures(records),
        **(detail(LoadRun(records, 0.0, 0, 0, 0.0)) if plan.detailed else {}),
        "provenance": provenance(workloads[0]) | {"workloads": [workload.describe() for workload in workloads]},
    }


async def _run(plan: Plan, sender: OpenAISender, workload: Workload, done: Callable[[Record], None]) -> LoadRun:
    if plan.rate != math.inf:
        workload = poisson(workload, plan.rate, burstiness=plan.burstiness, seed=workload.seed)
    return await offer(sender, workload.items, concurrency=plan.concurrency, timeout=plan.timeout, done=done)


async def first_model(client: Client) -> str:
    """The first name that the server lists; ConfigError says what came instead."""
    try:
        response = await client.request("GET", "/v1/models")
    except Exception as error:
        raise ConfigError(f"{error}. Is the server running? tuili serve starts one.") from error
    try:
        return str(json.loads(response.body)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        why = f"HTTP {response.status}: {bytes(response.body[:100])!r}"
        raise ConfigError(f"the server lists no model at /v1/models ({why}); name it with --model") from error


def _header(plan: Plan, model: str, workloads: Sequence[Workload]) -> dict[str, Any]:
    """The fields of vLLM's result that say what was run. JSON has no infinity: vLLM writes "inf"."""
    return {
        "backend": "openai-chat" if plan.chat else "openai",
        "model_id": model,
        "num_prompts": len(workloads[0].items),
        "request_rate": "inf" if math.isinf(plan.rate) else plan.rate,
        "burstiness": plan.burstiness,
        "max_concurrency": plan.concurrency,
        "goodput_limits_ms": plan.goodput or None,
    }
