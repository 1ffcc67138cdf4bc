"""``Runner``: plans to a device and results back, without waiting for it in between. Knows nothing of scheduling.

What the host knows of a step goes to the device in one piece: ids, where each request's positions begin, new blocks of
the block table that lives there (law 13), what the draws need. The device makes the rest: positions, slots, tables. A
token that was sampled by a step in flight stays where it was sampled, and the next step takes it from there (law 4).
What comes of the step is copied back as one piece, and read when somebody waits for it. A processor has answered when
``submit`` returns, and nothing is copied.

Rules that read a request's tokens do so on the host: for their sake the step before is waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import chain

import torch

from tuili.core.plan import StepPlan, StepResult
from tuili.layers.attention import AttentionBackend
from tuili.layers.decoder import Decoder
from tuili.runtime.attention.paged import PagedAttention
from tuili.runtime.batch import assemble
from tuili.runtime.captured import CapturedSteps, Parts
from tuili.runtime.device import Device, Work
from tuili.runtime.kvstore import KVStore
from tuili.runtime.prompts import is_judged, judge_prompt
from tuili.runtime.rows import Rows
from tuili.runtime.sampler import choose_tokens
from tuili.runtime.staging import Tensors, fetch, stage
from tuili.runtime.step import Fetched, StepInputs

#: Opens what captures steps.
Capture = Callable[[Parts], CapturedSteps]


class Pending(Future[StepResult]):
    """A step's result. Whoever asks for it first waits for the device and reads it, in their own thread."""

    def __init__(self, step: StepInputs, work: Work[Fetched]):
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


class Runner:
    """Runs plans on ``model`` with the KV of ``kv``, both on ``device``; holds up to ``max_rows`` requests.

    ``capture`` opens what captures the steps in which every row decodes; without it every step is eager. Steps that are
    padded write to the last block of ``kv``.
    """

    def __init__(
        self,
        model: Decoder,
        kv: KVStore,
        device: Device,
        max_rows: int,
        max_model_len: int,
        capture: Capture | None = None,
        attention: AttentionBackend | None = None,
    ):
        max_blocks, padding, where = -(-max_model_len // kv.block_size), kv.num_blocks - 1, device.torch_device
        self.model, self.kv, self.device = model, kv, device
        self.attention = attention or PagedAttention(model.kernels)
        self.rows = Rows(max_rows)
        #: The blocks of each row, and the id that was sampled last for it. The last row is for padding.
        self.table = torch.full((max_rows + 1, max_blocks), padding, dtype=torch.long, device=where)
        self.last = torch.zeros(max_rows + 1, dtype=torch.long, device=where)
        parts = Parts(model, kv, device, self.attention, self.table, self.last)
        self.captured = capture(parts) if capture is not None else None
        self._flying: deque[Pending] = deque()

    def submit(self, plan: StepPlan) -> Pending:
        """Queue one step: state, batch, forward, sampling. What goes wrong on the device is in its future."""
        if any(chunk.num_draft for chunk in plan.chunks):
            raise NotImplementedError("the plan has draft tokens, and this runner can not verify them")
        for id in plan.dropped:
            self.rows.drop(id)
        lacks = (chunk for chunk in plan.chunks if len(chunk.tokens) < chunk.count)
        if self.device.is_host or any(self.rows[chunk.id].remembers for chunk in lacks):
            self._settle()
        step = StepInputs(plan, [self.rows.advance(chunk) for chunk in plan.chunks])
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

    def _work(self, step: StepInputs) -> Callable[[], Fetched]:
        """What the device does for the step. All that it needs of the host is staged here."""
        captured = self._captured_for(step)
        own = step.batch() if captured is None else captured.load(step)
        staged = stage(self.device, [*own, *step.new_blocks(self.table.shape[1]), *step.draws()])
        for row in step.samplers:
            row.unread += 1

        def work() -> Fetched:
            self.kv.move(step.plan.moves)
            arrays = staged.unpack(None if captured is None else captured.memory)
            inputs, (places, blocks, samplers, *wishes) = arrays[: len(own)], arrays[len(own) :]
            if len(places):
                self.table.view(-1).index_copy_(0, places, blocks)
            logits, judged = self._replay(step, captured) if captured else self._forward(step, inputs)
            return fetch(self.device, [self._choose(step, logits, samplers, wishes) if step.asking else (), *judged])

        def nothing() -> Fetched:
            self.kv.move(step.plan.moves)
            return [()]

        return work if step.rows else nothing

    def _captured_for(self, step: StepInputs) -> CapturedSteps | None:
        """The captured steps, where this is one of them."""
        return self.captured if self.captured is not None and self.captured.fit(step) else None

    def _replay(self, step: StepInputs, captured: CapturedSteps) -> tuple[torch.Tensor, list[Tensors]]:
        """Logits of a captured step; of the same step, run eagerly, where it turns out that it can not be captured."""
        assert step.shape is not None
        logits = captured.logits(step.shape)
        return (logits, []) if logits is not None else self._forward(step, stage(self.device, step.batch()).unpack())

    def _forward(self, step: StepInputs, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[Tensors]]:
        """Logits of the chunks that ask for a token (or of none), and the judged prompts, flat."""
        rows, starts, bounds, ids, known, ends = inputs
        chunks, last = step.plan.chunks, bounds[1:] - 1
        ids = ids.index_copy(0, last, torch.where(known, ids[last], self.last[rows]))
        sizes = len(ids), step.plan.max_query_len
        batch = assemble(rows, starts, bounds, *sizes, self.table, self.kv.block_size, self.attention)
        hidden = self.model.forward(self.model.embed(ids), batch, self.kv)
        own = zip(*(tensor.split([chunk.count for chunk in chunks]) for tensor in (ids, hidden)), strict=True)
        judged: list[Tensors] = [
            tuple(chain.from_iterable(judge_prompt(self.model, chunk, row, *parts)))
            for chunk, row, parts in zip(chunks, step.rows, own, strict=True)
            if is_judged(chunk)
        ]
        return self.model.logits(hidden[ends]) if step.asking else hidden[:0], judged

    def _choose(
        self, step: StepInputs, logits: torch.Tensor, samplers: torch.Tensor, wishes: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        chosen = choose_tokens(logits, step.samplers, step.positions, wishes, self.model.kernels)
        step.broken = chosen.broken
        self.last.index_copy_(0, samplers, chosen.ids)
        return chosen.ids, chosen.finite, *chosen.top
