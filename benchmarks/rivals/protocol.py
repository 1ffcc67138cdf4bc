"""The harness's side of a worker: start it, ask it, put it to sleep, see what memory it took, end it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from rivals.rival import Timed, Unavailable

WORKER = Path(__file__).with_name("worker.py")
#: Longer than the slowest start (vLLM compiles for a minute and a half) on a busy machine.
START_SECONDS = 600.0
ANSWER_SECONDS = 300.0


class Worker:
    """One arm's process, alone in its process group (of the same session, so that a priority given to the harness is
    its too). It runs only inside ``generate``; between turns it is stopped, so that spinning threads of one engine
    never disturb another."""

    def __init__(self, command: Sequence[str], env: dict[str, str], log: Path):
        """``log`` takes what the worker says; its folder is the worker's current one, since children of engines import
        from there. Returns when the first token was there: ``start_seconds`` is the time from the command to it.

        Raises Unavailable when the engine cannot load.
        """
        began = time.time()
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=log.parent,
                env={**os.environ, **env},
                process_group=0,
            )
        try:
            self.start_seconds = self._answer(START_SECONDS)["ready"] - began
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[Timed]]:
        """See Session.generate; Unavailable when it fails, dies or does not answer in time."""
        self._signal(signal.SIGCONT)
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps({"prompts": prompts, "new": new}).encode() + b"\n")
            self.process.stdin.flush()
            timed = self._answer(ANSWER_SECONDS)["timed"]
        except BrokenPipeError as error:
            raise Unavailable("the worker is gone") from error
        self._signal(signal.SIGSTOP)
        return check(timed, len(prompts), new)

    def peak_memory(self) -> int:
        """Bytes: high-water mark of resident memory, summed over the worker and its children (shared pages count in
        each)."""
        return sum(high_water(each.pid) for each in self.processes())

    def processes(self) -> list[psutil.Process]:
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        if not ready:
            raise Unavailable(f"no answer within {seconds:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise Unavailable(f"the worker ended with exit status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"][:300])
        return answer


def high_water(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def check(timed: list[list[Timed]], requests: int, new: int) -> list[list[Timed]]:
    """What a worker says must be what was asked for: an arm that makes fewer tokens would look fast."""
    made = [len(row) for row in timed]
    if made != [new] * requests:
        raise Unavailable(f"asked for {new} tokens of {requests} requests, got {made}")
    return timed


class Others:
    """How much of the machine other processes used since this was made: figures taken beside them are marked."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self.before = self._now()

    def share(self) -> float:
        """0 to 1 of all cores."""
        wall, busy, mine = (after - before for after, before in zip(self._now(), self.before, strict=True))
        return max(0.0, busy - mine) / max(wall * (psutil.cpu_count() or 1), 1e-9)

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
        return time.monotonic(), busy, sum(cpu_seconds(each) for each in self.worker.processes())


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
