"""Which tiles a product uses: measured for the card where a file says so, else a guess from the shape.

A card's measurements are one JSON file, ``cards/<card>.json`` of this package or of ``~/.cache/tuili`` (which wins):
``{"card", "triton", "entries": {"<kernel> <outputs>x<inputs>": {"<rows>": [outputs, rows, inputs, splits, warps,
stages]}}}``. ``rows`` are powers of two; a number of rows uses the entry of the next one. No Triton in here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, field
from functools import cache
from pathlib import Path

from tuili.base.errors import ConfigError

SHIPPED = Path(__file__).parent / "cards"
OWN = Path.home() / ".cache" / "tuili" / "cards"


@dataclass(frozen=True)
class Tile:
    """A program makes ``outputs`` x ``rows`` results, ``inputs`` per step; ``splits`` programs share the inputs."""

    outputs: int
    rows: int
    inputs: int
    splits: int
    warps: int
    stages: int


@dataclass
class Card:
    """What was measured on one card: entries by kernel and shape, then by number of rows."""

    name: str
    triton: str = ""
    entries: dict[str, dict[int, Tile]] = field(default_factory=dict)

    def find(self, kernel: str, rows: int, outputs: int, inputs: int) -> Tile | None:
        """The entry of the smallest measured number of rows that is not below ``rows``, else of the largest."""
        by_rows = self.entries.get(key(kernel, outputs, inputs), {})
        if not by_rows:
            return None
        return by_rows[min((r for r in by_rows if r >= rows), default=max(by_rows))]

    def save(self, folder: Path) -> Path:
        """Write the file, beside what it held for other kernels and shapes. Returns its path."""
        path = folder / f"{slug(self.name)}.json"
        merged = {**(load(path).entries if path.exists() else {}), **self.entries}
        entries = {name: {str(r): list(astuple(t)) for r, t in sorted(by.items())} for name, by in merged.items()}
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"card": self.name, "triton": self.triton, "entries": entries}, indent=1, sort_keys=True)
        path.write_text(text + "\n")
        return path


def key(kernel: str, outputs: int, inputs: int) -> str:
    return f"{kernel} {outputs}x{inputs}"


def slug(name: str) -> str:
    """``NVIDIA H200`` as a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load(path: Path) -> Card:
    """A card's file. ConfigError where it is not one."""
    try:
        data = json.loads(path.read_text())
        entries = {name: {int(r): Tile(*tile) for r, tile in by.items()} for name, by in data["entries"].items()}
        return Card(data["card"], data["triton"], entries)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no file of measured tiles ({error!r}): delete it, or measure again") from error


@cache
def card(name: str) -> Card:
    """What is known of the card ``name``: nothing, where nobody measured it."""
    known = Card(name)
    for folder in (SHIPPED, OWN):
        path = folder / f"{slug(name)}.json"
        if name and path.exists():
            known.entries.update(load(path).entries)
    return known


def guess(rows: int, outputs: int, inputs: int, processors: int, step: int = 128) -> Tile:
    """A tile for a card that was not measured: few rows split the inputs until every multiprocessor has work."""
    if rows <= 64:
        wide = 64
        tiles = -(-outputs // wide)
        splits = max(1, min(8, 2 * processors // tiles, inputs // (4 * step)))
        return Tile(wide, max(16, 1 << (rows - 1).bit_length()), step, splits, 4, 4)
    return Tile(128, 128, min(step, 64), 1, 8, 3)


def invariant(outputs: int, inputs: int, step: int = 64) -> Tile:
    """One tile for any number of rows; the inputs are split by the matrix's shape alone."""
    splits = 1 if outputs >= 8192 or inputs < 1024 else 4
    return Tile(64, 32, step, splits, 4, 3)


def tune(
    kernel: str,
    outputs: int,
    inputs: int,
    rows: Iterable[int],
    candidates: Iterable[Tile],
    seconds: Callable[[int, Tile], float],
) -> dict[str, dict[int, Tile]]:
    """The fastest of ``candidates`` for each number of rows. ``seconds`` measures one; infinity: it does not run."""
    best = {}
    options = list(candidates)
    for count in rows:
        times = {tile: seconds(count, tile) for tile in options}
        fastest = min(times, key=times.__getitem__)
        if times[fastest] < float("inf"):
            best[count] = fastest
    return {key(kernel, outputs, inputs): best}
