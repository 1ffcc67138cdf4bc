"""What a step found, as the scheduler wants it."""

from __future__ import annotations

from collections.abc import Sequence

from tuili.core.plan import Chunk, StepPlan, StepResult, StepStats, TopLogprobs
from tuili.runtime.rows import Row
from tuili.runtime.sampler import Sampled

#: The chunks that asked for a token, their rows, and what was sampled for them.
Made = tuple[Sequence[Chunk], Sequence[Row], Sampled]
FAILED = "the model's logits were not finite, or every token was ruled out"


def result(
    plan: StepPlan, made: Made | None, prompt_logprobs: dict[str, list[TopLogprobs]], seconds: float
) -> StepResult:
    """The step's result; the rows learn what was sampled last."""
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, list[TopLogprobs]] = {}
    failed: dict[str, str] = {}
    if made is not None:
        chunks, rows, sampled = made
        for chunk, row, token, entry in zip(chunks, rows, sampled.tokens, sampled.logprobs, strict=True):
            # A plan that was made before anybody knew may go on from a failed request: on any id, as it ends anyway.
            row.last = token or 0
            if token is None:
                failed[chunk.id] = FAILED
                continue
            tokens[chunk.id] = [token]
            if entry is not None:
                logprobs[chunk.id] = [entry]
    stats = StepStats(step=plan.step, device_seconds=seconds)
    return StepResult(plan.step, tokens, {}, logprobs, prompt_logprobs, failed, stats)
