"""How much memory a model takes on its card, measured before the KV cache gets the rest; and what to do when it ends.

The largest step is run once, over a KV cache of one request: as many tokens as a step may have, from as many requests,
each of which has a token drawn with everything that a draw may ask for. Two captured steps tell what one more takes.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, cast

import torch

from tuili.base.config import Config
from tuili.base.errors import ConfigError
from tuili.core.params import SamplingParams
from tuili.core.plan import Chunk, StepPlan
from tuili.engine.captures import capture_sizes
from tuili.engine.memory import Measured, in_mib

if TYPE_CHECKING:
    from tuili.core.executor import Executor

#: Opens an executor with a pool of so many blocks that captures steps of those sizes.
Open = Callable[[int, Sequence[int]], "Executor"]


class Meter(Protocol):
    """Bytes on a card: ``allocated`` by this process's tensors, their ``peak`` since ``restart``; ``taken`` by anybody,
    and what of that is ``outside`` of this process's tensors."""

    def allocated(self) -> int: ...

    def peak(self) -> int: ...

    def restart(self) -> None: ...

    def taken(self) -> int: ...

    def outside(self) -> int: ...


class CudaMeter:
    """The card that torch computes on. What its allocator only keeps is given back before anything is read."""

    def allocated(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def taken(self) -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free

    def outside(self) -> int:
        return self.taken() - torch.cuda.memory_reserved()


def measure(config: Config, open: Open, meter: Meter, before: int, outside: int) -> Measured:
    """What a resolved config was seen to take. ``before``, ``outside``: what tensors and others took when nothing of it
    was there; now its weights are."""
    weights = meter.allocated() - before
    plan = largest_step(config)
    blocks = len(plan.chunks[0].new_blocks)
    executor = open(blocks, ())
    standing = meter.allocated()
    meter.restart()
    executor.execute(plan).result()
    activations = meter.peak() - standing
    bare = meter.taken()
    executor.close()
    del executor

    def captured(sizes: Sequence[int]) -> int:
        executor = open(blocks, sizes)
        taken = meter.taken() - bare
        executor.close()
        return taken

    sizes = capture_sizes(config)[::-1]
    graphs = captured(sizes[:1]) if sizes else 0
    if len(sizes) > 1:  # the others live in the memory of the largest, and take little more
        graphs += (len(sizes) - 1) * max(0, captured(sizes[:2]) - graphs)
    return Measured(weights, max(0, activations), max(0, graphs), max(0, meter.outside() - outside))


def largest_step(config: Config) -> StepPlan:
    """A step with all the rows and all the tokens that a step may have, as unevenly as they may come.

    All requests write to the blocks of the first: what is computed does not matter.
    """
    rows, budget, longest = cast(
        tuple[int, ...], (config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len)
    )
    counts, left = [1] * rows, budget - rows
    for i in range(rows):
        counts[i] += min(left, longest - 1)
        left -= counts[i] - 1
    blocks = tuple(range(-(-counts[0] // config.block_size)))
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=0, logprobs=max(config.max_logprobs, 1))
    chunks = (
        Chunk(f"profile-{i}", 0, count, (0,) * count, 0, True, blocks[: -(-count // config.block_size)], params, count)
        for i, count in enumerate(counts)
    )
    return StepPlan(0, tuple(chunks))


# When it ends ---------------------------------------------------------------------------------------------------------

UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def asked_for(error: Exception) -> int:
    """Bytes that the allocation which failed was of; torch says it in its message only. 0 where it does not."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", str(error))
    return int(float(found[1]) * UNITS[found[2]]) if found else 0


@contextmanager
def explain_out_of_memory(doing: str, advice: Callable[[int], str]) -> Iterator[None]:
    """ConfigError where the card's memory ends while ``doing`` something; ``advice`` gets the bytes it asked for."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(describe_out_of_memory(doing, error, advice)) from error


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def describe_out_of_memory(doing: str, error: Exception, advice: Callable[[int], str]) -> str:
    size = asked_for(error)
    return f"the card's memory ended while {doing}, which asked for {in_mib(size) if size else 'more'}.\n{advice(size)}"
