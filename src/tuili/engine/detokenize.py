"""Token ids to text as they arrive: whole characters only, stop strings held back, O(1) amortised per token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tuili.engine.tokenizer import Tokenizer, utf8


class Detokenizer:
    """The text of one output. ``push`` gives the characters that a token completes, ``finish`` what is left.

    All pieces together equal the decoded output. ``prompt`` decides whether the output starts a text or continues one
    (SentencePiece drops the space before a text's first word only).
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Iterable[int] = (), skip_special: bool = True, spaces_between: bool = True
    ):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset[int]()
        self._tight = tokenizer.special_ids if tokenizer.pieces.spaced and not spaces_between else frozenset[int]()
        self._first = all(id in self._skip or not tokenizer.knows(id) for id in prompt)
        self._after_special = False
        self._utf8 = utf8()

    def push(self, id: int) -> str:
        if id in self._skip or not self._tokenizer.knows(id):
            return ""
        special = id in self._tight
        raw = self._tokenizer.token_bytes(id, first=self._first or (special and self._after_special))
        self._first, self._after_special = False, special
        return self._utf8.decode(raw)

    def finish(self) -> str:
        """U+FFFD for a character whose last bytes never came."""
        return self._utf8.decode(b"", final=True)


@dataclass(slots=True)
class _StopMatcher:
    """How much of one stop string the text's end matches (Knuth, Morris, Pratt): ``state`` characters."""

    pattern: str
    fallback: list[int]
    state: int = 0

    def feed(self, char: str) -> bool:
        """True when the pattern ends with this character."""
        if self.state == len(self.pattern):
            self.state = self.fallback[-1]
        while self.state and self.pattern[self.state] != char:
            self.state = self.fallback[self.state - 1]
        if self.pattern[self.state] == char:
            self.state += 1
        return self.state == len(self.pattern)


def _matcher(pattern: str) -> _StopMatcher:
    fallback, length = [0], 0
    for char in pattern[1:]:
        while length and pattern[length] != char:
            length = fallback[length - 1]
        length += pattern[length] == char
        fallback.append(length)
    return _StopMatcher(pattern, fallback)


class StopStrings:
    """Finds the stop string that ends first in a text (the longest, if two end together), however the text is cut.

    ``push`` returns the text that is sure to be output; the rest, at most ``max(len(stop)) - 1`` characters, may be the
    start of a stop string and waits. ``match`` is the stop string once found; nothing may be pushed after that.
    """

    def __init__(self, stops: Sequence[str], include: bool = False):
        self._matchers = [_matcher(stop) for stop in dict.fromkeys(stops)]
        self._include = include
        self._held = ""
        self.match: str | None = None

    def push(self, text: str, armed: bool = True) -> str:
        """``armed`` False (before min_tokens): a stop string that ends here counts as text."""
        assert self.match is None, "text after a stop string"
        if not self._matchers:
            return text
        whole, offset = self._held + text, len(self._held)
        for end, char in enumerate(text, offset + 1):
            found = [m.pattern for m in self._matchers if m.feed(char)]
            if found and armed:
                self.match = max(found, key=len)
                self._held = ""
                return whole[:end] if self._include else whole[: end - len(self.match)]
        keep = 0 if self._include else max(self._waiting(m) for m in self._matchers)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]

    @staticmethod
    def _waiting(matcher: _StopMatcher) -> int:
        """Characters that may yet be part of a stop string; one that did not count can only overlap the next."""
        full = matcher.state == len(matcher.pattern)
        return matcher.fallback[-1] if full else matcher.state

    def finish(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held
