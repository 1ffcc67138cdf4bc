"""The machine's limits: read bandwidth by threads (probe.cpp), and the peak of products: the better of Tuili's own
loops for this instruction set and of torch's oneDNN (``tuili.bench.machine``).

``python machine.py THREADS`` prints the peaks; it runs in a process of its own, so that the harness holds no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


class Probe:
    """Built once into the cache; ``read`` takes a quarter of a second on an idle machine."""

    def __init__(self, folder: Path):
        self.program = folder / "probe"
        source = HERE / "probe.cpp"
        if not self.program.exists() or self.program.stat().st_mtime < source.stat().st_mtime:
            folder.mkdir(parents=True, exist_ok=True)
            flags = ["-O3", "-march=native", "-std=c++17", "-pthread"]
            subprocess.run(["c++", *flags, str(source), "-o", str(self.program)], check=True)

    def read(self, *threads: int) -> dict[str, float]:
        """Bytes per second by number of threads."""
        done = subprocess.run([str(self.program), *map(str, threads)], capture_output=True, text=True, check=True)
        return {count: 1e9 * value for count, value in json.loads(done.stdout).items()}


def peaks(threads: int) -> dict[str, float]:
    """Operations per second (two per multiply and add) in bf16, int8 and int4."""
    command = [sys.executable, str(HERE / "machine.py"), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    # The folder of this script holds files named like real packages.
    del sys.path[0]
    from tuili.bench.machine import peak, team

    kinds = {"bf16": "bfloat16", "int8": "int8", "int4": "int4"}
    with team(int(sys.argv[1])):
        print(json.dumps({name: peak(kind, 0.5) for name, kind in kinds.items()}))


if __name__ == "__main__":
    main()
