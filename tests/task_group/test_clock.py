"""The clock of a flow whose steps are tasks."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from beluga_airflow import Chain
from beluga_airflow.config import Settings
from beluga_airflow.graph import Shape
from beluga_airflow.task_group.clock import OutOfTime, TimeLeft, clocks
from tests.task_group import sample_flows as flows

SHAPE = Settings().settle(flows.late_inside.check())
STEP = "ship.first"


class State(dict[str, Any]):
    """A task state store."""

    def set(self, key: str, value: Any) -> None:
        self[key] = value


def context(*, clears: int = 0, state: State | None = None) -> Any:
    return {"dag_run": SimpleNamespace(clear_number=clears), "task_state_store": State() if state is None else state}


async def test_the_first_step_of_each_flow_starts_its_clock() -> None:
    began = time.time()
    found = await clocks(context(), SHAPE, STEP, known={}, generation=0)
    assert found.keys() == {"", "ship"}
    assert found[""] == found["ship"]
    assert found[""][0] == 0
    assert began <= found[""][1] <= time.time()
    known = {"": (0, 5.0)}
    inner = await clocks(context(), SHAPE, STEP, known=known, generation=0)
    assert inner[""] == (0, 5.0)
    assert inner["ship"][1] >= began


async def test_a_later_step_asks_nothing_of_airflow() -> None:
    state, known = State(), {"": (0, 5.0), "ship": (0, 6.0)}
    assert await clocks(context(clears=3, state=state), SHAPE, STEP, known=known, generation=0) == known
    assert state == {}


async def test_attempts_share_a_clock_and_clears_do_not() -> None:
    state = State()
    found = [
        await clocks(context(clears=clears, state=state), SHAPE, STEP, known={}, generation=generation)
        for clears, generation in ((0, 0), (0, 0), (1, 4))
    ]
    assert found[0] == found[1]
    assert found[2][""][0] == 1
    assert found[2][""][1] > found[1][""][1]


async def test_a_step_that_was_cleared_starts_the_clock_again() -> None:
    known = {"": (0, 5.0), "ship": (0, 6.0)}
    found = await clocks(context(clears=1), SHAPE, STEP, known=known, generation=1)
    assert {path: clears for path, (clears, _) in found.items()} == {"": 1, "ship": 1}
    assert min(moment for _, moment in found.values()) > time.time() - 60
    # one that was cleared with those before it goes by their clock
    assert await clocks(context(clears=1), SHAPE, STEP, known=found, generation=1) == found


async def test_a_run_that_does_not_tell_of_clears_has_none() -> None:
    untold: Any = {"dag_run": SimpleNamespace(clear_number=None), "task_state_store": State()}
    assert (await clocks(untold, SHAPE, STEP, known={}, generation=0))[""][0] == 0


def settled(outer: float, inner: float | None) -> Shape:
    nested = Chain("inner", timeout=inner).add_step("a", flows.stops)
    return Settings().settle(Chain("outer", timeout=outer).add_step("in", nested).check())


@pytest.mark.parametrize(
    ("outer", "inner", "seconds", "group"), [(50, 100, 40, None), (500, 100, 95, "in"), (50, None, 40, None)]
)
def test_what_is_left_is_that_of_the_flow_with_least(
    outer: float, inner: float | None, seconds: float, group: str | None
) -> None:
    now = time.time()
    left = TimeLeft.of(settled(outer, inner), "in.a", {"": (0, now - 10), "in": (0, now - 5)})
    assert left.seconds == pytest.approx(seconds, abs=5)
    assert (left.group and left.group.path) == group


def test_there_may_be_none() -> None:
    with pytest.raises(OutOfTime) as caught:
        TimeLeft.of(settled(50, 3), "in.a", {"": (0, time.time()), "in": (0, time.time() - 3)})
    assert caught.value.group is not None
    assert caught.value.group.path == "in"
