"""Tokens that stand in files beside tokenizer.json: markers of chats, ends of texts, names for special ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from tuili.base.errors import ModelError
from tuili.models.fields import Fields
from tuili.models.read import read_json

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
WHERE = "tokenizer_config.json"


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Names of special tokens (``ROLES``, and those that a model has of its own) to their texts, for templates.

    A token may be written as a string or as ``{"content": ...}``. ModelError for what is neither.
    """
    fields = Fields(config, WHERE)
    own = [key for key, value in config.items() if key.endswith("_token") and isinstance(value, str | dict)]
    named = {key: config[key] for key in dict.fromkeys((*ROLES, *own)) if config.get(key)}
    table = config.get("extra_special_tokens")
    named |= table if isinstance(table, dict) else {}
    return {key: _content(fields, key, token) for key, token in named.items()}


def special_texts(config: Mapping[str, Any]) -> list[str]:
    """The texts of all tokens that ``config`` makes special, each once."""
    fields = Fields(config, WHERE)
    found = list(special_tokens(config).values())
    for key in ("extra_special_tokens", "additional_special_tokens"):
        listed = config.get(key) or []
        if not isinstance(listed, list | dict):
            raise fields.wrong(key, "a list of tokens")
        found += [_content(fields, key, token) for token in listed] if isinstance(listed, list) else []
    found += [token.content for _, token in _decoded(config) if token.special]
    return list(dict.fromkeys(found))


def add_missing(backend: Backend, folder: Path, config: Mapping[str, Any]) -> None:
    """Add to ``backend`` what the files of ``folder`` name and it does not have, under their own ids, as transformers.

    ModelError where an id is given that the token cannot have: it would be another row of the embedding.
    """
    special = special_texts(config)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for id, token in sorted({**dict(_legacy(folder, special)), **dict(_decoded(config))}.items()):
        if token.content in known:
            continue
        old = backend.token_to_id(token.content)
        backend.add_tokens([token])
        known.add(token.content)
        if old is None and (new := backend.token_to_id(token.content)) != id:
            raise ModelError(
                f"{folder}: token {token.content!r} has id {id} in added_tokens.json or {WHERE}, and the next free one "
                f"is {new}: tokens between them are missing; write a tokenizer.json that has all"
            )
    missing = [text for text in special if text not in known]
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in missing])


def _decoded(config: Mapping[str, Any]) -> Iterator[tuple[int, AddedToken]]:
    """``added_tokens_decoder``: ids as strings to tokens with their flags."""
    table = Fields(config, WHERE).inside("added_tokens_decoder")
    for key in table.config:
        entry = table.inside(key)
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise ModelError(f"{table.where}: {key!r:.40} is not supported: expected a token id")
        flags = {flag: entry.flag(flag) for flag in FLAGS if entry.config.get(flag) is not None}
        yield int(key), AddedToken(entry.text("content"), **flags)


def _legacy(folder: Path, special: list[str]) -> Iterator[tuple[int, AddedToken]]:
    """added_tokens.json: texts to ids. Special are those that are named so elsewhere."""
    fields = Fields(read_json(folder / "added_tokens.json", optional=True), "added_tokens.json")
    for text in fields.config:
        yield (
            fields.integer(text, least=0),
            AddedToken(text, special=text in special, normalized=text not in special),
        )


def _content(fields: Fields, key: str, token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise fields.wrong(key, "a token's text, or a table with its content")
    return content
