"""Traces of others as workloads: Mooncake JSONL, Azure and BurstGPT CSV (interfaces.md 5.10). Lengths, arrivals,
prefixes; no text."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

from tuili.base.errors import ConfigError
from tuili.bench.workload import DEFAULT_VOCAB, Item, Workload, fold_ids, random_ids, rng_of

#: Tokens per hash id of a Mooncake trace.
MOONCAKE_BLOCK = 512


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One line of a trace. ``arrival`` in seconds since the first; ``hash_ids`` empty where the trace has no
    prefixes."""

    arrival: float
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()


def mooncake(path: str | Path) -> Iterator[TraceRow]:
    """Rows of a Mooncake JSONL file; ConfigError names the line that is not one."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            ids = tuple(int(i) for i in row["hash_ids"])
            yield TraceRow(finite(row["timestamp"] / 1000), int(row["input_length"]), int(row["output_length"]), ids)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ConfigError(f"{path}:{number} is not a line of a Mooncake trace: {error!r}") from error


def azure(path: str | Path) -> Iterator[TraceRow]:
    """Rows of an Azure LLM or a BurstGPT CSV file, told apart by the header."""
    reader = csv.DictReader(_lines(path))
    names = set(reader.fieldnames or ())
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= names:
        columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    elif {"Timestamp", "Request tokens", "Response tokens"} <= names:
        columns = ("Timestamp", "Request tokens", "Response tokens")
    else:
        raise ConfigError(f"{path} is neither an Azure nor a BurstGPT trace; its columns are {sorted(names)}")
    first: float | None = None
    for row in reader:
        try:
            when = finite(_seconds(row[columns[0]]))
            lengths = int(row[columns[1]]), int(row[columns[2]])
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}:{reader.line_num} is not a line of a trace: {error}") from error
        first = when if first is None else first
        yield TraceRow(when - first, *lengths)


def _lines(path: str | Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from file
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the trace {path} is not UTF-8: {error}") from error


def finite(seconds: float) -> float:
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} is no time")
    return seconds


def _seconds(text: str) -> float:
    """Seconds as a number (BurstGPT) or from an ISO date (Azure)."""
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()


def from_rows(
    rows: Iterator[TraceRow],
    *,
    name: str,
    count: int | None = None,
    max_len: int | None = None,
    shrink: int = 1,
    speed: float = 1.0,
    seed: int = 0,
    vocab: tuple[int, int] = DEFAULT_VOCAB,
) -> Workload:
    """The first ``count`` rows that fit ``max_len`` tokens, lengths divided by ``shrink`` and arrivals by ``speed``.

    Blocks of hash ids shrink with the lengths, so that the share of reused tokens stays what the trace has.
    """
    if shrink < 1 or MOONCAKE_BLOCK % shrink:
        raise ConfigError(f"the trace can shrink by a divisor of {MOONCAKE_BLOCK}, not by {shrink}")
    if not speed > 0:
        raise ConfigError(f"the speed of a trace must be positive, got {speed}")
    block, rng = MOONCAKE_BLOCK // shrink, rng_of(seed, "trace", name)
    skipped = 0

    def fitting() -> Iterator[Item]:
        nonlocal skipped
        for row in rows:
            length, output = -(-row.input_len // shrink), max(1, -(-row.output_len // shrink))
            if length < 1 or (max_len is not None and length + output > max_len):
                skipped += 1
                continue
            tokens = (
                fold_ids(row.hash_ids, length, block, vocab, seed) if row.hash_ids else random_ids(rng, length, vocab)
            )
            yield Item(tokens, output, row.arrival / speed)

    items = tuple(islice(fitting(), count))
    if not items:
        raise ConfigError(f"no request of the trace fits {max_len} tokens; raise --max-len or --trace-shrink")
    return Workload(name, seed, items, skipped)
