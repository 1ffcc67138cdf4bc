"""Plans run in this process, one after the other."""

from __future__ import annotations

from concurrent.futures import Future

from tuili.core.executor import Capacity
from tuili.core.plan import StepPlan, StepResult
from tuili.layers.decoder import Decoder
from tuili.runtime.kvstore import CODES, KVStore
from tuili.runtime.runner import ModelRunner


class LocalExecutor:
    """A ``ModelRunner`` on this machine. ``execute`` returns when the step is done."""

    def __init__(
        self,
        model: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        enforce_eager: bool = False,
        kv_cache_dtype: str = "auto",
    ):
        spec = model.spec
        dtype = CODES.get(kv_cache_dtype, model.dtype)
        kv = KVStore(spec.num_layers, num_blocks, block_size, spec.num_kv_heads, spec.head_dim, dtype)
        self.capacity = Capacity(num_blocks, block_size, max_model_len)
        self.runner = ModelRunner(model, kv, max_num_seqs, max_model_len, enforce_eager=enforce_eager)

    def execute(self, plan: StepPlan) -> Future[StepResult]:
        """The plan's result, or its exception, in a finished future."""
        future: Future[StepResult] = Future()
        try:
            future.set_result(self.runner.run(plan))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Give the model's and the KV pool's memory back."""
        del self.runner
