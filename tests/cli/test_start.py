"""The command as a process: it starts fast, loads nothing heavy, and ends with one message and the right exit code."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tuili.cli import VERBS

HEAVY = ("torch", "uvicorn", "transformers", "numpy", "tokenizers", "huggingface_hub")


def tuili(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tuili", *words],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def best(words: list[str]) -> float:
    """Seconds of CPU, the best of three: other processes do not count."""
    times = []
    for _ in range(3):
        before = cpu_seconds()
        subprocess.run([sys.executable, *words], capture_output=True, timeout=60, check=True)
        times.append(cpu_seconds() - before)
    return min(times)


def test_help_is_fast() -> None:
    """At most twice of what it takes to import the libraries that print it, whatever the machine."""
    libraries = best(["-c", "import typer, typer.rich_utils, rich.markdown"])
    assert best(["-m", "tuili", "--help"]) < 2 * libraries
    done = tuili("--help")
    assert done.returncode == 0
    for verb in ("serve", "run", "bench", "doctor", "config"):
        assert verb in done.stdout


@pytest.mark.parametrize(
    "words", [["--help"], ["serve", "--help"], ["config", "reference"], ["bench", "serve", "--help"]]
)
def test_nothing_heavy_is_imported(words: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['tuili', *{words!r}]\n"
        "from tuili.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        f"print('HEAVY', code, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY 0 []"


@pytest.mark.parametrize("verb", VERBS)
def test_the_line_of_a_verb_begins_as_its_own_help(verb: str) -> None:
    said = " ".join(tuili(verb, "--help").stdout.split())
    start = VERBS[verb][1].split(",")[0].split(";")[0].rstrip(".")
    assert start in said


def test_version() -> None:
    import tuili as package

    assert tuili("--version").stdout == f"tuili {package.__version__}\n"


def test_an_error_is_one_message_and_exit_1(tmp_path: Path) -> None:
    done = tuili("run", str(tmp_path / "nowhere"), "--prompt", "hello")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("tuili: error: ")
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = tuili("config", "explain", "no_such_option", TUILI_LOG="DEBUG")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["serve", "--no-such-option"], "--no-such-option"),
        (["serve", "--dtype", "int3"], "float32"),
        (["serve", "--max-num-seqs", "0"], "--max-num-seqs"),
        (["serve", "--port", "x"], "--port"),
        (["run", "--prompt", ""], "empty"),
        (["run"], "standard input is empty"),
        (["bench", "serve", "stray"], "stray"),
        (["no-such-verb"], "no-such-verb"),
    ],
)
def test_usage_errors_are_exit_2(words: list[str], named: str) -> None:
    done = tuili(*words)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_a_config_error_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "tuili.toml"
    file.write_text("max_num_seq = 3\n")
    done = tuili("config", "show", "--no-resolve", "--config", str(file))
    assert done.returncode == 1
    assert "Did you mean 'max_num_seqs'?" in done.stderr


def test_a_full_or_closed_standard_output_is_one_message() -> None:
    for place, said in (("/dev/full", "No space left"), ("&-", "closed")):
        command = f"{sys.executable} -m tuili run --prompt hi --max-tokens 3 >{place}"
        done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=120)
        assert done.returncode == 1
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_context_that_serves_nothing_is_refused() -> None:
    done = tuili("config", "show", "embedded", "--max-model-len", "1")
    assert done.returncode == 2
    assert "--max-model-len" in done.stderr
