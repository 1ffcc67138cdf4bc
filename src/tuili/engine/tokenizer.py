"""Text to token ids and back, from the files of a checkpoint. No torch, no transformers, no network."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tuili.base.errors import ModelError
from tuili.engine.added_tokens import WHERE, add_missing, special_texts, special_tokens
from tuili.engine.pieces import Pieces, compile_decoder
from tuili.models.fields import MOST, Fields, shown
from tuili.models.read import read_json, read_text

#: Characters that are tokenized in 2.5 ms or so.
LONG_TEXT = 4000
#: Bytes of tokenizer.json, and of merges.txt. The largest known have 33 and 2 million.
MOST_TOKENIZER, MOST_MERGES = 1 << 29, 64 << 20
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
        fields = Fields(self.config, WHERE)
        self._bos_wanted = None if self.config.get("add_bos_token") is None else fields.flag("add_bos_token")
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.bos = self._id("bos_token")
        self.eos = self._id("eos_token")
        # Not of the whole tokenizer's JSON, which takes as long as its largest id is large.
        self.pieces: Pieces = compile_decoder(json.loads(backend.decoder.__getstate__()) if backend.decoder else None)

    @classmethod
    def open(cls, directory: str | Path) -> Tokenizer:
        """Of a checkpoint directory. ModelError when there is none, or it is damaged."""
        folder = Path(directory)
        config = read_json(folder / "tokenizer_config.json", optional=True)
        for role, token in read_json(folder / "special_tokens_map.json", optional=True).items():
            config.setdefault(role, token)
        backend = _backend(folder, config)
        add_missing(backend, folder, config)
        return cls(backend, config)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that ``skip_special_tokens`` leaves out of a text: what is special by its flag, or by its name."""
        flagged = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        named = {self.backend.token_to_id(text) for text in special_texts(self.config)}
        return frozenset(flagged | {id for id in named if id is not None})

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
        wanted = self._bos_wanted
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


def _backend(folder: Path, config: dict[str, Any]) -> Backend:
    file, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    try:
        if file.is_file():
            if file.stat().st_size > MOST_TOKENIZER:
                raise ModelError(f"{file} has {file.stat().st_size} bytes, and at most {MOST_TOKENIZER} are read")
            return Backend.from_file(str(file))
        if vocab.is_file() and merges.is_file():
            return _byte_level_bpe(vocab, merges, config)
    except (ModelError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception for a damaged file, or panics
        raise ModelError(f"the tokenizer in {folder} cannot be read: {error}") from error
    raise ModelError(
        f"{folder} has no tokenizer.json, nor vocab.json and merges.txt. Copy the tokenizer's files next to "
        "config.json, or write tokenizer.json once with transformers: "
        "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
    )


def _byte_level_bpe(vocab: Path, merges: Path, config: dict[str, Any]) -> Backend:
    """GPT-2's scheme or Qwen2's, whichever tokenizer_config.json or config.json names."""
    words = _vocabulary(vocab)
    backend = Backend(models.BPE(words, list(_merges(merges, words))))
    backend.decoder = decoders.ByteLevel()
    spaced = Fields(config, WHERE).flag("add_prefix_space")
    if _cuts_like_qwen(vocab.parent, config):
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    if not special_tokens(config) and "<|endoftext|>" in words:
        backend.add_special_tokens(["<|endoftext|>"])
    return backend


#: Classes of tokenizers that say nothing of how text is cut, and the beginnings of those that cut as GPT-2 does.
SAYS_NOTHING = ("", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "PythonBackend")
LIKE_GPT2 = ("GPT2Tokenizer", "GPTNeoXTokenizer", "CodeGenTokenizer", "RobertaTokenizer")


def _cuts_like_qwen(folder: Path, config: dict[str, Any]) -> bool:
    """By the tokenizer's class; where that says nothing, by the model's type. ModelError for other classes."""
    kind = Fields(config, WHERE).text("tokenizer_class", "")
    if kind in SAYS_NOTHING:
        model = read_json(folder / "config.json", optional=True).get("model_type")
        return isinstance(model, str) and model.startswith(("qwen2", "qwen3"))
    if not kind.startswith(("Qwen2Tokenizer", "Qwen3Tokenizer", *LIKE_GPT2)):
        raise ModelError(
            f"{folder}: tokenizer_class={shown(kind)} with vocab.json and merges.txt is not supported; write "
            "tokenizer.json once with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    return kind.startswith("Qwen")


def _vocabulary(path: Path) -> dict[str, int]:
    words = read_json(path)
    most = MOST["vocab_size"]
    wrong = next((word for word, id in words.items() if type(id) is not int or not 0 <= id < most), None)
    if wrong is not None:
        raise ModelError(f"{path}: the id of {shown(wrong)} is {shown(words[wrong])}, and no token id")
    if "<0x0A>" in words:
        raise ModelError(f"{path} is a vocabulary of SentencePiece's kind, which needs tokenizer.json")
    return words


def _merges(path: Path, words: dict[str, int]) -> Iterator[tuple[str, str]]:
    """The pairs of merges.txt. ModelError for a line that is none, or makes what the vocabulary lacks."""
    for number, line in enumerate(read_text(path, MOST_MERGES).split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not space or any(part not in words for part in (left, right, left + right)):
            raise ModelError(
                f"{path}, line {number}: {shown(line)} does not merge two tokens of vocab.json into a third"
            )
        yield left, right
