"""OpenVINO GenAI: its continuous batching pipeline, stepped by us, so that the time of every token is seen.

Checkpoints are exported by optimum-intel: fp16 (computed in bf16 where the CPU has it), int8, and int4 with that
tool's default groups. The scheduler gets room for a whole prompt in a step, as its single-user pipeline has it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rivals.export import EXPORT
from rivals.rival import Environment, Places, Session, Timed, Width, shell, versions
from rivals.scenarios import MAX_REQUESTS
from rivals.shapes import SHAPES

ENVIRONMENT = Environment("openvino", ("openvino-genai",))
GIB = 1
#: Weights per scale that the exporter takes for int4 by default; it refuses rows that this does not divide.
GROUP = 128


class Engine:
    name = "openvino"
    widths = (Width("fp16", 16, "16 bit"), Width("int8", 8.03, "8 bit"), Width("int4", 4.25, "4 bit"))

    def install(self, places: Places) -> dict[str, str]:
        return versions(ENVIRONMENT.make(places), ("openvino-genai", "openvino"))

    def convert(self, shape: str, width: str, places: Places) -> Path:
        made = places.converted(shape, "openvino", width)
        if (made / ".done").exists():
            return made
        shutil.rmtree(made, ignore_errors=True)
        python = EXPORT.make(places)
        command: list[str | Path] = [
            python.with_name("optimum-cli"),
            "export",
            "openvino",
            "--model",
            places.checkpoint(shape),
        ]
        command += ["--task", "text-generation-with-past", "--weight-format", width]
        if width == "int4" and (SHAPES[shape].hidden % GROUP or SHAPES[shape].ffn % GROUP):
            command += ["--group-size", "32"]
        command += [made]
        shell([python, *command], places.log(f"convert-{shape}-openvino-{width}"), {"HF_HUB_OFFLINE": "1"})
        (made / ".done").touch()
        return made

    def launch(self, places: Places, threads: int) -> tuple[Path, dict[str, str]]:
        return places.python(ENVIRONMENT.name), {}

    def load(self, model: Path, width: str, threads: int) -> Session:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = GIB
        scheduler.max_num_seqs = MAX_REQUESTS
        scheduler.max_num_batched_tokens = MAX_REQUESTS * 128
        scheduler.enable_prefix_caching = True
        pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(model), scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        return _Session(pipeline)


class _Session:
    def __init__(self, pipeline: Any):
        self.pipeline, self.next = pipeline, 0

    def generate(self, prompts: Sequence[list[int]], new: int) -> list[list[Timed]]:
        import numpy
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        began = time.perf_counter()
        handles = []
        for prompt in prompts:
            tensor = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
            handles.append(self.pipeline.add_request(self.next, tensor, config))
            self.next += 1
        rows: list[list[Timed]] = [[] for _ in prompts]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            now = time.perf_counter() - began
            for row, handle in zip(rows, handles, strict=True):
                while handle.can_read():
                    row += [(int(id), now) for out in handle.read().values() for id in out.generated_ids]
        return rows
