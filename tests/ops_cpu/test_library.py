"""The shared library of the kernels loads wherever torch's wheels do (docs/decisions/0004-wheel.md)."""

from __future__ import annotations

import re

import pytest

from tuili.ops.cpu import library

#: Newest versions of manylinux_2_28, the tag of torch's wheels for x86-64.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


@pytest.mark.skipif(not library.PATH.is_file(), reason="the C++ kernels were not built")
def test_library_asks_for_no_newer_system_than_torch() -> None:
    content = library.PATH.read_bytes()
    if b"__asan_" in content:
        pytest.skip("the sanitizers' library is for this machine only")
    asked = re.findall(rb"\0(GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)(?=\0)", content)
    assert {name.decode() for name, _ in asked} >= {"GLIBC", "GLIBCXX"}
    versions = [(name.decode(), tuple(map(int, version.split(b".")))) for name, version in asked]
    assert not [f"{name}_{version}" for name, version in versions if version > NEWEST[name]]
