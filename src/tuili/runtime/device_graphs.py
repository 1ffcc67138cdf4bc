"""Captured decode steps on a device: CUDA graphs of a few sizes, to which the rows of a step are padded.

A graph repeats launches on the addresses of its capture, so a step's inputs come to one place (``memory``) and its
scores are left in one (``scores``). Padding rows have a row of the block table of their own, which is full of a block
that nobody reads. The largest size is captured first, and the others live in its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from tuili import ops
from tuili.base.log import get
from tuili.core.plan import Chunk
from tuili.layers.attention import AttentionBackend
from tuili.layers.decoder import Decoder
from tuili.runtime.batch import ForwardBatch
from tuili.runtime.device import Device
from tuili.runtime.kvstore import KVStore
from tuili.runtime.rows import Row, decodes

log = get(__name__)
#: Called with what is being done, how much of it is, and how much there is.
Progress = Callable[[str, int, int], None]
#: Numbers that a graph reads of each row: the row, the position, the id, and whether the host knows that.
INPUTS = 4
#: Bytes of a row in a parcel, at most: those, the row again, a new block and its place, five numbers for the draw.
ROW_BYTES = 8 * (INPUTS + 1 + 2 + 5)


class DeviceGraphs:
    """Decode steps of ``model`` of up to the largest of ``sizes`` rows, over the ``table`` and the ``last`` samples of
    a runner, the last of whose rows is for padding.

    ``why`` says why nothing is captured, "" where all is well; ``nbytes`` is what the captures took of the device.
    """

    def __init__(
        self,
        model: Decoder,
        kv: KVStore,
        device: Device,
        sizes: Sequence[int],
        table: torch.Tensor,
        last: torch.Tensor,
        attention: AttentionBackend,
        progress: Progress | None = None,
    ):
        self.model, self.kv, self.device, self.attention = model, kv, device, attention
        self.table, self.last = table, last
        self.most = max(sizes)
        where = device.torch_device
        #: Where parcels of captured steps go: an array of ``head`` first.
        self.memory = torch.zeros(ROW_BYTES * self.most + 64, dtype=torch.uint8, device=where)
        self.scores = torch.empty(self.most, model.spec.vocab_size, dtype=model.dtype, device=where)
        self._bounds = torch.arange(self.most + 1, device=where)
        self._replays: dict[int, Callable[[], None]] = {}
        self.backend = ops.active_backend()
        self.why = "torch's references read lengths back to the host" if self.backend == "reference" else ""
        self.nbytes = 0
        if not self.why:
            self._capture(sorted(set(sizes), reverse=True), progress)
        if self.why:
            log.warning("decode steps are not captured, so they are slower: %s", self.why)

    @property
    def active(self) -> bool:
        """Whether steps are captured: as long as the ops that were captured are what computes."""
        return not self.why and ops.active_backend() == self.backend

    @property
    def sizes(self) -> list[int]:
        """The numbers of rows that are captured."""
        return sorted(self._replays)

    def fit(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step of these chunks is a captured one. One with many new blocks has no room in ``memory``."""
        small = 0 < len(chunks) <= self.most and self.active and all(map(decodes, chunks))
        return small and sum(len(chunk.new_blocks) for chunk in chunks) <= len(chunks)

    def head(
        self, chunks: Sequence[Chunk], rows: Sequence[Row], ids: Sequence[int], known: Sequence[bool]
    ) -> np.ndarray:
        """The first array of a captured step's parcel, padded."""
        head = np.zeros((INPUTS, self.most), np.int64)
        head[0] = len(self.table) - 1
        head[:, : len(rows)] = [row.index for row in rows], [chunk.start for chunk in chunks], ids, known
        return head

    def logits(self, rows: int) -> torch.Tensor:
        """Scores [rows, vocab] of the step whose parcel is in ``memory``, valid until the next one. Device work."""
        size = min(size for size in self._replays if size >= rows)
        self._replays[size]()
        return self.scores[:rows]

    def _capture(self, sizes: Sequence[int], progress: Progress | None) -> None:
        before, _ = self.device.memory()
        for done, size in enumerate(sizes):
            if progress is not None:
                progress("capturing decode steps", done, len(sizes))
            try:
                self._replays[size] = self.device.capture(lambda size=size: self._step(size))  # type: ignore[misc]
            except torch.OutOfMemoryError:  # no way to go on: steps take memory too
                raise
            except Exception as error:  # whatever it was, steps run without
                self._replays.clear()
                self.why = f"{type(error).__name__} at {size} rows: {error}"
                return
        if progress is not None:
            progress("capturing decode steps", len(sizes), len(sizes))
        self.nbytes = max(0, before - self.device.memory()[0])

    def _step(self, size: int) -> None:
        head = self.memory[: INPUTS * self.most * 8].view(torch.int64).view(INPUTS, self.most)
        ids, slots, contexts, blocks = ops.locate(head[:, :size], self.last, self.table, self.kv.block_size)
        batch = ForwardBatch(head[1, :size], slots, self._bounds[: size + 1], contexts, blocks, 1, self.attention)
        hidden = self.model.forward(self.model.embed(ids), batch, self.kv)
        self.scores[:size].copy_(self.model.logits(hidden))
