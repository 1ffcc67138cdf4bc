"""The small files of a checkpoint, JSON and text: only regular files, of a bounded size, and errors that name them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from tuili.base.errors import ModelError

#: Bytes. The index of the largest model known has 9 million, the longest chat template 40 thousand.
MOST_JSON, MOST_TEXT = 64 << 20, 1 << 20


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """The UTF-8 text in ``path``, with or without a byte order mark. ModelError where that is not what is there."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{path} is not a regular file")
        if status.st_size > most:
            raise ModelError(f"{path} has {status.st_size} bytes, and at most {most} are read")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as UTF-8 text: {error}; download or write it again") from error


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """The JSON object in ``path``; ``{}`` where it may be and is missing. ModelError with the place of the fault."""
    if optional and not path.exists():
        return {}
    text = read_text(path, MOST_JSON)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}; download or write it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
