"""``ModelRunner``: a plan in, a result out. Knows tensors, nothing of scheduling; text is unknown here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain

import torch

from tuili.core.plan import Chunk, StepPlan, StepResult, StepStats, TopLogprobs
from tuili.layers.attention import AttentionBackend
from tuili.layers.decoder import Decoder
from tuili.ops import cpu
from tuili.runtime.attention.paged import PagedAttention
from tuili.runtime.batch import assemble
from tuili.runtime.graphs import Graphs
from tuili.runtime.kvstore import KVStore
from tuili.runtime.rows import Row, Rows
from tuili.runtime.sampler import sample, top_logprobs

#: Rows of prompt logits computed at once: bounds memory at large vocabularies.
PROMPT_LOGITS_SLICE = 256


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
        if self.graphs is not None and self.graphs.active and all(map(_decodes, chunks)):
            result = self._replay(self.graphs, plan, rows)
            if result is not None:
                return result
        return self._run_eagerly(plan, rows)

    def _replay(self, graphs: Graphs, plan: StepPlan, rows: Sequence[Row]) -> StepResult | None:
        """A step in which every row decodes; None if it can not be captured."""
        count, inputs = len(rows), graphs.inputs
        cpu.wake()
        inputs.ids[:count] = [self._tokens(chunk, row)[0] for chunk, row in zip(plan.chunks, rows, strict=True)]
        inputs.positions[:count] = [chunk.start for chunk in plan.chunks]
        inputs.rows[:count] = [row.index for row in rows]
        began = time.perf_counter()
        logits = graphs.logits(count)
        return None if logits is None else self._sample(plan, range(count), rows, logits, {}, began)

    def _run_eagerly(self, plan: StepPlan, rows: Sequence[Row]) -> StepResult:
        chunks = plan.chunks
        tokens = [self._tokens(chunk, row) for chunk, row in zip(chunks, rows, strict=True)]
        table = self.rows.table[[row.index for row in rows]]
        counts = [chunk.count for chunk in chunks]
        batch = assemble([c.start for c in chunks], counts, table, self.kv.block_size, self.attention)
        ids = torch.tensor(list(chain.from_iterable(tokens)))
        began = time.perf_counter()
        hidden = self.model.forward(self.model.embed(ids), batch, self.kv)
        ends = batch.query_start[1:]
        prompt_logprobs = self._prompt_logprobs(chunks, rows, tokens, hidden, ends)
        asking = [i for i, chunk in enumerate(chunks) if chunk.sample]
        logits = None
        if asking:
            last = ends - 1 if len(asking) == len(ends) else ends[asking] - 1
            logits = self.model.logits(hidden[last])
        return self._sample(plan, asking, rows, logits, prompt_logprobs, began)

    def _tokens(self, chunk: Chunk, row: Row) -> Sequence[int]:
        """The ids of the chunk's positions; the one that the scheduler could not know yet is the row's last sample."""
        tokens: Sequence[int] = chunk.tokens
        missing = chunk.count - len(tokens)
        if missing:
            if missing != 1 or row.last is None:
                raise RuntimeError(f"chunk of request {chunk.id} lacks {missing} token ids that were never sampled")
            tokens = (*tokens, row.last)
        if row.remembers:
            row.tokens[chunk.start :] = tokens
        return tokens

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
        tokens: dict[str, list[int]] = {}
        logprobs: dict[str, list[TopLogprobs]] = {}
        failed: dict[str, str] = {}
        if logits is not None:
            chunks, samplers = [plan.chunks[i] for i in asking], [rows[i] for i in asking]
            sampled = sample(logits, samplers, [c.start + c.count for c in chunks])
            for chunk, row, token, entry in zip(chunks, samplers, sampled.tokens, sampled.logprobs, strict=True):
                if token is None:
                    failed[chunk.id] = "the model's logits were not finite, or every token was ruled out"
                    continue
                row.last = token
                tokens[chunk.id] = [token]
                if entry is not None:
                    logprobs[chunk.id] = [entry]
        stats = StepStats(step=plan.step, device_seconds=time.perf_counter() - began)
        return StepResult(plan.step, tokens, {}, logprobs, prompt_logprobs, failed, stats)

    def _prompt_logprobs(
        self,
        chunks: Sequence[Chunk],
        rows: Sequence[Row],
        tokens: Sequence[Sequence[int]],
        hidden: torch.Tensor,
        ends: torch.Tensor,
    ) -> dict[str, list[TopLogprobs]]:
        """Entries for prompt positions ``max(1, start) .. min(start + count, prompt_len) - 1`` of each asking chunk.

        A position is judged by the hidden state before it: the first one's came with the chunk before.
        """
        out = {}
        for i, (chunk, row) in enumerate(zip(chunks, rows, strict=True)):
            count = chunk.params.prompt_logprobs
            if count is None or chunk.start >= chunk.prompt_len:
                continue
            own = hidden[int(ends[i]) - chunk.count : int(ends[i])]
            sources = own if row.before is None else torch.cat((row.before, own))
            targets = tokens[i] if row.before is not None else tokens[i][1:]
            targets = targets[: chunk.prompt_len - max(chunk.start, 1)]
            row.before = own[-1:].clone()
            out[chunk.id] = self._judge(sources, targets, count)
        return out

    def _judge(self, sources: torch.Tensor, targets: Sequence[int], count: int) -> list[TopLogprobs]:
        entries = []
        for first in range(0, len(targets), PROMPT_LOGITS_SLICE):
            part = targets[first : first + PROMPT_LOGITS_SLICE]
            logits = self.model.logits(sources[first : first + len(part)])
            entries += top_logprobs(logits, part, [count] * len(part))
        return entries


def _decodes(chunk: Chunk) -> bool:
    """One position, whose logits alone are needed."""
    return (
        chunk.count == 1 and chunk.sample and (chunk.params.prompt_logprobs is None or chunk.start >= chunk.prompt_len)
    )
