"""ik_llama.cpp, a fork of llama.cpp with other kernels for quantized weights, built natively from its public source.

Driven like llama.cpp, through ``ikllama.cpp``. Its flag ``-rtr`` repacks the weights while they are loaded: each width
runs with and without. Its GGUF files are made from llama.cpp's in bf16, by its own quantizer.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_uint32, c_void_p
from pathlib import Path

from rivals.batched import Batched, Context, Entry, greedy
from rivals.llamacpp import ENVIRONMENT, build, quantized
from rivals.rival import Places, Session, Unavailable, Width, shell

REPOSITORY = "https://github.com/ikawrakow/ik_llama.cpp"
COMMIT = "8337e4cd3861406fc04e0854b1409cd1b027fbc9"
#: Attention for every pair of types of KV would take hours to compile; the default types are all that runs here.
OPTIONS = ("-DGGML_IQK_FA_ALL_QUANTS=OFF",)
REPACKED = "-rtr"
#: Restype and argtypes of the functions in ikllama.cpp.
FUNCTIONS = {
    "load": (c_void_p, [c_char_p, c_bool]),
    "vocab": (c_int32, [c_void_p]),
    "context": (c_void_p, [c_void_p, c_uint32, c_uint32, c_uint32]),
    "size": (c_uint32, [c_void_p]),
    "clear": (None, [c_void_p]),
    "cut": (None, [c_void_p, c_int32, c_int32]),
    "decode": (c_int32, [c_void_p, POINTER(c_int32), c_int32]),
    "scores": (POINTER(c_float), [c_void_p, c_int32]),
    "quantize": (c_uint32, [c_char_p, c_char_p, c_int32]),
}


class Engine:
    name = "ik_llama.cpp"
    widths = tuple(
        Width(f"{name}{repacked}", bits, group)
        for name, bits, group in (
            ("bf16", 16, "16 bit"),
            ("q8_0", 8.5, "8 bit"),
            ("q4_0", 4.5, "4 bit"),
            ("q4_k_m", 4.85, "4 bit"),
        )
        for repacked in ("", REPACKED)
    )

    def install(self, places: Places) -> dict[str, str]:
        ENVIRONMENT.make(places)
        source, made, log = fetch(places), folder(places) / "build", places.log("install-ikllama")
        if not list(made.rglob("libllama.so")):
            build(source, made, OPTIONS, log)
        connect(source, made, library(places), log)
        return {"ik_llama.cpp": (source / "COMMIT").read_text().strip()}

    def convert(self, shape: str, width: str, places: Places) -> Path:
        return quantized(shape, width.removesuffix(REPACKED), "ikllama", quantize, places, self.launch(places, 2))

    def launch(self, places: Places, threads: int) -> tuple[Path, dict[str, str]]:
        return places.python(ENVIRONMENT.name), {"RIVALS_IK": str(library(places))}

    def load(self, model: Path, width: str, threads: int) -> Session:
        return Batched(_Model(model, width.endswith(REPACKED), threads).context)


def folder(places: Places) -> Path:
    return places.root / "ik_llama.cpp"


def library(places: Places) -> Path:
    return folder(places) / "librival.so"


def fetch(places: Places) -> Path:
    """The source, and in a file ``COMMIT`` which one it is: one that was put there by hand is taken as it is."""
    source, log = folder(places) / "source", places.log("install-ikllama")
    if not (source / "COMMIT").exists():
        try:
            shell(["git", "init", source], log)
            shell(["git", "-C", source, "fetch", "--depth", "1", REPOSITORY, COMMIT], log)
            shell(["git", "-C", source, "checkout", "--force", "FETCH_HEAD"], log)
        except OSError as error:
            raise Unavailable(f"no git to get the source of ik_llama.cpp with: {error}") from error
        (source / "COMMIT").write_text(COMMIT)
    return source


def connect(source: Path, made: Path, target: Path, log: Path) -> None:
    """``ikllama.cpp`` as a library, linked with ik_llama.cpp's; newer sources are compiled again."""
    code, llama = Path(__file__).with_suffix(".cpp"), next(made.rglob("libllama.so"))
    if target.exists() and target.stat().st_mtime > max(code.stat().st_mtime, llama.stat().st_mtime):
        return
    include = [f"-I{source / part}" for part in ("include", "ggml/include")]
    ggml = next(made.rglob("libggml.so"))
    paths = [f"-Wl,-rpath,{each.parent.resolve()}" for each in (llama, ggml)]
    shell(["c++", "-O2", "-std=c++17", "-shared", "-fPIC", *include, code, llama, ggml, *paths, "-o", target], log)


def bindings() -> ctypes.CDLL:
    c = ctypes.CDLL(os.environ["RIVALS_IK"])
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(c, f"ik_{name}")
        function.restype, function.argtypes = result, arguments
    return c


class _Model:
    def __init__(self, path: Path, repack: bool, threads: int):
        self.c, self.threads = bindings(), threads
        self.handle = self.c.ik_load(str(path).encode(), repack)
        if not self.handle:
            raise OSError(f"ik_llama.cpp loads no {path}")
        self.vocab = int(self.c.ik_vocab(self.handle))

    def context(self, positions: int, sequences: int) -> Context:
        return _Context(self, positions, sequences)


class _Context(Context):
    def __init__(self, model: _Model, positions: int, sequences: int):
        super().__init__()
        self.c, self.vocab = model.c, model.vocab
        self.handle = self.c.ik_context(model.handle, positions, sequences, model.threads)
        if not self.handle:
            raise MemoryError(f"ik_llama.cpp made no context of {positions} positions")
        self.size = int(self.c.ik_size(self.handle))

    def clear(self) -> None:
        self.c.ik_clear(self.handle)

    def cut(self, sequence: int, start: int) -> None:
        self.c.ik_cut(self.handle, sequence, start)

    def decode(self, entries: Sequence[Entry]) -> list[int]:
        numbers = [int(value) for entry in entries for value in entry]
        if code := self.c.ik_decode(self.handle, (c_int32 * len(numbers))(*numbers), len(entries)):
            raise RuntimeError(f"llama_decode returned {code}")
        wanted = [at for at, entry in enumerate(entries) if entry[3]]
        return [greedy(self.c.ik_scores(self.handle, at), self.vocab) for at in wanted]


def quantize(source: str, target: str, ftype: str) -> None:
    """Another width of a GGUF file, by ik_llama.cpp itself."""
    if bindings().ik_quantize(source.encode(), target.encode(), int(ftype)):
        raise SystemExit(f"ik_llama.cpp could not quantize {source}")
