"""One prompt after the other: the simplest use. `python examples/single.py [MODEL]`"""

from __future__ import annotations

import sys

from tuili import LLM, SamplingParams

PROMPTS = (
    "Tell a bedtime story about a fox.",
    "Tell a bedtime story about the sea.",
    "Tell a bedtime story about a lamp that could not sleep.",
)


def main(model: str = "embedded") -> list[list[int]]:
    """The tokens of each answer."""
    params = SamplingParams(temperature=0.0, max_tokens=100)
    tokens = []
    with LLM(model) as llm:
        for prompt in PROMPTS:
            (output,) = llm.chat([{"role": "user", "content": prompt}], params)
            print(f"> {prompt}\n{output.outputs[0].text}\n")
            tokens.append(output.outputs[0].token_ids)
    return tokens


if __name__ == "__main__":
    main(*sys.argv[1:])
