"""Memory limits of the control groups that this process is in: versions 1 and 2, in a container or on a host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Names:
    """How a version calls its files, the parts of ``memory.stat`` that are page cache, and where it is mounted."""

    mount: str
    limit: str
    usage: str
    cache: tuple[str, ...]


#: Page cache is what the kernel may drop: files on the LRU lists. Shared memory is not among them.
V1 = Names(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)
V2 = Names("sys/fs/cgroup", "memory.max", "memory.current", ("active_file", "inactive_file"))


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a group may take, and that it has taken without page cache."""

    limit: int
    used: int


def memory_limits(root: Path = Path("/")) -> list[MemoryUse]:
    """Of each limited group around this process, innermost first; none where nothing is limited. ``root`` is where
    ``proc`` and ``sys`` are mounted."""
    found = (_memory(folder, names) for folder, names in _folders(root))
    return [memory for memory in found if memory is not None]


def _folders(root: Path) -> Iterator[tuple[Path, Names]]:
    """The folders of this process's memory group and of those around it, up to the mount.

    A container without a namespace for groups reads its path on the host, which is not there: the mount is its group.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    paths = {
        controllers: path for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1)
    }
    first = next((path for controllers, path in paths.items() if "memory" in controllers.split(",")), None)
    names, path = (V1, first) if first is not None else (V2, paths.get("", "/"))
    mount = root / names.mount
    inside = PurePosixPath(path.lstrip("/"))
    if ".." in inside.parts or not (mount / inside).is_dir():
        inside = PurePosixPath()
    for group in (inside, *inside.parents) if inside.parts else (inside,):
        yield mount / group, names


def _memory(folder: Path, names: Names) -> MemoryUse | None:
    """None where the group has no limit, or no memory is counted."""
    limit, usage = _number(folder / names.limit), _number(folder / names.usage)
    if limit is None or usage is None:
        return None
    return MemoryUse(limit, max(0, usage - sum(_statistics(folder, names.cache))))


def _number(file: Path) -> int | None:
    """None for "max" and for a file that is not there."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _statistics(folder: Path, names: tuple[str, ...]) -> Iterator[int]:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return
    for name, _, value in (line.partition(" ") for line in lines):
        if name in names and value.isdigit():
            yield int(value)
