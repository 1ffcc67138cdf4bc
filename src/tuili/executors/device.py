"""Plans run on a device, several in flight: ``execute`` returns when the work is submitted."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from tuili.core.executor import Capacity
from tuili.core.plan import StepPlan, StepResult
from tuili.layers.decoder import Decoder
from tuili.runtime.device import Device
from tuili.runtime.device_graphs import Progress
from tuili.runtime.device_runner import DeviceRunner
from tuili.runtime.kvstore import CODES, KVStore


class DeviceExecutor:
    """A ``DeviceRunner`` and its KV pool on ``device``, where ``model`` is; for ``Engine(depth=2)``.

    ``capture_sizes``: numbers of rows of the decode steps that are captured now, smaller ones being padded; none:
    every step is eager. One block more than ``num_blocks`` is allocated, for the padding.
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
        capture_sizes: Sequence[int],
        kv_cache_dtype: str = "auto",
        progress: Progress | None = None,
    ):
        spec, dtype = model.spec, CODES.get(kv_cache_dtype, model.dtype)
        sizes = (spec.num_layers, num_blocks + 1, block_size, spec.num_kv_heads, spec.head_dim)
        kv = KVStore(*sizes, dtype, device.torch_device)
        self.capacity = Capacity(num_blocks, block_size, max_model_len)
        self.runner = DeviceRunner(model, kv, device, max_num_seqs, max_model_len, capture_sizes, progress=progress)

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
