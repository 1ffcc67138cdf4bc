"""Memory limits from control groups, on trees of files as kernels and container runtimes make them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuili.base import hardware
from tuili.base.cgroup import MemoryUse, memory_limits

GIB = 2**30
NO_LIMIT_V1 = 9223372036854771712


def tree(root: Path, self_cgroup: str, groups: dict[str, dict[str, object]]) -> Path:
    """``proc/self/cgroup``, and under ``sys/fs/cgroup`` a folder per group with its files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(self_cgroup)
    for group, files in groups.items():
        folder = root / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(f"{content}\n")
    return root


def v1(limit: int, usage: int, cache: int = 0, shared: int = 0) -> dict[str, object]:
    stat = f"cache {cache}\nactive_file 5\ntotal_active_file {cache // 4}\ntotal_inactive_file {cache - cache // 4}"
    stat += f"\ntotal_shmem {shared}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage, "memory.stat": stat}


def v2(limit: object, usage: int, cache: int = 0) -> dict[str, object]:
    stat = f"anon 7\nfile {cache}\nactive_file {cache // 4}\ninactive_file {cache - cache // 4}\nworkingset_x 9"
    return {"memory.max": limit, "memory.current": usage, "memory.stat": stat}


def test_page_cache_is_not_used_memory(tmp_path: Path) -> None:
    """A container that has read a large checkpoint: the file's pages are free for whoever asks."""
    tree(tmp_path, "0::/\n", {".": v2(8 * GIB, 7 * GIB, cache=6 * GIB)})
    assert memory_limits(tmp_path) == [MemoryUse(8 * GIB, GIB)]


def test_version_1_is_read(tmp_path: Path) -> None:
    lines = "9:name=systemd:/\n4:memory:/docker/abc\n3:cpu,cpuacct:/\n0::/\n"
    groups = {"memory": v1(NO_LIMIT_V1, 9 * GIB), "memory/docker": v1(16 * GIB, 5 * GIB, cache=GIB)}
    tree(tmp_path, lines, groups | {"memory/docker/abc": v1(4 * GIB, 3 * GIB, cache=2 * GIB)})
    found = memory_limits(tmp_path)
    assert found[:2] == [MemoryUse(4 * GIB, GIB), MemoryUse(16 * GIB, 4 * GIB)]
    assert all(memory.limit == NO_LIMIT_V1 for memory in found[2:])


@pytest.mark.parametrize("path", ["/docker/abc", "/../outside", "/kubepods.slice/pod:1/abc"])
def test_a_container_that_sees_its_path_on_the_host_has_the_mount_as_its_group(tmp_path: Path, path: str) -> None:
    tree(tmp_path / "1", f"4:memory:{path}\n", {"memory": v1(2 * GIB, GIB)})
    tree(tmp_path / "2", f"0::{path}\n", {".": v2(2 * GIB, GIB)})
    assert memory_limits(tmp_path / "1") == memory_limits(tmp_path / "2") == [MemoryUse(2 * GIB, GIB)]


def test_every_group_around_the_process_limits_it(tmp_path: Path) -> None:
    groups = {".": {}, "user.slice": v2(6 * GIB, 5 * GIB), "user.slice/app": v2("max", GIB)}
    tree(tmp_path, "0::/user.slice/app\n", groups)
    assert memory_limits(tmp_path) == [MemoryUse(6 * GIB, 5 * GIB)]


@pytest.mark.parametrize("lines", ["", "0::/\n", "nonsense\n", "4:memory:/\n"])
def test_without_limits_there_are_none(tmp_path: Path, lines: str) -> None:
    assert memory_limits(tree(tmp_path, lines, {"memory": {}})) == []
    assert memory_limits(tmp_path / "absent") == []


def test_the_machine_is_as_large_as_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        hardware, "memory_limits", lambda: [MemoryUse(2**20, 2**19), MemoryUse(2**30, 0), MemoryUse(2**21, 2**22)]
    )
    assert hardware.memory() == (0, 2**20)
    monkeypatch.setattr(hardware, "memory_limits", lambda: [MemoryUse(2**20, 2**19), MemoryUse(NO_LIMIT_V1, 0)])
    here = hardware.probe()
    assert (here.available_memory, here.total_memory) == hardware.memory() == (2**19, 2**20)
