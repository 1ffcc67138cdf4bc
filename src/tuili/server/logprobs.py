"""Log-probabilities in the three shapes of the API: chat, completions, and vLLM's ``prompt_logprobs``.

-inf is written -9999.0 (interfaces.md 5.1). Offsets count characters of the text; tokens that share a character share
its offset, and a special token that the text leaves out has no width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tuili.engine.outputs import TokenLogprob, TokenText
from tuili.engine.tokenizer import Tokenizer

LOWEST = -9999.0


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


def name(token: TokenText, as_id: bool) -> str:
    return f"token_id:{token.id}" if as_id else token.text


def chat_logprobs(entries: Iterable[TokenLogprob], as_id: bool) -> dict[str, Any]:
    content = [
        _chat_token(entry.chosen, as_id) | {"top_logprobs": [_chat_token(token, as_id) for token in entry.top]}
        for entry in entries
    ]
    return {"content": content}


def _chat_token(token: TokenText, as_id: bool) -> dict[str, Any]:
    return {"token": name(token, as_id), "logprob": finite(token.logprob), "bytes": list(token.bytes)}


def prompt_logprobs(entries: Sequence[TokenLogprob | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's shape: per prompt token {id: {logprob, rank, decoded_token}}, null for the first."""
    if entries is None:
        return None
    return [None if entry is None else _by_id(entry) for entry in entries]


def _by_id(entry: TokenLogprob) -> dict[str, Any]:
    chosen = entry.chosen
    found = {str(chosen.id): {"logprob": finite(chosen.logprob), "rank": entry.rank, "decoded_token": chosen.text}}
    for rank, token in enumerate(entry.top, 1):
        shown = {"logprob": finite(token.logprob), "rank": rank, "decoded_token": token.text}
        found.setdefault(str(token.id), shown)
    return found


class Offsets:
    """Where tokens start in a text that is put together from their bytes.

    ``hidden`` ids have no width. ``begun``: the text goes on from something that is shown, so that the space before
    SentencePiece's first word counts.
    """

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int], begun: bool):
        self.tokenizer = tokenizer
        self.hidden = hidden
        self.begun = begun
        self.characters = 0

    def place(self, token: TokenText, text: str = "") -> int:
        """The offset of the next token. Special tokens that the user spelled in ``text`` do have a width."""
        offset = self.characters
        if token.id in self.hidden:
            self.characters += len(token.text) if text.startswith(token.text, offset) else 0
            return offset
        raw = self.tokenizer.token_bytes(token.id, first=not self.begun)
        self.begun = True
        inside = bool(raw) and raw[0] & 0xC0 == 0x80 and offset > 0
        self.characters += sum(byte & 0xC0 != 0x80 for byte in raw)
        return offset - inside


class CompletionLogprobs:
    """Makes the ``logprobs`` objects of one choice, piece by piece, offsets running on."""

    def __init__(self, offsets: Offsets, as_id: bool):
        self.offsets = offsets
        self.as_id = as_id

    def piece(self, entries: Iterable[TokenLogprob], text: str = "") -> dict[str, Any]:
        found = self._empty()
        for entry in entries:
            chosen = entry.chosen
            found["tokens"].append(name(chosen, self.as_id))
            found["token_logprobs"].append(finite(chosen.logprob))
            found["text_offset"].append(self.offsets.place(chosen, text))
            top: dict[str, float] = {}
            for token in (*entry.top, chosen):  # of tokens that look alike the likeliest stays
                top.setdefault(name(token, self.as_id), finite(token.logprob))
            found["top_logprobs"].append(top)
        return found

    def prompt(self, first: int, entries: Sequence[TokenLogprob | None], text: str) -> dict[str, Any]:
        """For ``echo`` of ``text``: the first prompt token has no logprob, so it is null."""
        found = self._empty()
        tokenizer = self.offsets.tokenizer
        opening = TokenText(first, 0.0, tokenizer.token_text(first), tokenizer.token_bytes(first))
        found["tokens"].append(name(opening, self.as_id))
        found["token_logprobs"].append(None)
        found["top_logprobs"].append(None)
        found["text_offset"].append(self.offsets.place(opening, text))
        return joined(found, self.piece((entry for entry in entries if entry is not None), text))

    @staticmethod
    def _empty() -> dict[str, Any]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {key: first[key] + second[key] for key in first}
