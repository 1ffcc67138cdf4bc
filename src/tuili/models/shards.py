"""The safetensors files of a checkpoint: which they are, and whether they hold a head of their own. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from tuili.base.errors import ModelError
from tuili.models.fields import shown
from tuili.models.names import EMBEDDING, HEAD
from tuili.models.read import read_json

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
#: Bytes: of a file's header, as the format limits it; of a file's name; and what is compared at once.
MOST_HEADER, MOST_NAME, PIECE = 100_000_000, 255, 1 << 20


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single one, those of the index, or all there are."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed(index)
    every = sorted(path for path in directory.glob("*.safetensors") if path.is_file())
    # Mistral ships its weights a second time under its own names.
    files = [path for path in every if not path.name.startswith("consolidated")] or every
    if files:
        return files
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if not pickles:
        raise ModelError(f"{directory} has no *.safetensors; give the directory of a complete Hugging Face checkpoint")
    raise ModelError(
        f"{directory} has its weights only as pickles ({', '.join(pickles[:4])}). Loading them can run code, so Tuili "
        'never does. If you trust them, convert once: `python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}').save_pretrained('{directory}-safetensors')\"`, and copy the tokenizer."
    )


def _indexed(index: Path) -> list[Path]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ModelError(f"{index}: weight_map={shown(table)} must map tensor names to file names")
    names = sorted(set(table.values()))
    if outside := [name for name in names if Path(name).name != name or len(name.encode()) > MOST_NAME]:
        raise ModelError(f"{index} names files outside its directory: {listed(map(shown, outside))}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ModelError(f"{index.parent} lacks {len(missing)} of {len(names)} weight files; fetch {listed(missing)}")
    return [index.parent / name for name in names]


def listed(names: Iterable[str], most: int = 40) -> str:
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); download it again") from error


def plain_name(stored: str, prefixes: Mapping[str, str]) -> str:
    """The name in the family's table of the tensor that files call ``stored``."""
    for prefix, plain in prefixes.items():
        if stored.startswith(prefix):
            return plain + stored.removeprefix(prefix)
    return stored


# Is the head the embedding? ------------------------------------------------------------------------------------------


class _TensorPlace(NamedTuple):
    """Where a tensor's bytes lie."""

    path: Path
    start: int
    size: int
    kind: tuple[Any, ...]


def has_another_head(directory: Path, prefixes: Mapping[str, str]) -> bool:
    """Whether the files hold a head that is not, byte by byte, the embedding that they hold too.

    False where they hold no head, or none can be read: loading tells what is wrong with them.
    """
    try:
        found = {name: place for path in weight_files(directory) for name, place in _places(path, prefixes)}
    except (ModelError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    heads = {name for name in found if name.startswith(f"{HEAD}.")}
    embedding, head = found.get(f"{EMBEDDING}.weight"), found.get(f"{HEAD}.weight")
    if not heads or embedding is None:
        return False
    return heads != {f"{HEAD}.weight"} or head is None or not _equal(embedding, head)


def _places(path: Path, prefixes: Mapping[str, str]) -> Iterable[tuple[str, _TensorPlace]]:
    """The embedding and all that belongs to a head, by their names in the family's table."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MOST_HEADER:
            raise ValueError(f"{path}: a header of {size} bytes")
        header = json.loads(file.read(size))
    for stored, entry in header.items():
        name = plain_name(stored, prefixes)
        if name.startswith((f"{HEAD}.", f"{EMBEDDING}.")):
            start, end = entry["data_offsets"]
            yield name, _TensorPlace(path, 8 + size + start, end - start, (entry["dtype"], *entry["shape"]))


def _equal(one: _TensorPlace, other: _TensorPlace) -> bool:
    if one.kind != other.kind or one.size != other.size:
        return False
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        for done in range(0, one.size, PIECE):
            count = min(PIECE, one.size - done)
            if first.read(count) != second.read(count):
                return False
    return True
