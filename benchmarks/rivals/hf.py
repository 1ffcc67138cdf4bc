"""transformers, eager, bf16: what people have without an engine. Also the float32 oracle of first tokens.

Static batches with the default dynamic cache. The key and value cache of the last prompts is kept and cropped, so that
decode scenarios prefill once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rivals.rival import TORCH, Environment, Places, Session, Timed, Width, versions

ENVIRONMENT = Environment("transformers", (TORCH, "transformers", "safetensors", "numpy"))


class Engine:
    name = "transformers"
    widths = (Width("bf16", 16, "16 bit"),)
    #: Loaded for the oracle only: no arm.
    oracle = "f32"

    def install(self, places: Places) -> dict[str, str]:
        return versions(ENVIRONMENT.make(places), ("transformers", "torch"))

    def convert(self, shape: str, width: str, places: Places) -> Path:
        return places.checkpoint(shape)

    def launch(self, places: Places, threads: int) -> tuple[Path, dict[str, str]]:
        return places.python(ENVIRONMENT.name), {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}

    def load(self, model: Path, width: str, threads: int) -> Session:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        dtype = torch.float32 if width == self.oracle else torch.bfloat16
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        return _Session(loaded.eval())


class _Session:
    def __init__(self, model: Any):
        self.model = model
        self.prompts: list[list[int]] = []
        self.cache: Any = None

    def generate(self, prompts: Sequence[list[int]], new: int) -> list[list[Timed]]:
        import torch

        with torch.inference_mode():
            began = time.perf_counter()
            logits = self._prefill(list(prompts), keep=new > 1)
            rows: list[list[Timed]] = [[] for _ in prompts]
            for _ in range(new):
                tokens = logits[:, -1:].argmax(-1)
                now = time.perf_counter() - began
                for row, token in zip(rows, tokens[:, 0].tolist(), strict=True):
                    row.append((token, now))
                if len(rows[0]) < new:
                    logits = self.model(tokens, past_key_values=self.cache, logits_to_keep=1).logits
        return rows

    def _prefill(self, prompts: list[list[int]], keep: bool) -> Any:
        import torch
        from transformers import DynamicCache

        ids = torch.tensor(prompts)
        if keep and prompts == self.prompts:
            self.cache.crop(ids.shape[1] - 1 - self.cache.get_seq_length())
            ids = ids[:, -1:]
        else:
            self.prompts, self.cache = prompts, DynamicCache(config=self.model.config)
        return self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits
