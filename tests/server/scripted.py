"""A server whose model recites a script: the real text engine, loop and scheduler, and an executor without tensors.

Greedy output is ``SCRIPT`` byte by byte (so that emoji and CJK are split over tokens), then the end of text; sampled
output starts ``seed`` tokens later. A prompt with FAIL dies after three tokens; one with DIE takes the engine with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from tuili.base.clock import WallClock
from tuili.base.config import Config
from tuili.core.executor import Capacity
from tuili.core.plan import Chunk, StepPlan, StepResult, StepStats, TopLogprobs
from tuili.core.policies import policies
from tuili.core.scheduler import Scheduler
from tuili.engine.admission import Bounds
from tuili.engine.client import ThreadClient
from tuili.engine.engine import Engine
from tuili.engine.outputs import Finished
from tuili.engine.text import TextEngine
from tuili.engine.tokenizer import Tokenizer
from tuili.server.app import App, create_app
from tuili.server.launch import Server as HttpServer

T = TypeVar("T")
SCRIPT = "Once, 推理 met a 👩‍🚀 in Zürich. «Naïve!» said 世界; the END was near 🎉 and all slept."
SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """Bytes, and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(BPE(vocab={char: id for id, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return Tokenizer(backend, {"eos_token": SPECIAL[0]})


TOKENIZER = make_tokenizer()
LINE = TOKENIZER.encode(SCRIPT, add_special_tokens=False)
END = TOKENIZER.token_id(SPECIAL[0])


class Recital:
    """An executor: ``delay`` seconds per step, waits while ``gate`` is closed."""

    def __init__(self, capacity: Capacity, delay: float = 0.0):
        self.capacity = capacity
        self.delay = delay
        self.gate = threading.Event()
        self.gate.set()
        self.rows: dict[str, list[int]] = {}

    def execute(self, plan: StepPlan) -> Future[StepResult]:
        self.gate.wait(30)
        time.sleep(self.delay)
        for id in plan.dropped:
            del self.rows[id]
        result = StepResult(plan.step, {}, stats=StepStats(device_seconds=self.delay))
        for chunk in plan.chunks:
            self._run(chunk, result)
        done: Future[StepResult] = Future()
        done.set_result(result)
        return done

    def _run(self, chunk: Chunk, result: StepResult) -> None:
        row = self.rows[chunk.id] = [*chunk.history] if chunk.admitted else self.rows[chunk.id]
        row.extend(chunk.tokens)
        k = chunk.params.prompt_logprobs
        if k is not None:
            known = range(chunk.start + 1, min(chunk.start + chunk.count + 1, chunk.prompt_len))
            result.prompt_logprobs[chunk.id] = [logprob(row[i], i, k) for i in known]
        if not chunk.sample:
            return
        place = len(row) - chunk.prompt_len
        prompt = TOKENIZER.decode(row[: chunk.prompt_len])
        if "DIE" in prompt and place >= 2:
            raise RuntimeError("the device is on fire")
        if "FAIL" in prompt and place >= 3:
            result.failed[chunk.id] = "a bad number"
            return
        token = recite(chunk, place)
        result.tokens[chunk.id] = [token]
        if chunk.params.logprobs is not None:
            result.logprobs[chunk.id] = [logprob(token, place, chunk.params.logprobs)]

    def close(self) -> None:
        self.rows.clear()


def recite(chunk: Chunk, place: int) -> int:
    params = chunk.params
    place += 0 if params.greedy else (params.seed or 0) % 7
    if params.ignore_eos or place < len(LINE):
        return LINE[place % len(LINE)]
    assert END is not None
    return END


def logprob(token: int, place: int, k: int) -> TopLogprobs:
    """Made up: every fourth token is only second best, and the last of three or more is impossible."""
    rank = 2 if place % 4 == 3 else 1
    others = [id for id in range(60, 60 + k + 2) if id != token]
    order = [*others[: rank - 1], token, *others[rank - 1 :]][:k]
    top = [(id, -math.inf if n == 2 else -0.25 - n) for n, id in enumerate(order)]
    return TopLogprobs(token, -0.25 - (rank - 1), rank, tuple(top))


def make_engine(delay: float = 0.0, blocks: int = 4096, **options: Any) -> TextEngine:
    options = {"max_model_len": 1024, "max_num_seqs": 64, "max_num_batched_tokens": 512, **options}
    config = Config(model="scripted", block_size=4, num_gpu_blocks_override=blocks, threads=1, **options)
    executor = Recital(Capacity(blocks, config.block_size, config.max_model_len or 0), delay)
    clock = WallClock()
    scheduler = Scheduler(
        executor.capacity,
        policies.get(config.scheduling_policy)(),
        max_num_batched_tokens=config.max_num_batched_tokens or 0,
        max_num_seqs=config.max_num_seqs or 0,
        enable_prefix_caching=config.enable_prefix_caching,
        clock=clock,
        max_queued=config.max_num_queued_reqs,
    )
    queued = config.max_num_queued_reqs
    bounds = Bounds(
        config.max_model_len or 0,
        TOKENIZER.vocab_size,
        (END or 0,),
        config.max_logprobs,
        max_requests=None if queued is None else (config.max_num_seqs or 0) + queued,
        priorities=config.scheduling_policy == "priority",
    )
    client = ThreadClient(Engine(scheduler, executor, clock))
    template = None if options.get("chat_template") == "none" else TEMPLATE
    return TextEngine(client, TOKENIZER, config, bounds, templates=lambda tools: template)


def executor(engine: TextEngine) -> Recital:
    found = engine.client.engine.executor
    assert isinstance(found, Recital)
    return found


class Server:
    """An app, called without a socket (``post``, ``get``), or served on a port (``serving``)."""

    def __init__(self, engine: TextEngine):
        self.engine = engine
        self.finished: list[Finished] = []
        engine.on_finish.append(self.finished.append)
        self.app: App = create_app(engine, engine.config)

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30)

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.send("POST", path, json=body)

    def get(self, path: str) -> httpx.Response:
        return self.send("GET", path)

    def wait_idle(self, seconds: float = 5.0) -> None:
        """Until the engine holds no request and no block; fails when it does not come to that."""
        end = time.monotonic() + seconds
        while (now := self.engine.snapshot()).num_running or now.num_waiting or now.kv_blocks_used:
            assert time.monotonic() < end, now
            time.sleep(0.005)


@contextlib.contextmanager
def serving(server: Server, http: str = "auto") -> Iterator[str]:
    """The URL of the real server on a free port, in a thread; ``http`` is what parses."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    serves = HttpServer(server.app, http)
    thread = threading.Thread(target=serves.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not serves.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        serves.should_exit = serves.force_exit = True
        thread.join(10)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)
