"""Law 5: greedy text equals a naive loop, whatever the batch, budget, pool, reuse, policy, chunking, depth or capture.

One test per combination; their number is printed by pytest (``pytest tests/test_equality.py --collect-only -q``).
"""

from __future__ import annotations

import pytest
from equality import (
    EAGERLY,
    ON_BF16,
    ON_F16,
    ON_FP8_KV,
    ON_INT8_KV,
    ON_KERNELS,
    QUANTIZED,
    SPECS,
    WEIGHT_ONLY,
    drive,
    engine,
    load,
    naive,
    outputs,
    request,
)

LOAD = load(7)


#: Pool sizes in blocks of 8: the largest request needs 14; 15 forces preemptions, 200 holds all.
POOLS = {"tight": 15, "ample": 200}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
@pytest.mark.parametrize("policy", ["fcfs", "priority", "static"])
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no-reuse"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("budget", [6, 19, 512])
@pytest.mark.parametrize("name", [*SPECS, *ON_KERNELS, *EAGERLY, *QUANTIZED, *ON_INT8_KV[:1], *ON_BF16[:1]])
def test_greedy_text_equals_the_naive_loop(
    name: str, budget: int, pool: str, reuse: bool, policy: str, chunked: bool, depth: int
) -> None:
    scheduler, executor = engine(name, budget=budget, blocks=POOLS[pool], reuse=reuse, policy=policy, chunked=chunked)
    for i, (prompt, count) in enumerate(LOAD):
        scheduler.add(request(str(i), prompt, priority=i % 3 if policy == "priority" else 0, max_tokens=count))
    got = outputs(drive(scheduler, executor, depth))
    for i, (prompt, count) in enumerate(LOAD):
        assert got[str(i)] == naive(name, prompt, count), f"request {i}"
    scheduler.check_integrity()
    if pool == "tight" and budget == 512 and policy == "fcfs":
        assert scheduler.preempted > 0, "the tight pool was meant to preempt"
    if reuse and pool == "ample":
        assert scheduler.cache.hits > 0
    captured = executor.runner.captured
    assert (captured is None) == (executor.runner.model.kernels.backend != "cpu" or name in EAGERLY)
    assert captured is None or captured.shapes, "no step was captured"


@pytest.mark.parametrize(
    "name",
    [*SPECS, *ON_KERNELS, *EAGERLY, *QUANTIZED, *WEIGHT_ONLY, *ON_INT8_KV, *ON_FP8_KV, *ON_BF16, *ON_F16],
)
def test_seeded_sampling_does_not_depend_on_the_batch(name: str) -> None:
    wishes = [
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 12, "frequency_penalty": 0.5},
        {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2, "min_tokens": 3, "eos_token_ids": (3, 4, 5)},
    ]

    def run(budget: int, blocks: int, rows: int, picked: range) -> dict[str, tuple[int, ...]]:
        scheduler, executor = engine(name, budget=budget, blocks=blocks, rows=rows)
        for i in picked:
            prompt, count = LOAD[i]
            scheduler.add(request(str(i), prompt, max_tokens=count, seed=i, **wishes[i % 3]))
        return outputs(drive(scheduler, executor))

    together = run(512, 200, 7, range(7))
    assert together == run(9, 15, 4, range(7))
    for i in range(7):
        assert run(64, 30, 1, range(i, i + 1))[str(i)] == together[str(i)]


@pytest.mark.parametrize(
    "name",
    [
        *("llama-f32", "gemma-f32", *ON_KERNELS[1:4], *EAGERLY[3:4], *QUANTIZED, *WEIGHT_ONLY),
        *(*ON_INT8_KV, *ON_FP8_KV, *ON_BF16, *ON_F16),
    ],
)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("budget", [6, 512])
def test_logprobs_equal_those_of_a_whole_prompt(name: str, pool: str, budget: int) -> None:
    """Logprobs of output and prompt are bit-equal however the prompt was cut, also after preemption."""

    def run(blocks: int, budget: int) -> dict[str, tuple[list, list]]:
        scheduler, executor = engine(name, budget=budget, blocks=blocks)
        for i, (prompt, count) in enumerate(LOAD):
            scheduler.add(request(str(i), prompt, max_tokens=count, logprobs=2, prompt_logprobs=1))
        found: dict[str, tuple[list, list]] = {str(i): ([], []) for i in range(len(LOAD))}
        for update in drive(scheduler, executor):
            found[update.id][0].extend(update.logprobs)
            found[update.id][1].extend(update.prompt_logprobs)
        return found

    whole = run(200, 2000)
    assert run(POOLS[pool], budget) == whole
    for i, (prompt, count) in enumerate(LOAD):
        assert len(whole[str(i)][0]) == count
        assert [entry.token for entry in whole[str(i)][1]] == list(prompt[1:])


def test_prompt_logprobs_come_once_when_a_prompt_is_preempted_midway() -> None:
    """The second prompt is cut off by the first one's growth while it is being computed, and starts over."""
    scheduler, executor = engine("llama-f32", budget=6, blocks=12, rows=2)
    first, second = tuple(range(30)), tuple(range(30, 92))
    scheduler.add(request("first", first, max_tokens=40))
    scheduler.add(request("second", second, max_tokens=2, prompt_logprobs=0))
    updates = drive(scheduler, executor)
    entries = [entry for update in updates if update.id == "second" for entry in update.prompt_logprobs]
    assert max(update.preemptions for update in updates if update.id == "second") > 0
    assert [entry.token for entry in entries] == list(second[1:])
