"""A small mutation suite (`make mutants`): the code is changed in one place at a time, and the tests have to notice.

Changes: comparisons, signs, connectives and constants are turned, conditions negated, calls and assignments left out,
results replaced by None. Of all that are possible as many are tried, in an order that a seed decides, as ``--minutes``
allow. The survivors are listed with file, line and change: each is a test that is missing, or a change that changes
nothing.

    python .ci/mutants.py [--minutes 15] [--workers 2] [--seed 0] [--only core/scheduler.py]
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeGuard

ROOT = Path(__file__).resolve().parents[1]
#: What is changed, and the tests that have to notice, the quickest first.
TARGETS = {
    "core/*.py": (
        *("tests/core/test_scheduler_mutants.py", "tests/core/test_scheduler_laws.py", "tests/core/test_kv_cache.py"),
        *("tests/core/test_scheduler_equality.py", "tests/core/test_simulated.py"),
    ),
    "runtime/sampler.py": ("tests/runtime/test_sampler_mixed.py", "tests/runtime/test_sampler.py"),
    "engine/text.py": ("tests/engine/test_text_engine.py", "tests/engine/test_clients.py"),
    "server/stream.py": ("tests/server/test_server_answers.py",),
}
#: Runs pytest on the copy in PYTHONPATH: an editable install answers imports before that does.
RUN_PYTEST = (
    "import sys, pytest; sys.meta_path[:] = [f for f in sys.meta_path if 'Redirecting' not in type(f).__name__]; "
    "sys.exit(pytest.main(sys.argv[1:]))"
)
OPTIONS = ["-x", "-q", "-n", "0", "-p", "no:randomly", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult}


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before}  ->  {self.after}"


def mutants_of(path: Path, file: str) -> Iterator[Mutant]:
    source = path.read_text()
    for node, other in _changes(ast.parse(source)):
        start, end = _span(source, node)
        before, after = source[start:end], other if isinstance(other, str) else ast.unparse(other)
        changed = source[:start] + (f"({after})" if isinstance(node, ast.expr) else after) + source[end:]
        yield Mutant(file, node.lineno, " ".join(before.split())[:80], " ".join(after.split())[:80], changed)


def _span(source: str, node: ast.expr | ast.stmt) -> tuple[int, int]:
    lines = source.splitlines(keepends=True)
    assert node.end_lineno is not None
    assert node.end_col_offset is not None

    def place(line: int, column: int) -> int:
        return sum(map(len, lines[: line - 1])) + len(lines[line - 1].encode()[:column].decode())

    return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)


def _changes(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, ast.AST | str]]:
    """Every node that may be changed below ``node``, and what takes its place. Not messages, types and assertions."""
    for name, child in _children(node):
        if isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.AnnAssign):
            continue
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        yield from _replacements(child)
        yield from _changes(child)


def _children(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield name, child


def _replacements(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, ast.AST | str]]:
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            ops = [*node.ops[:i], COMPARED[type(op)](), *node.ops[i + 1 :]]
            yield node, ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        yield node, ast.BinOp(node.left, COMPUTED[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield node, ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for i in range(len(node.values)):
            rest = [*node.values[:i], *node.values[i + 1 :]]
            yield node, rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int):
        yield node, ast.Constant(not node.value if type(node.value) is bool else node.value + 1)
    elif isinstance(node, ast.IfExp | ast.If | ast.While):
        yield node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield node, "return None"
    elif _is_effect(node):
        yield node, "pass"


def _is_effect(node: ast.AST) -> TypeGuard[ast.stmt]:
    """A statement that only changes something: a call, or an assignment to a part of an object."""
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    return isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def run_tests(copy: Path, tests: tuple[str, ...], limit: float) -> bool:
    """Whether the tests pass on the package in ``copy``. A run that takes too long has noticed."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN_PYTEST, *tests, *OPTIONS, "-m", "not slow"]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1, 2):  # 2: the package cannot be imported any more
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


class Suite:
    """Copies of the package, one for each worker, and how long the tests of each target take on the real one."""

    def __init__(self, folder: Path, workers: int):
        self.copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(workers):
            copy = folder / str(number)
            shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
            self.copies.put(copy)
        self.seconds: dict[str, float] = {}

    def measure(self, pattern: str) -> float:
        """Seconds that the target's tests take. RuntimeError where they fail as it is."""
        copy, began = self.copies.get(), time.monotonic()
        passed = run_tests(copy, TARGETS[pattern], 600)
        self.copies.put(copy)
        if not passed:
            raise RuntimeError(f"the tests of {pattern} fail already: {' '.join(TARGETS[pattern])}")
        self.seconds[pattern] = time.monotonic() - began
        return self.seconds[pattern]

    def survives(self, pattern: str, mutant: Mutant) -> bool:
        copy = self.copies.get()
        path = copy / "tuili" / mutant.file
        original = path.read_text()
        try:
            path.write_text(mutant.source)
            return run_tests(copy, TARGETS[pattern], 20 + 4 * self.seconds[pattern])
        finally:
            path.write_text(original)
            self.copies.put(copy)


def collect(only: str | None, seed: int) -> list[tuple[str, Mutant]]:
    """All mutants, shuffled."""
    package = ROOT / "src" / "tuili"
    found = [
        (pattern, mutant)
        for pattern in TARGETS
        for path in sorted(package.glob(pattern))
        for mutant in mutants_of(path, path.relative_to(package).as_posix())
        if only is None or mutant.file == only
    ]
    random.Random(seed).shuffle(found)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a file below src/tuili")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    every = collect(options.only, options.seed)
    tried, survivors = 0, []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(options.workers) as pool:
        suite = Suite(Path(folder), options.workers)
        for pattern in dict.fromkeys(pattern for pattern, _ in every):
            print(f"{pattern}: the tests take {suite.measure(pattern):.0f} s", flush=True)

        def attempt(work: tuple[str, Mutant]) -> tuple[Mutant, bool | None]:
            pattern, mutant = work
            late = time.monotonic() + suite.seconds[pattern] > end
            return mutant, None if late else suite.survives(pattern, mutant)

        for mutant, survived in pool.map(attempt, every):
            tried += survived is not None
            if survived:
                survivors.append(mutant)
                print(f"survived  {mutant}", flush=True)
    print(f"{len(every)} mutants, {tried} tried with seed {options.seed}, {len(survivors)} survived:")
    for mutant in sorted(survivors, key=lambda mutant: (mutant.file, mutant.line)):
        print(f"  {mutant}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
