"""Options are made from ``base.config``: every field, every command; defaults < file < command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tuili.base import config as base
from tuili.base.config import Config
from tuili.cli.config import markdown
from tuili.cli.options import COMMAND_LINE, DEFAULT, flag

if TYPE_CHECKING:
    from conftest import Invoke
    from tiny_models import Tiny

FIELDS = [item.name for item in base.options()]


def shown(tuili: Invoke, *words: Any) -> dict[str, dict[str, Any]]:
    result = tuili("config", "show", "--no-resolve", "--json", *words)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def other_value(name: str) -> Any:
    """A valid value of the option that is not its default."""
    item = next(item for item in base.options() if item.name == name)
    kind, _ = base.option_type(name)
    if item.metadata["choices"]:
        return next(choice for choice in item.metadata["choices"] if choice != item.default)
    if kind is bool:
        return not item.default
    if kind is float:
        return 0.5
    return min(2048, item.metadata["maximum"] or 2048) if kind is int else "other"


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_has_a_flag_and_a_file_key(tuili: Invoke, name: str, tmp_path: Path) -> None:
    value = other_value(name)
    if name == "model":
        words = [value]
    elif isinstance(value, bool):
        words = [flag(name) if value else f"--no-{flag(name)[2:]}"]
    else:
        words = [flag(name), value]
    assert shown(tuili, *words)[name] == {"value": value, "source": COMMAND_LINE}
    file = tmp_path / "tuili.toml"
    file.write_text(f"{name} = {json.dumps(value)}\n")
    assert shown(tuili, "--config", file)[name] == {"value": value, "source": f"file {file}"}


def test_help_names_every_option_with_its_sentence(tuili: Invoke) -> None:
    text = " ".join(tuili("serve", "--help", env={"COLUMNS": "250"}).stdout.replace("│", " ").split())
    for item in base.options():
        assert item.name == "model" or flag(item.name) in text
        assert item.metadata["help"].split(";")[0] in text


def test_order_of_sources(tuili: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "tuili.toml"
    file.write_text("[scheduler]\nmax_num_seqs = 3\nmax_num_batched_tokens = 300\n[server]\nport = 1\n")
    got = shown(tuili, "here", "--config", file, "--max-num-seqs", 7, "--no-enable-prefix-caching")
    assert got["max_num_seqs"] == {"value": 7, "source": COMMAND_LINE}
    assert got["max_num_batched_tokens"] == {"value": 300, "source": f"file {file}"}
    assert got["port"] == {"value": 1, "source": f"file {file}"}
    assert got["enable_prefix_caching"] == {"value": False, "source": COMMAND_LINE}
    assert got["model"] == {"value": "here", "source": COMMAND_LINE}
    assert got["block_size"] == {"value": Config().block_size, "source": DEFAULT}


def test_nothing_given_is_the_defaults(tuili: Invoke) -> None:
    got = shown(tuili)
    assert {name: entry["value"] for name, entry in got.items()} == {name: getattr(Config(), name) for name in FIELDS}
    assert {entry["source"] for entry in got.values()} == {DEFAULT}


def test_resolved_config_reads_back_to_itself(tuili: Invoke, tiny: Tiny, tmp_path: Path) -> None:
    """Law 12: the TOML that is printed gives the same run; no auto is left in what shapes it."""
    model = tiny("llama")
    result = tuili("config", "show", model, "--toml", "--max-num-seqs", 5)
    assert result.exit_code == 0, result.output
    file = tmp_path / "run.toml"
    file.write_text(result.stdout)
    first = base.load(file, {})
    assert (first.max_num_seqs, first.device, first.dtype) == (5, "cpu", "float32")
    assert None not in (first.max_model_len, first.num_gpu_blocks_override, first.max_num_batched_tokens, first.threads)
    again = tuili("config", "show", "--toml", "--config", file)
    assert again.stdout == result.stdout


def test_show_says_what_the_machine_decided(tuili: Invoke, tiny: Tiny) -> None:
    text = tuili("config", "show", tiny("llama"), env={"COLUMNS": "200"}).stdout
    line = next(line for line in text.splitlines() if "max_model_len" in line)
    assert "256" in line
    assert "auto (resolved)" in line


def test_explain_one_option(tuili: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "tuili.toml"
    file.write_text("block_size = 32\n")
    text = tuili("config", "explain", "block-size", "--config", file).stdout
    for part in (
        "--block-size",
        "Positions per KV block",
        "tokens",
        "1 .. 1024",
        "default  16",
        f"32 (set by: file {file})",
    ):
        assert part in text
    assert tuili("config", "explain", "blok_size").exit_code != 0


def test_the_reference_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == markdown(), "run: tuili config reference > docs/configuration.md"


def test_the_reference_page_has_every_option() -> None:
    for item in base.options():
        row = next(line for line in markdown().splitlines() if line.startswith(f"| `{flag(item.name)}` "))
        assert item.metadata["help"] in row
        assert row.count(" | ") == 4
