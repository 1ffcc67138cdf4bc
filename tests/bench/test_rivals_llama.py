"""The arms of llama.cpp and its fork without either: batches by hand, a made-up library behind the fork's functions."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def rivals() -> None:
    """As in test_rivals.py: imported, and its folder off the path again."""
    sys.path.insert(0, str(BENCHMARKS))
    importlib.import_module("rivals")
    sys.path.remove(str(BENCHMARKS))


def context(size: int) -> Any:
    """One that remembers what it holds, and whose next token is the sum of all that a sequence has seen, modulo 97."""
    from rivals.batched import Context, Entry

    class Sums(Context):
        def __init__(self) -> None:
            super().__init__()
            self.size, self.held, self.calls = size, dict[int, list[int]](), list[int]()

        def clear(self) -> None:
            self.held = {}

        def cut(self, sequence: int, start: int) -> None:
            self.held[sequence] = self.held.get(sequence, [])[:start]

        def decode(self, entries: Sequence[Entry]) -> list[int]:
            assert 0 < len(entries) <= self.size
            self.calls.append(len(entries))
            made = []
            for token, position, sequence, wanted in entries:
                assert position == len(self.held[sequence]), "positions follow each other"
                self.held[sequence].append(token)
                made += [sum(self.held[sequence]) % 97] * wanted
            return made

    return Sums()


def expected(prompt: list[int], new: int) -> list[int]:
    seen = list(prompt)
    for _ in range(new):
        seen.append(sum(seen) % 97)
    return seen[len(prompt) :]


@pytest.mark.parametrize("size", [3, 7, 100])
def test_batches_give_each_request_what_it_gets_alone(size: int) -> None:
    prompts, made = [[5, 9, 2, 41], [7], [1, 2, 3]], context(size)
    for _ in range(2):  # the second time from the keys and values that are there
        rows = made.generate(prompts, 4)
        assert [[token for token, _ in row] for row in rows] == [expected(prompt, 4) for prompt in prompts]
        assert all(before <= after for row in rows for (_, before), (_, after) in pairwise(row))
    assert [[token for token, _ in row] for row in made.generate([[8, 8]], 3)] == [expected([8, 8], 3)]


def test_a_prompt_that_was_there_is_computed_for_its_last_token_only() -> None:
    made = context(100)
    made.generate([[1, 2, 3, 4]], 1)
    made.generate([[1, 2, 3, 4]], 1)
    assert made.calls == [4, 1]


def test_one_request_and_many_have_contexts_of_their_own() -> None:
    from rivals.batched import Batched
    from rivals.scenarios import MAX_LENGTH, MAX_POSITIONS, MAX_REQUESTS

    made: list[tuple[int, int]] = []

    def make(positions: int, sequences: int) -> Any:
        made.append((positions, sequences))
        return context(100)

    session = Batched(make)
    for prompts in ([[1]], [[1], [2]], [[3]], [[1]] * 32):
        session.generate(prompts, 2)
    assert made == [(MAX_LENGTH, 1), (MAX_POSITIONS, MAX_REQUESTS)]


def test_the_fork_runs_each_width_with_and_without_repacking() -> None:
    from rivals.arms import arms

    plain = {arm.width.name: arm.width for arm in arms(["llama.cpp"])}
    fork = {arm.width.name: arm.width for arm in arms(["ik_llama.cpp"])}
    assert fork.keys() == plain.keys() | {f"{name}-rtr" for name in plain}
    for name, width in fork.items():
        same = plain[name.removesuffix("-rtr")]
        assert (width.bits, width.group) == (same.bits, same.group), "in turns with the same width of llama.cpp"


def test_the_fork_without_a_source_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rivals import ikllama
    from rivals.rival import Places, Unavailable

    if not shutil.which("git"):
        pytest.skip("no git")
    monkeypatch.setattr(ikllama, "REPOSITORY", str(tmp_path / "nowhere"))
    with pytest.raises(Unavailable, match="git failed"):
        ikllama.fetch(Places(tmp_path))


def test_without_git_there_is_no_source_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rivals import ikllama
    from rivals.rival import Places, Unavailable

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="no git"):
        ikllama.fetch(Places(tmp_path))


def test_a_source_that_was_put_there_is_taken_as_it_is(tmp_path: Path) -> None:
    from rivals import ikllama
    from rivals.rival import Places

    source = tmp_path / "ik_llama.cpp" / "source"
    source.mkdir(parents=True)
    (source / "COMMIT").write_text("by hand")
    assert ikllama.fetch(Places(tmp_path)) == source
    assert sorted(source.iterdir()) == [source / "COMMIT"]


def test_what_is_called_by_ctypes_is_what_the_functions_take() -> None:
    from rivals.ikllama import FUNCTIONS

    code = (BENCHMARKS / "rivals" / "ikllama.cpp").read_text()
    found = {
        name: taken.count(",") + 1 for name, taken in re.findall(r"\bik_(\w+)\(([^)]*(?:\)\[4\][^)]*)?)\) \{", code)
    }
    assert found == {name: len(arguments) for name, (_, arguments) in FUNCTIONS.items()}


STUB = """
#include <cstdint>
#include <vector>
static float scores[97];
static std::vector<int32_t> seen;
extern "C" {
void *ik_load(const char *path, bool repack) { return path[0] == '!' ? nullptr : new int(repack); }
int ik_vocab(const void *) { return 97; }
void *ik_context(void *model, uint32_t, uint32_t, uint32_t) { return model; }
uint32_t ik_size(const void *) { return 3; }
void ik_clear(void *) { seen.clear(); }
void ik_cut(void *, int, int start) { seen.resize(start); }
int ik_decode(void *, const int32_t (*entries)[4], int count) {
    for (int at = 0; at < count; ++at) {
        if (entries[at][1] != int(seen.size()) || entries[at][2] != 0) return 7;
        seen.push_back(entries[at][0]);
    }
    return 0;
}
const float *ik_scores(void *model, int) {
    int sum = *static_cast<int *>(model);
    for (int token : seen) sum += token;
    for (int at = 0; at < 97; ++at) scores[at] = at == sum % 97;
    return scores;
}
uint32_t ik_quantize(const char *, const char *, int ftype) { return ftype != 7; }
}
"""


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_the_fork_is_driven_through_its_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rivals.ikllama import Engine, quantize

    (tmp_path / "stub.cpp").write_text(STUB)
    library = tmp_path / "librival.so"
    subprocess.run(["c++", "-shared", "-fPIC", tmp_path / "stub.cpp", "-o", library], check=True)
    monkeypatch.setenv("RIVALS_IK", str(library))
    timed = Engine().load(Path("model"), "q8_0", 2).generate([[5, 9, 2, 41]], 4)
    assert [token for token, _ in timed[0]] == expected([5, 9, 2, 41], 4)
    repacked = Engine().load(Path("model"), "q8_0-rtr", 2).generate([[5, 9, 2, 41]], 1)
    assert repacked[0][0][0] == expected([5, 9, 2, 41], 1)[0] + 1, "the stub adds one where it is told to repack"
    with pytest.raises(OSError, match="loads no !model"):
        Engine().load(Path("!model"), "q8_0", 2)
    quantize("a", "b", "7")
    with pytest.raises(SystemExit, match="could not quantize"):
        quantize("a", "b", "2")
