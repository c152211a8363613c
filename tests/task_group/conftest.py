"""Tasks of a group, one at a time, by the operator runner; the states of the others are what the test says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.execution_time import comms

from beluga_airflow.task_group import GraphTaskGroup
from beluga_airflow.testing import OperatorRunner, TaskRun
from beluga_airflow.testing.supervisor import TaskKey

RUN_ID = "test-run"


class Tasks:
    """The tasks of one group in one DAG run: what a test ran has the state in which it ended.

    Attributes:
        states: of the tasks, by step, ``undo`` or ``result``; a test may say what others are in.
        clears: of the DAG run.
    """

    def __init__(self, runner: OperatorRunner, flow: Any, *, map_index: int = -1, **options: Any) -> None:
        with DAG("orders", schedule=None, default_args=options.pop("dag_args", {})):
            self.group = GraphTaskGroup("g", flow=flow, **options)
        self.runner = runner
        self.map_index = map_index
        self.states: dict[str, str] = {}
        self.runs: dict[str, TaskRun] = {}

    def run(self, *steps: str, **options: Any) -> TaskRun:
        """An attempt of each of these; returns the last one."""
        for step in steps:
            task = self.group.dag.get_task(f"g.{step}")
            self._ended(step, self.runner.run(task, run_id=RUN_ID, map_index=self.map_index, **options))
        return self.runs[steps[-1]]

    def retry(self, step: str) -> TaskRun:
        """Another attempt after Airflow's wait."""
        return self._ended(step, self.runs[step].retry())

    def lose(self, step: str) -> TaskRun:
        """The end of an attempt whose worker was lost."""
        return self._ended(step, self.runs[step].lose())

    def clear(self, step: str) -> TaskRun:
        """Another attempt after a user cleared the task."""
        return self._ended(step, self.runs[step].clear())

    def left(self, step: str, value: Any, key: str = "return_value") -> None:
        """Put what a task of another time has left."""
        self.runner._supervisor.put_xcom(TaskKey("orders", RUN_ID, f"g.{step}", self.map_index), key, value)

    def _ended(self, step: str, run: TaskRun) -> TaskRun:
        self.runs[step] = run
        self.states[step] = run.state.value
        return run

    def answer(self, msg: comms.GetTaskStates) -> comms.TaskStatesResult:
        """As Airflow's API server does: only the map index that was asked for, which is a part of the names."""
        assert (msg.dag_id, msg.task_group_id, msg.run_ids, msg.map_index) == ("orders", "g", [RUN_ID], self.map_index)
        suffix = "" if self.map_index < 0 else f"_{self.map_index}"
        return comms.TaskStatesResult(
            task_states={RUN_ID: {f"g.{step}{suffix}": state for step, state in self.states.items()}}
        )


@pytest.fixture
def tasks_of(operator_runner: OperatorRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a group, and runs its tasks."""
    groups: list[Tasks] = []
    supervisor = operator_runner._supervisor
    answer = supervisor._answer

    def answered(msg: Any) -> Any:
        return groups[-1].answer(msg) if isinstance(msg, comms.GetTaskStates) else answer(msg)

    monkeypatch.setattr(supervisor, "_answer", answered)
    operator_runner.connections["beluga_state_default"] = {
        "conn_type": "beluga_state",
        "extra": {"url": f"sqlite:///{tmp_path / 'state.db'}"},
    }

    def make(flow: Any, **options: Any) -> Tasks:
        groups.append(Tasks(operator_runner, flow, **options))
        return groups[-1]

    return make
