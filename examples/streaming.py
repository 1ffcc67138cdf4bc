"""Text as it comes, several answers at once, in asyncio: what a server does. `python examples/streaming.py [MODEL]`"""

from __future__ import annotations

import asyncio
import sys

from single import PROMPTS

from tuili import SamplingParams
from tuili.base.config import Config
from tuili.engine.build import build
from tuili.engine.text import TextEngine


async def answer(engine: TextEngine, number: int, prompt: str) -> list[int]:
    """Print pieces of text as they come. Leaving the loop early would free what the request holds."""
    tokens = []
    ids = engine.encode_chat([{"role": "user", "content": prompt}])
    params = SamplingParams(temperature=0.0, max_tokens=100)
    async for delta in engine.generate(ids, params, request_id=f"answer-{number}"):
        tokens += delta.token_ids
        if delta.text:
            print(f"[{number}] {delta.text!r}", flush=True)
    return tokens


async def answer_all(engine: TextEngine) -> list[list[int]]:
    return await asyncio.gather(*(answer(engine, number, prompt) for number, prompt in enumerate(PROMPTS)))


def main(model: str = "embedded") -> list[list[int]]:
    """The tokens of each answer."""
    engine = build(Config(model=model))
    try:
        return asyncio.run(answer_all(engine))
    finally:
        engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
