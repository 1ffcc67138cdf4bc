"""``tuili train`` from the command line, on a tiny recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tuili.base.errors import ConfigError
from tuili.cli.train import app

RECIPE = """
name = "tiny"
[data]
categories = ["night", "day"]
max_len = 160
[tokenizer]
vocab_size = 400
[model]
hidden_size = 32
intermediate_size = 48
num_layers = 1
num_heads = 2
num_kv_heads = 1
head_dim = 16
[train]
steps = 2
batch_tokens = 300
[report]
line_every = 0
sample_tokens = 4
sample_prompts = ["Tell a story."]
"""


def test_pretrain_evaluate_and_export(archive: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)
    where = [str(recipe), "--data", str(archive), "--out", str(tmp_path / "run")]
    made = CliRunner().invoke(app, ["pretrain", *where], catch_exceptions=False)
    assert made.exit_code == 0
    assert "step 2  loss" in made.stderr
    assert json.loads(made.stdout)["step"] == 2
    measured = CliRunner().invoke(app, ["evaluate", *where], catch_exceptions=False)
    assert json.loads(measured.stdout) == json.loads(made.stdout)
    exported = CliRunner().invoke(
        app, ["export", str(recipe), str(tmp_path / "copy"), *where[1:]], catch_exceptions=False
    )
    assert exported.exit_code == 0
    written, copy = tmp_path / "run" / "model", tmp_path / "copy"
    files = sorted(p.name for p in written.iterdir())
    assert files == sorted(p.name for p in copy.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "MODEL_CARD.md", "chat_template.jinja"} < set(files)
    assert all((written / name).read_bytes() == (copy / name).read_bytes() for name in files)


def test_errors_are_typed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe at"):
        CliRunner().invoke(app, ["pretrain", str(tmp_path / "absent.toml")], catch_exceptions=False)
