"""Patterns of module names: Python's ``re`` is the oracle, and nothing hangs."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuili.base.errors import ModelError
from tuili.models.quantized.patterns import NameMatcher

ATOMS = [
    "a",
    "b",
    r"\.",
    ".",
    r"\d",
    r"\W",
    "[ab]",
    "[^a]",
    "[0-9.]",
    "(?=a)",
    "(?!b)",
    "(?<=a)",
    "(?<!b)",
    "$",
    "^",
    r"\b",
]
REPEATS = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "{2,}", "*?", "+?"]


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    sequence = st.lists(st.tuples(inner, st.sampled_from(REPEATS)), min_size=1, max_size=4).map(
        lambda parts: "".join(f"(?:{part}){repeat}" for part, repeat in parts)
    )
    return st.lists(sequence, min_size=1, max_size=3).map(lambda ways: "(" + "|".join(ways) + ")")


@settings(max_examples=400, deadline=None)
@given(st.recursive(st.sampled_from(ATOMS), grown, max_leaves=6), st.text("ab.1", max_size=7))
def test_equals_re(pattern: str, name: str) -> None:
    assert NameMatcher().matches(pattern, name) == (re.match(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.(1|12)\.mlp\.(gate|up|down)_proj$",
        r"model\.layers\.\d+\..*_proj",
        r"^(?!.*self_attn).*proj",
        r"(?:.*\.)?lm_head",
        r".*(?<!gate)_proj",
        r"model.layers.*.mlp",
        r"(?P<part>model)\.layers",
    ],
)
def test_what_configs_hold(pattern: str) -> None:
    names = [f"model.layers.{i}.{part}" for i in (1, 12, 3) for part in ("mlp.gate_proj", "self_attn.q_proj", "mlp.up")]
    for name in [*names, "lm_head", "model.embed_tokens"]:
        assert NameMatcher().matches(pattern, name) == (re.match(pattern, name) is not None), name


@pytest.mark.parametrize(
    "pattern",
    [
        "(([a-z_.0-9]+)+)+!",
        "(a|a)*" * 10 + "!",
        ".*" * 60 + "!",
        "(.?){500}!",
        "(x{0,4000000000}){4000000000}!",
        "(a*)*(b*)*!",
    ],
)
def test_nothing_hangs(pattern: str) -> None:
    start = time.process_time()
    name = "model.layers.12.self_attn.aaaaaaaaaaaaaaaaaaaaaaaaa_proj"
    assert not NameMatcher().matches(pattern, name)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "pattern", ["*x", "(", "a" * 5000, "(" * 900 + ")" * 900, r"(a)\1", "(?i)A", "(?i:A)", "[z-a]"]
)
def test_what_is_no_pattern_is_named(pattern: str) -> None:
    with pytest.raises(ModelError, match="no regular expression"):
        NameMatcher().matches(pattern, "a")


def test_many_patterns_on_many_modules_are_a_bounded_work() -> None:
    matcher = NameMatcher(left=10_000)
    with pytest.raises(ModelError, match="take too long"):
        [matcher.matches(".*a.*b", "model.layers.0.mlp.gate_proj") for _ in range(10_000)]
