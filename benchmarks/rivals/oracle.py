"""First greedy tokens by transformers in float32, cached: what the first tokens of every arm are compared with."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rivals import hf
from rivals.arms import Arm
from rivals.protocol import Worker
from rivals.rival import Places, Width
from rivals.scenarios import agreement_prompts
from rivals.shapes import VERSION, Shape


def first_tokens(shape: Shape, places: Places, threads: int) -> list[int]:
    """One token per agreement prompt; Unavailable where transformers cannot be had."""
    cached = places.root / "oracle" / f"{shape.name}-{VERSION}.json"
    if not cached.exists():
        arm = Arm("hf", hf.Engine(), Width(hf.Engine.oracle, 32, "oracle"))
        arm.rival.install(places)
        command, env = arm.command(places.checkpoint(shape.name), places, threads)
        worker = Worker(command, env, places.log("worker-oracle"))
        try:
            timed = worker.generate(agreement_prompts(shape.vocab), 1)
        finally:
            worker.close()
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_text(json.dumps([row[0][0] for row in timed]))
    found: list[int] = json.loads(cached.read_text())
    return found


def agreeing(tokens: Sequence[int], reference: Sequence[int]) -> int:
    return sum(ours == theirs for ours, theirs in zip(tokens, reference, strict=True))
