"""The simulator is a judge of plans: it objects to each kind of wrong one, and its tokens depend on all before."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuili.base.clock import VirtualClock
from tuili.core.executor import Capacity
from tuili.core.params import SamplingParams
from tuili.core.plan import Chunk, StepPlan
from tuili.executors.simulated import LinearCost, PlanError, SimExecutor, history_token

PARAMS = SamplingParams(temperature=0.0)


def executor(**options) -> SimExecutor:
    return SimExecutor(Capacity(8, 4, 32), LinearCost(1.0, 0.1, 0.01), VirtualClock(), verify=True, **options)


def chunk(id: str, start: int, tokens: tuple, blocks: tuple, sample: bool = True, history: tuple = (), count: int = 0):
    return Chunk(id, start, count or len(tokens), tokens, 0, sample, blocks, PARAMS, 3, history)


FIRST = StepPlan(0, (chunk("a", 0, (1, 2, 3, 4, 5), (0, 1)),))


@pytest.mark.parametrize(
    ("plan", "objection"),
    [
        (StepPlan(0, ()), "step 0 after step 0"),
        (StepPlan(1, (), dropped=("b",)), "drops 'b'"),
        (StepPlan(1, (chunk("b", 4, (7,), (0, 2)),)), "without history"),
        (StepPlan(1, (chunk("a", 0, (1, 2), (2,)),)), "admitted twice"),
        (StepPlan(1, (chunk("a", 6, (7,), ()),)), "expected 5"),
        (StepPlan(1, (chunk("a", 5, (-1,), ()),)), "id -1 at 5"),
        (StepPlan(1, (chunk("a", 5, (), (), count=3),)), "1 ids"),
        (StepPlan(1, (chunk("b", 0, (1, 2, 3, 4, 5), (2,)),)), "1 blocks for 5 positions"),
        (StepPlan(1, (chunk("b", 0, (1, 2), (8,)),)), "invalid block table"),
        (StepPlan(1, (chunk("b", 0, (1, 2), (2, 2)),)), "invalid block table"),
        (StepPlan(1, (chunk("b", 0, (1, 2), (2,)), chunk("c", 0, (1, 2), (2,)))), "written by 'b' and 'c'"),
        (StepPlan(1, (chunk("b", 4, (7,), (0, 2), history=(1, 2, 3, 9)),)), "KV of another history at position 3"),
        (StepPlan(1, (chunk("b", 4, (7,), (5, 2), history=(1, 2, 3, 4)),)), "nobody wrote"),
        (StepPlan(1, (chunk("b", 0, (9, 9), (0,)), chunk("a", 5, (), (), count=1))), "KV of another history"),
    ],
)
def test_wrong_plans_are_refused(plan: StepPlan, objection: str) -> None:
    sim = executor()
    sim.execute(FIRST)
    with pytest.raises(PlanError, match=objection):
        sim.execute(plan)


def test_a_right_plan_costs_what_the_model_says() -> None:
    sim = executor()
    sim.execute(FIRST)
    reader = chunk("b", 4, (7,), (0, 2), history=(1, 2, 3, 4))
    result = sim.execute(StepPlan(1, (chunk("a", 5, (), (), count=1), reader))).result()
    assert sim.clock.now() == pytest.approx(2 * 1.0 + 0.1 * (5 + 2) + 0.01 * (5 + 6 + 5))
    assert result.stats.device_seconds == pytest.approx(1.0 + 0.2 + 0.11)
    assert result.tokens["b"] == [history_token([1, 2, 3, 4, 7], 32_000)]
    first = history_token([1, 2, 3, 4, 5], 32_000)
    assert result.tokens["a"] == [history_token([1, 2, 3, 4, 5, first], 32_000)]


def test_own_model_and_failures() -> None:
    sim = executor(tokens=lambda id, history: len(history), fails=lambda plan, c: "no" if c.id == "b" else None)
    result = sim.execute(StepPlan(0, (chunk("a", 0, (1, 2), (0,)), chunk("b", 0, (1,), (1,))))).result()
    assert result.tokens == {"a": [2]}
    assert result.failed == {"b": "no"}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.data())
def test_tokens_depend_on_every_token_of_the_history(history: list[int], data: st.DataObject) -> None:
    changed = list(history)
    changed[data.draw(st.integers(0, len(history) - 1))] += 1
    assert history_token(history, 2**50) != history_token(changed, 2**50)


def test_the_control_plane_imports_no_torch() -> None:
    code = (
        "import sys, tuili.core.scheduler, tuili.executors.simulated; from tuili.core.policies import policies;"
        "assert {'fcfs', 'priority', 'static'} <= set(policies) and not policies.broken();"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
