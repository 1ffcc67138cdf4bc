"""The engine on Triton's kernels, interpreted, on stand-ins: captured and late, as the naive loop says.

They are slow so: requests are few and short here. ``test_device_runner.py`` has the matrix on torch, and
``test_device_equality.py`` that of a card.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from devices import AtOnce, Lagging
from equality import LONGEST, VOCAB, device_engine, drive, model, naive, outputs, request

from tuili.ops.triton import FAST, INVARIANT, describe

pytestmark = pytest.mark.skipif(
    not describe().interpreted, reason="interpreted kernels; on a card test_device_equality.py"
)
PROMPTS = [tuple((7 * i + j * j) % VOCAB for j in range(count)) for i, count in enumerate((19, 6))]


def text(
    backend: str,
    name: str,
    device: Any,
    sizes: tuple[int, ...],
    depth: int,
    requests: list[tuple[tuple[int, ...], int]],
    blocks: int = 30,
    **wishes: Any,
) -> tuple[Any, Any]:
    """What the engine says, as updates, and its scheduler."""
    decoder = deepcopy(model(name.split("+")[0], backend)).to(device.torch_device)
    decoder.prepare(LONGEST)
    scheduler, executor = device_engine(name, device, sizes, budget=64, blocks=blocks, decoder=decoder)
    for i, (prompt, count) in enumerate(requests):
        scheduler.add(request(str(i), prompt, max_tokens=count, **wishes))
    updates = drive(scheduler, executor, depth)
    assert executor.runner.captured is None or executor.runner.captured.why == ""
    return updates, scheduler


def expected(name: str, requests: list[tuple[tuple[int, ...], int]]) -> dict[str, tuple[int, ...]]:
    return {str(i): naive(name, prompt, count) for i, (prompt, count) in enumerate(requests)}


#: Two rows, then one that needs a new block.
SMALL = [(PROMPTS[0], 3), (PROMPTS[1], 4)]


@pytest.mark.parametrize(
    ("backend", "name", "device", "sizes", "depth"),
    [
        (FAST, "llama-f32", Lagging, (2,), 2),
        (FAST, "llama-f32+kv8", AtOnce, (), 1),
        (FAST, "llama-f32+kvfp8", Lagging, (4,), 2),
        (INVARIANT, "gemma-f32", Lagging, (2,), 2),
    ],
)
def test_interpreted_kernels_say_what_the_naive_loop_says(
    backend: str, name: str, device: Callable[[], Any], sizes: tuple[int, ...], depth: int
) -> None:
    updates, _ = text(backend, name, card := device(), sizes, depth, SMALL)
    assert outputs(updates) == expected(name, SMALL)
    assert (card.replays > 0) == bool(sizes)


def test_deterministic_kernels_give_the_same_bits_captured_or_not() -> None:
    """Law 5 to the bit: logprobs of two requests together, padded to three rows and late, are those of one alone."""
    wishes = {"logprobs": 2, "prompt_logprobs": 0, "temperature": 0.9, "seed": 4}
    small = [(prompt[-3:], 3) for prompt in PROMPTS]
    together, _ = text(INVARIANT, "qwen3-f32", Lagging(), (3,), 2, small, **wishes)
    for i, one in enumerate(small):
        alone, _ = text(INVARIANT, "qwen3-f32", AtOnce(), (), 1, [one], **wishes)
        own = [update for update in together if update.id == str(i)]
        for part in ("tokens", "logprobs", "prompt_logprobs"):
            said = [x for update in own for x in getattr(update, part)]
            assert said == [x for update in alone for x in getattr(update, part)], part
