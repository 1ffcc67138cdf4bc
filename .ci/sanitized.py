"""Run pytest on the copy of Tuili in ./src, whose library has the sanitizers in: not on the installed checkout."""

import sys
from pathlib import Path

import pytest

# An editable install answers imports before PYTHONPATH does.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
sys.path.insert(0, "src")

from tuili.ops.cpu import library  # noqa: E402

if Path(library.PATH).resolve().parents[3] != Path("src").resolve() or b"__asan_" not in library.PATH.read_bytes():
    sys.exit(f"{library.PATH} is not the sanitized library")
sys.exit(pytest.main(sys.argv[1:]))
