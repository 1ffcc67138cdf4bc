"""The table and the plot of a gpu-check, from its JSON.

python benchmarks/gpu/report.py FOLDER/check.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Found = dict[str, Any]
#: What multiplies in the arms of the models, for the limit that they are held to.
PEAKS = {"bf16": "bfloat16", "W4A16 g128": "bfloat16", "FP8": "float8", "W8A8": "int8"}


@dataclass(frozen=True)
class Limits:
    """What was measured of the card: bytes per second, and operations per second by kind; 0 where nothing was."""

    bandwidth: float
    peaks: dict[str, float]

    @staticmethod
    def of(found: Found) -> Limits:
        entries = _entries(found, "peaks")
        value = {name: entry["value"] for name, entry in entries.items()}
        return Limits(value.pop("copy", 0.0), value)

    def seconds(self, entry: Found, kind: str) -> float | None:
        """The least time for an entry's bytes and operations; None where the limits are not known."""
        peak = self.peaks.get(kind)
        if not self.bandwidth or not peak:
            return None
        return max(entry["bytes"] / self.bandwidth, entry.get("operations", 0) / peak)


def _entries(found: Found, piece: str) -> dict[str, Found]:
    """Those that were measured."""
    entries = found["pieces"].get(piece, {}).get("entries", {})
    return {name: entry for name, entry in entries.items() if entry["status"] == "done"}


def markdown(found: Found) -> str:
    limits = Limits.of(found)
    lines = [*_origin(found), *_problems(found), *_limits(limits)]
    lines += _speeds(found, limits)
    lines += _overhead(found)
    lines += _alone(found, limits)
    return "\n".join(lines) + "\n"


def _origin(found: Found) -> list[str]:
    origin, versions = found["provenance"], found["versions"]
    commit = origin["commit"] or {"id": "unknown", "dirty": False}
    stated = ", ".join(f"{name} {value}" for name, value in {**origin["versions"], **versions}.items())
    lines = [f"# gpu-check on {versions.get('card', 'no card')}", ""]
    if found["tiny"]:
        lines += ["**Tiny sizes, interpreted on a CPU: these figures mean nothing.**", ""]
    dirty = " with local changes" if commit["dirty"] else ""
    return [*lines, f"Measured {origin['date']}, commit `{commit['id'][:12]}`{dirty}. {stated}.", ""]


def _problems(found: Found) -> list[str]:
    """What is wrong, and what was not done."""
    lines = ["| piece | | seconds | |", "|---|---|---:|---|"]
    for name, piece in found["pieces"].items():
        entries = piece["entries"].values()
        bad, out = (sum(e["status"] == status for e in entries) for status in ("failed", "left out"))
        tests = sum(e.get("tests", 0) for e in entries)
        words = [f"{tests} tests passed" if tests else f"{len(entries) - bad - out} done"]
        words += ["not all of them ran"] * any(e.get("stopped") for e in entries)
        words += [f"{bad} failed"] * bool(bad) + [f"{out} left out"] * bool(out)
        status = "failed" if bad else piece["status"]
        lines.append(f"| {name} | {status} | {piece['seconds']:.0f} | {', '.join(words)} |")
    details = [
        f"- {name}: {entry}: {_first(e)}"
        for name, piece in found["pieces"].items()
        for entry, e in piece["entries"].items()
        if e["status"] != "done"
    ]
    details += [f"- {name}: {_first(piece)}" for name, piece in found["pieces"].items() if piece.get("why")]
    return lines + (["", "Failed or left out:", "", *details] if details else [])


def _first(entry: Found) -> str:
    words = str(entry.get("error") or entry.get("why") or entry["status"]).strip().splitlines()
    return words[0][:300] if words else entry["status"]


def _limits(limits: Limits) -> list[str]:
    peaks = [f"{name} products {value / 1e12:.4g} T operations/s" for name, value in limits.peaks.items()]
    copy = [f"copying {limits.bandwidth / 1e12:.4g} TB/s (read and written)"] if limits.bandwidth else []
    return ["", "Measured limits: " + ("; ".join([*copy, *peaks]) or "none") + "."]


@dataclass(frozen=True)
class Speed:
    """A measured speed; ``share`` of the card's limit."""

    model: str
    width: str
    scenario: str
    rate: float
    share: float | None
    entry: Found


def speeds(found: Found, limits: Limits) -> Iterator[Speed]:
    """Of Tuili's models. An entry's bytes and operations are of a step in decode, of the prompt in prefill."""
    for name, piece in found["pieces"].items():
        arm = piece.get("arm")
        if arm is None:
            continue
        for scenario, entry in _entries(found, name).items():
            if "tokens_per_second" not in entry:
                continue
            least = limits.seconds(entry, PEAKS[arm["width"]])
            tokens = entry.get("requests") or int(scenario.split()[1])
            share = entry["tokens_per_second"] * least / tokens if least else None
            yield Speed(arm["model"], arm["width"], scenario, entry["tokens_per_second"], share, entry)


def _speeds(found: Found, limits: Limits) -> list[str]:
    """A table per model: scenarios down, widths across; transformers beside."""
    measured = list(speeds(found, limits))
    rivals = {**_entries(found, "transformers-continuous"), **_entries(found, "transformers-static")}
    lines: list[str] = []
    for model in dict.fromkeys(s.model for s in measured):
        own = [s for s in measured if s.model == model]
        widths, scenarios = (list(dict.fromkeys(getattr(s, key) for s in own)) for key in ("width", "scenario"))
        lines += ["", f"## {model}, tokens/s (share of the measured limit; x bf16)", ""]
        lines += ["| | " + " | ".join(widths) + " |", "|---" + "|---:" * len(widths) + "|"]
        for scenario in scenarios:
            cells = {s.width: s for s in own if s.scenario == scenario}
            lines.append(f"| {scenario} | " + " | ".join(_cell(cells, width) for width in widths) + " |")
    if rivals:
        lines += [
            "",
            "## transformers, the 8B shape in bf16, tokens/s",
            "",
            "| | while all decode | from start to end |",
        ]
        lines += ["|---|---:|---:|"]
        for name, entry in rivals.items():
            lines.append(
                f"| {name} | {_figure(entry['tokens_per_second'])} | {_figure(entry['whole_tokens_per_second'])} |"
            )
        lines += _ratio(measured, rivals)
    return lines


def _cell(cells: dict[str, Speed], width: str) -> str:
    speed, plain = cells.get(width), cells.get("bf16")
    if speed is None:
        return "-"
    share = f"{speed.share:.0%}" if speed.share is not None else ""
    times = f"{speed.rate / plain.rate:.2f} x" if plain and plain is not speed else ""
    notes = "; ".join(part for part in (share, times) if part)
    return _figure(speed.rate) + (f" ({notes})" if notes else "")


def _ratio(measured: list[Speed], rivals: dict[str, Found]) -> list[str]:
    """Tuili in bf16 against transformers on the same requests, from start to end."""
    lines = []
    for name, entry in rivals.items():
        work = name.split(" ", 2)[2] if name.startswith("continuous") else name.rsplit("compiled ", 1)[1]
        ours = [
            s for s in measured if s.width == "bf16" and s.model.startswith("Llama") and s.scenario == f"decode {work}"
        ]
        for speed in ours:
            times = speed.entry["whole_tokens_per_second"] / entry["whole_tokens_per_second"]
            lines.append(f"- Tuili, {work}, from start to end: {times:.2f} x {name}")
    return ["", *lines] if lines else []


def _overhead(found: Found) -> list[str]:
    lines = []
    for name in found["pieces"]:
        for scenario, entry in _entries(found, name).items():
            if "device_seconds" not in entry:
                continue
            device = entry["device_seconds"]
            over = f"{entry['step_seconds'] / device - 1:+.1%}" if device else "-"
            cells = (entry["step_seconds_depth_1"], entry["step_seconds"], device)
            times = " | ".join(f"{1000 * value:.3f}" if value else "-" for value in cells)
            lines.append(f"| {name}: {scenario.removeprefix('device time of ')} | {times} | {over} |")
    head = ["", "## A decode step, ms", "", "| | depth 1 | depth 2 | kernels alone | depth 2 over kernels |",
            "|---|---:|---:|---:|---:|"]  # fmt: skip
    return head + lines if lines else []


def _alone(found: Found, limits: Limits) -> list[str]:
    lines = []
    for piece in ("attention", "products"):
        entries = _entries(found, piece)
        if not entries:
            continue
        lines += ["", f"## Kernels alone: {piece}", "", "| | us | GB/s | T operations/s | share of the limit |"]
        lines += ["|---|---:|---:|---:|---:|"]
        for name, entry in entries.items():
            kind = {"FP8": "float8", "W8A8": "int8"}.get(name.split()[0], "bfloat16")
            least, taken = limits.seconds(entry, kind), entry["seconds_alone"]
            cells = [f"{1e6 * taken:.1f}", f"{entry['bytes'] / taken / 1e9:,.0f}"]
            cells += [f"{entry.get('operations', 0) / taken / 1e12:,.1f}", f"{least / taken:.0%}" if least else "-"]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def plot(found: Found, path: Path) -> None:
    """Operations per byte against operations per second: the card's measured roofs, and every measured speed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'tuili[bench]')", file=sys.stderr)
        return
    limits = Limits.of(found)
    measured = [s for s in speeds(found, limits) if s.share]
    figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
    intensities = [s.entry["operations"] / s.entry["bytes"] for s in measured] or [1.0]
    low, high = min(0.5, *intensities) / 2, max(2000.0, *intensities) * 2
    for name, peak in limits.peaks.items():
        if limits.bandwidth:
            knee = peak / limits.bandwidth
            xs = sorted({low, max(low, min(knee, high)), high})
            axis.plot(xs, [min(peak, x * limits.bandwidth) for x in xs], linewidth=1, label=f"limit, {name}")
    markers = dict(zip(dict.fromkeys((s.model, s.width) for s in measured), "osD^vP*X", strict=False))
    for (model, width), marker in markers.items():
        own = [s for s in measured if (s.model, s.width) == (model, width)]
        xs = [s.entry["operations"] / s.entry["bytes"] for s in own]
        least = [limits.seconds(s.entry, PEAKS[width]) or 1.0 for s in own]
        ys = [s.entry["operations"] / seconds * (s.share or 0) for s, seconds in zip(own, least, strict=True)]
        axis.scatter(xs, ys, marker=marker, s=28, label=f"{model} {width}")
    axis.set(xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="operations per second (measured)")
    axis.set_title(
        "Measured limits of the card and measured speeds" + (" (tiny: means nothing)" if found["tiny"] else "")
    )
    if measured:
        axis.legend(fontsize=7)
    axis.grid(visible=True, which="major", alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_report(path: Path) -> str:
    """check.md and roofline.png beside check.json at ``path``; the text of the first."""
    found = json.loads(path.read_text())
    text = markdown(found)
    path.with_name("check.md").write_text(text)
    plot(found, path.with_name("roofline.png"))
    return text


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
