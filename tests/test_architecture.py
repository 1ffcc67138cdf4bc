"""The house holds: imports only go down the floors of DESIGN.md 3, and no torch where the control plane lives."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "tuili"

#: Package to floor. Packages of one floor do not import each other.
FLOORS = {
    "base": 0,
    "ops": 1,
    "core": 1,
    "quant": 2,
    "layers": 3,
    "models": 4,
    "runtime": 5,
    "executors": 6,
    "tiers": 6,
    "engine": 7,
    "server": 8,
    "quantize": 8,
    "train": 8,
    "plan": 8,
    "bench": 8,
    "cost": 8,
    "evals": 8,
    "deploy": 8,
    "optimize": 9,
    "cli": 10,
    "__main__": 11,
}

#: Modules that must be importable where torch is not installed.
NO_TORCH = (
    *("base", "core", "quant.scheme", "quant.formats", "layers.spec", "layers.sizes", "models"),
    *("engine.engine", "engine.outputs", "engine.resolve", "executors.simulated", "bench", "plan", "cli"),
)


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(p for p in parts if p != "__init__")] = path
    return names


def running(path: Path) -> Iterator[ast.AST]:
    """What of a module runs: all but what is under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    return (node for node in ast.walk(tree) if id(node) not in typing_only)


def runtime_imports(path: Path) -> set[str]:
    """Modules of Tuili that ``path`` imports when it runs."""
    found = set()
    for node in running(path):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{a.name}" for a in node.names} if node.module == "tuili" else {node.module}
    return {name for name in found if name.split(".")[0] == "tuili"}


@pytest.mark.parametrize("name", [n for n in modules() if n])
def test_imports_go_down(name: str) -> None:
    package = name.split(".")[0]
    assert package in FLOORS, f"{name}: put the package {package!r} on a floor of FLOORS (and of docs/structure.md)"
    for target in runtime_imports(modules()[name]):
        parts = target.split(".")
        if len(parts) < 2 or parts[1] == package or parts[1] not in FLOORS:
            continue
        assert FLOORS[parts[1]] < FLOORS[package], (
            f"{name} (floor {FLOORS[package]}) imports {target} above or beside it"
        )


def test_the_floor_test_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from tuili.server import app\n")
    assert runtime_imports(bad) == {"tuili.server"}


def test_no_torch_below_the_cut() -> None:
    wanted = [n for n in modules() if any(n == p or n.startswith(p + ".") for p in NO_TORCH)]
    assert len(wanted) > 15
    script = f"""
import importlib, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'transformers'):
            raise ImportError(f'{{name}} is not installed')
sys.meta_path.insert(0, NoTorch())
for name in {wanted!r}:
    importlib.import_module('tuili.' + name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_pickle_and_no_remote_code() -> None:
    for name, path in modules().items():
        source = path.read_text()
        for word in ("import pickle", "torch.load(", "trust_remote_code=True", "weights_only=False"):
            assert word not in source, f"{name} contains {word!r}"


def test_a_class_name_is_defined_once() -> None:
    """One word per concept (DESIGN.md 4): a name that stands for two things does not grep."""
    places: dict[str, list[str]] = {}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), []).append(name)
    assert {word: found for word, found in places.items() if len(found) > 1} == {}


def test_packages_have_no_cycles() -> None:
    """No module needs itself, by whatever way, also where imports are put off; the root's lazy names are no need."""
    names = set(modules()) - {""}
    graph = {name: _needs(modules()[name], names) for name in names}
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for target in graph[name]:
                walk(target, (*way, name))
            done.add(name)

    for name in sorted(names):
        walk(name, ())


def _needs(path: Path, names: set[str]) -> set[str]:
    """The modules among ``names`` that things are taken from when ``path`` runs, not the packages around them."""
    found = set()
    for node in running(path):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tuili."):
            package = node.module.removeprefix("tuili.")
            found |= {own if (own := f"{package}.{a.name}") in names else package for a in node.names}
    return found & names
