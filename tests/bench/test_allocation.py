"""What the KV cache is given to, counted by hand and by laws (INVENTORY row 42)."""

from __future__ import annotations

import pytest

from tuili.base.errors import ConfigError
from tuili.bench.allocation import DYNAMIC, RESERVED, SLOT, compare, figures, run
from tuili.bench.workload import Item, Workload, preset
from tuili.core.executor import Capacity

MIXED = preset("mixed", 48, max_len=256)


def test_one_request_by_hand() -> None:
    """A prompt of 5, 3 tokens: after the steps 5, 6, and, as it ends with the third, nothing is held."""
    alone = Workload("alone", 0, (Item((7,) * 5, 3),))
    assert run(alone, SLOT, Capacity(1, 100, 100), 4)["steps"] == [[1, 5, 100], [1, 6, 100], [1, 0, 0]]
    assert run(alone, RESERVED, Capacity(25, 4, 100), 4)["steps"] == [[1, 5, 20], [1, 6, 20], [1, 0, 0]]
    assert run(alone, DYNAMIC, Capacity(25, 4, 100), 4)["steps"] == [[1, 5, 8], [1, 6, 8], [1, 0, 0]]
    assert run(alone, SLOT, Capacity(1, 100, 100), 4)["waste"] == 1 - 11 / 200


def test_the_same_memory_holds_more_requests_the_later_it_is_given_out() -> None:
    result = compare(MIXED, 2048, 256, 16, 4.0)
    slot, reserved, dynamic = result["arms"]
    assert slot["running"] < reserved["running"] < dynamic["running"]
    assert slot["waste"] > reserved["waste"] > dynamic["waste"]
    assert slot["preemptions"] == reserved["preemptions"] == slot["recomputed_tokens"] == 0
    assert dynamic["preemptions"] > 0
    assert max(running for running, _, _ in slot["steps"]) == 2048 // 256
    for arm in result["arms"]:
        assert figures(arm["steps"]) == {name: arm[name] for name in ("num_steps", "running", "waste")}
        assert all(held <= given <= 2048 for _, held, given in arm["steps"])


def test_dynamic_blocks_waste_less_than_a_block_per_request() -> None:
    """INVENTORY row 41's law, on every step."""
    dynamic = compare(MIXED, 2048, 256, 16, 4.0)["arms"][2]
    assert all(given - held <= 16 * running for running, held, given in dynamic["steps"])


def test_requests_that_ask_for_what_they_need_are_reserved_little_too_much() -> None:
    exact, generous = (compare(MIXED, 2048, 256, 16, slack)["arms"][1]["waste"] for slack in (1.0, 4.0))
    assert exact < generous


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds no request"):
        compare(MIXED, 100, 256, 16, 4.0)
    with pytest.raises(ConfigError, match="slack"):
        compare(MIXED, 2048, 256, 16, 0.5)
