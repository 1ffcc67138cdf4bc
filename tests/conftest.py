"""Shared set-up: one thread per test process (tests run in parallel), no network, fixtures that several suites use."""

from __future__ import annotations

import logging
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton's kernels run on the CPU, interpreted; `make gpu-check` says 0, and runs them on the card.
os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ["TRITON_INTERPRET"] == "1":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # interpreted kernels compute on the CPU, and so does the engine

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tiny_models import Tiny

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def plain_process() -> None:
    """Engines choose the threads of their process, commands its log; no test inherits a choice."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    logger = logging.getLogger("tuili")  # commands set it up for a terminal, where caplog hears nothing
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it skip where it is not."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data folder {SHARED}, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """``tiny(case) -> Path``: a tiny random checkpoint of a case of ``tiny_models.CASES``, made once per session."""
    from tiny_models import Tiny

    return Tiny(tmp_path_factory.mktemp)
