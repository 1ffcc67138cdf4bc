"""Small tokenizers of every kind, and engines over the simulator, for the tests of floor 7."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tuili.base.clock import VirtualClock
from tuili.base.config import Config
from tuili.core.executor import Capacity
from tuili.core.plan import StepPlan, StepResult
from tuili.core.policies import policies
from tuili.core.scheduler import Scheduler
from tuili.engine.admission import Bounds
from tuili.engine.client import ThreadClient
from tuili.engine.engine import Engine
from tuili.engine.text import TextEngine
from tuili.engine.tokenizer import Tokenizer
from tuili.executors.simulated import LinearCost, SimExecutor

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 3 o'clock, isn't it?",
    "你好，世界。推理引擎让大模型更便宜。日本語のテキストも。",
    "Emoji 🙂🙃 family 👨‍👩‍👧‍👦 flags 🇩🇪🇨🇳 skin 👍🏽 done.",
    "Combining: e\u0301 a\u0308 n\u0303; Ελληνικά, русский, עברית, हिन्दी, ไทย.",
    "code:\n\tfor i in range(10):\n\t\tprint(i)  # trailing  \n\n",
]
SPECIALS = ("<|end|>", "<|start|>")


@cache
def byte_level() -> Tokenizer:
    """GPT-2's kind, with special and ordinary added tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([AddedToken("<tool call>", normalized=False), AddedToken("é♥", normalized=False)])
    return Tokenizer(backend, {"eos_token": SPECIALS[0]})


@cache
def sentencepiece() -> Tokenizer:
    """Llama 2's kind: a mark for spaces, bytes for what is not in the vocabulary, a space before the text."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz.,!?'", "你", "好"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("i", "n"), ("▁", "▁")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *("".join(m) for m in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True})


@cache
def metaspace() -> Tokenizer:
    backend = Backend(models.BPE({t: i for i, t in enumerate(["<s>", "▁", *"abcdeé你"])}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


@cache
def words() -> Tokenizer:
    """No decoder at all: tokens are joined by spaces."""
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "one": 2, "two": 3, "<unk>": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
    "words": words,
}


class SlowExecutor:
    """Wraps an executor: ``before(plan)`` runs first, and may sleep or raise."""

    def __init__(self, inner: SimExecutor, before: Callable[[StepPlan], object]):
        self.inner = inner
        self.before = before
        self.capacity = inner.capacity
        self.closed = False

    def execute(self, plan: StepPlan) -> Future[StepResult]:
        self.before(plan)
        return self.inner.execute(plan)

    def close(self) -> None:
        self.closed = True
        self.inner.close()


def engine(
    *,
    tokens: Callable[[str, list[int]], int] | None = None,
    before: Callable[[StepPlan], object] = lambda plan: None,
    blocks: int = 256,
    block_size: int = 4,
    max_model_len: int = 200,
    seqs: int = 16,
    budget: int = 64,
    depth: int = 1,
    max_queued: int | None = None,
    vocab: int = 400,
    **simulator: Any,
) -> Engine:
    capacity = Capacity(blocks, block_size, max_model_len)
    clock = VirtualClock()
    executor = SimExecutor(capacity, LinearCost(0.01), clock, tokens, vocab_size=vocab, **simulator)
    scheduler = Scheduler(
        capacity,
        policies.get("fcfs")(),
        max_num_batched_tokens=budget,
        max_num_seqs=seqs,
        enable_prefix_caching=True,
        clock=clock,
        max_queued=max_queued,
    )
    return Engine(scheduler, SlowExecutor(executor, before), clock, depth)


def text_engine(tokenizer: Tokenizer, run: Engine, **limits: Any) -> TextEngine:
    values = {
        "max_model_len": run.executor.capacity.max_model_len,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_ids": () if tokenizer.eos is None else (tokenizer.eos,),
    }
    return TextEngine(ThreadClient(run), tokenizer, Config(served_model_name="sim"), Bounds(**{**values, **limits}))


def wait_idle(text: TextEngine, seconds: float = 5.0) -> None:
    """Until the engine holds no request and no block; fails when it does not come to that."""
    end = time.monotonic() + seconds
    while (now := text.snapshot()).num_running or now.num_waiting or now.kv_blocks_used:
        assert time.monotonic() < end, now
        time.sleep(0.002)


def speaker(script: dict[str, list[int]], prompt_len: dict[str, int] | int) -> Callable[[str, list[int]], int]:
    """A model that says ``script[id]`` (also found without a choice's number), then repeats its last token."""

    def next_token(id: str, history: list[int]) -> int:
        key = id if id in script else id.rsplit("-", 1)[0]
        start = prompt_len if isinstance(prompt_len, int) else prompt_len[key]
        line = script[key]
        return line[min(len(history) - start, len(line) - 1)]

    return next_token
