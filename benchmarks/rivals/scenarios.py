"""What is measured: prompts, lengths, and how a speed is read from the times of tokens.

Decoding is measured while all requests of the scenario decode: from the last of the first tokens to the first of the
last ones. An engine that mixes prefill and decode is so neither helped nor harmed by it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rivals.rival import Timed
from rivals.shapes import FIRST_ID


@dataclass(frozen=True)
class Scenario:
    """``fresh``: every round has other prompts, so that no prefix cache can answer."""

    name: str
    requests: int
    prompt: int
    new: int
    fresh: bool = False

    @property
    def alone(self) -> bool:
        """Decoding of a single request: bound by memory."""
        return self.requests == 1 and self.new > 1

    def prompts(self, vocab: int, round_: str) -> list[list[int]]:
        seed = f"{self.name} {round_}" if self.fresh else "decode"
        return random_prompts(seed, self.requests, self.prompt, vocab)

    def speed(self, timed: Sequence[Sequence[Timed]]) -> float:
        """Tokens per second: of the prompt for a prefill, of all requests together for decoding."""
        if self.new == 1:
            return self.requests * self.prompt / max(row[0][1] for row in timed)
        begin, end = max(row[0][1] for row in timed), min(row[-1][1] for row in timed)
        if end <= begin:
            raise ValueError(f"{self.name}: the requests never decoded all together")
        return sum(begin < when <= end for row in timed for _, when in row) / (end - begin)


FULL = (
    Scenario("decode 1", 1, 128, 128),
    Scenario("decode 8", 8, 128, 64),
    Scenario("decode 32", 32, 128, 32),
    Scenario("prefill 512", 1, 512, 1, fresh=True),
    Scenario("prefill 2048", 1, 2048, 1, fresh=True),
)

#: The same kinds, short: shows that everything works, measures nothing.
QUICK = (
    Scenario("decode 1", 1, 128, 16),
    Scenario("decode 8", 8, 128, 8),
    Scenario("decode 32", 32, 128, 8),
    Scenario("prefill 512", 1, 512, 1, fresh=True),
    Scenario("prefill 2048", 1, 2048, 1, fresh=True),
)

#: What a session must have room for: requests, positions of one of them, of all of them together.
MAX_REQUESTS = 32
MAX_LENGTH = 2048 + 16
MAX_POSITIONS = 32 * (128 + 64)


def random_prompts(seed: str, count: int, length: int, vocab: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(FIRST_ID, vocab) for _ in range(length)] for _ in range(count)]


def agreement_prompts(vocab: int) -> list[list[int]]:
    """16 prompts of 64 tokens whose first greedy token is compared with transformers in float32."""
    return random_prompts("agreement", 16, 64, vocab)
