"""The tokenizer round-trips any text, and its template writes what the trainer trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tuili.train import tokenizer

BPE = tokenizer.train(["Once upon a time there was a fox."] * 10, 300)


def test_specials_come_first_and_every_byte_is_there() -> None:
    assert [BPE.token_to_id(t) for t in tokenizer.SPECIALS] == [0, 1, 2]
    assert BPE.get_vocab_size() <= 300
    every = "".join(chr(i) for i in range(0x250)) + "推理 🦊"
    assert BPE.decode(BPE.encode(every).ids) == every


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    if not any(special in text for special in tokenizer.SPECIALS):
        assert BPE.decode(BPE.encode(text).ids) == text


def test_the_saved_template_is_the_trained_format(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(BPE, tmp_path, 64)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": "Hi 🦊"}]
    text = "<|im_start|>system\nYou tell stories.<|im_end|>\n<|im_start|>user\nHi 🦊<|im_end|>\n<|im_start|>assistant\n"
    assert loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == text
    ids = loaded.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == BPE.encode(text).ids == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert loaded.eos_token_id == 2
