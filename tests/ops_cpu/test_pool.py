"""The team of threads: every piece is done once, whoever sleeps, leaves, comes late or asks at the same time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from tuili import ops
from tuili.ops import cpu

pytestmark = pytest.mark.skipif(not cpu.describe().built, reason=f"the C++ kernels: {cpu.describe().why}")


@pytest.fixture(autouse=True)
def _one_thread_after() -> Iterator[None]:
    yield
    cpu.set_threads(1)


class Chain:
    """A program of many short products, each on the result of the one before: a piece left out, or done before the op
    before it was finished, changes the last result."""

    def __init__(self, seed: int = 0, length: int = 60, size: int = 160):
        g = torch.Generator().manual_seed(seed)
        matrices = [torch.randn(size, size, generator=g) / size**0.5 for _ in range(4)]
        self.weights = [cpu.pack(matrix) for matrix in matrices]
        self.states = [torch.randn(2, size, generator=g)]
        kernels = ops.kernels_of("cpu")
        with cpu.recorded() as calls:
            for i in range(length):
                self.states.append(kernels.packed_linear(self.states[i], self.weights[i % 4], size))
        self.program = cpu.Program(calls)

    def __call__(self) -> torch.Tensor:
        for state in self.states[1:]:
            state.fill_(torch.nan)
        self.program.run()
        return self.states[-1].clone()


def test_every_team_size_gives_the_same_bits() -> None:
    chain = Chain()
    want = chain()
    assert torch.isfinite(want).all()
    for threads in (2, 3, 5, 2, 1, 4):
        cpu.set_threads(threads)
        for _ in range(20):
            assert torch.equal(chain(), want)


def test_helpers_that_fell_asleep_come_back() -> None:
    chain = Chain()
    want = chain()
    cpu.set_threads(3)
    for i in range(20):
        time.sleep(0.002)  # they watch for 50 microseconds
        if i % 2:
            cpu.wake()
        assert torch.equal(chain(), want)


def test_two_callers_at_once() -> None:
    """One has the team, the other works alone."""
    chains = [Chain(seed) for seed in range(2)]
    wants = [chain() for chain in chains]
    cpu.set_threads(2)
    wrong: list[int] = []

    def repeat(which: int) -> None:
        for _ in range(60):
            if not torch.equal(chains[which](), wants[which]):
                wrong.append(which)

    threads = [threading.Thread(target=repeat, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_works_without_its_parents_threads() -> None:
    chain = Chain()
    want = chain()
    cpu.set_threads(3)
    assert torch.equal(chain(), want)
    child = os.fork()
    if child == 0:
        first = torch.equal(chain(), want)
        cpu.set_threads(2)
        os._exit(0 if first and torch.equal(chain(), want) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(chain(), want)
