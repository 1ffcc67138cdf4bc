"""Ourselves, through the public API: ``LLM(model, quantization=...)`` in the interpreter that runs the harness.

The worker runs from the harness's own environment. A width that this build lacks (no ``quantization`` option yet) is
told as such, and the run goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rivals.rival import Places, Session, Timed, Unavailable, Width, versions
from rivals.scenarios import MAX_POSITIONS, MAX_REQUESTS

if TYPE_CHECKING:
    from tuili import LLM


class Engine:
    name = "tuili"
    widths = (Width("bf16", 16, "16 bit"), Width("int8", 8.03, "8 bit"), Width("int4", 4.5, "4 bit"))

    def install(self, places: Places) -> dict[str, str]:
        return versions(Path(sys.executable), ("tuili", "torch"))

    def convert(self, shape: str, width: str, places: Places) -> Path:
        from tuili.base.config import options

        if width != "bf16" and "quantization" not in {item.name for item in options()}:
            raise Unavailable("this build of Tuili has no --quantization")
        return places.checkpoint(shape)

    def launch(self, places: Places, threads: int) -> tuple[Path, dict[str, str]]:
        return Path(sys.executable), {}

    def load(self, model: Path, width: str, threads: int) -> Session:
        from tuili import LLM

        chosen: dict[str, Any] = {} if width == "bf16" else {"quantization": width}
        blocks = -(-MAX_POSITIONS // 16)
        llm = LLM(str(model), threads=threads, max_num_seqs=MAX_REQUESTS, num_gpu_blocks_override=blocks, **chosen)
        return _Session(llm)


class _Session:
    def __init__(self, llm: LLM):
        self.llm = llm

    def generate(self, prompts: Sequence[list[int]], new: int) -> list[list[Timed]]:
        """The loop of ``LLM.generate``, with a clock in it: the engine's updates are the moments a caller sees."""
        from tuili import SamplingParams

        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        began = time.perf_counter()
        engine = self.llm.engine.client.engine
        rows: dict[str, list[Timed]] = {}
        for index, prompt in enumerate(prompts):
            for request in self.llm.engine.prepare(prompt, params, f"{began}-{index}", 0):
                engine.add(request)
                rows[request.id] = []
        while engine.has_work:
            updates = engine.step()
            now = time.perf_counter() - began
            for update in updates:
                rows[update.id] += [(int(token), now) for token in update.tokens]
        return list(rows.values())
