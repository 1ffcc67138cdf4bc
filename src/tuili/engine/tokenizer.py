"""Text to token ids and back, from the files of a checkpoint. No torch, no transformers, no network."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tuili.base.errors import ModelError
from tuili.engine.pieces import Pieces, compile_decoder

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: Characters that are tokenized in 2.5 ms or so.
LONG_TEXT = 4000
#: How Qwen2 cuts text before BPE, for directories that hold vocab.json and merges.txt only.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A `tokenizers` backend and what tokenizer_config.json adds to it.

    ``special_tokens`` maps roles (bos_token, ...) to strings. ``decode`` is byte-exact: it equals what a stream of
    ``Detokenizer`` gives for the same ids. Safe to use from several threads.
    """

    def __init__(self, backend: Backend, config: dict[str, Any] | None = None):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.config = config or {}
        self.special_tokens = special_tokens(self.config)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.bos = self._id("bos_token")
        self.eos = self._id("eos_token")
        self.pieces: Pieces = compile_decoder(json.loads(backend.to_str())["decoder"])

    @classmethod
    def open(cls, directory: str | Path) -> Tokenizer:
        """Of a checkpoint directory. ModelError when there is none, or it is damaged."""
        folder = Path(directory)
        config = _json(folder / "tokenizer_config.json")
        for role, token in _json(folder / "special_tokens_map.json").items():
            config.setdefault(role, token)
        return cls(_backend(folder, config), config)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that ``skip_special_tokens`` leaves out of a text."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text. More than ``LONG_TEXT`` characters free the GIL, so that other threads go on."""
        if sum(map(len, texts)) > LONG_TEXT:
            found = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        else:
            found = [self.backend.encode(text, add_special_tokens=add_special_tokens) for text in texts]
        return [self._opened(one.ids, text, add_special_tokens) for one, text in zip(found, texts, strict=True)]

    def _opened(self, ids: list[int], text: str, add_special_tokens: bool) -> list[int]:
        """``ids`` with or without the token that begins a text, as ``add_bos_token`` has it."""
        wanted = self.config.get("add_bos_token")
        if not add_special_tokens or wanted is None or self.bos is None:
            return ids
        starts = bool(ids) and ids[0] == self.bos
        if wanted and not starts:
            return [self.bos, *ids]
        return ids[1:] if starts and not wanted and not text.startswith(self.special_tokens["bos_token"]) else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        shown = [i for i in ids if i in self._tokens and not (skip_special_tokens and i in self.special_ids)]
        raw = b"".join(self.token_bytes(i, first=n == 0) for n, i in enumerate(shown))
        return raw.decode("utf-8", "replace")

    def token_bytes(self, id: int, first: bool = False) -> bytes:
        """What the token adds to a text (``first``: at its start); nothing for an id that is not in the vocabulary."""
        if first and id in self._tokens:
            return self.pieces.first(self._tokens[id])
        return self._inside.get(id, b"")

    def token_text(self, id: int) -> str:
        """For display: part of a character shows as U+FFFD."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def knows(self, id: int) -> bool:
        """False for ids that only the model has (embeddings padded to a round size); they add nothing to a text."""
        return id in self._tokens

    @cached_property
    def _tokens(self) -> dict[int, str]:
        vocabulary = {id: token for token, id in self.backend.get_vocab(with_added_tokens=True).items()}
        return vocabulary | {id: token.content for id, token in self.backend.get_added_tokens_decoder().items()}

    @cached_property
    def _inside(self) -> dict[int, bytes]:
        return {id: self.pieces.inside(token) for id, token in self._tokens.items()}

    def _id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)


def utf8() -> codecs.IncrementalDecoder:
    """Bytes to whole characters as they complete; U+FFFD for what is no UTF-8."""
    return codecs.getincrementaldecoder("utf-8")("replace")


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Roles to strings; a token may be written as a string or as ``{"content": ...}``."""
    written = {role: config[role] for role in ROLES if config.get(role)}
    return {role: token["content"] if isinstance(token, dict) else token for role, token in written.items()}


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _backend(folder: Path, config: dict[str, Any]) -> Backend:
    file = folder / "tokenizer.json"
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        if file.exists():
            return Backend.from_file(str(file))
        if vocab.exists() and merges.exists():
            return _byte_level_bpe(vocab, merges, config)
    except Exception as error:  # the library raises plain Exception for a damaged file
        raise ModelError(f"the tokenizer in {folder} cannot be read: {error}") from error
    raise ModelError(
        f"{folder} has no tokenizer.json, nor vocab.json and merges.txt. Copy the tokenizer's files next to "
        "config.json, or write tokenizer.json once with transformers: "
        "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
    )


def _byte_level_bpe(vocab: Path, merges: Path, config: dict[str, Any]) -> Backend:
    """GPT-2's scheme, or Qwen2's where tokenizer_config.json names it."""
    backend = Backend(models.BPE.from_file(str(vocab), str(merges)))
    backend.decoder = decoders.ByteLevel()
    if str(config.get("tokenizer_class", "")).startswith("Qwen2"):
        from tokenizers import Regex

        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.add_tokens(list(_added(config)))
    specials = special_tokens(config) or {"eos_token": "<|endoftext|>"}
    backend.add_special_tokens([token for token in specials.values() if backend.token_to_id(token) is not None])
    return backend


def _added(config: dict[str, Any]) -> Iterable[AddedToken]:
    """The added tokens of tokenizer_config.json, in the order of their ids."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for _, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        yield AddedToken(token["content"], **{flag: bool(token[flag]) for flag in flags if flag in token})
