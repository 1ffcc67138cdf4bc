"""Lines on a terminal break between words, whatever pieces the text comes in; code and newlines stay."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from tuili.cli.wrap import WordWrap

PROSE = st.text(alphabet="ab é推。 \n-", max_size=200)


def wrapped(text: str, columns: int, sizes: list[int] | None = None) -> str:
    """The text in pieces of these sizes, over and over."""
    wrap, shown, sizes = WordWrap(lambda: columns), "", sizes or [1]
    while text:
        for size in sizes:
            shown += wrap.feed(text[:size])
            text = text[size:]
    return shown + wrap.end()


@given(PROSE, st.integers(4, 30), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_only_spaces_become_line_breaks_and_no_line_is_too_long(text: str, columns: int, sizes: list[int]) -> None:
    shown = wrapped(text, columns, sizes)
    assert shown == wrapped(text, columns)
    assert "".join(shown.split()) == "".join(text.split())
    assert shown.split("\n")[0] == text.split("\n")[0] or cell_len(text.split("\n")[0]) > columns
    longest = max((cell_len(word) for word in text.split()), default=0)
    for line in shown.split("\n"):
        if longest <= columns and not line.startswith("    "):
            assert cell_len(line.rstrip(" ")) <= columns


@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=8), min_size=1, max_size=40), st.integers(8, 40))
def test_lines_are_as_full_as_they_can_be(words: list[str], columns: int) -> None:
    """The greedy break: the first word of each line would not have fitted on the line before."""
    lines = [line.split(" ") for line in wrapped(" ".join(words), columns).split("\n")]
    assert [word for line in lines for word in line] == words
    for line, after in pairwise(lines):
        assert len(" ".join([*line, after[0]])) > columns


def test_a_word_is_shown_when_its_end_is_known() -> None:
    wrap = WordWrap(lambda: 10)
    pieces = ("The", " qui", "ck", " fo", "x. ", "\n", "ok")
    assert [wrap.feed(piece) for piece in pieces] == ["", "The", "", " quick", "\nfox.", " \n", ""]
    assert wrap.end() == "ok"


def test_code_stays_as_it_is() -> None:
    long = "x = " + " + ".join("abcdef")
    fenced = f"```python\n{long}\n\n  {long}\n```\n"
    assert wrapped(fenced, 10) == fenced
    assert wrapped(f"    {long}\n\t{long}\n", 10) == f"    {long}\n\t{long}\n"
    assert wrapped(fenced + "one two three four", 10) == fenced + "one two\nthree four"


def test_a_word_longer_than_a_line_is_left_whole_and_not_held_back() -> None:
    wrap = WordWrap(lambda: 10)
    assert [wrap.feed(piece) for piece in ("see http://ex", "ampl", "e.org ")] == ["see", "\nhttp://exampl", "e.org"]
    assert wrapped("see http://example.org/a/b now", 10) == "see\nhttp://example.org/a/b\nnow"


def test_an_indent_that_leaves_no_room_for_its_word_is_dropped() -> None:
    assert wrapped(" 。。", 4) == "。。"
    assert wrapped("ab\n  abc", 4) == "ab\nabc"


@pytest.mark.parametrize(("text", "want"), [("推理推理推理", "推理推\n理推理"), ("推理推。理", "推理\n推。理")])
def test_wide_letters_may_break_anywhere_but_not_before_their_mark(text: str, want: str) -> None:
    assert wrapped(text, 7) == want


def test_unbreakable_spaces_do_not_break_and_the_width_may_change() -> None:
    assert wrapped("aaa 10\u00a0km", 7) == "aaa\n10\u00a0km"
    width = 20
    wrap = WordWrap(lambda: width)
    shown = wrap.feed("one two three ")
    width = 9
    assert shown + wrap.feed("four five ") + wrap.end() == "one two three\nfour five "
