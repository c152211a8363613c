"""The status of a flow whose steps are tasks: each tells its part, one tells the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow.execute.status import RunStatus, moment
from beluga_airflow.testing import operator_runner
from tests.statuses import terminal, told_in
from tests.task_group import sample_flows as flows
from tests.task_group.test_ends import failed, shop

RUN = "orders/test-run/g/-1"


@pytest.fixture
def told(tmp_path: Path) -> Callable[[], list[RunStatus]]:
    """All that was told of runs, in order."""
    return lambda: [status for _, status in told_in(tmp_path / "state.db")]


@pytest.fixture
def ends(tmp_path: Path) -> Callable[[], Counter[tuple[int, str]]]:
    """Which generation came to which end, and how often."""
    return lambda: Counter(
        {
            (generation, status): times
            for (_, _, generation, status), times in terminal(told_in(tmp_path / "state.db")).items()
        }
    )


def test_each_step_tells_its_part_and_the_last_task_the_end(
    tasks_of: Any, told: Any, ends: Any, tmp_path: Path
) -> None:
    tasks = tasks_of(flows.linear, inputs={"case": "told"})
    tasks.run("validate")
    now = told()[-1]
    assert (now.status, now.steps, now.total, now.ended) == ("running", {"validate": "completed"}, 2, None)
    assert now.owner == {"dag_id": "orders", "run_id": "test-run", "task_id": "g.result", "map_index": -1}
    assert (now.runtime, now.run) == ("tasks", RUN)
    tasks.run("charge", "result")
    assert told()[-1].steps == {"validate": "completed", "charge": "completed"}
    assert ends() == {(0, "completed"): 1}
    assert {key for key, _ in told_in(tmp_path / "state.db")} == {f"beluga/flows/linear/{RUN}"}


def test_a_business_key_is_the_runs_name(tasks_of: Any, tmp_path: Path) -> None:
    tasks = tasks_of(flows.linear, inputs={"case": "keyed", "order_id": "o/7"}, key="order_id")
    tasks.run("validate", "charge", "result")
    assert {key for key, _ in told_in(tmp_path / "state.db")} == {"beluga/flows/linear/o%2F7"}


def test_a_stop_is_told_by_the_last_task(tasks_of: Any, ends: Any) -> None:
    tasks = tasks_of(flows.stop_in_branch, inputs={"case": "stop"})
    tasks.run("a", "stock")
    for name in ("b", "c", "d"):
        tasks.states[name] = "skipped"
    assert tasks.run("result").state == "success"
    assert ends() == {(0, "out_of_stock"): 1}


def test_a_failure_is_told_by_the_step_where_nothing_is_undone(tasks_of: Any, told: Any, ends: Any) -> None:
    tasks = tasks_of(flows.used_up, inputs={"case": "failed"})
    run = tasks.run("pay")
    assert (run.state, ends()) == ("up_for_retry", {})
    while run.state == "up_for_retry":
        run = tasks.retry("pay")
    end = told()[-1]
    assert (end.status, end.steps) == ("failed", {"pay": "failed"})
    assert str(run.error) == f"flow failed: {end.error}"
    assert ends() == {(0, "failed"): 1}


def test_a_failure_is_told_by_the_task_that_undoes(tasks_of: Any, told: Any, ends: Any) -> None:
    tasks = failed(tasks_of(shop, inputs={"case": "undone"}))
    assert ends() == {}
    assert told()[-1].steps == {"reserve": "completed", "charge": "completed", "fulfil": "failed"}
    tasks.run("undo")
    end = told()[-1]
    assert (end.status, end.undone) == ("failed", {"charge": "undone", "reserve": "undone"})
    assert str(end.error).startswith("step 'fulfil' failed: RuntimeError: the truck is gone")
    assert ends() == {(0, "failed"): 1}


def test_a_failure_with_nothing_to_undo_is_told_too(tasks_of: Any, ends: Any) -> None:
    tasks = tasks_of(shop, inputs={"case": "nothing to undo"})
    tasks.states["reserve"] = "failed"  # its worker was lost
    assert tasks.run("undo").state == "skipped"
    assert ends() == {(0, "failed"): 1}


def test_a_lost_worker_leaves_it_running_and_the_retry_ends_it(tasks_of: Any, told: Any, ends: Any) -> None:
    tasks = tasks_of(flows.third, inputs={"case": "lost"})
    tasks.run("try")
    tasks.lose("try")
    assert told()[-1].ended is None
    tasks.retry("try")
    tasks.retry("try")
    tasks.run("after", "result")
    assert told()[-1].steps == {"try": "completed", "after": "completed"}
    assert ends() == {(0, "completed"): 1}


def test_what_comes_after_the_end_is_not_told(tasks_of: Any, told: Any, ends: Any) -> None:
    tasks = tasks_of(flows.failure, inputs={"case": "late"})
    tasks.run("a", "bad")
    before = told()[-1]
    assert before.status == "failed"
    tasks.states.pop("bad")  # as for one that had begun before
    tasks.run("b")
    assert told()[-1] == before
    assert ends() == {(0, "failed"): 1}


def test_a_flow_that_is_not_at_its_end_has_failed(tasks_of: Any, told: Any) -> None:
    tasks = tasks_of(flows.several_ends, inputs={"case": "not at its end"})
    tasks.run("a", "b")
    tasks.states["c"] = "skipped"
    tasks.run("result")
    assert told()[-1].status == "failed"
    assert "is not at its end" in str(told()[-1].error)


def test_two_groups_with_one_key_at_once_do_not_take_the_entry_from_each_other(
    tasks_of: Any, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, dag_run_of = datetime.now(UTC), operator_runner._dag_run
    monkeypatch.setattr(
        operator_runner, "_dag_run", lambda *args: dag_run_of(*args).model_copy(update={"start_date": now})
    )
    tasks = tasks_of(flows.linear, inputs={"case": "twice", "order_id": "o-1"}, key="order_id")
    for step in ("validate", "charge", "result"):
        for tasks.map_index in (1, 0):
            tasks.run(step)
    assert {status.run for status in told()} == {"orders/test-run/g/1"}
    assert (told()[-1].status, told()[-1].started) == ("completed", moment(now))


def test_a_group_that_undoes_has_both_last_tasks(tasks_of: Any, told: Any) -> None:
    tasks_of(shop, inputs={"case": "both"}).run("reserve")
    assert (told()[-1].owner["task_id"], told()[-1].owner["undo"]) == ("g.result", "g.undo")


def test_a_clear_begins_anew(tasks_of: Any, told: Any, ends: Any) -> None:
    tasks = tasks_of(flows.linear, inputs={"case": "cleared"})
    tasks.run("validate", "charge", "result")
    for run in tasks.runs.values():
        run._attempt.dag_run.clear_number = 1  # as Airflow counts the user's clear
    tasks.states.pop("result")
    tasks.clear("charge")
    now = told()[-1]
    assert (now.status, now.steps, now.generation) == ("running", {"charge": "completed"}, 1)
    tasks.clear("result")
    assert told()[-1].steps == {"validate": "completed", "charge": "completed"}
    assert ends() == {(0, "completed"): 1, (1, "completed"): 1}
