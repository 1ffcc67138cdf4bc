"""Tokenizers from the files of a checkpoint."""

from __future__ import annotations

import json

import pytest
from engine_parts import KINDS, TEXTS, byte_level, sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from tuili.base.errors import ModelError
from tuili.engine.pieces import compile_decoder
from tuili.engine.tokenizer import Tokenizer


def write(tokenizer: Tokenizer, folder, config: dict | None = None):
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_open_equals_what_was_saved(kind, tmp_path):
    tokenizer = KINDS[kind]()
    again = Tokenizer.open(write(tokenizer, tmp_path, tokenizer.config))
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    assert (again.vocab_size, again.bos, again.eos) == (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos)


def test_special_tokens_may_be_objects_and_may_come_from_the_map(tmp_path):
    write(byte_level(), tmp_path, {"eos_token": {"content": "<|end|>", "special": True}, "bos_token": None})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|start|>", "eos_token": "wrong"}))
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.special_tokens == {"eos_token": "<|end|>", "pad_token": "<|start|>"}
    assert tokenizer.eos == tokenizer.token_id("<|end|>")
    assert tokenizer.bos is None


def test_bos_follows_the_config_where_it_says_something():
    tokenizer = sentencepiece()
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [tokenizer.bos, *plain]
    assert Tokenizer(tokenizer.backend, {**tokenizer.config, "add_bos_token": False}).encode("hello") == plain
    assert Tokenizer(tokenizer.backend, {"bos_token": "<s>"}).encode("hello") == tokenizer.backend.encode("hello").ids


def test_tokens_of_a_text_have_the_bytes_of_the_text():
    tokenizer = byte_level()
    for text in TEXTS:
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert tokenizer.token_bytes(10**6) == b""
    part = tokenizer.backend.encode("🙂").ids[0]
    assert tokenizer.token_text(part) == "\ufffd"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "tokenizer.json"),
        ({"tokenizer.json": "{"}, "cannot be read"),
        ({"vocab.json": "{}"}, "merges.txt"),
        ({"tokenizer_config.json": "[]"}, "must hold a JSON object"),
        ({"tokenizer_config.json": "{"}, "cannot be read as JSON"),
    ],
)
def test_what_is_missing_or_damaged_is_said(files, said, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=said):
        Tokenizer.open(tmp_path)


def test_a_decoder_that_works_on_whole_texts_is_refused():
    with pytest.raises(ModelError, match="WordPiece"):
        compile_decoder(json.loads(decoders.WordPiece().__getstate__()))
    with pytest.raises(ModelError, match="literal"):
        compile_decoder({"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"})


@pytest.mark.parametrize("name", ["gpt2", "qwen2.5"])
def test_real_vocabularies_without_tokenizer_json(name, shared):
    """Against transformers' own conversion of the same files."""
    from transformers import GPT2Tokenizer, Qwen2Tokenizer

    folder = shared / "data" / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which is not here")
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    reference = (GPT2Tokenizer if name == "gpt2" else Qwen2Tokenizer)(**files)
    tokenizer = Tokenizer.open(folder)
    for text in [*TEXTS, "  two  spaces\r\n\r\n 12345 don't I'LL", "ﬁ ligature, e\u0301, \u00a0nbsp"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)
    if name == "qwen2.5":
        assert tokenizer.eos == 151645
        assert tokenizer.encode("<|im_start|>user") == [151644, 872]
        assert tokenizer.decode([151644, 872]) == "user"


def test_the_backend_does_not_cut_long_texts(tmp_path):
    backend = Backend.from_str(byte_level().backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    assert len(Tokenizer(backend).encode("a" * 500)) == len(byte_level().encode("a" * 500))
