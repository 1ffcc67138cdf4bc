"""Every family through the engine: 64 greedy tokens equal transformers', alone, batched, chunked and with reuse."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from equality import drive, outputs, request
from tiny_models import CASES, Tiny, max_model_len, prompt, reference_greedy

from tuili.base.clock import WallClock
from tuili.core.policies import policies
from tuili.core.scheduler import Scheduler
from tuili.executors.local import LocalExecutor
from tuili.layers.decoder import Decoder
from tuili.models.checkpoint import open_checkpoint
from tuili.models.weights import load_model
from tuili.runtime.host import Host

COUNT = 64
START = prompt(20, seed=7)
PROMPTS = [START + prompt(3, seed=1), prompt(9, seed=2), START + prompt(13, seed=3)]


def generate(model: Decoder, longest: int, groups: Sequence[Sequence[list[int]]], budget: int, count: int) -> list:
    """Greedy text of each prompt; the prompts of a group run together, the groups one after the other."""
    executor = LocalExecutor(model, Host(), num_blocks=80, block_size=8, max_model_len=longest, max_num_seqs=4)
    scheduler = Scheduler(
        executor.capacity,
        policies.get("fcfs")(),
        max_num_batched_tokens=budget,
        max_num_seqs=4,
        enable_prefix_caching=True,
        clock=WallClock(),
    )
    texts = []
    for number, group in enumerate(groups):
        for i, ids in enumerate(group):
            scheduler.add(request(f"{number}-{i}", tuple(ids), max_tokens=count))
        texts += [list(tokens) for _, tokens in sorted(outputs(drive(scheduler, executor)).items())]
    if len(groups) > 1 and len(groups[0]) > 1:
        assert scheduler.cache.hits > 0, "the second group was meant to reuse the first one's prompts"
    scheduler.check_integrity()
    return texts


@pytest.mark.parametrize("case", CASES)
def test_64_greedy_tokens_through_the_engine(case: str, tiny: Tiny) -> None:
    directory, longest = tiny(case), max_model_len(case)
    count = min(COUNT, longest - max(map(len, PROMPTS)))
    model = load_model(open_checkpoint(str(directory)), "float32", longest)
    want = [reference_greedy(directory, ids, count) for ids in PROMPTS]
    executions = {
        "single": ([[ids] for ids in PROMPTS], 512),
        "batched": ([PROMPTS], 512),
        "chunked": ([PROMPTS], 5),
        "reused": ([PROMPTS, PROMPTS], 512),
    }
    for name, (groups, budget) in executions.items():
        got = generate(model, longest, groups, budget, count)
        assert got == want * (len(got) // len(want)), name
