"""Where plans run, seen from the control plane."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from tuili.core.plan import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an executor can hold: KV blocks of ``block_size`` positions, and the longest sequence (prompt + output)."""

    num_blocks: int
    block_size: int
    max_model_len: int

    @property
    def num_positions(self) -> int:
        return self.num_blocks * self.block_size


class Executor(Protocol):
    """Runs plans in the order in which they are given. ``execute`` may return before the step is done."""

    capacity: Capacity

    def execute(self, plan: StepPlan) -> Future[StepResult]: ...

    def close(self) -> None: ...
