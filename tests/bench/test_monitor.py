"""The monitor against a child that does a known amount of work, and /proc's own words."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tuili.base.errors import ConfigError
from tuili.bench.counters import Counters
from tuili.bench.monitor import Monitor, recording, totals

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the monitor reads /proc")

#: Prints the CPU seconds that it used so far once it has worked ``sys.argv[1]`` of them, then waits for its end.
BUSY = """
import sys, time
while time.process_time() < float(sys.argv[1]): pass
print(time.process_time(), flush=True)
sys.stdin.read()
"""
#: Touches 40 MiB.
LARGE = """
import sys
b = bytearray(40 << 20)
for i in range(0, len(b), 4096): b[i] = 1
print(1, flush=True); sys.stdin.read()
"""
#: A grandchild works.
NESTED = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', '''{BUSY}''', sys.argv[1]])"


@contextmanager
def child(code: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("code", [BUSY, NESTED], ids=["child", "grandchild"])
def test_cpu_time_is_what_the_busy_child_used(code: str) -> None:
    with child(code, "0.4") as process:
        monitor = Monitor(process.pid)
        began = time.perf_counter()
        used = float(process.stdout.readline())  # type: ignore[union-attr]
        sample = monitor.sample()
        wall = time.perf_counter() - began
        assert sample.process is not None
        # A clock tick per process, and what the interpreter used before the monitor and the grandchild began.
        assert sample.process.cpu * wall == pytest.approx(used, abs=0.15)
        assert max(sample.load) > 0.3 * used / wall
        assert len(sample.load) == os.cpu_count()
        monitor.close()
        quiet = monitor.sample()
        assert quiet.process is not None
        assert quiet.process.cpu * wall < 0.1


def test_memory_and_faults() -> None:
    with child(LARGE) as process:
        monitor = Monitor(process.pid)
        process.stdout.readline()  # type: ignore[union-attr]
        sample = monitor.sample().process
        assert sample is not None
        assert 40 << 20 < sample.rss < 80 << 20
        assert sample.minor_faults * resource.getpagesize() > 30 << 20 or sample.minor_faults >= 20  # huge pages: 2 MiB
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert sample.rss >> 10 == pytest.approx(int(status.split("VmRSS:")[1].split()[0]), rel=0.05)
        assert sample.threads == 1
        monitor.close()


def test_a_process_that_ended_is_none() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    monitor = Monitor(process.pid)
    assert monitor.sample().process is None
    assert monitor.sample().memory_total > 0


def test_files_have_a_header_and_a_sample_per_interval(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "m.jsonl"
    with recording(path, interval=0.05):
        time.sleep(0.4)
    head, *samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert (head["kind"], head["pid"], head["interval"]) == ("monitor", os.getpid(), 0.05)
    assert head["provenance"]["kind"] == "measured"
    assert 3 <= len(samples) <= 10
    times = [sample["time"] for sample in samples]
    assert times == sorted(times)
    for sample in samples:
        assert set(sample) == {
            *("time", "device", "load", "memory_used", "memory_total", "power", "process", "counters")
        }
        assert all(0 <= share <= 1 for share in sample["load"])
        assert 0 < sample["memory_used"] < sample["memory_total"]


def test_no_file_no_monitor_and_what_is_wrong_is_refused(tmp_path: Path) -> None:
    with recording(None, interval=-1):
        pass
    with pytest.raises(ConfigError, match="interval=0"), recording(io.StringIO(), interval=0):
        pass
    with pytest.raises(ConfigError, match="cannot write to"), recording(tmp_path):
        pass


def test_counters_count_or_say_why() -> None:
    counters = Counters(os.getpid())
    before = counters.read()
    total = sum(range(1_000_000))
    after = counters.read()
    counters.close()
    assert total
    if "instructions" not in after:
        assert "not" in counters.why or "no" in counters.why
        assert counters.read() == {}
    else:
        assert after["instructions"] - before["instructions"] > 1_000_000


def test_totals_add_up(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with child(BUSY, "0.3") as process, recording(path, interval=0.05, pid=process.pid):
        used = float(process.stdout.readline())  # type: ignore[union-attr]
    seen = totals(path)
    assert seen["cpu_seconds"] == pytest.approx(used, abs=0.15)
    assert 0 < seen["load"] <= 1
    assert seen["peak_rss"] > 1 << 20
