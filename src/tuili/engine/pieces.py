"""What each token id adds to a text, in bytes: a tokenizer's decoder compiled to a table.

A text is the concatenation of its tokens' bytes; only the first token may differ (by a space that the encoder added).
That holds for every decoder that language models use: byte-level BPE, SentencePiece with or without byte fallback,
Metaspace, and plain words. Any other decoder is refused, since a wrong text is worse than none.

Where bytes are no UTF-8, each maximal wrong part becomes one U+FFFD, as everywhere in Unicode. (The `tokenizers`
library does so for byte-level BPE; with byte fallback it blanks the whole run of byte tokens, which no stream can do.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuili.base.errors import ModelError

ToBytes = Callable[[str], bytes]
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Pieces:
    """``inside`` gives a token's bytes within a text, ``first`` at its start; ``spaced``: joined by spaces."""

    inside: ToBytes
    first: ToBytes
    spaced: bool = False


def compile_decoder(decoder: Mapping[str, Any] | None) -> Pieces:
    """From the "decoder" of tokenizer.json. ModelError for a decoder that does not work token by token."""
    if decoder is None:
        return Pieces(lambda token: b" " + token.encode(), str.encode, spaced=True)
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Pieces(_byte_level, _byte_level)
    if kinds == ["Metaspace"]:
        return _metaspace(steps[0])
    return _sentencepiece(steps, kinds)


def _metaspace(step: Mapping[str, Any]) -> Pieces:
    mark = step["replacement"]
    leading = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"

    def inside(token: str) -> bytes:
        return token.replace(mark, " ").encode()

    return Pieces(inside, (lambda token: token.replace(mark, "").encode()) if leading else inside)


def _sentencepiece(steps: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> Pieces:
    """Replace* ByteFallback? Fuse? Strip?, as Llama 1 and 2, Mistral, Gemma and Phi-3 have it."""
    plain = [kind for kind in kinds if kind != "Replace"]
    known = plain in (
        ["ByteFallback", "Fuse", "Strip"],
        ["ByteFallback", "Fuse"],
        ["ByteFallback"],
        ["Fuse"],
        ["Fuse", "Strip"],
        [],
    )
    if not known or kinds[: len(kinds) - len(plain)].count("Replace") != len(kinds) - len(plain):
        raise ModelError(
            f"the tokenizer's decoder {' + '.join(kinds)} is not supported: known are ByteLevel, Metaspace, and "
            "Replace + ByteFallback + Fuse + Strip"
        )
    swaps = [(_literal(step), step["content"]) for step in steps if step["type"] == "Replace"]
    strips = [step for step in steps if step["type"] == "Strip"]
    if strips and (strips[0]["start"] > 1 or strips[0]["stop"] or len(strips[0]["content"].encode()) != 1):
        raise ModelError(f"the tokenizer's decoder {strips[0]} is not supported: one leading character may be stripped")

    def inside(token: str) -> bytes:
        for old, new in swaps:
            token = token.replace(old, new)
        byte = BYTE_TOKEN.fullmatch(token) if "ByteFallback" in kinds else None
        return bytes([int(byte[1], 16)]) if byte else token.encode()

    strip = strips[0]["content"].encode() if strips and strips[0]["start"] else b""
    return Pieces(inside, (lambda token: inside(token).removeprefix(strip)) if strip else inside)


def _literal(step: Mapping[str, Any]) -> str:
    pattern = step["pattern"]
    if "String" not in pattern:
        raise ModelError(f"the tokenizer's decoder {step} is not supported: only literal patterns are")
    return pattern["String"]


def _byte_level(token: str) -> bytes:
    try:
        return bytes(BYTES[char] for char in token)
    except KeyError:  # an added token with characters outside the alphabet stands for itself
        return token.encode()


def _alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins of the 256 bytes: printable Latin-1 stays, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTES = _alphabet()
