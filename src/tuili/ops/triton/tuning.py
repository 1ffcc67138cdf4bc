"""Which tiles products and attention use: measured for the card where a file says so, else a guess from the shape.

A card's measurements are one JSON file, ``cards/<card>.json`` of this package or of ``~/.cache/tuili`` (which wins):
``{"card", "triton", "entries": {"<kernel> <outputs>x<inputs>": {"<rows>": [outputs, rows, inputs, splits, warps,
stages]}}, "attention": {"<phase> <dtype of the cache> <heads of a KV head>x<dim>": {"<count>": [rows, keys, waves,
warps, stages]}}}``. ``rows`` are powers of two, and so are counts: of requests where the phase is decode, of queries
per request where it is prefill; other numbers use the entry of the next one. No Triton in here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

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


@dataclass(frozen=True)
class AttentionTile:
    """A program takes ``rows`` (queries times heads of a group), ``keys`` per step; where there are few of them, keys
    are split until there are ``waves`` programs per multiprocessor."""

    rows: int
    keys: int
    waves: int
    warps: int
    stages: int


T = TypeVar("T", Tile, AttentionTile)
Entries = dict[str, dict[int, T]]


@dataclass
class CardTiles:
    """What was measured on one card: entries by kernel and shape, then by number of rows."""

    name: str
    triton: str = ""
    entries: Entries[Tile] = field(default_factory=dict)
    attention: Entries[AttentionTile] = field(default_factory=dict)

    def find(self, kernel: str, rows: int, outputs: int, inputs: int) -> Tile | None:
        """The entry of the smallest measured number of rows that is not below ``rows``, else of the largest."""
        return _next(self.entries.get(key(kernel, outputs, inputs), {}), rows)

    def find_attention(self, phase: str, dtype: str, group: int, dim: int, count: int) -> AttentionTile | None:
        """Likewise; ``count`` requests in "decode", queries per request in "prefill"."""
        return _next(self.attention.get(attention_key(phase, dtype, group, dim), {}), count)

    def add(self, other: CardTiles) -> None:
        """Take over what ``other`` knows, number by number."""
        for mine, theirs in ((self.entries, other.entries), (self.attention, other.attention)):
            for name, by_count in theirs.items():
                mine.setdefault(name, {}).update(by_count)  # type: ignore[arg-type]

    def save(self, folder: Path) -> Path:
        """Write the file, beside what it held of other kernels, shapes and numbers. Returns its path."""
        path = folder / f"{slug(self.name)}.json"
        merged = load(path) if path.exists() else CardTiles(self.name)
        merged.add(self)
        found = {"card": self.name, "triton": self.triton or merged.triton}
        text = json.dumps(
            {**found, "entries": _plain(merged.entries), "attention": _plain(merged.attention)},
            indent=1,
            sort_keys=True,
        )
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        return path


def _next(by_count: Mapping[int, T], count: int) -> T | None:
    if not by_count:
        return None
    return by_count[min((n for n in by_count if n >= count), default=max(by_count))]


def _plain(entries: Entries[T]) -> dict[str, dict[str, list[int]]]:
    return {name: {str(n): list(astuple(t)) for n, t in sorted(by.items())} for name, by in entries.items()}


def _parsed(data: Mapping[str, Any], tile: type[T]) -> Entries[T]:
    return {name: {int(n): tile(*numbers) for n, numbers in by.items()} for name, by in data.items()}


def key(kernel: str, outputs: int, inputs: int) -> str:
    return f"{kernel} {outputs}x{inputs}"


def attention_key(phase: str, dtype: str, group: int, dim: int) -> str:
    return f"{phase} {dtype} {group}x{dim}"


def slug(name: str) -> str:
    """``NVIDIA H200`` as a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load(path: Path) -> CardTiles:
    """A card's file. ConfigError where it is not one."""
    try:
        data = json.loads(path.read_text())
        parts = _parsed(data["entries"], Tile), _parsed(data.get("attention", {}), AttentionTile)
        return CardTiles(data["card"], data["triton"], *parts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no file of measured tiles ({error!r}): delete it, or measure again") from error


@cache
def card(name: str) -> CardTiles:
    """What is known of the card ``name``: nothing, where nobody measured it."""
    known = CardTiles(name)
    for folder in (SHIPPED, OWN):
        path = folder / f"{slug(name)}.json"
        if name and path.exists():
            known.add(load(path))
    return known


def guess(rows: int, outputs: int, inputs: int, processors: int, step: int = 128) -> Tile:
    """A tile for a card that was not measured: few rows split the inputs until every multiprocessor has work."""
    if rows <= 64:
        wide = 64
        tiles = -(-outputs // wide)
        splits = max(1, min(8, 2 * processors // tiles, inputs // (4 * step)))
        return Tile(wide, max(16, 1 << (rows - 1).bit_length()), step, splits, 4, 4)
    return Tile(128, 128, min(step, 64), 1, 8, 3)


def guess_attention(queries: int, group: int, dim: int) -> AttentionTile:
    """For ``queries`` per request, on a card that was not measured."""
    least = 1 << (group - 1).bit_length()
    rows = max(16, least, min(128 if dim <= 128 else 64, 1 << (queries * group - 1).bit_length()))
    if dim > 128:
        return AttentionTile(rows, 32, 2, 8 if rows >= 64 else 4, 2)
    return AttentionTile(rows, 64, 2, 8 if rows >= 128 else 4, 3)


def invariant(outputs: int, inputs: int, step: int = 64) -> Tile:
    """One tile for any number of rows; the inputs are split by the matrix's shape alone."""
    splits = 1 if outputs >= 8192 or inputs < 1024 else 4
    return Tile(64, 32, step, splits, 4, 3)


def fastest(candidates: Iterable[T], seconds: Callable[[T], float]) -> T | None:
    """The one that takes least by ``seconds`` (infinity: it does not run); None where none runs."""
    times = {tile: seconds(tile) for tile in candidates}
    best = min(times, key=times.__getitem__, default=None)
    return best if best is not None and times[best] < float("inf") else None
