from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from airflow.sdk import Context
from airflow.sdk.exceptions import TaskAwaitingInput, TaskDeferred

from beluga_airflow.operators.generation import generation
from beluga_airflow.triggers.temporal import TemporalRunTrigger


class TaskState(dict[str, Any]):
    def set(self, key: str, value: Any) -> None:
        self[key] = value


class Task:
    """One task over its attempts: what Airflow counts, and what the task keeps."""

    def __init__(self, *, retries: int | None = 2) -> None:
        self.retries = retries
        self.max_tries = retries or 0
        self.clears: int | None = 0
        self.try_number = 0
        self.state = TaskState()

    async def attempt(self, *, ending: BaseException | None = None, resumed: bool = False) -> int:
        self.try_number += not resumed
        task = SimpleNamespace(retries=self.retries)
        ti = SimpleNamespace(task=task, max_tries=self.max_tries, try_number=self.try_number)
        run = SimpleNamespace(clear_number=self.clears)
        found = -1
        try:
            async with generation(cast(Context, {"ti": ti, "dag_run": run, "task_state_store": self.state})) as number:
                found = number
                if ending is not None:
                    raise ending
        except (ValueError, KeyboardInterrupt, TaskDeferred, TaskAwaitingInput):
            pass
        return found


def waiting() -> TaskDeferred:
    trigger = TemporalRunTrigger(temporal_conn_id="c", workflow_id="w", run_id="r")
    return TaskDeferred(trigger=trigger, method_name="execute_complete")


async def test_a_retry_keeps_it() -> None:
    task = Task()
    assert [await task.attempt(ending=ValueError()) for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("retries", [0, 2, None])
async def test_a_clear_of_an_ended_task_raises_it(retries: int | None) -> None:
    task = Task(retries=retries)
    assert await task.attempt() == 0
    task.max_tries, task.clears = 1 + (retries or 0), 1  # as Airflow does: the attempts so far, and the retries
    assert [await task.attempt(), await task.attempt()] == [1, 1]
    task.max_tries, task.clears = 3 + (retries or 0), 2
    assert await task.attempt() == 3


async def test_an_edit_of_the_retries_is_no_clear() -> None:
    task = Task(retries=1)
    assert await task.attempt(ending=ValueError()) == 0
    task.retries = 0
    assert await task.attempt() == 0


async def test_a_clear_counts_whatever_was_done_to_the_retries() -> None:
    task = Task(retries=1)
    assert await task.attempt() == 0
    task.retries, task.max_tries = 5, 1 + 5
    assert await task.attempt() == 1
    task.retries, task.max_tries = 9, 2 + 5  # cleared before the edit was seen
    assert await task.attempt() == 2


async def test_a_clear_of_the_running_task_raises_it() -> None:
    task = Task()
    assert await task.attempt(ending=KeyboardInterrupt()) == 0  # its process is told to end
    task.clears = 1  # and max_tries stays
    assert await task.attempt() == 1


async def test_a_lost_worker_keeps_it() -> None:
    task = Task()
    assert [await task.attempt(ending=KeyboardInterrupt()), await task.attempt()] == [0, 0]


async def test_a_failed_attempt_is_not_cleared_by_the_clear_of_another_task() -> None:
    task = Task()
    assert await task.attempt(ending=ValueError()) == 0
    task.clears = 1
    assert [await task.attempt(), await task.attempt()] == [0, 0]


@pytest.mark.parametrize("ending", [waiting(), TaskAwaitingInput(method_name="answered")])
async def test_a_task_that_waits_is_not_cleared_by_the_clear_of_another_one(ending: BaseException) -> None:
    task = Task()
    assert await task.attempt(ending=ending) == 0
    task.clears = 1
    assert await task.attempt(ending=ending, resumed=True) == 0
    task.clears = 2  # and the wait takes too long: the attempt fails, and no code of ours runs
    assert await task.attempt() == 0
    task.max_tries = 5  # now it is cleared itself
    assert await task.attempt() == 3


async def test_an_attempt_that_fails_when_it_is_resumed_is_not_cleared_by_the_clear_of_another_task() -> None:
    task = Task()
    assert await task.attempt(ending=waiting()) == 0
    assert await task.attempt(ending=ValueError(), resumed=True) == 0
    task.clears = 1
    assert await task.attempt() == 0


async def test_a_clear_of_the_resumed_task_while_it_runs_raises_it() -> None:
    task = Task()
    assert await task.attempt(ending=waiting()) == 0
    assert await task.attempt(ending=KeyboardInterrupt(), resumed=True) == 0
    task.clears = 1
    assert await task.attempt() == 1


async def test_a_run_that_counts_no_clears() -> None:
    task = Task()
    task.clears = None
    assert [await task.attempt(), await task.attempt()] == [0, 0]


async def test_where_the_task_state_is_lost_the_numbers_of_airflow_hold() -> None:
    task = Task()
    task.max_tries = 6
    assert await task.attempt() == 4
    task.state.clear()
    assert await task.attempt() == 4
