"""Stand-ins for a card, which compute on the CPU and are stricter than one where a CPU would forgive.

- Memory of the host begins as garbage.
- A captured function is called again, but every call must launch the same ops on the same addresses with the same
  numbers as the first one, since that is all that a CUDA graph would repeat; and nothing may be read back to the host.
- ``Lagging`` computes nothing before somebody waits for it: what the host overwrites too early is lost, what it reads
  too early is garbage.
- ``Strict`` takes no tensor that was made without naming the device: a card would find it on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tuili.ops.triton import describe

aten = torch.ops.aten
#: What reads a result back, or whose result's shape is in the numbers: a capture fails on it.
SYNCHRONOUS = {aten.nonzero.default, aten.masked_select.default}
READERS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")


class Done:
    """Work that runs when ``run`` is called, at the latest when it is waited for."""

    def __init__(self, device: AtOnce, work: Callable[[], Any]):
        self._device, self._work = device, work
        self._result: Any = None
        self._error: BaseException | None = None
        self.seconds = 0.0
        self.done = False

    def run(self) -> None:
        began = time.perf_counter()
        try:
            with torch.inference_mode(), self._device.rules():
                self._result = self._work()
        except Exception as error:
            self._error = error
        self.done, self.seconds = True, time.perf_counter() - began

    def wait(self) -> Any:
        self._device.reach(self)
        if self._error is not None:
            raise self._error
        return self._result


class AtOnce:
    """Does work when it is submitted."""

    is_host = False

    def __init__(self, total: int = 1 << 40) -> None:
        self.torch_device = torch.device("cpu")
        self.total = total
        #: How often a captured function was replayed, and how many there are.
        self.replays = self.captures = 0
        self.closed = False

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        memory = torch.empty(tuple(shape), dtype=dtype, device="cpu")
        memory.view(torch.uint8).fill_(0xA5)
        return memory

    def submit(self, work: Callable[[], Any]) -> Done:
        assert not self.closed, "work after close"
        done = Done(self, work)
        self.take(done)
        return done

    def rules(self) -> AbstractContextManager[None]:
        """What surrounds all work."""
        return nullcontext()

    def take(self, work: Done) -> None:
        work.run()

    def reach(self, work: Done) -> None:
        assert work.done

    def capture(self, function: Callable[[], object]) -> Callable[[], None]:
        self.submit(function).wait()  # as a card: compiles
        first = Launches()
        self.submit(lambda: first.watch(function)).wait()
        self.captures += 1

        def replay() -> None:
            again = Launches()
            again.watch(function)
            for one, two in zip(first.seen, again.seen, strict=True):
                assert one == two, f"a graph would repeat {one}, and not launch {two}"
            self.replays += 1

        return replay

    def memory(self) -> tuple[int, int]:
        return self.total, self.total

    def close(self) -> None:
        self.closed = True


class Lagging(AtOnce):
    """Does work when it is waited for, together with all before it."""

    def __init__(self, total: int = 1 << 40) -> None:
        super().__init__(total)
        self._queue: list[Done] = []

    def take(self, work: Done) -> None:
        self._queue.append(work)

    def reach(self, work: Done) -> None:
        while not work.done:
            self._queue.pop(0).run()

    def close(self) -> None:
        while self._queue:
            self._queue.pop(0).run()
        super().close()


class Located(TorchDispatchMode):
    """Raises where a tensor is made that is not on the device: some ops mix ``meta`` with others, and do nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(made, torch.Tensor) and made.is_meta for made in _flat([out])):
            raise RuntimeError(f"{func} makes a tensor that is not on the device")
        return out


class Strict(AtOnce):
    """As a card, mixes no devices: what is made without saying where is on ``meta``, and raises. Costs some time."""

    @contextmanager
    def rules(self) -> Iterator[None]:
        with torch.device("meta"), Located():
            yield


class Launches(TorchDispatchMode):
    """What a function launches: ops and kernels, with the addresses that are not its own and all numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []
        self._own: dict[int, torch.Tensor] = {}

    def watch(self, function: Callable[[], object]) -> None:
        with patch.multiple(torch.Tensor, **dict.fromkeys(READERS, _read)), _kernels(self.launched), self:
            function()
        self._own.clear()

    def launched(self, name: str, values: Any) -> None:
        self.seen.append((name, *(self._told(value) for value in _flat(values))))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SYNCHRONOUS or (any(_is_mask(index) for index in _flat(args[1:])) and "index" in str(func)):
            _read(func)
        self.launched(str(func), [args, sorted(kwargs.items())])
        out = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in _flat([args, kwargs]) if isinstance(t, torch.Tensor)}
        for made in _flat([out]):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self._own[made.untyped_storage().data_ptr()] = made  # kept, so that nobody else gets its memory
        return out

    def _told(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        own = value.untyped_storage().data_ptr() in self._own
        return "own" if own else value.data_ptr(), value.dtype, tuple(value.shape), value.stride()


def _read(what: Any) -> None:
    raise RuntimeError(f"{type(what).__name__} is read back while a step is captured")


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _flat(values: Any) -> Iterator[Any]:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, list | tuple | dict):
            yield from _flat(value)
        else:
            yield value


@contextmanager
def _kernels(told: Callable[[str, Any], None]) -> Iterator[None]:
    """Tells of every launch of an interpreted Triton kernel in the block."""
    if not describe().interpreted:
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        told(executor.fn.__name__, [executor.grid, args, sorted(kwargs.items())])
        with _disable_current_modes():
            return call(executor, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", launch):
        yield
