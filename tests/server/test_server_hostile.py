"""Hostile bodies: JSON is read in bounded, linear time, in slices, and large bodies mean what small ones mean."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from scripted import Server, serving

from tuili.base.errors import RequestError
from tuili.server import wire
from tuili.server.body import validated
from tuili.server.protocol import CompletionRequest, DetokenizeRequest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import hostile

TEXT = "/v1/completions"


def small(raw: bytes) -> Any:
    return asyncio.run(wire.loads(raw, asyncio.Lock()))


def large(raw: bytes) -> Any:
    """The same body with so much space behind it that it is read in slices."""
    return small(raw + b" " * wire.INLINE_BYTES)


def outcome(read: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        return read(raw)
    except RequestError:
        return "refused"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=60) | st.dictionaries(st.text(), inner),
    max_leaves=25,
)


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(st.dictionaries(st.text(), JSON_VALUES), st.booleans(), st.sampled_from([None, 1]))
def test_large_bodies_mean_what_small_ones_do(value: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert large(raw) == small(raw) == value


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    st.dictionaries(st.text(max_size=5), JSON_VALUES, min_size=1),
    st.data(),
    st.sampled_from(list('{}[]",:\\0-.eE n\x01')),
)
def test_large_bodies_are_refused_where_small_ones_are(value: dict[str, Any], data: st.DataObject, char: str) -> None:
    """One character of a good body is replaced, left out or doubled."""
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text) - 1))
    for spoilt in (text[:at] + char + text[at + 1 :], text[:at] + text[at + 1 :], text[: at + 1] + text[at:]):
        assert outcome(large, spoilt.encode()) == outcome(small, spoilt.encode()), spoilt


@pytest.mark.parametrize("name", hostile.KINDS)
@pytest.mark.parametrize("size", [30, 3000])
def test_hostile_bodies_are_the_same_to_both(name: str, size: int) -> None:
    raw = hostile.KINDS[name](random.Random(1), size)
    assert outcome(large, raw) == outcome(small, raw)


LONG = 300_000


@pytest.mark.parametrize(
    "unit", ["a", "推", "\n", "\\", '"', "\U0001f600", "\n\U0001f600", "\\\\\U0001f600a", "\x7f\u2028"]
)
@pytest.mark.parametrize("shift", range(7))
def test_long_strings_are_put_together_right(unit: str, shift: int) -> None:
    """Strings are read in pieces, that split neither an escape nor a surrogate pair."""
    value = {"prompt": "x" * shift + unit * (LONG // len(unit))}
    for ascii_only in (True, False):
        assert small(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b'"prompt":"x","prompt":"y"', "prompt"),
        (b'"x":{"a":1,"b":[],"a":2}', "a"),
        (b'"prompt":"\\ud800"', "prompt"),
        (b'"x":["\\udc00"]', "x"),
    ],
)
def test_faults_name_their_field(raw: bytes, param: str) -> None:
    for read in (small, large):
        with pytest.raises(RequestError) as caught:
            read(b"{" + raw + b"}")
        assert caught.value.param == param


def test_places_of_faults_are_told() -> None:
    numbers = b",".join([b"123"] * 5000)
    with pytest.raises(RequestError, match=r"line 1, column 20014\b"):
        small(b'{"prompt":[1,' + numbers + b",,1]" + b" " * 20_000 + b"}")


def test_the_number_of_values_is_bounded() -> None:
    def body(item: bytes, count: int) -> bytes:
        return b'{"prompt":[' + b",".join([item] * count) + b"]}"

    assert len(small(body(b"65", wire.MAX_VALUES * 7))["prompt"]) == wire.MAX_VALUES * 7
    assert len(small(body(b'"x"', wire.MAX_VALUES - 3))["prompt"]) == wire.MAX_VALUES - 3
    for raw in (body(b"65", wire.MAX_VALUES * 9), body(b'"x"', wire.MAX_VALUES), body(b"[]", wire.MAX_VALUES)):
        with pytest.raises(RequestError, match="more than 65536 values") as caught:
            small(raw)
        assert caught.value.param == "prompt"


def pieces(raw: bytes) -> Iterator[float]:
    """CPU seconds between two places where the reading may pause."""
    work = wire.SlowReader(raw.decode()).document()
    while True:
        began = time.thread_time()
        try:
            next(work)
        except (StopIteration, RequestError, ValueError):
            return
        finally:
            yield time.thread_time() - began


@pytest.mark.parametrize("name", [name for name in hostile.KINDS if name not in ("noise", "not UTF-8")])
def test_no_piece_takes_long(name: str) -> None:
    """Linear time: each slice is short, and the sum grows with the body. (8 MB of spaces take about 20 ms.)"""
    raw = hostile.KINDS[name](random.Random(0), 2_000_000)
    gc.freeze()  # as the server does: what was there before costs no collection anything
    try:
        times = list(pieces(raw))
    finally:
        gc.unfreeze()
    assert max(times) < 0.1
    assert sum(times) < 4


@pytest.mark.parametrize("bad", [-1, 2**31, 1.5, True, "1", None, []])
def test_a_wrong_id_of_many_is_found_and_named(bad: Any) -> None:
    for place in (0, 4095, 4096, 99_999):
        ids: list[Any] = [7] * 100_000
        ids[place] = bad
        for model, name, value in (
            (CompletionRequest, "prompt", [ids] if place == 0 else ids),
            (DetokenizeRequest, "tokens", ids),
        ):
            with pytest.raises(RequestError) as caught:
                validated({name: value}, model)
            assert caught.value.param == (f"{name}.0.{place}" if value == [ids] else f"{name}.{place}")


def test_whole_numbers_are_ids() -> None:
    given = [1.0, 2] * 5000
    found = validated({"tokens": given}, DetokenizeRequest).tokens
    assert found == given
    assert {type(id) for id in found} == {int}


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("prompt", [1.5] * 300_000, "prompt.0"),
        ("prompt", ["a"] * 50_000 + [None], "prompt.50000"),
        ("stop", [1] * 300_000, "stop.0"),
        ("logit_bias", {str(id): "x" for id in range(50_000)}, "logit_bias.0"),
        ("bad_words", [None] * 300_000, "bad_words.0"),
    ],
)
def test_the_first_of_many_faults_is_enough(field: str, value: Any, param: str) -> None:
    began = time.thread_time()
    with pytest.raises(RequestError) as caught:
        validated({"prompt": "x", field: value}, CompletionRequest)
    assert caught.value.param == param
    assert time.thread_time() - began < 0.2


def test_bodies_in_a_row_end_typed_and_health_is_served(make_server: Callable[..., Server]) -> None:
    """0.1 s on a quiet machine (benchmarks/hostile.py). What a busy one takes from the server is not its fault: of the
    same bodies, one round is served at once."""
    server, worst = make_server(), []
    with serving(server) as url:
        while not worst or (min(worst) >= 0.5 and len(worst) < 4):
            with hostile.probing(url) as waits:
                connection = hostile.connect(url)
                for name, path, body in hostile.bodies(seed=7, count=400, largest=300_000):
                    status, answer = hostile.post(connection, path, body)
                    assert not hostile.wrong(status, answer), (name, path, status, answer[:300])
            assert len(waits) > 10
            worst.append(max(waits))
    assert min(worst) < 0.5, worst
    server.wait_idle()
