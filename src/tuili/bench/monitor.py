"""What runs, second by second: load of every core, and the CPU time, memory and page faults of a process and its
children, read from /proc; one JSON object per line. Linux only.

The schema is the same for every device: ``device`` ("cpu", later "gpu:0"), ``load`` per core or engine (0 to 1), memory
in bytes, ``power`` in watts (None where nobody can read it); what only a process has is under ``process``.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from tuili.base.errors import ConfigError
from tuili.bench.counters import Counters
from tuili.bench.provenance import provenance
from tuili.bench.statistics import mean

PROC = Path("/proc")
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Process:
    """A process and its descendants since the sample before: ``cpu`` seconds per second (2.0: two cores busy), faults
    counted; ``rss`` and ``threads`` now."""

    cpu: float
    rss: int
    threads: int
    minor_faults: int
    major_faults: int


@dataclass(frozen=True, slots=True)
class MonitorSample:
    """``time`` in seconds since the monitor began; ``counters`` are perf's since the sample before, empty where it may
    not count."""

    time: float
    device: str
    load: tuple[float, ...]
    memory_used: int
    memory_total: int
    power: float | None
    process: Process | None
    counters: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Tree:
    """Totals of a process and its descendants; those of children that ended are in their parent's."""

    ticks: int = 0
    rss: int = 0
    threads: int = 0
    minor: int = 0
    major: int = 0
    count: int = 0

    def __add__(self, other: _Tree) -> _Tree:
        return _Tree(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))


def _values(tree: _Tree) -> tuple[int, ...]:
    return tree.ticks, tree.rss, tree.threads, tree.minor, tree.major, tree.count


class Monitor:
    """Takes samples of process ``pid`` (None: this one) and the machine; each tells what happened since the last."""

    def __init__(self, pid: int | None = None):
        if not (PROC / "stat").is_file():
            raise ConfigError("the monitor reads /proc, which this system does not have; it needs Linux")
        self.pid = pid or os.getpid()
        self.counters = Counters(self.pid)
        self._began = self._last = time.perf_counter()
        self._cores, self._tree, self._counts = _cores(), _tree(self.pid), self.counters.read()

    def sample(self) -> MonitorSample:
        """Now, against the sample before. Load and CPU are exact to the kernel's clock tick (10 ms)."""
        now, cores, tree, counts = time.perf_counter(), _cores(), _tree(self.pid), self.counters.read()
        used, total = _memory()
        sample = MonitorSample(
            time=round(now - self._began, 4),
            device="cpu",
            load=tuple(_share(*pair) for pair in zip(self._cores, cores, strict=False)),
            memory_used=used,
            memory_total=total,
            power=None,
            process=self._process(tree, max(now - self._last, 1e-9)) if tree.count else None,
            counters={name: value - self._counts.get(name, 0) for name, value in counts.items()},
        )
        self._cores, self._tree, self._counts, self._last = cores, tree, counts, now
        return sample

    def _process(self, tree: _Tree, seconds: float) -> Process:
        """Differences are at least 0: a child whose parent did not wait for it takes its totals with it."""
        before = self._tree
        return Process(
            cpu=round(max(0, tree.ticks - before.ticks) / os.sysconf("SC_CLK_TCK") / seconds, 4),
            rss=tree.rss * os.sysconf("SC_PAGE_SIZE"),
            threads=tree.threads,
            minor_faults=max(0, tree.minor - before.minor),
            major_faults=max(0, tree.major - before.major),
        )

    def close(self) -> None:
        self.counters.close()


def header(monitor: Monitor, interval: float) -> dict[str, Any]:
    """The first line of a file: what was watched, how, and where."""
    return {
        "kind": "monitor",
        "schema": SCHEMA,
        "interval": interval,
        "pid": monitor.pid,
        "counters": monitor.counters.why or sorted(monitor.counters.read()),
        "provenance": provenance(),
    }


@contextmanager
def recording(file: Path | IO[str] | None, interval: float = 0.5, pid: int | None = None) -> Iterator[None]:
    """Write samples of ``pid`` (None: this process) to ``file`` while the block runs, every ``interval`` seconds and at
    the end; nothing where ``file`` is None. Raises ConfigError."""
    if file is None:
        yield
        return
    if interval <= 0:
        raise ConfigError(f"interval={interval}: the monitor needs a positive number of seconds")
    if isinstance(file, Path):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            opened = file.open("w")
        except OSError as error:
            raise ConfigError(f"cannot write to {file}: {error.strerror}") from error
        with opened, recording(opened, interval, pid):
            yield
        return
    monitor, stop = Monitor(pid), threading.Event()
    print(json.dumps(header(monitor, interval)), file=file, flush=True)
    thread = threading.Thread(target=_record, args=(monitor, file, interval, stop), name="monitor", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        monitor.close()


def _record(monitor: Monitor, file: IO[str], interval: float, stop: threading.Event) -> None:
    due = time.perf_counter() + interval
    while not stop.wait(max(0.0, due - time.perf_counter())):
        due += interval
        print(json.dumps(asdict(monitor.sample())), file=file, flush=True)
    print(json.dumps(asdict(monitor.sample())), file=file, flush=True)


def totals(path: Path) -> dict[str, Any]:
    """A recorded file in short: seconds, mean load of the cores and CPU of the process, largest memory, all faults."""
    samples = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    times = [0.0, *(sample["time"] for sample in samples)]
    spans = [after - before for before, after in pairwise(times)]
    own = [(sample["process"], span) for sample, span in zip(samples, spans, strict=True) if sample["process"]]
    wall = max(times[-1], 1e-9)
    return {
        "seconds": times[-1],
        "load": sum(mean(sample["load"]) * span for sample, span in zip(samples, spans, strict=True)) / wall,
        "cpu_seconds": sum(process["cpu"] * span for process, span in own),
        "peak_rss": max((process["rss"] for process, _ in own), default=0),
        "minor_faults": sum(process["minor_faults"] for process, _ in own),
        "major_faults": sum(process["major_faults"] for process, _ in own),
    }


# --------------------------------------------------------------------------------------------------------------- /proc


def _cores() -> list[tuple[int, int]]:
    """Busy and total clock ticks of every core since the machine started. Waiting for a disk is not busy."""
    found = []
    for line in (PROC / "stat").read_text().splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name != "cpu":
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, ticks[:8])
            busy = user + nice + system + irq + softirq + steal
            found.append((busy, busy + idle + iowait))
    return found


def _share(before: tuple[int, int], after: tuple[int, int]) -> float:
    total = after[1] - before[1]
    return round(min(1.0, max(0.0, (after[0] - before[0]) / total)), 4) if total > 0 else 0.0


def _memory() -> tuple[int, int]:
    """Bytes in use (not available) and in all."""
    lines = (line.split() for line in (PROC / "meminfo").read_text().splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    return (kib["MemTotal"] - kib["MemAvailable"]) << 10, kib["MemTotal"] << 10


def _tree(pid: int) -> _Tree:
    """``pid`` and its descendants; nothing of those that ended while they were read."""
    try:
        # The name is in parentheses and may hold anything: the fields begin after the last one (proc_pid_stat(5)).
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        children = [child for thread in (PROC / str(pid) / "task").iterdir() for child in _children(thread)]
    except (FileNotFoundError, ProcessLookupError):
        return _Tree()
    number = [int(field) for field in fields[1:]]  # number[0] is field 4 of the manual page, the parent's pid
    minor, minor_ended, major, major_ended = number[6:10]
    own = _Tree(sum(number[10:14]), number[20], number[16], minor + minor_ended, major + major_ended, 1)
    return sum((_tree(child) for child in children), own)


def _children(thread: Path) -> list[int]:
    """Processes that ``thread`` started; none where it has ended, or where the kernel keeps no such list."""
    try:
        return [int(word) for word in (thread / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
