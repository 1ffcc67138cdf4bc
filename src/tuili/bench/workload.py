"""Workloads: what is asked and when, as data. The same arguments and seed give the same bytes on every machine (no
torch)."""

from __future__ import annotations

import hashlib
import math
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tuili.base.errors import ConfigError, nearest

#: Token ids that random prompts draw from when the tokenizer is not known: ordinary words in every byte-level BPE.
DEFAULT_VOCAB = (300, 2000)

#: Text form of a token id, for endpoints that take no ids: about one token per word in an English vocabulary.
_TEXT = """
the a little big red blue old new small happy sad kind brave quiet soft warm cold dog cat bird tree house ball boat
girl boy mom dad friend park day night sun moon star rain snow wind river sea hill road door box book song game toy
ran saw had was went came said asked found made took gave liked loved played jumped looked helped and but so then
with in on at to from for of by up down out over under near far very too also again always never once there here
"""
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Item:
    """One request: prompt token ids, tokens to generate, and seconds after the start when it is due (0 = at once)."""

    tokens: tuple[int, ...]
    max_tokens: int
    arrival: float = 0.0

    @property
    def text(self) -> str:
        """The prompt as words; equal prefixes of ids are equal prefixes of text."""
        return " ".join(_WORDS[token % len(_WORDS)] for token in self.tokens)


@dataclass(frozen=True, slots=True)
class Workload:
    """Items in order of arrival. ``skipped`` counts requests of a trace that were too long for ``max_len``."""

    name: str
    seed: int
    items: tuple[Item, ...]
    skipped: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 of everything that is sent: ids, lengths, arrivals (in microseconds)."""
        state = hashlib.sha256()
        for item in self.items:
            state.update(array("q", (len(item.tokens), item.max_tokens, round(item.arrival * 1e6))).tobytes())
            state.update(array("q", item.tokens).tobytes())
        return state.hexdigest()

    @property
    def input_tokens(self) -> int:
        return sum(len(item.tokens) for item in self.items)

    @property
    def output_tokens(self) -> int:
        return sum(item.max_tokens for item in self.items)

    def describe(self) -> dict[str, object]:
        return {
            "name": self.name,
            "seed": self.seed,
            "requests": len(self.items),
            "skipped": self.skipped,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "sha256": self.digest,
        }


@dataclass(frozen=True, slots=True)
class Span:
    """A length: fixed (``low == high``) or uniform in ``low .. high``; written ``128`` or ``64-256``. Unit: tokens."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str | int) -> Span:
        low, _, high = str(text).partition("-")
        try:
            span = cls(int(low), int(high or low))
        except ValueError:
            raise ConfigError(f"a length is a number of tokens or a range such as 64-256, got {text!r}") from None
        if not 1 <= span.low <= span.high:
            raise ConfigError(f"a length needs 1 <= low <= high, got {text!r}")
        return span

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


def rng_of(*parts: object) -> random.Random:
    """A generator that depends on its name only (strings are hashed with SHA-512, the same everywhere)."""
    return random.Random(":".join(map(str, parts)))


def random_ids(rng: random.Random, count: int, vocab: tuple[int, int]) -> tuple[int, ...]:
    low, high = vocab
    return tuple(low + int(rng.random() * (high - low)) for _ in range(count))


def fixed_random(
    count: int,
    input_len: Span,
    output_len: Span,
    *,
    seed: int = 0,
    shared_prefix: float = 0.0,
    vocab: tuple[int, int] = DEFAULT_VOCAB,
) -> Workload:
    """``count`` random prompts; the first ``shared_prefix`` (0..1) of each is the same for all of them."""
    if not 0.0 <= shared_prefix <= 1.0:
        raise ConfigError(f"the shared prefix is a ratio in [0, 1], got {shared_prefix}")
    common = random_ids(rng_of(seed, "prefix"), input_len.high, vocab)
    rng = rng_of(seed, "random")
    items = []
    for _ in range(count):
        length = input_len.draw(rng)
        shared = int(length * shared_prefix)
        items.append(Item(common[:shared] + random_ids(rng, length - shared, vocab), output_len.draw(rng)))
    return Workload("random", seed, tuple(items))


def _lengths(rng: random.Random, median: float, sigma: float, low: int, high: int) -> int:
    """Log-normal, as lengths of real traffic are, cut to ``low .. high``."""
    return min(max(low, round(median * math.exp(rng.gauss(0.0, sigma)))), max(low, high))


def _chat(count: int, rng: random.Random, max_len: int, vocab: tuple[int, int]) -> Iterator[Item]:
    """Conversations of one to five turns behind one system prompt: each turn repeats all that was said before it."""
    system = random_ids(rng, max_len // 8, vocab)
    conversations: list[tuple[int, ...]] = []
    for _ in range(count):
        back = rng.random() < 0.6 and conversations
        said = conversations.pop(rng.randrange(len(conversations))) if back else system
        user = random_ids(rng, _lengths(rng, max_len / 24, 0.6, 4, max_len // 6), vocab)
        answer = _lengths(rng, max_len / 12, 0.7, 4, max_len // 4)
        if len(said) + len(user) + answer > max_len:
            said = system
        yield Item(said + user, answer)
        conversations.append(said + user + random_ids(rng, answer, vocab))


def _batch(count: int, rng: random.Random, max_len: int, vocab: tuple[int, int]) -> Iterator[Item]:
    """Documents with one instruction: long different inputs behind a short common one, short to middling outputs."""
    instruction = random_ids(rng, max(4, max_len // 32), vocab)
    for _ in range(count):
        document = random_ids(rng, _lengths(rng, max_len / 4, 0.5, 8, max_len // 2), vocab)
        yield Item(instruction + document, _lengths(rng, max_len / 16, 0.8, 4, max_len // 3))


def _mixed(count: int, rng: random.Random, max_len: int, vocab: tuple[int, int]) -> Iterator[Item]:
    """Two thirds chat, one third batch, in random order."""
    chat, batch = _chat(count, rng, max_len, vocab), _batch(count, rng, max_len, vocab)
    for _ in range(count):
        yield next(batch if rng.random() < 1 / 3 else chat)


PRESETS: dict[str, Callable[[int, random.Random, int, tuple[int, int]], Iterator[Item]]] = {
    "chat": _chat,
    "batch": _batch,
    "mixed": _mixed,
}


def preset(
    name: str, count: int, *, seed: int = 0, max_len: int = 512, vocab: tuple[int, int] = DEFAULT_VOCAB
) -> Workload:
    """A generated load (INVENTORY W3): ``chat``, ``batch`` or ``mixed``. No prompt + output is longer than
    ``max_len``."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}.{nearest(name, PRESETS)}")
    if max_len < 48:
        raise ConfigError(f"presets need a context of at least 48 tokens, got {max_len}")
    items = PRESETS[name](count, rng_of(seed, "preset", name), max_len, vocab)
    return Workload(f"preset-{name}", seed, tuple(items))


def poisson(workload: Workload, rate: float, *, burstiness: float = 1.0, seed: int = 0) -> Workload:
    """Open loop: gaps are gamma distributed with mean 1/rate seconds; burstiness 1 is Poisson, below 1 comes in bursts.

    An infinite rate makes all items due at once.
    """
    if not rate > 0 or not burstiness > 0:
        raise ConfigError(f"request rate and burstiness must be positive, got {rate} and {burstiness}")
    if math.isinf(rate):
        return replace(workload, items=tuple(replace(item, arrival=0.0) for item in workload.items))
    rng, now, items = rng_of(seed, "arrivals"), 0.0, []
    for item in workload.items:
        items.append(replace(item, arrival=now))
        now += rng.gammavariate(burstiness, 1.0 / (rate * burstiness))
    return replace(workload, items=tuple(items))


def fold_ids(ids: Sequence[int], length: int, block: int, vocab: tuple[int, int], seed: int) -> tuple[int, ...]:
    """Tokens of a Mooncake row: each hash id always becomes the same ``block`` tokens; the last block is cut to
    ``length``."""
    tokens: list[int] = []
    for hash_id in ids:
        tokens.extend(random_ids(rng_of(seed, "block", hash_id), min(block, length - len(tokens)), vocab))
    return tuple(tokens)
