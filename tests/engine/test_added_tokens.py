"""Tokens beside tokenizer.json: transformers, opening the same directory, is the oracle."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tuili.base.errors import ModelError
from tuili.engine.chat import ChatTemplate
from tuili.engine.tokenizer import Tokenizer

LETTERS = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
NEW = "<|my_start|>"
TEXT = f"a{NEW}b<|im_end|> {NEW}"


def stored(ordinary: str = "") -> dict[str, Any]:
    """tokenizer.json of 256 bytes and three markers, of which ``ordinary`` is not special."""
    backend = Backend(models.BPE(LETTERS, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(MARKERS))
    table = json.loads(backend.to_str())
    for entry in table["added_tokens"]:
        entry["special"] = entry["content"] != ordinary
    return table


def write(folder: Path, **files: Any) -> Path:
    """``files`` by their names without ending; None: no such file."""
    content = {"tokenizer": stored(), "config": {"model_type": "llama"}, "tokenizer_config": CLASS, **files}
    for name, value in content.items():
        if value is not None:
            (folder / (name if "." in name else f"{name}.json")).write_text(
                value if isinstance(value, str) else json.dumps(value)
            )
    return folder


def decoded(id: int, content: str, **flags: bool) -> dict[str, Any]:
    usual = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    return {"added_tokens_decoder": {str(id): {"content": content, **usual, **flags}}}


OLD: dict[str, Any] = {"tokenizer": None, "vocab": LETTERS, "merges.txt": ""}
BESIDE = {
    "added_tokens.json": {"added_tokens": {NEW: 259}},
    "added_tokens.json, named special": {
        "added_tokens": {NEW: 259},
        "special_tokens_map": {"eos_token": NEW},
    },
    "decoder": {"tokenizer_config": CLASS | decoded(259, NEW)},
    "decoder, ordinary": {"tokenizer_config": CLASS | decoded(259, NEW, special=False)},
    "decoder, stripping": {"tokenizer_config": CLASS | decoded(259, NEW, lstrip=True, rstrip=True)},
    "decoder of a token of the vocabulary": {"tokenizer_config": CLASS | decoded(64, "a")},
    "eos_token": {"tokenizer_config": CLASS | {"eos_token": NEW}},
    "eos_token as a table": {"tokenizer_config": CLASS | {"eos_token": {"content": NEW, "__type": "AddedToken"}}},
    "pad_token": {"tokenizer_config": CLASS | {"pad_token": NEW}},
    "special_tokens_map.json": {"special_tokens_map": {"eos_token": NEW}},
    "extra_special_tokens": {"tokenizer_config": CLASS | {"extra_special_tokens": [NEW]}},
    "extra_special_tokens with names": {"tokenizer_config": CLASS | {"extra_special_tokens": {"my_token": NEW}}},
    "additional_special_tokens": {"tokenizer_config": CLASS | {"additional_special_tokens": [NEW]}},
    "a name of its own": {"tokenizer_config": CLASS | {"my_token": NEW}},
    "eos_token is ordinary in tokenizer.json": {
        "tokenizer": stored("<|im_end|>"),
        "tokenizer_config": CLASS | {"eos_token": "<|im_end|>"},
    },
    "bos_token is ordinary in tokenizer.json": {
        "tokenizer": stored("<|im_end|>"),
        "tokenizer_config": CLASS | {"bos_token": "<|im_end|>"},
    },
    "made special by the decoder": {
        "tokenizer": stored("<|im_end|>"),
        "tokenizer_config": CLASS | decoded(258, "<|im_end|>"),
    },
    "old layout": {
        "tokenizer": None,
        "vocab": LETTERS,
        "merges.txt": "#version: 0.2\n",
        "tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|my_end|>"},
        "added_tokens": {NEW: 257, "<|my_end|>": 258, "<|endoftext|>": 256},
        "special_tokens_map": {"eos_token": "<|my_end|>", "additional_special_tokens": [NEW]},
    },
}


@pytest.mark.parametrize("name", BESIDE)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write(tmp_path, **BESIDE[name])
    tokenizer, oracle = Tokenizer.open(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = oracle(TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(TEXT, add_special_tokens=False) == ids
    if "old" not in name:  # Qwen2Tokenizer has a default that the directory does not name
        assert tokenizer.eos == oracle.eos_token_id
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == oracle.decode(ids, skip, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        *((model, None) for model in ("qwen2", "qwen3", "gpt2")),
        ("qwen2", CLASS),
        ("qwen2", {"add_prefix_space": True}),
        ("gpt2", {"add_prefix_space": True}),
        ("llama", {"tokenizer_class": "GPT2Tokenizer"}),
        ("llama", {"tokenizer_class": "Qwen2Tokenizer"}),
    ],
    ids=str,
)
def test_how_text_is_cut_follows_the_class_else_the_model(model: str, config: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    vocabulary = LETTERS | {"'T": 256, "12": 257, "Ã©": 258, "<|endoftext|>": 259}
    merges = "#version: 0.2\n' T\n1 2\nÃ ©\n"
    files = {"vocab": vocabulary, "merges.txt": merges, "config": {"model_type": model}}
    write(tmp_path, tokenizer=None, tokenizer_config=config, **files)
    tokenizer, oracle = Tokenizer.open(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a12 N'T I'm", "e\u0301 12<|endoftext|>", "DON'T  \n\n x"):
        assert tokenizer.encode(text) == oracle(text, add_special_tokens=False)["input_ids"]


def test_named_tokens_reach_templates(tmp_path: Path) -> None:
    extra = {"extra_special_tokens": {"think_token": "<|im_start|>"}, "own_token": {"content": "<|im_end|>"}}
    tokenizer = Tokenizer.open(write(tmp_path, tokenizer_config=CLASS | extra))
    template = ChatTemplate("{{ think_token }}{{ own_token }}{{ messages[0].content }}")
    said = template.render([{"role": "user", "content": "hi"}], special_tokens=tokenizer.special_tokens)
    assert said == "<|im_start|><|im_end|>hi"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"added_tokens": {NEW: 300}}, "has id 300.*next free one is 259"),
        ({"tokenizer_config": CLASS | decoded(300, NEW)}, "has id 300"),
        ({"added_tokens": {NEW: "259"}}, "added_tokens.json: .*='259'"),
        ({"added_tokens": {NEW: -1}}, "added_tokens.json"),
        ({"added_tokens": [NEW]}, "must hold a JSON object"),
        ({"tokenizer_config": CLASS | {"bos_token": 5}}, "tokenizer_config.json: bos_token=5"),
        ({"tokenizer_config": CLASS | {"bos_token": {"lstrip": False}}}, "tokenizer_config.json: bos_token="),
        ({"tokenizer_config": CLASS | {"eos_token": ["</s>"]}}, "tokenizer_config.json: eos_token="),
        ({"tokenizer_config": CLASS | {"extra_special_tokens": {"x": 1}}}, "tokenizer_config.json: x"),
        ({"tokenizer_config": CLASS | {"extra_special_tokens": 7}}, "extra_special_tokens=7"),
        ({"tokenizer_config": CLASS | {"additional_special_tokens": [7]}}, "additional_special_tokens="),
        ({"tokenizer_config": CLASS | {"added_tokens_decoder": []}}, "added_tokens_decoder="),
        ({"tokenizer_config": CLASS | {"added_tokens_decoder": {"x": {"content": "y"}}}}, "'x' is not supported"),
        ({"tokenizer_config": CLASS | {"added_tokens_decoder": {"259": "y"}}}, "added_tokens_decoder: 259='y'|259='y'"),
        ({"tokenizer_config": CLASS | {"added_tokens_decoder": {"259": {}}}}, "no 'content'"),
        ({"tokenizer_config": CLASS | decoded(259, NEW, special="yes")}, "special='yes'"),  # type: ignore[arg-type]
        ({"tokenizer_config": CLASS | {"add_bos_token": "yes"}}, "add_bos_token='yes'"),
        ({"special_tokens_map": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"}, "special_tokens_map.json cannot"),
        ({"tokenizer": '{"model":' + "[" * 100_000 + "]" * 100_000 + "}"}, "cannot be read"),
        ({"tokenizer": None, "vocab": {"a": 0, "b": 1}, "merges.txt": "a b\n"}, "merges.txt, line 1"),
        ({"tokenizer": None, "vocab": {"a": 0, "b": 1}, "merges.txt": "ab\n"}, "merges.txt, line 1"),
        ({"tokenizer": None, "vocab": {"a": 0, "b": "1"}, "merges.txt": ""}, "vocab.json: the id of 'b'"),
        ({"tokenizer": None, "vocab": {"a": 0, "<0x0A>": 1}, "merges.txt": ""}, "SentencePiece"),
        (OLD | {"tokenizer_config": {"tokenizer_class": "CLIPTokenizer"}}, "tokenizer_class='CLIPTokenizer'"),
        (OLD | {"tokenizer_config": {"tokenizer_class": 1}}, "tokenizer_class=1"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_what_cannot_be_is_named(files: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=says):
        Tokenizer.open(write(tmp_path, **files))


def test_large_ids_of_tokens_take_no_time(tmp_path: Path) -> None:
    table = stored()
    table["model"]["vocab"]["ab"] = (1 << 32) - 1
    start = time.process_time()
    assert Tokenizer.open(write(tmp_path, tokenizer=table)).encode("a") == [64]
    assert time.process_time() - start < 5
