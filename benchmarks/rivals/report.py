"""Tables and a plot from raw results: ``write(records, folder)`` makes rivals.md and, with matplotlib, rivals.png.

Every figure is the median over the rounds that are there; how many is in the table. Each speed stands beside its share
of what the machine allows: reading all weights of the arm's width once per step at the bandwidth measured beside it (or
at the start), and multiplying at the measured peak of bf16 or int8, whichever takes longer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rivals.results import Record
from rivals.scenarios import FULL, Scenario
from rivals.shapes import SHAPES, Shape
from tuili.bench.statistics import median

OURS = "tuili"
#: Figures in whose rounds other processes took more of the machine than this are marked.
DISTURBED = 0.10
SCENARIOS = {scenario.name: scenario for scenario in FULL}


@dataclass(frozen=True)
class Speed:
    """Tokens per second, of ``rounds`` measurements; ``share`` of the machine's limit, None where it is not known."""

    value: float
    rounds: int
    share: float | None
    disturbed: bool

    def __str__(self) -> str:
        star = "*" if self.disturbed else ""
        share = f" ({self.share:.0%})" if self.share is not None else ""
        return f"{figure(self.value)}{star}{share}"


@dataclass
class Row:
    """What is known of an arm on a shape."""

    arm: str
    rival: str
    bits: float
    speeds: dict[str, Speed]
    start: float | None = None
    memory: float | None = None
    agreement: str = "-"
    reason: str | None = None

    @property
    def ours(self) -> bool:
        return self.rival == OURS


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def limit(shape: Shape, bits: float, scenario: Scenario, bandwidth: float, peaks: dict[str, float]) -> float:
    """Tokens per second that this machine allows: attention, KV cache and activations cost nothing here."""
    peak = peaks["bf16"] if bits > 8.9 else peaks["int8"] if bits > 6.9 else peaks.get("int4", peaks["int8"])
    rows = scenario.requests if scenario.new > 1 else scenario.prompt
    products = rows * shape.body + scenario.requests * shape.head
    seconds = max((shape.body + shape.head) * bits / 8 / bandwidth, 2 * products / peak)
    return rows / seconds


def rows(records: Sequence[Record], model: str) -> list[Row]:
    """One per arm that was asked for, widest first, ours before the others of its width."""
    of = [record for record in records if record.get("model") == model]
    machine = [record for record in records if record["kind"] == "machine"]
    found = {record["arm"]: record for record in of if record["kind"] == "arm"}
    made = [_row(about, [r for r in of if r["arm"] == name], machine) for name, about in found.items()]
    return sorted(made, key=lambda row: (-round(row.bits / 4), not row.ours))


def _row(about: Record, of: Sequence[Record], machine: Sequence[Record]) -> Row:
    def values(kind: str, key: str) -> list[Any]:
        return [record[key] for record in of if record["kind"] == kind]

    speeds = {name: speed for name in SCENARIOS if (speed := _speed(about, of, name, machine))}
    failures = values("failed", "reason")
    return Row(
        arm=about["arm"],
        rival=about["rival"],
        bits=about["bits"],
        speeds=speeds,
        start=median(values("start", "seconds")) or None,
        memory=max(values("memory", "bytes"), default=None),
        agreement=next((f"{r['agree']}/{r['of']}" for r in of if r["kind"] == "agreement"), "-"),
        reason=None if speeds else about.get("reason") or (failures[-1] if failures else "not measured yet"),
    )


def _speed(about: Record, of: Sequence[Record], name: str, machine: Sequence[Record]) -> Speed | None:
    taken = [r for r in of if r["kind"] == "speed" and r["scenario"] == name]
    if not taken:
        return None
    value = median([r["tokens_per_second"] for r in taken])
    share = None
    if machine:
        reads = [r["bandwidth"] for r in taken if "bandwidth" in r]
        last = machine[-1]
        bandwidth = median(reads) if reads else last["bandwidth"][str(last["threads"])]
        share = value / limit(SHAPES[about["model"]], about["bits"], SCENARIOS[name], bandwidth, last["peaks"])
    return Speed(value, len(taken), share, median([r["others"] for r in taken]) > DISTURBED)


def markdown(records: Sequence[Record]) -> str:
    lines = ["# Tuili and its rivals", "", *_origin(records)]
    for model in dict.fromkeys(r["model"] for r in records if r["kind"] == "arm"):
        found = rows(records, model)
        lines += ["", f"## {model}", "", *_table(found)]
        missing = [f"- {row.arm}: {row.reason}" for row in found if row.reason]
        lines += ["", "Not measured:", "", *missing] if missing else []
        lines += _ratios(found)
    return "\n".join(lines) + "\n"


def _origin(records: Sequence[Record]) -> list[str]:
    runs = [r for r in records if r["kind"] == "run"]
    machines = [r for r in records if r["kind"] == "machine"]
    if not runs or not machines:
        return ["Nothing was measured yet."]
    run, machine = runs[-1], machines[-1]
    commit = run["commit"] or {"id": "unknown", "dirty": False}
    reads = ", ".join(f"{value / 1e9:.0f} GB/s with {count}" for count, value in machine["bandwidth"].items())
    peaks = ", ".join(f"{name} {value / 1e9:,.0f} G" for name, value in machine["peaks"].items())
    versions = {r["rival"]: " ".join(r["versions"].values()) for r in records if r["kind"] == "arm" and "versions" in r}
    return [
        f"Measured {run['date']} on {run['machine']['cpu']}, {machine['threads']} threads, commit "
        f"`{commit['id'][:12]}`{' with local changes' if commit['dirty'] else ''}. Random weights, greedy, medians of "
        "the rounds; the arms of a width took turns. In brackets the share of the machine's limit: reading the weights "
        "once per step at the bandwidth measured beside, or multiplying at its peak. * = other processes used more "
        f"than {DISTURBED:.0%} of the machine. A share over 100 %: others used it while its limits were probed, or the "
        "model fits the cache. Raw values in `raw.jsonl`.",
        "",
        f"Read bandwidth by threads: {reads}. Peak operations per second: {peaks}.",
        "",
        f"Versions (first the rival's): {', '.join(f'{name} {version}' for name, version in versions.items())}.",
    ]


def _table(found: Sequence[Row]) -> list[str]:
    head = ["arm", *SCENARIOS, "first token, s", "peak MiB", "agrees", "rounds"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in found:
        if row.reason:
            continue
        rounds = [speed.rounds for speed in row.speeds.values()]
        cells = [f"**{row.arm}**" if row.ours else row.arm]
        cells += [str(row.speeds.get(name, "-")) for name in SCENARIOS]
        cells += [f"{row.start:.1f}" if row.start else "-", f"{row.memory / 2**20:,.0f}" if row.memory else "-"]
        cells += [row.agreement, f"{min(rounds)}" if min(rounds) == max(rounds) else f"{min(rounds)}-{max(rounds)}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _ratios(found: Sequence[Row]) -> list[str]:
    """Each width of ours against the best rival of that width, and against the best of any."""
    ours = [row for row in found if row.ours and row.speeds]
    if not ours or not any(row.speeds for row in found if not row.ours):
        return []
    lines = ["", "Times the best rival of the same width, of any width:", ""]
    lines += ["| arm | " + " | ".join(SCENARIOS) + " |", "|---" + "|---:" * len(SCENARIOS) + "|"]
    for row in ours:
        lines.append("| " + " | ".join([row.arm, *(_ratio(row, found, name) for name in SCENARIOS)]) + " |")
    return lines


def _ratio(row: Row, found: Sequence[Row], name: str) -> str:
    if name not in row.speeds:
        return "-"
    rivals = [other for other in found if not other.ours and name in other.speeds]
    same = [other for other in rivals if round(other.bits / 4) == round(row.bits / 4)]
    parts = []
    for others in (same, rivals):
        best = max(others, key=lambda other: other.speeds[name].value, default=None)
        parts.append(f"{row.speeds[name].value / best.speeds[name].value:.2f} ({best.arm})" if best else "-")
    return ", ".join(parts)


def write(records: Sequence[Record], folder: Path) -> str:
    """rivals.md and rivals.png into ``folder``; the text of the first."""
    text = markdown(records)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rivals.md").write_text(text)
    plot(records, folder / "rivals.png")
    return text


COLOURS = {16: "#4c78a8", 8: "#f58518", 4: "#54a24b"}


def plot(records: Sequence[Record], path: Path) -> None:
    """One row of panels per shape: a bar per arm, its width as colour, ours hatched, the machine's limit as a tick."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'tuili[bench]')", file=sys.stderr)
        return
    models = {model: rows(records, model) for model in dict.fromkeys(r["model"] for r in records if r["kind"] == "arm")}
    models = {model: measured for model, found in models.items() if (measured := [row for row in found if row.speeds])}
    if not models:
        return
    heights = [0.6 + 0.26 * len(found) for found in models.values()]
    figure_, axes = pyplot.subplots(
        len(models), len(SCENARIOS), figsize=(3.2 * len(SCENARIOS) + 1, sum(heights) + 0.6), squeeze=False,
        layout="constrained", gridspec_kw={"height_ratios": heights}, sharey="row",
    )  # fmt: skip
    for line, (model, found) in zip(axes, models.items(), strict=True):
        for axis, name in zip(line, SCENARIOS, strict=True):
            _panel(axis, found, name)
        line[0].set_ylabel(model)
    figure_.suptitle("tokens/s (measured, medians); the tick is this machine's limit for the width")
    figure_.savefig(path, dpi=110)
    pyplot.close(figure_)


def _panel(axis: Any, found: Sequence[Row], name: str) -> None:
    for place, row in enumerate(found):
        speed = row.speeds.get(name)
        if speed is None:
            continue
        colour = COLOURS[4 * round(row.bits / 4)]
        axis.barh(place, speed.value, color=colour, hatch="//" if row.ours else None, edgecolor="white")
        axis.text(speed.value, place, f" {figure(speed.value)}", va="center", fontsize=7)
        if speed.share:
            axis.plot([speed.value / speed.share] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1)
    axis.set_yticks(range(len(found)), [row.arm for row in found], fontsize=8)
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_title(name, fontsize=9)
    axis.margins(x=0.15)
    axis.tick_params(axis="x", labelsize=7)
