"""Raw results: one JSON object per line, written the moment it is known, so that a run can be cut and taken up again.

Kinds: ``run`` (provenance, options), ``machine`` (limits), ``arm`` (versions, or why it is not there), ``start``,
``agreement``, ``speed``, ``memory``. All but the first two name ``model`` and ``arm``. Everything is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Results:
    """``hidden`` maps folders of this machine to what is written instead of them."""

    def __init__(self, path: Path, hidden: dict[Path, str] | None = None):
        self.path, self.hidden = path, hidden or {}
        self.records: list[Record] = list(read(path)) if path.exists() else []

    def add(self, kind: str, /, **values: Any) -> None:
        line = json.dumps({**values, "kind": kind})
        for folder, word in self.hidden.items():
            line = line.replace(str(folder), word)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(line + "\n")
        self.records.append(json.loads(line))

    def of(self, kind: str, **wanted: Any) -> list[Record]:
        return [
            record
            for record in self.records
            if record["kind"] == kind and all(record.get(key) == value for key, value in wanted.items())
        ]


def read(path: Path) -> Iterator[Record]:
    """The records of a file; a last line that a killed run left unfinished is passed over."""
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number != len(lines):
                raise
