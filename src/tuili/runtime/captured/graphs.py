"""Captured steps on a device: CUDA graphs of a few sizes, to which the rows of a step are padded.

A graph repeats launches on the addresses of its capture, so a step's inputs come to one place (``memory``) and its
scores are left in one (``scores``). Padding rows have a row of the block table of their own, which is full of a block
that nobody reads. The largest shape is captured first, and the others live in its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from tuili.base.log import get
from tuili.runtime.batch import ForwardBatch
from tuili.runtime.captured import Parts
from tuili.runtime.step import Shape, StepInputs

log = get(__name__)
#: Called with what is being done, how much of it is, and how much there is.
Progress = Callable[[str, int, int], None]
#: Numbers that a graph reads of each position: the row, the position, the id, and whether the host knows that.
INPUTS = 4
#: Bytes of a position in a parcel, at most: those, the row again, a new block and its place, five numbers for the draw.
POSITION_BYTES = 8 * (INPUTS + 1 + 2 + 5)


class GraphSteps:
    """Captured steps of the ``shapes`` given, every request of a step having as many positions as the others.

    ``nbytes`` is what the captures took of the device.
    """

    def __init__(self, parts: Parts, shapes: Sequence[Shape], progress: Progress | None = None):
        self.parts = parts
        self.most = max(requests * each for requests, each in shapes)
        where, model = parts.device.torch_device, parts.model
        #: Where parcels of captured steps go: an array of ``INPUTS`` rows first.
        self.memory: torch.Tensor | None = torch.zeros(POSITION_BYTES * self.most + 64, dtype=torch.uint8, device=where)
        self.scores = torch.empty(self.most, model.spec.vocab_size, dtype=model.dtype, device=where)
        self._bounds = torch.arange(self.most + 1, device=where)
        self._replays: dict[Shape, Callable[[], None]] = {}
        references = model.kernels.backend == "reference"
        self.why = "torch's references read lengths back to the host" if references else ""
        self.nbytes = 0
        if not self.why:
            self._capture(sorted(set(shapes), key=lambda shape: (-shape[0] * shape[1], shape)), progress)
        if self.why:
            log.warning("decode steps are not captured, so they are slower: %s", self.why)

    @property
    def shapes(self) -> list[Shape]:
        return sorted(self._replays)

    def fit(self, step: StepInputs) -> bool:
        """A step with many new blocks has no room in ``memory``."""
        if step.shape is None or self.why or self._padded(step.shape) is None:
            return False
        return sum(len(chunk.new_blocks) for chunk in step.plan.chunks) <= len(step.rows)

    def _padded(self, shape: Shape) -> Shape | None:
        """The smallest captured shape that holds ``shape``."""
        requests, each = shape
        return min((known for known in self._replays if known[0] >= requests and known[1] == each), default=None)

    def load(self, step: StepInputs) -> Sequence[np.ndarray]:
        """The first array of the step's parcel, padded."""
        assert step.shape is not None
        (_, each), (ids, known) = step.shape, step.ids()
        head = np.zeros((INPUTS, self.most), np.int64)
        head[0] = len(self.parts.table) - 1
        own = head[:, : len(ids)].reshape(INPUTS, -1, each)
        own[0] = np.array([[row.index] for row in step.rows])
        own[1] = np.array([[chunk.start] for chunk in step.plan.chunks]) + np.arange(each)
        own[2] = np.reshape(ids, (-1, each))
        own[3], own[3, :, -1] = 1, known
        return [head]

    def logits(self, shape: Shape) -> torch.Tensor:
        padded = self._padded(shape)
        assert padded is not None
        self._replays[padded]()
        return self.scores[: shape[0] * shape[1]]

    def _capture(self, shapes: Sequence[Shape], progress: Progress | None) -> None:
        device = self.parts.device
        before, _ = device.memory()
        for done, shape in enumerate(shapes):
            if progress is not None:
                progress("capturing decode steps", done, len(shapes))
            try:
                self._replays[shape] = device.capture(lambda shape=shape: self._step(shape))  # type: ignore[misc]
            except torch.OutOfMemoryError:  # no way to go on: steps take memory too
                raise
            except Exception as error:  # whatever it was, steps run without
                self._replays.clear()
                self.why = f"{type(error).__name__} at {shape[0]} rows: {error}"
                return
        if progress is not None:
            progress("capturing decode steps", len(shapes), len(shapes))
        self.nbytes = max(0, before - device.memory()[0])

    def _step(self, shape: Shape) -> None:
        (requests, each), parts = shape, self.parts
        rows = requests * each
        assert self.memory is not None
        head = self.memory[: INPUTS * self.most * 8].view(torch.int64).view(INPUTS, self.most)
        ids, slots, contexts, blocks = parts.model.kernels.locate(
            head[:, :rows], parts.last, parts.table, parts.kv.block_size
        )
        if each > 1:  # a request's context is that of its last position
            contexts, blocks = contexts[each - 1 :: each].contiguous(), blocks[::each].contiguous()
        bounds = self._bounds[: rows + 1 : each]
        batch = ForwardBatch(head[1, :rows], slots, bounds, contexts, blocks, each, parts.attention)
        hidden = parts.model.forward(parts.model.embed(ids), batch, parts.kv)
        self.scores[:rows].copy_(parts.model.logits(hidden))
