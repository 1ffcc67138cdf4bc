"""Stories out of the archive: read, cleaned, and split into training and held-out documents. Deterministic.

Records are ``prompt<start>response\\n<end>``; a file's name without its number is the category.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tuili.base.errors import ConfigError

QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "\u00a0": " ", "–": "—"})
MARKS = re.compile(r"^#+ .*$|\*\*|^[-*_]{3,}$", re.MULTILINE)
BLANKS = re.compile(r"\n\s*\n+")
NUMBER = re.compile(r"(-\d+)?\.md$")
#: One document in this many is held out.
HELD_OUT = 100


@dataclass(frozen=True)
class Document:
    category: str
    prompt: str
    text: str

    @property
    def held_out(self) -> bool:
        """Never trained on; a function of the text alone, so that no change of the recipe leaks it into training."""
        digest = hashlib.blake2b(self.text.encode(), digest_size=8).digest()
        return int.from_bytes(digest) % HELD_OUT == 0


def read(path: Path, categories: tuple[str, ...]) -> list[Document]:
    """Distinct documents of ``categories`` in the tar archive at ``path``, in order of file name.

    Raises ConfigError when the archive is missing or holds none of a category.
    """
    if not path.is_file():
        raise ConfigError(f"no corpus at {path}; give its place with --data")
    files: dict[str, str] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            content = archive.extractfile(member) if NUMBER.sub("", name) in categories else None
            if content is not None:
                files[name] = content.read().decode("utf-8", "replace")
    found = {NUMBER.sub("", name) for name in files}
    if missing := set(categories) - found:
        raise ConfigError(f"{path} has no files of {', '.join(sorted(missing))}")
    documents = [d for name in sorted(files) for d in records(NUMBER.sub("", name), files[name])]
    return list({d.text: d for d in documents}.values())


def records(category: str, content: str) -> Iterator[Document]:
    """The cleaned documents of one file; empty ones are left out."""
    for record in content.split("<end>"):
        prompt, found, text = record.partition("<start>")
        text = clean(text)
        if found and len(text) > 200:
            yield Document(category, clean(prompt), text)


def clean(text: str) -> str:
    """Plain quotes, no markdown headings or bold, single blank lines, and no title line on top."""
    text = BLANKS.sub("\n\n", MARKS.sub("", text.translate(QUOTES))).strip()
    first, found, rest = text.partition("\n\n")
    is_title = found and len(first) < 90 and first[-1] not in ".!?:,\"'"
    return rest.strip() if is_title else text
