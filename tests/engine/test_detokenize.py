"""Streams of text equal the whole text: for every tokenizer, every split, bytes that are no UTF-8, and stop strings."""

from __future__ import annotations

from itertools import pairwise

import pytest
from engine_parts import KINDS, TEXTS, byte_level, sentencepiece, words
from hypothesis import given, settings
from hypothesis import strategies as st

from tuili.engine.detokenize import Detokenizer, StopStrings

ids_of = {name: st.lists(st.integers(0, make().vocab_size + 3), max_size=30) for name, make in KINDS.items()}


def stream(tokenizer, ids, **options) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [detokenizer.push(id) for id in ids] + [detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_pieces_joined_are_the_decoded_text(kind, data, skip):
    tokenizer = KINDS[kind]()
    ids = data.draw(ids_of[kind])
    assert "".join(stream(tokenizer, ids, skip_special=skip)) == tokenizer.decode(ids, skip)


@given(ids=ids_of["byte_level"], skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_byte_level_decodes_as_the_library_does(ids, skip):
    tokenizer = byte_level()
    assert tokenizer.decode(ids, skip) == tokenizer.backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["metaspace", "words"])
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_words_decode_as_the_library_does(kind, data, skip):
    tokenizer = KINDS[kind]()
    ids = data.draw(ids_of[kind])
    assert tokenizer.decode(ids, skip) == tokenizer.backend.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=40), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_sentencepiece_decodes_valid_text_as_the_library_does(text, skip):
    tokenizer = sentencepiece()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip) == tokenizer.backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_round_trip_and_whole_characters(kind, text):
    tokenizer = KINDS[kind]()
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_ends_becomes_one_replacement():
    tokenizer = byte_level()
    ids = tokenizer.backend.encode("🙂").ids
    last = tokenizer.token_bytes(ids[-1])
    assert len(last) < 4, "the tokenizer has the whole emoji; choose another"
    pieces = stream(tokenizer, ids[:-1])
    assert pieces[:-1] == [""] * (len(ids) - 1)
    assert pieces[-1] == "\ufffd"


def test_output_continues_the_prompt():
    tokenizer = sentencepiece()
    prompt, more = tokenizer.encode("the"), tokenizer.encode("the")[1:]
    assert "".join(stream(tokenizer, more, prompt=prompt)) == " the"
    assert "".join(stream(tokenizer, more, prompt=[tokenizer.bos])) == "the", "nothing is shown before it"


def test_spaces_between_special_tokens():
    tokenizer = words()
    ids = [2, 0, 1, 3]
    assert "".join(stream(tokenizer, ids, skip_special=False)) == "one <s> </s> two"
    assert "".join(stream(tokenizer, ids, skip_special=False, spaces_between=False)) == "one <s></s> two"


# -------------------------------------------------------------------------------------------------------- stop strings

letters = st.text("ab ", max_size=24)
stops_of = st.lists(st.text("ab ", min_size=1, max_size=5), min_size=1, max_size=3)


def first_match(text: str, stops: list[str], armed_from: int = 0) -> tuple[str, str] | None:
    """The oracle: text before the stop string that ends first, and that stop string (the longest of them)."""
    for end in range(armed_from + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return None


def cut(text: str, points: list[int]) -> list[str]:
    edges = [0, *sorted(p for p in points if p <= len(text)), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def run_stops(
    pieces: list[str], stops: list[str], include: bool = False, armed_from: int = 0
) -> tuple[str, str | None]:
    finder, out, seen = StopStrings(stops, include), "", 0
    for piece in pieces:
        held_before = finder._held
        out += finder.push(piece, armed=seen >= armed_from)
        seen += len(piece)
        if finder.match is not None:
            return out, finder.match
        assert len(finder._held) <= max(map(len, stops)) - 1
        assert not finder._held or any(stop.startswith(finder._held) for stop in stops), "held back without need"
        assert include is False or not held_before
    return out + finder.finish(), None


@given(text=letters, stops=stops_of, points=st.lists(st.integers(0, 24), max_size=8), include=st.booleans())
@settings(max_examples=600, deadline=None)
def test_the_earliest_stop_string_wins_however_the_text_is_cut(text, stops, points, include):
    out, match = run_stops(cut(text, points), stops, include)
    expected = first_match(text, stops)
    if expected is None:
        assert (out, match) == (text, None)
    else:
        assert match == expected[1]
        assert out == expected[0] + (match if include else "")


@given(text=letters, stops=stops_of, start=st.integers(0, 24))
@settings(max_examples=300, deadline=None)
def test_before_min_tokens_a_stop_string_is_text(text, stops, start):
    pieces = list(text)
    out, match = run_stops(pieces, stops, armed_from=start)
    expected = first_match(text, stops, start)
    if expected is None or len(text) <= start:
        assert (out, match) == (text, None)
    else:
        assert (out, match) == expected


def test_without_stop_strings_nothing_is_held():
    finder = StopStrings(())
    assert finder.push("abc") == "abc"
    assert finder.finish() == ""
