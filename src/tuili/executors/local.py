"""Plans run in this process, on a device of this machine: several in flight where the device lets the host go on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from tuili.core.executor import Capacity
from tuili.core.plan import StepPlan, StepResult
from tuili.layers.decoder import Decoder
from tuili.layers.kvspec import kv_specs
from tuili.runtime.captured.graphs import GraphSteps, Progress
from tuili.runtime.captured.native import NativeSteps
from tuili.runtime.device import Device
from tuili.runtime.kvstore import KVStore
from tuili.runtime.runner import Capture, Runner


class LocalExecutor:
    """A ``Runner`` and its KV pool on ``device``, where ``model`` is.

    Decode steps are captured unless ``enforce_eager``: those of C++ kernels in any size, as they come; a card's now, in
    ``capture_sizes`` rows, smaller ones being padded (none: every step is eager). Where steps may be padded, one block
    more than ``num_blocks`` is allocated.
    """

    def __init__(
        self,
        model: Decoder,
        device: Device,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        enforce_eager: bool = False,
        capture_sizes: Sequence[int] = (),
        kv_cache_dtype: str = "auto",
        progress: Progress | None = None,
    ):
        dtype = str(model.dtype).removeprefix("torch.") if kv_cache_dtype == "auto" else kv_cache_dtype
        kv = KVStore(kv_specs(model.spec, dtype), num_blocks + (not device.is_host), block_size, device)
        self.capacity = Capacity(num_blocks, block_size, max_model_len)
        capture: Capture | None = None
        if device.is_host and model.kernels.backend == "cpu" and not enforce_eager:
            capture = NativeSteps
        elif capture_sizes and not enforce_eager:
            capture = partial(GraphSteps, shapes=[(size, 1) for size in capture_sizes], progress=progress)
        self.runner = Runner(model, kv, device, max_num_seqs, max_model_len, capture)

    def execute(self, plan: StepPlan) -> Future[StepResult]:
        """The plan's result, or its exception, in a future whose ``result`` waits for the device."""
        try:
            return self.runner.submit(plan)
        except Exception as error:
            failed: Future[StepResult] = Future()
            failed.set_exception(error)
            return failed

    def close(self) -> None:
        """Wait for the device, and give the model's and the KV pool's memory back."""
        self.runner.close()
        del self.runner
