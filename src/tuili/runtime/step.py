"""``StepInputs``: what the host knows of a step, as the arrays that a device needs; and what came of it, read back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tuili.core.plan import StepPlan, StepResult, StepStats
from tuili.runtime.device import Work
from tuili.runtime.prompts import is_judged, read_judged
from tuili.runtime.rows import Row, decodes, lacking
from tuili.runtime.sampler import Chosen, read_tokens, settings

#: What a step's work returns, on the host: of the tokens that were chosen, then of each prompt that was judged.
Fetched = Sequence[Sequence[torch.Tensor]]
#: How many requests a captured step has, and how many positions each of them.
Shape = tuple[int, int]
FAILED = "the model's logits were not finite, or every token was ruled out"
#: Tensors of a ``Top``.
PARTS = 5


class StepInputs:
    """A plan, the ``rows`` of its chunks, and those that ask for a token (``asking``: their indices).

    ``broken``: of those that ask, the ones whose own rules failed, and why; known when the step's work was launched.
    """

    def __init__(self, plan: StepPlan, rows: list[Row]):
        self.plan, self.rows = plan, rows
        chunks = plan.chunks
        self.asking = [i for i, chunk in enumerate(chunks) if chunk.sample]
        self.askers = [chunks[i] for i in self.asking]
        self.samplers = [rows[i] for i in self.asking]
        #: Where the tokens that are asked for will stand.
        self.positions = [chunk.start + chunk.count for chunk in self.askers]
        self.broken: dict[int, str] = {}
        #: Of a step in which every row decodes: what a captured one is told by.
        self.shape: Shape | None = (len(chunks), 1) if chunks and all(map(decodes, chunks)) else None

    def ids(self) -> tuple[list[int], list[bool]]:
        """The ids of all chunks' positions, and of each chunk whether its last is known here; if not, it is there."""
        ids: list[int] = []
        known = []
        for chunk, row in zip(self.plan.chunks, self.rows, strict=True):
            known.append(len(chunk.tokens) == chunk.count or not row.unread)
            if known[-1]:
                ids += row.ids(chunk)
            elif len(chunk.tokens) == chunk.count - 1:
                ids += (*chunk.tokens, 0)
            else:
                raise lacking(chunk)
        return ids, known

    def new_blocks(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Where blocks are new in a table of ``width`` blocks per row, and which they are."""
        places: list[int] = []
        blocks: list[int] = []
        for chunk, row in zip(self.plan.chunks, self.rows, strict=True):
            if chunk.new_blocks:
                end = row.index * width + row.num_blocks
                places += range(end - len(chunk.new_blocks), end)
                blocks += chunk.new_blocks
        return np.array(places, np.int64), np.array(blocks, np.int64)

    def batch(self) -> list[np.ndarray]:
        """Rows, first positions, and bounds in the batch of the chunks; their ids, and whether the host knows the last
        of each; where in the batch are the last of those that ask for a token."""
        ids, known = self.ids()
        bounds = np.zeros(len(self.rows) + 1, np.int64)
        np.cumsum([chunk.count for chunk in self.plan.chunks], out=bounds[1:])
        lists = [row.index for row in self.rows], [chunk.start for chunk in self.plan.chunks], bounds, ids
        ends = bounds[1:][self.asking] - 1
        return [*(np.array(values, np.int64) for values in lists), np.array(known, np.bool_), ends]

    def draws(self) -> list[np.ndarray]:
        """The rows that ask for a token, and what their draws need."""
        indices = np.array([row.index for row in self.samplers], np.int64)
        return [indices, *settings([row.params for row in self.samplers], self.positions)]

    def read(self, work: Work[Fetched]) -> StepResult:
        """Wait for the step's work; its result. The rows learn what was sampled last."""
        chosen, *judged = work.wait()
        result = StepResult(self.plan.step, {}, stats=StepStats(step=self.plan.step, device_seconds=work.seconds))
        if self.asking:
            self._read_tokens(Chosen(chosen[0], chosen[1], tuple(chosen[2:])), result)
        for chunk, top in zip(filter(is_judged, self.plan.chunks), judged, strict=True):
            entries = read_judged(chunk, [tuple(top[i : i + PARTS]) for i in range(0, len(top), PARTS)])
            result.prompt_logprobs[chunk.id] = entries
        return result

    def _read_tokens(self, chosen: Chosen, result: StepResult) -> None:
        tokens, logprobs = read_tokens(chosen, self.samplers)
        for i, (chunk, row, token) in enumerate(zip(self.askers, self.samplers, tokens, strict=True)):
            # A plan that was made before anybody knew may go on from a failed request: on any id, as it ends anyway.
            row.last, row.unread = token or 0, row.unread - 1
            if token is None or i in self.broken:
                result.failed[chunk.id] = self.broken.get(i, FAILED)
                continue
            result.tokens[chunk.id] = [token]
            if (entry := logprobs[i]) is not None:
                result.logprobs[chunk.id] = [entry]
