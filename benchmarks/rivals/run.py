"""The runner: the arms of a group take turns until the rounds or the minutes are used up.

One speed is written per arm, scenario and round, at once; a run with the same results folder takes up where it
stopped. An arm that fails is written down with the reason, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import psutil

from rivals.arms import Arm
from rivals.machine import Probe
from rivals.oracle import agreeing
from rivals.protocol import Others, Worker
from rivals.results import Results
from rivals.rival import Places, Unavailable
from rivals.scenarios import Scenario, agreement_prompts
from rivals.shapes import Shape
from tuili.bench.statistics import median

#: A measurement repeats short generations until this much time went by.
MEASURE_SECONDS = 0.5
MOST_REPEATS = 10
#: A shape that only takes left-over time is begun when this much is left for each of its arms.
LEAST_SECONDS = 30.0
#: Rounds of arms that are far behind the others and take most of the time.
BRIEF_ROUNDS = 2


@dataclass
class Bench:
    """All that the groups of a run share. ``deadline`` is on ``time.monotonic``; ``oracle`` has the first tokens by
    name of shape; none where there is no oracle. Arms that begin with one of ``brief`` get two rounds at most."""

    places: Places
    results: Results
    probe: Probe
    scenarios: Sequence[Scenario]
    rounds: int
    threads: int
    deadline: float
    oracle: dict[str, list[int]]
    brief: tuple[str, ...] = ()

    def rounds_of(self, arm: Arm) -> int:
        return min(self.rounds, BRIEF_ROUNDS) if arm.name.startswith(self.brief) else self.rounds

    def say(self, text: str) -> None:
        left = max(0.0, self.deadline - time.monotonic())
        print(f"[{left / 60:5.1f} min left] {text}", flush=True)

    def bandwidth(self) -> float:
        return self.probe.read(self.threads)[str(self.threads)]


class Group:
    """Arms of one shape that are loaded together. Each runs only in its turn."""

    def __init__(self, bench: Bench, shape: Shape, arms: Sequence[Arm]):
        self.bench, self.shape, self.arms = bench, shape, arms
        self.scenarios = [each for each in bench.scenarios if each.prompt + each.new <= shape.positions]
        self.workers: dict[Arm, Worker] = {}

    def run(self, until: float) -> None:
        """Turns until ``until``, but at least one whole round, the bench's deadline allowing."""
        try:
            for arm in self.arms:
                if time.monotonic() < self.bench.deadline and self._missing(arm):
                    self._attempt(arm, self._start)
            for arm in list(self.workers):
                self._attempt(arm, self._agreement)
            self._rounds(until)
            for arm, worker in self.workers.items():
                self._add("memory", arm, bytes=worker.peak_memory())
        finally:
            for worker in self.workers.values():
                worker.close()

    def _add(self, kind: str, arm: Arm, **values: object) -> None:
        self.bench.results.add(kind, model=self.shape.name, arm=arm.name, **values)

    def _attempt(self, arm: Arm, step: Callable[[Arm], None]) -> None:
        """One step of one arm; an arm that fails is out of this group."""
        try:
            step(arm)
        except Unavailable as error:
            self.bench.say(f"{self.shape.name}: {arm.name} is out: {error}")
            self._add("failed", arm, reason=str(error))
            if arm in self.workers:
                self.workers.pop(arm).close()

    def _missing(self, arm: Arm) -> bool:
        done = self.bench.results.of("speed", model=self.shape.name, arm=arm.name)
        return len(done) < self.bench.rounds_of(arm) * len(self.scenarios)

    def _start(self, arm: Arm) -> None:
        bench, places = self.bench, self.bench.places
        model = arm.rival.convert(self.shape.name, arm.width.name, places)
        free, needed = psutil.virtual_memory().available, room(self.shape)
        if free < needed:
            raise Unavailable(f"{free / 2**30:.1f} GiB of memory are free; starting it may take {needed / 2**30:.1f}")
        command, env = arm.command(model, places, bench.threads)
        worker = Worker(command, env, places.log(f"worker-{arm.name.replace(' ', '-')}"))
        self.workers[arm] = worker
        bench.say(f"{self.shape.name}: {arm.name} made its first token after {worker.start_seconds:.1f} s")
        self._add("start", arm, seconds=worker.start_seconds, command=command, environment=env)

    def _agreement(self, arm: Arm) -> None:
        reference = self.bench.oracle[self.shape.name]
        if not reference or self.bench.results.of("agreement", model=self.shape.name, arm=arm.name):
            return
        timed = self.workers[arm].generate(agreement_prompts(self.shape.vocab), 1)
        self._add("agreement", arm, agree=agreeing([row[0][0] for row in timed], reference), of=len(reference))

    def _rounds(self, until: float) -> None:
        bench = self.bench
        for round_ in range(bench.rounds):
            limit = bench.deadline if round_ == 0 else min(until, bench.deadline)
            for scenario in self.scenarios:
                for arm in rotated([arm for arm in self.workers if round_ < bench.rounds_of(arm)], round_):
                    if time.monotonic() >= limit:
                        bench.say(f"{self.shape.name}: the time of this group is over in round {round_ + 1}")
                        return
                    self._attempt(arm, partial(self._measure, scenario=scenario, round_=round_))
            bench.say(f"{self.shape.name}: round {round_ + 1} of {', '.join(arm.name for arm in self.workers)}")

    def _measure(self, arm: Arm, scenario: Scenario, round_: int) -> None:
        """One speed; beside a single request's decoding, which memory bounds, the bandwidth just before and after."""
        about = {"scenario": scenario.name, "round": round_}
        if self.bench.results.of("speed", model=self.shape.name, arm=arm.name, **about):
            return
        reads = [self.bench.bandwidth()] if scenario.alone else []
        others, began, speeds = Others(self.workers[arm]), time.monotonic(), list[float]()
        while len(speeds) < MOST_REPEATS and (not speeds or time.monotonic() - began < MEASURE_SECONDS):
            prompts = scenario.prompts(self.shape.vocab, f"{round_}.{len(speeds)}")
            speeds.append(scenario.speed(self.workers[arm].generate(prompts, scenario.new)))
        values = {"tokens_per_second": median(speeds), "repeats": len(speeds), "others": round(others.share(), 3)}
        reads += [self.bench.bandwidth()] if scenario.alone else []
        self._add("speed", arm, **about, **values, **({"bandwidth": sum(reads) / 2} if reads else {}))


def room(shape: Shape) -> int:
    """Bytes that starting one more worker may take: twice the weights in bf16, and a runtime with its KV cache."""
    return 4 * (shape.body + shape.head) + (2 << 30)


def rotated(arms: list[Arm], round_: int) -> list[Arm]:
    """Every round begins with another arm, so that none is always first."""
    at = round_ % len(arms) if arms else 0
    return arms[at:] + arms[:at]


def part(work: Sequence[tuple[Shape, Sequence[Arm]]], at: int) -> float:
    """The part of the remaining time that group ``at`` may take; shapes without a share divide what is left evenly."""
    weights = [shape.share * len(arms) for shape, arms in work[at:]]
    if not weights[0]:
        weights = [float(len(arms)) for _, arms in work[at:]]
    return weights[0] / sum(weights)


def run_all(bench: Bench, work: Sequence[tuple[Shape, Sequence[Arm]]]) -> None:
    """Groups in their order, but those of shapes with a share of the time first."""
    work = sorted(work, key=lambda each: each[0].share == 0)
    for at, (shape, arms) in enumerate(work):
        left = bench.deadline - time.monotonic()
        if left <= 0 or (not shape.share and left < LEAST_SECONDS * len(arms)):
            bench.say(f"{shape.name}: no time left for {', '.join(arm.name for arm in arms)}")
            continue
        Group(bench, shape, arms).run(time.monotonic() + left * part(work, at))
