"""``Device``: what the runner needs of what computes. ``Host`` is the processor, ``Cuda`` a card; tests bring others.

Work is a closure of kernel launches and copies. It is handed over and done in order; the host learns that it is done,
and what went wrong, by waiting for it. A processor has done it when ``submit`` returns. Launches on CUDA are
asynchronous, so ``Cuda`` runs a closure at once and the card follows; a stand-in may run it when somebody waits for it.
So a closure takes what it needs with it, and what it reads on the host (pinned memory) stays as it is until its work is
done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Work(Protocol[T_co]):
    """Submitted work, which ends with an event on the device."""

    def wait(self) -> T_co:
        """Block until it is done: what its closure returned, or raises what it raised. Any number of times."""
        ...

    @property
    def seconds(self) -> float:
        """How long the device took, from the end of the work before it, if it had any; known after ``wait``."""
        ...


class Device(Protocol):
    """One processor or card, with a queue of its own. ``torch_device`` is where its tensors live.

    ``is_host``: the processor that Python runs on. Its memory is the host's, so nothing is copied, and its work is done
    when ``submit`` returns.
    """

    torch_device: torch.device
    is_host: bool

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host that the device copies from and to while the host goes on (CUDA: pinned)."""
        ...

    def submit(self, work: Callable[[], T]) -> Work[T]:
        """Queue ``work`` behind what was submitted before, in inference mode. May raise what ``work`` raises."""
        ...

    def capture(self, function: Callable[[], object]) -> Callable[[], None]:
        """``function``'s launches as one, to be called within submitted work. Returns when all is captured.

        Only what was launched is repeated, on the addresses and numbers of that time: nothing that Python did. Runs
        ``function`` before, to compile and set up what that takes. All captures share one pool of memory: what one
        leaves in memory that it allocated is gone when another is replayed.
        """
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes of the device that are free, for any process, and in all."""
        ...

    def close(self) -> None:
        """Wait for everything submitted. No work may follow."""
        ...


def send(values: Sequence[float] | Sequence[int], device: torch.device) -> torch.Tensor:
    """``values`` as a tensor on ``device``, without waiting for what the device is doing (``torch.tensor`` would)."""
    made = torch.tensor(values, device="cpu")
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)


# CUDA -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Launched(Generic[T]):
    """Work whose launches are made; the card is at it between two events."""

    returned: T
    began: torch.cuda.Event
    ended: torch.cuda.Event

    def wait(self) -> T:
        self.ended.synchronize()
        return self.returned

    @property
    def seconds(self) -> float:
        return self.began.elapsed_time(self.ended) / 1000


class Cuda:
    """An NVIDIA card, ``index`` as CUDA counts them: one stream for everything, one memory pool for all graphs."""

    is_host = False

    def __init__(self, index: int = 0):
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        self._stream = torch.cuda.Stream(self.torch_device)
        self._pool = torch.cuda.graph_pool_handle()

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu", pin_memory=True)

    def submit(self, work: Callable[[], T]) -> Work[T]:
        self._stream.wait_stream(torch.cuda.current_stream(self.torch_device))  # where weights and pools were made
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.torch_device), torch.cuda.stream(self._stream), torch.inference_mode():
            began.record()
            returned = work()
            ended.record()
        return _Launched(returned, began, ended)

    def capture(self, function: Callable[[], object]) -> Callable[[], None]:
        self.submit(function).wait()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the card meanwhile: only this one's calls are forbidden what a graph can not hold.
        captured = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self.torch_device), torch.inference_mode(), captured:
            function()
        return graph.replay

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return free, total

    def close(self) -> None:
        self._stream.synchronize()
