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
    """What a decode step reads, at fixed addresses: an entry, or row of the block table, per row of the batch.

    The caller writes ``ids``, ``positions`` and ``rows`` (where each one's blocks stand in ``blocks``); the first call
    of a step makes the rest of them.
    """

    def __init__(self, parts: Parts):
        self.parts, self.blocks = parts, parts.table.numpy()
        max_rows, columns = self.blocks.shape
        self.ids, self.positions, self.rows, self.slots, self.context = np.zeros((5, max_rows), np.int64)
        self.table = np.zeros((max_rows, columns), np.int64)
        self.starts = np.arange(max_rows + 1)

    def locate(self, n: int) -> None:
        """Slots, context lengths and block table of the first ``n`` rows."""
        made = (self.slots[:n], self.context[:n], self.table[:n])
        tensors = map(torch.from_numpy, (self.positions[:n], self.rows[:n], self.blocks, *made))
        cpu.kernels.locate(*tensors, self.parts.kv.block_size)

    def batch(self, n: int) -> ForwardBatch:
        """The batch of the first ``n`` rows: views, so that one batch serves all steps of ``n`` rows."""
        whole = (self.positions, self.slots, self.context, self.table)
        positions, slots, context, table = (torch.from_numpy(array[:n]) for array in whole)
        starts = torch.from_numpy(self.starts[: n + 1])
        return ForwardBatch(positions, slots, starts, context, table, 1, self.parts.attention)


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
    """Captured steps of C++ kernels, where the device is the host."""

    memory: torch.Tensor | None = None

    def __init__(self, parts: Parts):
        self.parts = parts
        self.inputs = Inputs(parts)
        self.why = ""
        self._workspace = Workspace(len(parts.table))
        self._recordings: dict[Shape, Recording] = {}

    @property
    def shapes(self) -> list[Shape]:
        return sorted(self._recordings)

    def fit(self, step: StepInputs) -> bool:
        return step.shape is not None and not self.why

    def load(self, step: StepInputs) -> Sequence[np.ndarray]:
        """Write the inputs, which are the device's own. The team's threads may wake up meanwhile."""
        cpu.wake()
        count, inputs = len(step.rows), self.inputs
        inputs.ids[:count], _ = step.ids()
        inputs.positions[:count] = [chunk.start for chunk in step.plan.chunks]
        inputs.rows[:count] = [row.index for row in step.rows]
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
        rows, _ = shape
        self.inputs.locate(rows)
        ids, batch, model = torch.from_numpy(self.inputs.ids[:rows]), self.inputs.batch(rows), self.parts.model
        return model.logits(model.forward(model.embed(ids), batch, self.parts.kv))

    def _give_up(self, why: str) -> None:
        self.why = why
        self._recordings.clear()
        log.warning("decode steps are not captured, so they are slower: %s", why)
