"""Arms of a comparison in this process: one engine per config, the same workload, repeats taken in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuili.base.config import Config
from tuili.bench import offline
from tuili.bench.provenance import provenance
from tuili.bench.report import over_repeats
from tuili.bench.statistics import median
from tuili.bench.workload import Workload

if TYPE_CHECKING:
    from tuili.engine.text import TextEngine


@dataclass(frozen=True, slots=True)
class Arm:
    """``label`` says what differs; at most ``concurrency`` requests run together."""

    label: dict[str, Any]
    config: Config
    concurrency: int


def open_engine(
    config: Config, concurrency: int, progress: Callable[[str, int, int], None] | None = None
) -> TextEngine:
    """The engine of a config, with room for ``concurrency`` requests at a time."""
    from tuili.engine.build import build

    return build(config.with_(max_num_seqs=concurrency), progress)


def vocabulary(engine: TextEngine) -> tuple[int, int]:
    """Range of ordinary token ids: beyond bytes and special tokens where the vocabulary has that many."""
    size = engine.tokenizer.vocab_size
    low = 300 if size > 600 else 0
    special = [token for token in engine.tokenizer.special_ids if token >= low]
    return low, min([size, *special])


def compare(
    arms: Sequence[Arm],
    workload: Callable[[TextEngine], Workload],
    repeats: int,
    tick: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], Workload]:
    """Each arm's medians over ``repeats`` runs, after one warm-up run each. The arms take turns, so that drift hits
    all alike."""
    engines: list[TextEngine] = []
    try:
        for arm in arms:
            engines.append(open_engine(arm.config, arm.concurrency))
        work = workload(engines[0])
        runs: list[list[dict[str, Any]]] = [[] for _ in arms]
        for repeat in range(repeats + 1):
            for engine, outcomes in zip(engines, runs, strict=True):
                outcome = offline.throughput(engine, work)
                if repeat:
                    outcomes.append(outcome)
                tick()
        return [_arm(*pair) for pair in zip(arms, engines, runs, strict=True)], work
    finally:
        for engine in engines:
            engine.close()


def _arm(arm: Arm, engine: TextEngine, outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of an arm, its raw summaries, and the steps of its median run."""
    merged = over_repeats(outcomes)
    middle = sorted(outcomes, key=lambda outcome: outcome["duration"])[len(outcomes) // 2]
    host: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        for rows, seen in outcome["steps"]["host_ms_per_decode_step"].items():
            host.setdefault(rows, {"steps": 0, "total": [], "own": []})
            host[rows]["steps"] += seen["steps"]
            host[rows]["total"].append(seen["total"])
            host[rows]["own"].append(seen["own"])
    steps = middle["steps"] | {
        "host_ms_per_decode_step": {
            rows: seen | {"total": median(seen["total"]), "own": median(seen["own"])} for rows, seen in host.items()
        }
    }
    import dataclasses

    return {**arm.label, "concurrency": arm.concurrency, **merged, "steps": steps, "runs": outcomes} | {
        "config": dataclasses.asdict(engine.config)
    }


def throughput(
    config: Config,
    concurrencies: Sequence[int],
    workload: Callable[[TextEngine], Workload],
    repeats: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One arm per concurrency of one config."""
    arms = [Arm({"scheduling_policy": config.scheduling_policy}, config, number) for number in concurrencies]
    results, work = compare(arms, workload, repeats, tick)
    return {"benchmark": "throughput", "arms": results, "provenance": provenance(work)}


def latency(
    engine: TextEngine,
    workloads: Sequence[Workload],
    warmups: int,
    repeats: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One arm per batch size."""
    results = []
    for work in workloads:
        outcome = offline.latency(engine, work, warmups=warmups, repeats=repeats, done=lambda record: tick())
        results.append(outcome | {"workload": work.describe()})
    return {"benchmark": "latency", "arms": results, "provenance": provenance(workloads[0], engine.config)}
