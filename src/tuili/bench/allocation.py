"""What becomes of the KV cache, by when its memory is given out: how many requests run at once, and how much is waste.

The real scheduler drains a workload on a simulated executor under a virtual clock, so all counts are exact and nothing
of it is measured. Every arm has the same memory. No torch.

Kwon et al. 2023 (arXiv:2309.06180, figure 2) found 20 to 38 % of the memory of engines with slots in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuili.base.clock import VirtualClock
from tuili.base.errors import ConfigError
from tuili.bench.workload import Item, Workload
from tuili.core.executor import Capacity
from tuili.core.params import SamplingParams
from tuili.core.policies import policies
from tuili.core.request import Request
from tuili.core.scheduler import Scheduler
from tuili.engine.engine import Engine
from tuili.executors.simulated import LinearCost, SimExecutor

#: The id that ends a text of the simulated model, and the one that all others are.
END, WORD = 1, 2
#: Arms: what a request is given. "slot": one piece of the longest length, as before paging; the others in blocks.
SLOT, RESERVED, DYNAMIC = "slot", "reserved", "dynamic"


def compare(workload: Workload, positions: int, max_model_len: int, block_size: int, slack: float) -> dict[str, Any]:
    """Each arm's steps and figures, in a cache of ``positions``. Requests ask for ``slack`` times the tokens that they
    turn out to need, at most what the model can; nobody knows beforehand where a text ends."""
    if positions < max_model_len:
        raise ConfigError(f"a cache of {positions} positions holds no request of --max-model-len {max_model_len}")
    if slack < 1:
        raise ConfigError(f"--slack {slack:g}: requests ask for at least what they need, so it must be at least 1")
    arms = [
        run(workload, arm, Capacity(positions // size, size, max_model_len), slack)
        for arm, size in ((SLOT, max_model_len), (RESERVED, block_size), (DYNAMIC, block_size))
    ]
    sizes = {"positions": positions, "max_model_len": max_model_len, "block_size": block_size, "slack": slack}
    return {"benchmark": "allocation", "kind": "simulated", "workload": workload.describe(), **sizes, "arms": arms}


def run(workload: Workload, arm: str, capacity: Capacity, slack: float) -> dict[str, Any]:
    """One arm: ``steps`` is [requests that run, positions that hold KV, positions given out] after each step."""
    lengths = {str(index): len(item.tokens) + item.max_tokens for index, item in enumerate(workload.items)}

    def text(id: str, history: list[int]) -> int:
        return END if len(history) + 1 == lengths[id] else WORD

    clock = VirtualClock()
    scheduler = Scheduler(
        capacity,
        policies.get("fcfs")(),
        max_num_batched_tokens=max(capacity.max_model_len, len(workload.items)),
        max_num_seqs=len(workload.items),
        enable_prefix_caching=False,
        reserve_kv=arm == RESERVED,
        clock=clock,
    )
    engine = Engine(scheduler, SimExecutor(capacity, LinearCost(per_step=1.0), clock, text), clock)
    for id, item in zip(lengths, workload.items, strict=True):
        engine.add(_request(id, item, slack, capacity.max_model_len))
    computed, steps = 0, list[list[int]]()
    engine.listeners.append(lambda plan, result, stats: steps.append([stats.num_requests, stats.num_tokens]))
    while engine.has_work:
        engine.step()
        held = sum(request.computed for request in scheduler.requests.values())
        computed += steps[-1].pop()
        steps[-1] += [held, scheduler.cache.num_used * capacity.block_size]
    engine.close()
    needed = sum(length - 1 for length in lengths.values())
    return {"arm": arm, "steps": steps, **figures(steps), "preemptions": scheduler.preempted,
            "recomputed_tokens": computed - needed}  # fmt: skip


def figures(steps: Sequence[Sequence[int]]) -> dict[str, float]:
    """Requests at once, and the share of what was given out that held nothing: over all steps."""
    running, held, given = (sum(column) for column in zip(*steps, strict=True))
    return {"num_steps": len(steps), "running": running / len(steps), "waste": 1 - held / given if given else 0.0}


def _request(id: str, item: Item, slack: float, longest: int) -> Request:
    asked = min(round(slack * item.max_tokens), longest - len(item.tokens))
    params = SamplingParams(max_tokens=asked, eos_token_ids=(END,), seed=0)
    return Request(id, len(item.tokens), list(item.tokens), params)
