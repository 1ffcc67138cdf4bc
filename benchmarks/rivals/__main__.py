"""``python -m rivals`` in benchmarks/, or `make bench-rivals`: Tuili and its rivals, side by side (docs/rivals.md)."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rivals import report
from rivals.arms import Arm, arms, installed, side_by_side
from rivals.machine import Probe, peaks
from rivals.oracle import first_tokens
from rivals.results import Results
from rivals.rival import Places, Unavailable
from rivals.run import Bench, run_all
from rivals.scenarios import FULL, QUICK
from rivals.shapes import SHAPES, Shape, prepare
from tuili.base import hardware
from tuili.bench import provenance

#: Converting the 1 B shape for everybody takes half an hour: only when it is asked for.
DEFAULT = [name for name in SHAPES if name != "llama3.2-1b"]
REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> None:
    options = arguments()
    # So that ``finally`` ends the workers when the harness is told to stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    places = Places(options.cache.expanduser().resolve())
    # Short scenarios must never mix with real figures.
    folder = options.out or (
        places.root / "quick"
        if options.quick
        else provenance.results_folder(REPOSITORY / "benchmarks" / "results") / "rivals"
    )
    results = Results(folder / "raw.jsonl", {places.root: "CACHE", REPOSITORY: ".", Path.home(): "~"})
    shapes, chosen = [SHAPES[name] for name in options.models], arms(options.arms)
    if not options.report_only:
        measure(options, shapes, chosen, places, results)
    print(report.write(results.records, folder))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rivals", description=__doc__)
    parser.add_argument("--models", nargs="+", default=DEFAULT, choices=list(SHAPES), metavar="MODEL",
                        help=f"of {', '.join(SHAPES)}; the last two only take time that the others leave")  # fmt: skip
    parser.add_argument("--arms", nargs="+", default=[], help="names or their beginnings: tuili 'openvino int4'")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every arm; figures are their medians")
    parser.add_argument("--brief", nargs="+", default=[], help="arms of which two rounds are enough, as in --arms")
    parser.add_argument("--budget-minutes", type=float, default=35.0, help="for measuring; installing comes before")
    parser.add_argument("--threads", type=int, default=hardware.probe().cores, help="of every arm")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/tuili/rivals"),
                        help="environments, checkpoints and conversions; 20 GB")  # fmt: skip
    parser.add_argument("--out", type=Path, help="results; one that has some is gone on with")
    parser.add_argument("--quick", action="store_true", help="short scenarios, one round: shows that all of it works")
    parser.add_argument("--prepare-only", action="store_true", help="install and convert, measure nothing")
    parser.add_argument("--report-only", action="store_true", help="make the tables from the results that are there")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    return options


def measure(
    options: argparse.Namespace, shapes: list[Shape], chosen: list[Arm], places: Places, results: Results
) -> None:
    """Install, convert, probe the machine, run. What is done already is done at once."""
    about = provenance.provenance() | {"command": "python -m rivals", "options": plain(vars(options))}
    results.add("run", **about)
    ready = {shape.name: prepared(shape, chosen, places, results) for shape in shapes}
    oracle = {shape.name: reference(shape, places, options.threads) for shape in shapes}
    if options.prepare_only:
        return
    probe = Probe(places.root)
    limits = probe.read(*sorted({1, options.threads}))
    results.add("machine", threads=options.threads, bandwidth=limits, peaks=peaks(options.threads))
    deadline = time.monotonic() + 60 * options.budget_minutes
    scenarios = QUICK if options.quick else FULL
    bench = Bench(
        places, results, probe, scenarios, options.rounds, options.threads, deadline, oracle, tuple(options.brief)
    )
    run_all(bench, [(shape, group) for shape in shapes for group in side_by_side(ready[shape.name])])


def prepared(shape: Shape, chosen: list[Arm], places: Places, results: Results) -> list[Arm]:
    """The arms that can run this shape here; each is written down with its versions, or with why it cannot."""
    prepare(shape, places)
    found, ready = installed(chosen, places), []
    for arm in chosen:
        about: dict[str, Any] = {"model": shape.name, "arm": arm.name, "rival": arm.rival.name}
        about |= dataclasses.asdict(arm.width) | {"width": arm.width.name}
        versions = found[arm.module]
        try:
            if isinstance(versions, Unavailable):
                raise versions
            arm.rival.convert(shape.name, arm.width.name, places)
        except Unavailable as error:
            print(f"{shape.name}: {arm.name} cannot run here: {error}", flush=True)
            results.add("arm", **about, reason=str(error))
        else:
            results.add("arm", **about, versions=versions)
            ready.append(arm)
    return ready


def reference(shape: Shape, places: Places, threads: int) -> list[int]:
    """First tokens by the oracle; none where there is no oracle."""
    try:
        return first_tokens(shape, places, threads)
    except Unavailable as error:
        print(f"{shape.name}: no reference for first tokens: {error}", flush=True)
        return []


def plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


if __name__ == "__main__":
    main()
