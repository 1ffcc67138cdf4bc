"""Captured steps on a processor: the calls of a step, recorded once per shape, then replayed in one native call.

A step in which every row decodes makes the same list of op calls every time; only what is in the buffers differs. So
the model runs once as it is, on inputs at fixed addresses and with its results in memory of ours, while its calls are
written down. A replay is those calls on those addresses: no Python, no allocation, the same bits (law 5).

Nothing is trusted. While recording, torch may only make views and ask for memory: any other torch op would be missing
from the replay, and the model then runs eagerly. A new recording is replayed at once, over memory that was spoiled, and
again at its first use, on other inputs; both must give the bits of the eager run.

Recordings are made when a shape first occurs, so they cost no start-up time; a recording takes some ten kilobytes, and
all share one memory. A recording is of exactly n rows: on a CPU padding rows are computed for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tuili.base.log import get
from tuili.ops import cpu
from tuili.runtime.batch import ForwardBatch
from tuili.runtime.captured import Parts
from tuili.runtime.captured.recording import Guard, Unrecordable, Workspace
from tuili.runtime.step import Shape, StepInputs

log = get(__name__)


class Inputs:
    """What a step reads, at fixed addresses: of each request its row of the block table ``blocks``, of each of its
    positions, up to ``longest``, where it is and the id there.

    The caller writes ``ids``, ``positions`` and ``rows``; the first call of a step makes the rest of them.
    """

    def __init__(self, parts: Parts, longest: int):
        self.parts, self.blocks = parts, parts.table.numpy()
        max_rows = len(self.blocks)
        self.rows, self.context = np.zeros((2, max_rows), np.int64)
        self.ids, self.positions, self.slots = np.zeros((3, max_rows * longest), np.int64)
        self.table = np.zeros_like(self.blocks)

    def write(self, step: StepInputs, shape: Shape) -> None:
        requests, each = shape
        self.ids[: requests * each], _ = step.ids()
        self.rows[:requests] = [row.index for row in step.rows]
        starts = [chunk.start for chunk in step.plan.chunks]
        np.add.outer(starts, np.arange(each), out=self.positions[: requests * each].reshape(shape))

    def locate(self, shape: Shape) -> None:
        """Slots, context lengths and block table of the requests of ``shape``."""
        requests, each = shape
        positions, slots = (part[: requests * each].reshape(shape) for part in (self.positions, self.slots))
        given = positions, self.rows[:requests], self.blocks, slots, self.context[:requests], self.table[:requests]
        cpu.kernels.locate(*map(torch.from_numpy, given), self.parts.kv.block_size)

    def batch(self, shape: Shape) -> ForwardBatch:
        """The batch of ``shape``: views, so that one batch serves all steps of it."""
        requests, each = shape
        rows, bounds = slice(requests * each), torch.from_numpy(np.arange(0, requests * each + 1, each))
        positions, slots = torch.from_numpy(self.positions[rows]), torch.from_numpy(self.slots[rows])
        context, table = torch.from_numpy(self.context[:requests]), torch.from_numpy(self.table[:requests])
        return ForwardBatch(positions, slots, bounds, context, table, each, self.parts.attention)


@dataclass
class Recording:
    """A step of some shape. ``logits`` is where a replay leaves its result; ``seen`` must outlive it.

    ``trusted``: on other inputs than the recorded ones, too, it gave the bits of an eager run.
    """

    program: cpu.Program
    logits: torch.Tensor
    seen: list[torch.Tensor]
    trusted: bool = False


class NativeSteps:
    """Captured steps of C++ kernels, where the device is the host; of up to ``longest`` positions of a request."""

    memory: torch.Tensor | None = None

    def __init__(self, parts: Parts, longest: int = 1):
        self.parts, self.longest = parts, longest
        self.inputs = Inputs(parts, longest)
        self.why = ""
        self._workspace = Workspace(len(parts.table) * longest)
        self._recordings: dict[Shape, Recording] = {}

    @property
    def shapes(self) -> list[Shape]:
        return sorted(self._recordings)

    def fit(self, step: StepInputs) -> bool:
        return step.shape is not None and step.shape[1] <= self.longest and not self.why

    def load(self, step: StepInputs) -> Sequence[np.ndarray]:
        """Write the inputs, which are the device's own. The team's threads may wake up meanwhile."""
        assert step.shape is not None
        cpu.wake()
        self.inputs.write(step, step.shape)
        return ()

    def logits(self, shape: Shape) -> torch.Tensor | None:
        """Computing a step a second time changes nothing: it writes the same K and V to the same slots."""
        recording = self._recordings.get(shape)
        if recording is not None and recording.trusted:
            recording.program.run()
            return recording.logits
        if recording is None:
            try:
                recording, expected = self._record(shape)
            except Unrecordable as error:
                self._give_up(str(error))
                return None
        else:
            expected, recording.trusted = self._eager(shape), True
        self._workspace.spoil()
        recording.program.run()
        if not torch.equal(recording.logits.view(torch.uint8), expected.view(torch.uint8)):
            self._give_up(f"a replay of {shape[0]} rows gave other bits than the calls that it is made of")
            return None
        self._recordings[shape] = recording
        return recording.logits

    def _record(self, shape: Shape) -> tuple[Recording, torch.Tensor]:
        """A recording of the step, and its scores."""
        guard = Guard(self._workspace, shape[0] * shape[1])
        with guard, cpu.recorded() as calls:
            logits = self._eager(shape)
        return Recording(cpu.Program(calls), self._workspace.unlent(logits), guard.seen), logits.clone()

    def _eager(self, shape: Shape) -> torch.Tensor:
        self.inputs.locate(shape)
        ids, batch, model = self.inputs.ids[: shape[0] * shape[1]], self.inputs.batch(shape), self.parts.model
        return model.logits(model.forward(model.embed(torch.from_numpy(ids)), batch, self.parts.kv))

    def _give_up(self, why: str) -> None:
        self.why = why
        self._recordings.clear()
        log.warning("decode steps are not captured, so they are slower: %s", why)
