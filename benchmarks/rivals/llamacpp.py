"""llama.cpp, from the sdist of llama-cpp-python (library, converter and C bindings in one archive), built natively.

The worker drives ``llama_decode`` through those ctypes bindings: many sequences in a batch, which the package's own
``Llama`` class cannot, and no work per token beyond an argmax.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rivals.batched import Batched, Context, Entry, greedy
from rivals.export import EXPORT
from rivals.rival import Environment, Places, Session, Unavailable, Width, call, shell

ENVIRONMENT = Environment("llamacpp", ("numpy", "typing_extensions"))
UNWANTED = ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_TOOLS", "BUILD_SERVER", "BUILD_EXAMPLES")
#: llama_ftype of each width; bf16 is what the converter writes.
FTYPES = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15}


class Engine:
    name = "llama.cpp"
    widths = (
        Width("bf16", 16, "16 bit"),
        Width("q8_0", 8.5, "8 bit"),
        Width("q4_0", 4.5, "4 bit"),
        Width("q4_k_m", 4.85, "4 bit"),
    )

    def install(self, places: Places) -> dict[str, str]:
        ENVIRONMENT.make(places)
        source = unpack(places)
        if not (libraries(places) / "libllama.so").exists():
            folder = places.root / "llamacpp" / "build"
            build(source / "vendor" / "llama.cpp", folder, (), places.log("install-llamacpp"))
        return {"llama-cpp-python": source.name.removeprefix("llama_cpp_python-")}

    def convert(self, shape: str, width: str, places: Places) -> Path:
        return quantized(shape, width, "llamacpp", quantize, places, self.launch(places, 2))

    def launch(self, places: Places, threads: int) -> tuple[Path, dict[str, str]]:
        return places.python(ENVIRONMENT.name), {
            "LLAMA_CPP_LIB_PATH": str(libraries(places)),
            "RIVALS_BINDINGS": str(unpack(places) / "llama_cpp"),
        }

    def load(self, model: Path, width: str, threads: int) -> Session:
        return Batched(_Model(model, threads).context)


def unrounded(shape: str, places: Places) -> Path:
    """A checkpoint as GGUF in bf16."""
    made = places.converted(shape, "llamacpp", "bf16") / "model.gguf"
    if not made.exists():
        converter, python = unpack(places) / "vendor" / "llama.cpp", EXPORT.make(places)
        log = places.log(f"convert-{shape}-llamacpp-bf16")
        whole(made, lambda target: call(python, to_gguf, [converter, places.checkpoint(shape), target], log))
    return made


def quantized(
    shape: str,
    width: str,
    folder: str,
    quantizer: Callable[[str, str, str], None],
    places: Places,
    launch: tuple[Path, dict[str, str]],
) -> Path:
    """The file of ``width``, made from the one in bf16 by an engine's own ``quantizer``, which runs as ``launch``."""
    first = unrounded(shape, places)
    if width == "bf16":
        return first
    made = places.converted(shape, folder, width) / "model.gguf"
    if not made.exists():
        python, env = launch
        log = places.log(f"convert-{shape}-{folder}-{width}")
        whole(made, lambda target: call(python, quantizer, [first, target, FTYPES[width]], log, env))
    return made


def whole(file: Path, write: Callable[[Path], None]) -> None:
    """Have ``file`` written under another name first, so that one that is there is whole."""
    part = file.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    write(part)
    part.rename(file)


def libraries(places: Places) -> Path:
    return places.root / "llamacpp" / "build" / "bin"


def unpack(places: Places) -> Path:
    """The sdist's folder, downloaded through pip where it is not there yet."""
    folder = places.root / "llamacpp"
    if not list(folder.glob("llama_cpp_python-*/llama_cpp")):
        log = places.log("install-llamacpp")
        shell(
            [ENVIRONMENT.make(places), "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python",
             "-d", folder, "llama-cpp-python"],
            log,
        )  # fmt: skip
        archive = next(folder.glob("llama_cpp_python-*.tar.gz"))
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
    return next(folder.glob("llama_cpp_python-*/llama_cpp")).parent


def build(source: Path, folder: Path, options: Sequence[str], log: Path) -> None:
    """The shared libraries alone, for this machine's instructions, at low priority: it takes many CPU minutes."""
    if not (shutil.which("cmake") and shutil.which("c++")):
        raise Unavailable("no cmake and C++ compiler to build it with")
    off = [f"-DLLAMA_{name}=OFF" for name in UNWANTED]
    shell(["cmake", "-S", source, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON",
           "-DBUILD_SHARED_LIBS=ON", *off, *options], log)  # fmt: skip
    shell(["nice", "-n", "10", "cmake", "--build", folder, "-j2", "--target", "llama"], log)


def bindings() -> Any:
    """The sdist's ``llama_cpp.llama_cpp`` without its package's other modules, which want more dependencies."""
    package = types.ModuleType("llama_cpp")
    package.__path__ = [os.environ["RIVALS_BINDINGS"]]
    sys.modules["llama_cpp"] = package
    from llama_cpp import llama_cpp

    return llama_cpp


class _Model:
    def __init__(self, path: Path, threads: int):
        self.c, self.threads = bindings(), threads
        self.c.llama_backend_init()
        self.handle = self.c.llama_model_load_from_file(str(path).encode(), self.c.llama_model_default_params())
        self.vocab = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self.handle))

    def context(self, positions: int, sequences: int) -> Context:
        return _Context(self, positions, sequences)


class _Context(Context):
    def __init__(self, model: _Model, positions: int, sequences: int):
        super().__init__()
        c = self.c = model.c
        params = c.llama_context_default_params()
        params.n_ctx, params.n_seq_max = positions, sequences
        params.n_threads = params.n_threads_batch = model.threads
        self.size = int(params.n_batch)
        self.handle = c.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise MemoryError(f"llama.cpp made no context of {positions} positions")
        self.memory = c.llama_get_memory(self.handle)
        self.batch = c.llama_batch_init(self.size, 0, 1)
        self.vocab = model.vocab

    def clear(self) -> None:
        self.c.llama_memory_clear(self.memory, False)

    def cut(self, sequence: int, start: int) -> None:
        self.c.llama_memory_seq_rm(self.memory, sequence, start, -1)

    def decode(self, entries: Sequence[Entry]) -> list[int]:
        batch = self.batch
        batch.n_tokens = len(entries)
        for at, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = wanted
        if code := self.c.llama_decode(self.handle, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        scores = self.c.llama_get_logits_ith
        return [greedy(scores(self.handle, at), self.vocab) for at, (*_, wanted) in enumerate(entries) if wanted]


def to_gguf(converter: str, checkpoint: str, target: str) -> None:
    """Checkpoint to GGUF in bf16, in the environment for conversions. llama.cpp's converter knows tokenizers by a hash
    and refuses others; ours are made up, and prompts are ids anyway."""
    sys.path[:0] = [converter, f"{converter}/gguf-py"]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert", checkpoint, "--outfile", target, "--outtype", "bf16"]
    convert_hf_to_gguf.main()


def quantize(source: str, target: str, ftype: str) -> None:
    """Another width of a GGUF file, by llama.cpp itself."""
    c = bindings()
    params = c.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(ftype), 1
    if c.llama_model_quantize(source.encode(), target.encode(), params):
        raise SystemExit(f"llama.cpp could not quantize {source}")
