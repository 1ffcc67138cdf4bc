"""The doctor's verdicts: what is there, what is missing and how to get it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tuili.base.gpu import Card
from tuili.base.hardware import Hardware
from tuili.cli import doctor as module
from tuili.cli.doctor import FAIL, PASS, WARN, examine
from tuili.ops.cpu import LibrarySupport
from tuili.ops.triton import TritonSupport

if TYPE_CHECKING:
    from conftest import Invoke

GIB = 1 << 30


def machine(**fields: object) -> Hardware:
    good = {"cpu": "x", "cores": 4, "isa": frozenset({"avx2"}), "total_memory": 64 * GIB, "available_memory": 32 * GIB}
    return Hardware(**{**good, **fields})  # type: ignore[arg-type]


def test_json_is_clean_and_agrees_with_the_exit_code(tuili: Invoke) -> None:
    result = tuili("doctor", "--json")
    report = json.loads(result.stdout)
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    assert set(verdicts.values()) <= {PASS, WARN, FAIL}
    assert {
        "python",
        "cpu",
        "memory",
        "packages",
        "torch",
        "compiler",
        "gpu",
        "triton",
        "backend",
        "limits",
        "embedded model",
        "disk",
    } <= set(verdicts)
    assert verdicts["torch"] == verdicts["packages"] == verdicts["plugins"] == PASS
    assert report["ok"] == (FAIL not in verdicts.values())
    assert result.exit_code == (0 if report["ok"] else 1)
    for check in report["checks"]:
        assert check["verdict"] == PASS or check["fix"], "what is not well says what to do"


@pytest.mark.parametrize(
    ("look", "hardware", "verdict"),
    [
        (module.memory, machine(available_memory=GIB // 4), FAIL),
        (module.memory, machine(available_memory=GIB), WARN),
        (module.memory, machine(), PASS),
        (module.processor, machine(isa=frozenset()), WARN),
        (module.processor, machine(cores=1), WARN),
        (module.processor, machine(), PASS),
    ],
)
def test_hardware_verdicts(look: object, hardware: Hardware, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuili.base.hardware.probe", lambda: hardware)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    check = look()  # type: ignore[operator]
    assert check.verdict == verdict
    assert bool(check.fix) == (verdict != PASS)


H200 = Card("NVIDIA H200", 140 * GIB, 100 * GIB, count=2)


@pytest.mark.parametrize(
    ("card", "usable", "verdict", "found"),
    [
        (None, False, PASS, "none"),
        (H200, True, PASS, "NVIDIA H200, 100.0 GiB free of 140.0 GiB, the first of 2"),
        (H200, False, WARN, "this torch cannot use it"),
    ],
)
def test_the_card_and_whether_torch_can_use_it(
    card: Card | None, usable: bool, verdict: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuili.base.gpu.find", lambda: card)
    monkeypatch.setattr("torch.cuda.is_available", lambda: usable)
    monkeypatch.setattr("shutil.which", lambda name: None)
    check = module.gpu()
    assert check.verdict == verdict
    assert found in check.found


@pytest.mark.parametrize(
    ("card", "here", "verdict", "found"),
    [
        (H200, TritonSupport(True, card="NVIDIA H200"), PASS, "for NVIDIA H200"),
        (H200, TritonSupport(False, why="Triton is not installed"), WARN, "references"),
        (None, TritonSupport(False, why="no CUDA device"), PASS, "not used: no CUDA device"),
        (None, TritonSupport(True, interpreted=True), PASS, "interpreted"),
    ],
)
def test_whether_triton_kernels_run(
    card: Card | None, here: TritonSupport, verdict: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuili.base.gpu.find", lambda: card)
    monkeypatch.setattr("tuili.ops.triton.describe", lambda: here)
    check = module.triton()
    assert check.verdict == verdict
    assert found in check.found
    assert bool(check.fix) == (verdict != PASS)


@pytest.mark.parametrize(
    ("here", "verdict", "fix"),
    [(LibrarySupport("avx2", 2, ""), PASS, ""), (LibrarySupport("", 0, "not built"), WARN, "apt install g++")],
)
def test_no_compiler_matters_where_the_kernels_are_not_built(
    here: LibrarySupport, verdict: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("tuili.ops.cpu.describe", lambda: here)
    check = module.compiler()
    assert check.verdict == verdict
    assert fix in check.fix
    assert bool(check.fix) == bool(fix)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NEEDED", ("typer", "no-such-package-of-ours"))
    check = module.packages()
    assert (check.verdict, check.fix) == (FAIL, "pip install no-such-package-of-ours")


def test_a_missing_embedded_model_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr("tuili.__file__", f"{tmp_path}/__init__.py")
    check = module.embedded()
    assert check.verdict == FAIL
    assert "model.safetensors" in check.found
    assert "tuili train" in check.fix


def test_a_check_that_breaks_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Hardware:
        raise OSError("no /proc here")

    monkeypatch.setattr("tuili.base.hardware.probe", broken)
    verdicts = {check.found: check.verdict for check in examine()}
    assert verdicts["could not look: OSError: no /proc here"] == FAIL


def test_text_shows_every_check(tuili: Invoke) -> None:
    text = tuili("doctor", env={"COLUMNS": "200"}).stdout
    for check in examine():
        assert f"{check.verdict:<5}{check.name}" in text
