"""Captured decode steps: the calls of a step of n rows, recorded once, then replayed in one native call.

A decode step makes the same list of op calls every time; only what is in the buffers differs. So the model runs once as
it is, on inputs at fixed addresses and with its results in memory of ours, while its calls are written down. A replay
is those calls on those addresses: no Python, no allocation, the same bits (law 5).

Nothing is trusted. While recording, torch may only make views and ask for memory: any other torch op would be missing
from the replay, and the model then runs eagerly. A new recording is replayed at once, over memory that was spoiled, and
again at its first use, on other inputs; both must give the bits of the eager run.

Recordings are made when a number of rows first occurs, so they cost no start-up time; a recording takes some ten
kilobytes, and all share one memory. A recording is of exactly n rows: on a CPU padding rows are computed for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tuili import ops
from tuili.base.log import get
from tuili.layers.attention import AttentionBackend
from tuili.layers.decoder import Decoder
from tuili.ops import cpu
from tuili.runtime.batch import ForwardBatch
from tuili.runtime.kvstore import KVStore
from tuili.runtime.recording import Guard, Unrecordable, Workspace

log = get(__name__)


class Inputs:
    """What a decode step reads, at fixed addresses: an entry, or row of the block table, per row of the batch.

    The caller writes ``ids``, ``positions`` and ``rows`` (where each one's blocks stand in ``blocks``); the first call
    of a step makes the rest of them.
    """

    def __init__(self, max_rows: int, blocks: np.ndarray, block_size: int, attention: AttentionBackend):
        self.ids, self.positions, self.rows, self.slots, self.context = np.zeros((5, max_rows), np.int64)
        self.blocks, self.table = blocks, np.zeros((max_rows, blocks.shape[1]), np.int64)
        self.starts = np.arange(max_rows + 1)
        self.block_size = block_size
        self.attention = attention

    def locate(self, n: int) -> None:
        """Slots, context lengths and block table of the first ``n`` rows."""
        parts = (self.positions[:n], self.rows[:n], self.blocks, self.slots[:n], self.context[:n], self.table[:n])
        cpu.kernels.locate(*map(torch.from_numpy, parts), self.block_size)

    def batch(self, n: int) -> ForwardBatch:
        """The batch of the first ``n`` rows: views, so that one batch serves all steps of ``n`` rows."""
        whole = (self.positions, self.slots, self.context, self.table)
        positions, slots, context, table = (torch.from_numpy(part[:n]) for part in whole)
        starts = torch.from_numpy(self.starts[: n + 1])
        return ForwardBatch(positions, slots, starts, context, table, 1, self.attention)


@dataclass
class Recording:
    """A step of some number of rows. ``logits`` is where a replay leaves its result; ``seen`` must outlive it.

    ``trusted``: on other inputs than the recorded ones, too, it gave the bits of an eager run.
    """

    program: cpu.Program
    logits: torch.Tensor
    seen: list[torch.Tensor]
    trusted: bool = False


class Graphs:
    """Decode steps of ``model`` on the KV of ``kv``, of up to ``max_rows`` rows whose blocks stand in ``blocks``
    [.., columns] int64, contiguous and always the same array.

    Fill ``inputs``, then ask for ``logits``. ``why`` says why nothing is captured, "" where all is well.
    """

    def __init__(self, model: Decoder, kv: KVStore, max_rows: int, blocks: np.ndarray, attention: AttentionBackend):
        self.model, self.kv = model, kv
        self.inputs = Inputs(max_rows, blocks, kv.block_size, attention)
        self.why = ""
        self._workspace = Workspace(max_rows)
        self._recordings: dict[int, Recording] = {}

    @property
    def active(self) -> bool:
        """Whether steps are captured: only the C++ kernels are, and only as long as they are what computes."""
        return not self.why and ops.active_backend() == "cpu"

    @property
    def sizes(self) -> list[int]:
        """The numbers of rows that are captured."""
        return sorted(self._recordings)

    def logits(self, rows: int) -> torch.Tensor | None:
        """Scores [rows, vocab] of the step whose inputs were filled in, valid until the next step; None if it has to
        run eagerly. Computing a step a second time changes nothing: it writes the same K and V to the same slots."""
        recording = self._recordings.get(rows)
        if recording is not None and recording.trusted:
            recording.program.run()
            return recording.logits
        if recording is None:
            try:
                recording, expected = self._record(rows)
            except Unrecordable as error:
                self._give_up(str(error))
                return None
        else:
            expected, recording.trusted = self._eager(rows), True
        self._workspace.spoil()
        recording.program.run()
        if not torch.equal(recording.logits.view(torch.uint8), expected.view(torch.uint8)):
            self._give_up(f"a replay of {rows} rows gave other bits than the calls that it is made of")
            return None
        self._recordings[rows] = recording
        return recording.logits

    def _record(self, rows: int) -> tuple[Recording, torch.Tensor]:
        """A recording of the step, and its scores."""
        guard = Guard(self._workspace, rows)
        with guard, cpu.recorded() as calls:
            logits = self._eager(rows)
        return Recording(cpu.Program(calls), self._workspace.unlent(logits), guard.seen), logits.clone()

    def _eager(self, rows: int) -> torch.Tensor:
        self.inputs.locate(rows)
        ids, batch = torch.from_numpy(self.inputs.ids[:rows]), self.inputs.batch(rows)
        return self.model.logits(self.model.forward(self.model.embed(ids), batch, self.kv))

    def _give_up(self, why: str) -> None:
        self.why = why
        self._recordings.clear()
        log.warning("decode steps are not captured, so they are slower: %s", why)
