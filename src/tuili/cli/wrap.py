"""Text for a terminal, broken between words while it streams."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

from rich.cells import cell_len

FENCES = ("```", "~~~")
#: Spaces at which no line is broken.
UNBROKEN = "\u00a0\u202f"


class WordWrap:
    """``feed`` takes pieces of text and gives what of them can be shown: all but a word whose end is not known.

    A line is broken before the word that does not fit into ``columns()`` cells, and the spaces before that word are
    dropped; nothing else changes. Code stays as it is: lines between ``` fences, lines that begin with a tab or four
    spaces. A word longer than a line is shown as it comes. Chinese and Japanese may break before any letter.
    """

    def __init__(self, columns: Callable[[], int]):
        self.columns = columns
        self.column = 0
        #: What waits: spaces, and the word behind them.
        self.spaces = self.word = ""
        self.fenced = self.code = self.long = False

    def feed(self, piece: str) -> str:
        return "".join(map(self._take, piece))

    def end(self) -> str:
        """What still waits; the text is over."""
        shown = self._settle() + self.spaces
        self.spaces = ""
        return shown

    def _take(self, char: str) -> str:
        if char == "\n":
            shown = self.end() + char
            self.column, self.code = 0, False
            return shown
        if char.isspace() and char not in UNBROKEN:
            shown = self._settle()
            self.spaces += char
            return shown
        shown = self._settle() if starts_word(char) else ""
        self.word += char
        too_long = self.long or cell_len(self.word) > self.columns()
        if too_long:
            shown += self._settle()
            self.long = True
        return shown

    def _settle(self) -> str:
        """The word that waits, on this line or on the next."""
        spaces, word, inside, self.long = self.spaces, self.word, self.long, False
        if not word:
            return ""
        self.spaces = self.word = ""
        if self.column == 0:
            self.code = self.fenced or spaces.startswith(("\t", " " * 4))
            self.fenced ^= word.startswith(FENCES)
        end = cell_len((" " * self.column + spaces).expandtabs()) + cell_len(word)
        if end > self.columns() and not self.code and not inside:
            broken, self.column = "\n" if self.column else "", cell_len(word)
            return broken + word
        self.column = end
        return spaces + word


def starts_word(char: str) -> bool:
    """Whether a line may break before this letter whatever stands before it."""
    return char.isalpha() and unicodedata.east_asian_width(char) in "WF"
