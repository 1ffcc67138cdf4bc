"""The contrast lab: one matrix times 1 to 2,048 rows in every weight format. With few rows the weights' bytes are the
time, with many the products are: intensity (operations per byte) says which, the roofline says how fast at best.

Limits are probed in the same run, before and after; the better count. Every product uses another copy of the matrix, so
that weights come from memory as in a model's step. The functions import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuili.base import hardware
from tuili.base.limits import attainable, bound
from tuili.bench import machine
from tuili.bench.provenance import provenance
from tuili.quant.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from tuili.quant.weight import Weight

ROWS = tuple(1 << power for power in range(12))


@dataclass(frozen=True)
class RooflineArm:
    """A way of multiplying: what weights are stored in, and the kind of its products."""

    name: str
    scheme: Scheme
    kind: str

    @property
    def dtype(self) -> str:
        """Of the activations, as an engine has them here: bfloat16 where that is multiplied fast."""
        return "bfloat16" if self.kind != "float32" and hardware.probe().fast_bfloat16 else "float32"


ARMS = (
    RooflineArm("f32", Scheme(dtype="float32"), "float32"),
    RooflineArm("bf16", Scheme(dtype="bfloat16"), "bfloat16"),
    RooflineArm("int8", Scheme("int8"), "int8"),
    RooflineArm("int4", Scheme("int4", 32), "int4"),
)


@dataclass(frozen=True)
class Point:
    """A measured product: ``bytes`` moved once (weights, activations in and out), ``operations`` (a multiplication and
    an addition are two) of ``kind``."""

    arm: str
    kind: str
    rows: int
    seconds: float
    bytes: int
    operations: int

    def under(self, bandwidth: float, peaks: Mapping[str, float]) -> dict[str, Any]:
        """All figures, and the roof: what ``bandwidth`` and the peak of the kind allow at this intensity."""
        intensity, peak, rate = self.operations / self.bytes, peaks[self.kind], self.operations / self.seconds
        roof = attainable(intensity, bandwidth, peak)
        return asdict(self) | {
            "intensity": intensity,
            "bytes_per_second": self.bytes / self.seconds,
            "per_second": rate,
            "roof": roof,
            "share": rate / roof,
            "bound": bound(intensity, bandwidth, peak),
        }


def sweep(
    inputs: int,
    outputs: int,
    rows: Sequence[int] = ROWS,
    arms: Sequence[RooflineArm] = ARMS,
    threads: int | None = None,
    seconds: float = 0.1,
    cold_bytes: int = 256 << 20,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Every arm at every number of rows, ``seconds`` each; copies of a matrix fill ``cold_bytes``."""
    import torch

    threads = threads or machine.thread_counts()[-1]
    points: list[Point] = []
    with machine.team(threads), torch.inference_mode():
        limits = [machine.limits(threads, [cold_bytes], seconds)]
        for arm in arms:
            weights = copies(arm, inputs, outputs, cold_bytes)
            for count in rows:
                points.append(run(arm, weights, count, seconds))
                tick()
        limits.append(machine.limits(threads, [cold_bytes], seconds))
    bandwidth = max(found.memory_bandwidth for found in limits)
    peaks = {kind: max(found.peaks[kind] for found in limits) for kind in machine.KINDS}
    return {
        "benchmark": "roofline",
        "inputs": inputs,
        "outputs": outputs,
        "threads": threads,
        "bandwidth": bandwidth,
        "peaks": peaks,
        "points": [point.under(bandwidth, peaks) for point in points],
        "provenance": provenance(),
    }


def copies(arm: RooflineArm, inputs: int, outputs: int, cold_bytes: int) -> list[Weight]:
    """One random matrix in the arm's format, as often as ``cold_bytes`` hold it."""
    import torch

    from tuili.ops import kernels_of
    from tuili.ops.cpu import Arena, describe
    from tuili.quant.weight import Weight

    arena = Arena(kernels_of("cpu" if describe().built else "reference"))
    matrix = torch.randn(outputs, inputs).to(getattr(torch, arm.dtype)) / inputs**0.5
    first = Weight.of(matrix, arm.scheme, arena)

    def clone(tensor: torch.Tensor) -> torch.Tensor:
        return arena.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    count = max(2, cold_bytes // first.nbytes)
    return [first, *(replace(first, tensors={k: clone(t) for k, t in first.tensors.items()}) for _ in range(count - 1))]


def run(arm: RooflineArm, weights: list[Weight], rows: int, seconds: float) -> Point:
    """Time one product of ``rows`` rows, each call on the next copy of the matrix."""
    import torch

    first = weights[0]
    x = torch.randn(rows, first.into).to(first.dtype)
    turn = iter(range(sys.maxsize))

    def call() -> None:
        weights[next(turn) % len(weights)].matmul(x)

    took = machine.best(call, seconds)
    moved = first.nbytes + (rows * first.into + rows * first.out) * x.element_size()
    return Point(arm.name, arm.kind, rows, took, moved, 2 * rows * first.into * first.out)


# --------------------------------------------------------------------------------------------------------------- plot


def plot(result: dict[str, Any], path: Path) -> bool:
    """The roofline as a picture: a roof per kind of product, and where each measured product is below it. False where
    matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axis = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    bandwidth, peaks = result["bandwidth"], result["peaks"]
    intensities = [entry["intensity"] for entry in result["points"]]
    low, high = min(intensities) / 2, max(intensities) * 2
    for kind, peak in peaks.items():
        ridge = peak / bandwidth
        xs = [low, ridge, max(high, ridge)]
        axis.plot(xs, [attainable(x, bandwidth, peak) / 1e9 for x in xs], color="black", linewidth=1)
        axis.annotate(f"{kind}: {peak / 1e9:,.0f} G/s", (xs[-1], peak / 1e9), ha="right", va="bottom", fontsize=8)
    for arm in dict.fromkeys(entry["arm"] for entry in result["points"]):
        points = [entry for entry in result["points"] if entry["arm"] == arm]
        axis.plot([p["intensity"] for p in points], [p["per_second"] / 1e9 for p in points], marker="o", label=arm)
        for p in (points[0], points[-1]):
            place = (p["intensity"], p["per_second"] / 1e9)
            axis.annotate(str(p["rows"]), place, xytext=(4, -10), textcoords="offset points", fontsize=8)
    axis.set(
        xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="10^9 operations per second (measured)"
    )
    axis.set_title(
        f"{result['outputs']} x {result['inputs']} times 1 to 2,048 rows, {result['threads']} threads, "
        f"reads {bandwidth / 1e9:.0f} GB/s; {result['provenance']['machine']['cpu']}",
        fontsize=10,
    )
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(title="weights (number: rows)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
