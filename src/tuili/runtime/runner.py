"""``ModelRunner``: a plan in, a result out. Knows tensors, nothing of scheduling; text is unknown here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain

import torch

from tuili.core.plan import StepPlan, StepResult, TopLogprobs
from tuili.layers.attention import AttentionBackend
from tuili.layers.decoder import Decoder
from tuili.ops import cpu
from tuili.runtime.attention.paged import PagedAttention
from tuili.runtime.batch import assemble
from tuili.runtime.graphs import Graphs
from tuili.runtime.kvstore import KVStore
from tuili.runtime.prompts import entries, is_judged, judge
from tuili.runtime.results import result
from tuili.runtime.rows import Row, Rows, decodes
from tuili.runtime.sampler import sample


class ModelRunner:
    """Runs plans on ``model`` with the KV of ``kv``; holds the state of up to ``max_rows`` requests.

    Where every row decodes, the step is a captured one, unless ``enforce_eager``.
    """

    def __init__(
        self,
        model: Decoder,
        kv: KVStore,
        max_rows: int,
        max_model_len: int,
        attention: AttentionBackend | None = None,
        enforce_eager: bool = False,
    ):
        max_blocks = -(-max_model_len // kv.block_size)
        self.model = model
        self.kv = kv
        self.rows = Rows(max_rows, max_blocks)
        self.attention = attention or PagedAttention()
        self.graphs = None if enforce_eager else Graphs(model, kv, max_rows, self.rows.table, self.attention)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """One step: state, batch, forward, sampling."""
        for id in plan.dropped:
            self.rows.drop(id)
        self.kv.move(plan.moves)
        chunks = plan.chunks
        if not chunks:
            return StepResult(plan.step, {})
        rows = [self.rows.advance(chunk) for chunk in chunks]
        if self.graphs is not None and self.graphs.active and all(map(decodes, chunks)):
            made = self._replay(self.graphs, plan, rows)
            if made is not None:
                return made
        return self._run_eagerly(plan, rows)

    def _replay(self, graphs: Graphs, plan: StepPlan, rows: Sequence[Row]) -> StepResult | None:
        """A step in which every row decodes; None if it can not be captured."""
        count, inputs = len(rows), graphs.inputs
        cpu.wake()
        inputs.ids[:count] = [row.ids(chunk)[0] for chunk, row in zip(plan.chunks, rows, strict=True)]
        inputs.positions[:count] = [chunk.start for chunk in plan.chunks]
        inputs.rows[:count] = [row.index for row in rows]
        began = time.perf_counter()
        logits = graphs.logits(count)
        return None if logits is None else self._sample(plan, range(count), rows, logits, {}, began)

    def _run_eagerly(self, plan: StepPlan, rows: Sequence[Row]) -> StepResult:
        chunks = plan.chunks
        tokens = [row.ids(chunk) for chunk, row in zip(chunks, rows, strict=True)]
        table = self.rows.table[[row.index for row in rows]]
        counts = [chunk.count for chunk in chunks]
        batch = assemble([c.start for c in chunks], counts, table, self.kv.block_size, self.attention)
        ids = torch.tensor(list(chain.from_iterable(tokens)))
        began = time.perf_counter()
        hidden = self.model.forward(self.model.embed(ids), batch, self.kv)
        ends = batch.query_start[1:]
        starts = batch.query_start.tolist()
        judged = {
            chunk.id: entries(chunk, judge(self.model, chunk, row, ids[first:last], hidden[first:last]))
            for chunk, row, first, last in zip(chunks, rows, starts, starts[1:], strict=False)
            if is_judged(chunk)
        }
        asking = [i for i, chunk in enumerate(chunks) if chunk.sample]
        logits = None
        if asking:
            last = ends - 1 if len(asking) == len(ends) else ends[asking] - 1
            logits = self.model.logits(hidden[last])
        return self._sample(plan, asking, rows, logits, judged, began)

    def _sample(
        self,
        plan: StepPlan,
        asking: Sequence[int],
        rows: Sequence[Row],
        logits: torch.Tensor | None,
        prompt_logprobs: dict[str, list[TopLogprobs]],
        began: float,
    ) -> StepResult:
        """The step's result; ``logits`` [len(asking), vocab] are of the chunks ``asking``."""
        made = None
        if logits is not None:
            chunks, samplers = [plan.chunks[i] for i in asking], [rows[i] for i in asking]
            made = chunks, samplers, sample(logits, samplers, [c.start + c.count for c in chunks])
        return result(plan, made, prompt_logprobs, time.perf_counter() - began)
