"""When compiling pays: the arithmetic, and the table that tells it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tuili.bench.compile import break_even
from tuili.cli.lab import compile_table


def step(kind: str, tokens: int, default: float, compiled: float) -> dict[str, Any]:
    return {"kind": kind, "tokens": tokens, "default_ms": default, "eager_ms": default, "compiled_ms": compiled}


milliseconds = st.floats(0.1, 1000)


@given(milliseconds, milliseconds, milliseconds, milliseconds, st.floats(0.1, 100), st.integers(1, 500))
def test_after_so_many_requests_both_have_taken_as_long(p, q, d, e, startup, output) -> None:
    found = break_even(startup, [step("prefill", 64, p, q), step("decode", 1, d, e)], output)
    plain, compiled = (p + output * d) / 1000, (q + output * e) / 1000
    if found["requests"] is None:
        assert compiled >= plain
    else:
        assert found["requests"] * plain == pytest.approx(startup + found["requests"] * compiled)
    assert (found["decode_tokens"] is None) == (e >= d)


@pytest.mark.parametrize(
    ("compiled", "said"), [(1.0, "pays after 100 of them, or 20,000 decoded tokens"), (3.0, "does not pay")]
)
def test_the_table_says_whether_it_pays(compiled: float, said: str) -> None:
    steps = [step("prefill", 64, 5.0, 5.0), step("decode", 1, 2.0, compiled)]
    result = {
        "steps": steps,
        "startup": {"empty_cache_s": 20.0, "filled_cache_s": 1.0},
        "request": {"prompt": 64, "output": 200},
        "break_even": break_even(20.0, steps, 200),
    }
    console = Console(width=200, file=io.StringIO())
    compile_table(console, result)
    text = console.file.getvalue()
    for word in (said, "start-up 20.0 s", "64 + 200 tokens", f"{2.0 / compiled:.2f}"):
        assert word in text
