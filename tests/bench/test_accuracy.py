"""The accuracy bench: its figures against transformers' own, what must hold of any width, and wrong input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import Tiny, reference_logits
from tokenizers import Tokenizer
from typer.testing import CliRunner

from tuili.base.config import Config
from tuili.base.errors import ConfigError
from tuili.bench.accuracy import STORIES, WIDTHS, JudgedText, markdown, measure, read_documents, widths_of
from tuili.cli import app

TEXTS = [JudgedText("Once upon a time there was a small fox."), JudgedText("It slept.", prompt="What did it do?")]


def test_perplexity_is_that_of_transformers(tiny: Tiny) -> None:
    path = tiny("llama")
    report = measure(Config(model=str(path)), TEXTS[:1], {})
    ids = Tokenizer.from_file(str(path / "tokenizer.json")).encode(TEXTS[0].text).ids
    logits = reference_logits(path, ids).double().log_softmax(-1)[:-1]
    nll = -logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    (arm,) = report["arms"]
    assert arm["perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    assert (arm["kl_mean"], arm["top1_agreement"], report["text"]["tokens"]) == (0.0, 1.0, len(ids) - 1)


def test_wider_is_closer_and_sizes_are_told(tiny: Tiny) -> None:
    report = measure(Config(model=str(tiny("qwen3"))), TEXTS, WIDTHS)
    arms = {arm["width"]: arm for arm in report["arms"]}
    assert arms.keys() == WIDTHS.keys()
    assert report["text"]["tokens"] == len(TEXTS[0].text) - 1 + len(TEXTS[1].text), "of a chat only the answer counts"
    divergence = {name: arm["kl_mean"] for name, arm in arms.items()}
    assert 0 <= divergence["int8 weight-only"] < divergence["int4 weight-only"]
    assert divergence["int8"] < divergence["int4 g32"]
    assert divergence["bfloat16 + int8 KV"] > 0
    sizes = [arms[name]["weight_bytes"] for name in ("float32", "bfloat16", "int8", "int4 g32", "int4 g64")]
    assert sizes == sorted(sizes, reverse=True)
    assert report["provenance"]["kind"] == "measured"
    page = markdown(report)
    assert all(f"| {name} |" in page for name in WIDTHS)


def test_the_command_writes_json_and_table(tiny: Tiny, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "accuracy.json"
    text.write_text("A short story. " * 30)
    command = ["bench", "accuracy", "--model", str(tiny("llama")), "--text", str(text), "--widths", "int8"]
    done = CliRunner().invoke(app, [*command, "--save-result", str(out)])
    assert done.exit_code == 0, done.output
    assert [arm["width"] for arm in json.loads(out.read_text())["arms"]] == ["float32", "int8"]
    assert "| int8 |" in out.with_suffix(".md").read_text()
    assert "int8" in done.output


def test_input_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'int9'\. Did you mean 'int8'"):
        widths_of("int9")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_documents(tmp_path / "none.txt", 5)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "no text"}\n')
    with pytest.raises(ConfigError, match="string 'text'"):
        read_documents(broken, 5)


def test_the_stories_are_held_out() -> None:
    if not STORIES.is_file():
        pytest.skip("benchmarks/data is not here: no checkout")
    from tuili.train.corpus import Document

    documents = read_documents(None, 100)
    assert len({document.text for document in documents}) == 60
    assert all(Document("any", document.prompt or "", document.text).held_out for document in documents)
