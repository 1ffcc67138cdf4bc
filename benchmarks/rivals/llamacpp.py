"""llama.cpp, from the sdist of llama-cpp-python (library, converter and C bindings in one archive), built natively.

The worker drives ``llama_decode`` through those ctypes bindings: many sequences in a batch, which the package's own
``Llama`` class cannot, and no work per token beyond an argmax. Key and value caches of the last prompts are kept.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rivals.export import EXPORT
from rivals.rival import Environment, Places, Session, Timed, Unavailable, Width, call, shell
from rivals.scenarios import MAX_LENGTH, MAX_POSITIONS, MAX_REQUESTS

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
            build(source, places)
        return {"llama-cpp-python": source.name.removeprefix("llama_cpp_python-")}

    def convert(self, shape: str, width: str, places: Places) -> Path:
        first = places.converted(shape, "llamacpp", "bf16") / "model.gguf"
        made = places.converted(shape, "llamacpp", width) / "model.gguf"
        log = places.log(f"convert-{shape}-llamacpp-{width}")
        if not first.exists():
            first.parent.mkdir(parents=True, exist_ok=True)
            converter = unpack(places) / "vendor" / "llama.cpp"
            call(EXPORT.make(places), to_gguf, [converter, places.checkpoint(shape), part(first)], log)
            part(first).rename(first)
        if not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            python, env = self.launch(places, 2)
            call(python, quantize, [first, part(made), FTYPES[width]], log, env)
            part(made).rename(made)
        return made

    def launch(self, places: Places, threads: int) -> tuple[Path, dict[str, str]]:
        return places.python(ENVIRONMENT.name), {
            "LLAMA_CPP_LIB_PATH": str(libraries(places)),
            "RIVALS_BINDINGS": str(unpack(places) / "llama_cpp"),
        }

    def load(self, model: Path, width: str, threads: int) -> Session:
        return _Session(model, threads)


def part(file: Path) -> Path:
    """Where a file is written, so that one that is there is whole."""
    return file.with_suffix(".part")


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


def build(source: Path, places: Places) -> None:
    """The shared libraries alone, for this machine's instructions, at low priority: it takes many CPU minutes."""
    if not (shutil.which("cmake") and shutil.which("c++")):
        raise Unavailable("no cmake and C++ compiler to build llama.cpp with")
    log, folder = places.log("install-llamacpp"), places.root / "llamacpp" / "build"
    off = [f"-DLLAMA_{name}=OFF" for name in UNWANTED]
    shell(["cmake", "-S", source / "vendor" / "llama.cpp", "-B", folder, "-DCMAKE_BUILD_TYPE=Release",
           "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=ON", *off], log)  # fmt: skip
    shell(["nice", "-n", "10", "cmake", "--build", folder, "-j2", "--target", "llama"], log)


def bindings() -> Any:
    """The sdist's ``llama_cpp.llama_cpp`` without its package's other modules, which want more dependencies."""
    package = types.ModuleType("llama_cpp")
    package.__path__ = [os.environ["RIVALS_BINDINGS"]]
    sys.modules["llama_cpp"] = package
    from llama_cpp import llama_cpp

    return llama_cpp


class _Session:
    def __init__(self, model: Path, threads: int):
        self.c, self.threads = bindings(), threads
        self.c.llama_backend_init()
        self.model = self.c.llama_model_load_from_file(str(model).encode(), self.c.llama_model_default_params())
        self.vocab = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self.model))
        self.contexts: dict[bool, _Context] = {}

    def generate(self, prompts: Sequence[list[int]], new: int) -> list[list[Timed]]:
        alone = len(prompts) == 1
        if alone not in self.contexts:
            self.contexts[alone] = _Context(self, MAX_LENGTH if alone else MAX_POSITIONS, 1 if alone else MAX_REQUESTS)
        return self.contexts[alone].generate(list(prompts), new)


class _Context:
    """Positions are split evenly among the sequences of a context: one for a long prompt, another for many requests."""

    def __init__(self, session: _Session, positions: int, sequences: int):
        c = self.c = session.c
        params = c.llama_context_default_params()
        params.n_ctx, params.n_seq_max = positions, sequences
        params.n_threads = params.n_threads_batch = session.threads
        self.size = int(params.n_batch)
        self.handle = c.llama_init_from_model(session.model, params)
        if not self.handle:
            raise MemoryError(f"llama.cpp made no context of {positions} positions")
        self.memory = c.llama_get_memory(self.handle)
        self.batch = c.llama_batch_init(self.size, 0, 1)
        self.vocab = session.vocab
        self.prompts: list[list[int]] = []

    def generate(self, prompts: list[list[int]], new: int) -> list[list[Timed]]:
        began = time.perf_counter()
        rows: list[list[Timed]] = [[] for _ in prompts]
        tokens = self._prefill(prompts)
        for index in range(new):
            now = time.perf_counter() - began
            for row, token in zip(rows, tokens, strict=True):
                row.append((token, now))
            if index < new - 1:
                entries = [(token, len(prompts[row]) + index, row) for row, token in enumerate(tokens)]
                tokens = self._run(entries, set(range(len(entries))))
        return rows

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        """The first token of each; prompts equal to the last ones are computed again for their last token only."""
        kept = prompts == self.prompts
        if not kept:
            self.c.llama_memory_clear(self.memory, False)
        self.prompts = prompts
        entries = []
        for row, prompt in enumerate(prompts):
            start = len(prompt) - 1 if kept else 0
            self.c.llama_memory_seq_rm(self.memory, row, start, -1)
            entries += [(prompt[position], position, row) for position in range(start, len(prompt))]
        lengths = [len(prompt) - 1 for prompt in prompts]
        return self._run(entries, {at for at, (_, position, row) in enumerate(entries) if position == lengths[row]})

    def _run(self, entries: list[tuple[int, int, int]], wanted: set[int]) -> list[int]:
        """Decode (token, position, sequence) entries, a logical batch at a time; the greedy token of the wanted."""
        batch, tokens = self.batch, []
        for begin in range(0, len(entries), self.size):
            part = entries[begin : begin + self.size]
            batch.n_tokens = len(part)
            for at, (token, position, row) in enumerate(part):
                batch.token[at], batch.pos[at] = token, position
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                batch.logits[at] = begin + at in wanted
            if code := self.c.llama_decode(self.handle, batch):
                raise RuntimeError(f"llama_decode returned {code}")
            tokens += [self._greedy(at) for at in range(len(part)) if begin + at in wanted]
        return tokens

    def _greedy(self, at: int) -> int:
        import numpy

        pointer = self.c.llama_get_logits_ith(self.handle, at)
        return int(numpy.ctypeslib.as_array(pointer, (self.vocab,)).argmax())


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
