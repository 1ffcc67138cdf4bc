"""``DeviceRunner``: plans to a device and results back, without waiting for it in between.

What the host knows of a step goes to the device in one copy: ids, where each request's positions begin, new blocks of
the block table that lives there (law 13), what the draws need. The device makes the rest: positions, slots, tables. A
token that was sampled by a step in flight stays where it was sampled, and the next step takes it from there (law 4).
What comes of the step is copied back as one piece, and read when somebody waits for it.

Only penalties and forbidden words read a request's tokens on the host: for their sake the step before is waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import chain

import numpy as np
import torch

from tuili.core.plan import Chunk, StepPlan, StepResult
from tuili.layers.attention import AttentionBackend
from tuili.layers.decoder import Decoder
from tuili.runtime.attention.paged import PagedAttention
from tuili.runtime.batch import spread
from tuili.runtime.device import Device, Work
from tuili.runtime.device_graphs import DeviceGraphs, Progress
from tuili.runtime.kvstore import KVStore
from tuili.runtime.prompts import entries, is_judged, judge
from tuili.runtime.results import result
from tuili.runtime.rows import Row, Rows, lacking
from tuili.runtime.sampler import Chosen, decide, settings, tell
from tuili.runtime.staging import Parcel, fetch

Tensors = tuple[torch.Tensor, ...]
#: What a step's work returns, on the host: of the tokens that were chosen, then of each prompt that was judged.
Fetched = list[Tensors]
#: Tensors of a ``Top``.
PARTS = 5


class Step:
    """A plan, the ``rows`` of its chunks, and those that ask for a token (``asking``: their indices)."""

    def __init__(self, plan: StepPlan, rows: list[Row]):
        self.plan, self.rows = plan, rows
        self.asking = [i for i, chunk in enumerate(plan.chunks) if chunk.sample]
        self.askers = [plan.chunks[i] for i in self.asking]
        self.samplers = [rows[i] for i in self.asking]
        #: Where the tokens that are asked for will stand.
        self.positions = [chunk.start + chunk.count for chunk in self.askers]

    def ids(self) -> tuple[list[int], list[bool]]:
        """The ids of all chunks' positions, and of each chunk whether its last is known here; if not, it is there."""
        ids: list[int] = []
        known = []
        for chunk, row in zip(self.plan.chunks, self.rows, strict=True):
            known.append(len(chunk.tokens) == chunk.count or row.remembers)
            if known[-1]:
                ids += row.ids(chunk)
            elif len(chunk.tokens) == chunk.count - 1 and row.sampled:
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

    def inputs(self) -> list[np.ndarray]:
        """Rows, first positions, and bounds in the batch of the chunks; their ids, and whether the host knows the last
        of each; where in the batch are the last of those that ask for a token."""
        ids, known = self.ids()
        bounds = np.zeros(len(self.rows) + 1, np.int64)
        np.cumsum([chunk.count for chunk in self.plan.chunks], out=bounds[1:])
        lists = [row.index for row in self.rows], [chunk.start for chunk in self.plan.chunks], bounds, ids
        ends = bounds[1:][self.asking] - 1
        return [*(np.array(values, np.int64) for values in lists), np.array(known, np.bool_), ends]

    def read(self, work: Work[Fetched]) -> StepResult:
        """Wait for the step's work; its result."""
        chosen, *judged = work.wait()
        made = None
        if self.asking:
            made = self.askers, self.samplers, tell(Chosen(chosen[0], chosen[1], chosen[2:]), self.samplers)
        prompts = {
            chunk.id: entries(chunk, [top[i : i + PARTS] for i in range(0, len(top), PARTS)])
            for chunk, top in zip(filter(is_judged, self.plan.chunks), judged, strict=True)
        }
        return result(self.plan, made, prompts, work.seconds)


class Pending(Future[StepResult]):
    """A step's result. Whoever asks for it first waits for the device and reads it, in their own thread."""

    def __init__(self, step: Step, work: Work[Fetched]):
        super().__init__()
        self._step, self._work = step, work

    def result(self, timeout: float | None = None) -> StepResult:
        self.settle()
        return super().result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.settle()
        return super().exception()

    def settle(self) -> None:
        if self.done():
            return
        try:
            self.set_result(self._step.read(self._work))
        except Exception as error:
            self.set_exception(error)


class DeviceRunner:
    """Runs plans on ``model`` with the KV of ``kv``, whose last block is for padding; all three are on ``device``.

    Holds the state of up to ``max_rows`` requests. Steps in which every row decodes are captured ones, of up to the
    largest of ``capture_sizes`` rows; without sizes none is.
    """

    def __init__(
        self,
        model: Decoder,
        kv: KVStore,
        device: Device,
        max_rows: int,
        max_model_len: int,
        capture_sizes: Sequence[int] = (),
        attention: AttentionBackend | None = None,
        progress: Progress | None = None,
    ):
        max_blocks, padding, where = -(-max_model_len // kv.block_size), kv.num_blocks - 1, device.torch_device
        self.model, self.kv, self.device = model, kv, device
        self.attention = attention or PagedAttention()
        self.rows = Rows(max_rows, max_blocks)
        #: The blocks of each row, and the id that was sampled last for it. The last row is for padding.
        self.table = torch.full((max_rows + 1, max_blocks), padding, dtype=torch.long, device=where)
        self.last = torch.zeros(max_rows + 1, dtype=torch.long, device=where)
        parts = (model, kv, device, capture_sizes, self.table, self.last, self.attention, progress)
        self.graphs = DeviceGraphs(*parts) if capture_sizes else None
        self._flying: deque[Pending] = deque()

    def submit(self, plan: StepPlan) -> Pending:
        """Queue one step: state, batch, forward, sampling. What goes wrong on the device is in its future."""
        for id in plan.dropped:
            self.rows.drop(id)
        if any(len(chunk.tokens) < chunk.count and self.rows[chunk.id].remembers for chunk in plan.chunks):
            self._settle()
        step = Step(plan, [self.rows.advance(chunk) for chunk in plan.chunks])
        pending = Pending(step, self.device.submit(self._work(step)))
        while self._flying and self._flying[0].done():
            self._flying.popleft()
        self._flying.append(pending)
        return pending

    def close(self) -> None:
        """Wait for everything."""
        self._settle()
        self.device.close()

    def _settle(self) -> None:
        while self._flying:
            self._flying.popleft().settle()

    def _work(self, step: Step) -> Callable[[], Fetched]:
        """What the device does for the step. All that it needs of the host is in a parcel."""
        samplers = np.array([row.index for row in step.samplers], np.int64)
        wishes = settings([row.params for row in step.samplers], step.positions)
        common = [samplers, *step.new_blocks(self.table.shape[1]), *wishes]
        graphs = self._graphs_for(step.plan.chunks)
        own = step.inputs() if graphs is None else [graphs.head(step.plan.chunks, step.rows, *step.ids())]
        parcel = Parcel(self.device, [*own, *common])
        for row in step.samplers:
            row.sampled = True

        def work() -> Fetched:
            self.kv.move(step.plan.moves)
            arrays = parcel.unpack(None if graphs is None else graphs.memory)
            inputs, (samplers, places, blocks, *wishes) = arrays[: len(own)], arrays[len(own) :]
            self.table.view(-1).index_copy_(0, places, blocks)
            logits, judged = self._forward(step, inputs) if graphs is None else (graphs.logits(len(step.rows)), [])
            return fetch(self.device, [self._choose(step, logits, samplers, wishes) if step.asking else (), *judged])

        def nothing() -> Fetched:
            self.kv.move(step.plan.moves)
            return [()]

        return work if step.rows else nothing

    def _graphs_for(self, chunks: Sequence[Chunk]) -> DeviceGraphs | None:
        """The captured steps, where this is one of them."""
        return self.graphs if self.graphs is not None and self.graphs.fit(chunks) else None

    def _forward(self, step: Step, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[Tensors]]:
        """Logits of the chunks that ask for a token (or of none), and the judged prompts, flat."""
        rows, starts, bounds, ids, known, ends = inputs
        chunks, last = step.plan.chunks, bounds[1:] - 1
        ids = ids.index_copy(0, last, torch.where(known, ids[last], self.last[rows]))
        sizes = len(ids), step.plan.max_query_len
        batch = spread(rows, starts, bounds, *sizes, self.table, self.kv.block_size, self.attention)
        hidden = self.model.forward(self.model.embed(ids), batch, self.kv)
        own = zip(*(tensor.split([chunk.count for chunk in chunks]) for tensor in (ids, hidden)), strict=True)
        judged = [
            tuple(chain.from_iterable(judge(self.model, chunk, row, *parts)))
            for chunk, row, parts in zip(chunks, step.rows, own, strict=True)
            if is_judged(chunk)
        ]
        return self.model.logits(hidden[ends]) if step.asking else hidden[:0], judged

    def _choose(
        self, step: Step, logits: torch.Tensor, samplers: torch.Tensor, wishes: Sequence[torch.Tensor]
    ) -> Tensors:
        chosen = decide(logits, step.samplers, step.positions, wishes)
        self.last.index_copy_(0, samplers, chosen.ids)
        return chosen.ids, chosen.finite, *chosen.top
