"""ONNX Runtime GenAI: models built by its own builder, static batches through its Generator.

By default it runs on one thread of this kind of machine: the count goes into genai_config.json. There is no bf16 on
CPUs. ``int4`` and ``int8`` quantize activations too (accuracy level 4).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rivals.export import EXPORT
from rivals.rival import Environment, Places, Session, Timed, Width, shell, versions
from rivals.scenarios import MAX_LENGTH

ENVIRONMENT = Environment("ort", ("onnxruntime-genai",))


class Engine:
    name = "onnxruntime"
    widths = (Width("int8", 8.5, "8 bit"), Width("int4", 4.5, "4 bit"))

    def install(self, places: Places) -> dict[str, str]:
        return versions(ENVIRONMENT.make(places), ("onnxruntime-genai", "onnxruntime"))

    def convert(self, shape: str, width: str, places: Places) -> Path:
        made = places.converted(shape, "ort", width)
        if (made / ".done").exists():
            return made
        shutil.rmtree(made, ignore_errors=True)
        log = places.log(f"convert-{shape}-ort-{width}")
        command: list[str | Path] = [
            EXPORT.make(places),
            "-m",
            "onnxruntime_genai.models.builder",
            "-i",
            places.checkpoint(shape),
        ]
        command += ["-o", made, "-p", width, "-e", "cpu", "-c", places.root / "builder-cache"]
        shell(
            [*command, "--extra_options", "int4_accuracy_level=4", "int4_block_size=32"], log, {"HF_HUB_OFFLINE": "1"}
        )
        (made / ".done").touch()
        return made

    def launch(self, places: Places, threads: int) -> tuple[Path, dict[str, str]]:
        return places.python(ENVIRONMENT.name), {}

    def load(self, model: Path, width: str, threads: int) -> Session:
        import onnxruntime_genai

        config = onnxruntime_genai.Config(str(model))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        return _Session(onnxruntime_genai.Model(config))


class _Session:
    def __init__(self, model: Any):
        self.model = model

    def generate(self, prompts: Sequence[list[int]], new: int) -> list[list[Timed]]:
        import numpy
        import onnxruntime_genai

        length = len(prompts[0]) + new
        params = onnxruntime_genai.GeneratorParams(self.model)
        # A minimum length is how it goes on past the end-of-text token.
        params.set_search_options(
            do_sample=False, batch_size=len(prompts), min_length=length, max_length=min(length, MAX_LENGTH)
        )
        began = time.perf_counter()
        generator = onnxruntime_genai.Generator(self.model, params)
        generator.append_tokens(numpy.array(prompts, dtype=numpy.int32))
        rows: list[list[Timed]] = [[] for _ in prompts]
        for _ in range(new):
            generator.generate_next_token()
            now = time.perf_counter() - began
            for row, token in zip(rows, generator.get_next_tokens(), strict=True):
                row.append((int(token), now))
        return rows
