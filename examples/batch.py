"""Many prompts in one call: the engine runs them together. `python examples/batch.py [MODEL]`"""

from __future__ import annotations

import sys

from single import PROMPTS

from tuili import LLM, SamplingParams


def main(model: str = "embedded") -> list[list[int]]:
    """The tokens of each answer, in the order of the prompts."""
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    with LLM(model) as llm:
        outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=100))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        print(f"> {prompt}\n{output.outputs[0].text}\n")
    return [output.outputs[0].token_ids for output in outputs]


if __name__ == "__main__":
    main(*sys.argv[1:])
