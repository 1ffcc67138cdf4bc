"""The pieces of gpu-check in the order of their weight: what there is no time for is left out from the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from gpu import alone, matrix, operations, peaks, rival, speed
from gpu.place import Place
from gpu.shapes import Arm
from tuili.quant.scheme import Scheme, scheme_of

#: Processes that check ops beside each other: compiling hundreds of kernels takes longer than running them.
SHARDS = 10

ARMS = {
    "8b-bf16": Arm("Llama-3.1-8B", "bf16", None, "bfloat16"),
    "8b-w4a16": Arm("Llama-3.1-8B", "W4A16 g128", scheme_of("int4_weight_only", 128), "bfloat16"),
    "8b-fp8": Arm("Llama-3.1-8B", "FP8", Scheme("fp8"), "float8"),
    "8b-w8a8": Arm("Llama-3.1-8B", "W8A8", Scheme("int8"), "int8"),
    "0.6b-bf16": Arm("Qwen3-0.6B", "bf16", None, "bfloat16"),
}


@dataclass(frozen=True)
class Piece:
    """``seconds``: what it takes at most on an H200, the process's start included. Pieces of a ``stage`` run beside
    each other: only those that time nothing share one. ``model``: of arm ``name``."""

    name: str
    run: Callable[[Place], None]
    seconds: float
    stage: str = ""
    arm: Arm | None = None


def _speed(name: str, seconds: float) -> Piece:
    return Piece(name, partial(speed.run, arm=ARMS[name]), seconds, arm=ARMS[name])


def _long(name: str, seconds: float) -> Piece:
    return Piece(f"{name}-long", partial(speed.run_long, arm=ARMS[name]), seconds, arm=ARMS[name])


PIECES = [
    *(Piece(f"ops-{i}", partial(operations.run, shard=i, shards=SHARDS), 150, "checks") for i in range(SHARDS)),
    Piece("matrix", matrix.run, 150, "checks"),
    Piece("peaks", peaks.run, 25),
    _speed("8b-bf16", 70),
    _speed("8b-w4a16", 60),
    _speed("8b-fp8", 60),
    Piece("transformers-continuous", rival.continuous, 100),
    _long("8b-bf16", 80),
    Piece("attention", alone.attention, 40),
    _speed("8b-w8a8", 60),
    _speed("0.6b-bf16", 50),
    Piece("products", alone.products, 60),
    _long("8b-fp8", 80),
    _long("8b-w4a16", 80),
    _long("8b-w8a8", 80),
    _long("0.6b-bf16", 50),
    Piece("transformers-static", rival.static, 90),
]
