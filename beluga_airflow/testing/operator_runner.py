"""Run one operator as an Airflow worker would, without a metadata database.

    def test_greets(operator_runner):
        run = operator_runner.run(GreetOperator(task_id="greet", name="{{ params.name }}"), conf={"name": "Ada"})
        assert run.state == "success"
        assert run.return_value == "hello Ada"

Airflow's own task runner runs the operator: templates, XComs, task state, retry policies, callbacks, extra links and
deferral are Airflow's. What the API server, the scheduler and the triggerer decide (whether a task is retried, what a
clear changes, how an event resumes a task) is decided in memory, by the rules of Airflow 3.3.

An operator blocks its thread. A test on an event loop says ``await asyncio.to_thread(operator_runner.run, operator)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any, Self
from uuid import uuid4

from airflow.sdk import DAG, BaseOperator
from airflow.sdk.api.datamodels._generated import DagRun, DagRunState, DagRunType
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.sdk.execution_time.xcom import XCom

from beluga_airflow.testing.supervisor import ConnectionSpec, InMemorySupervisor, TaskKey
from beluga_airflow.testing.task_run import Attempt, TaskRun, run_attempt

__all__ = ["OperatorRunner"]

LOGICAL_DATE = datetime(2026, 1, 1, tzinfo=UTC)


class OperatorRunner:
    """Runs operators, one after the other or several in several threads. A context manager.

    While it is entered this process looks to Airflow like a task's process: hooks find the runner's connections, also
    when the test itself calls them.

    Args:
        connections: connections by id: the JSON form as a mapping, a URI, or an Airflow ``Connection``.
        variables: Airflow variables by key, as text.
    """

    def __init__(
        self,
        *,
        connections: Mapping[str, ConnectionSpec] | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._supervisor = InMemorySupervisor()
        self._installed = ExitStack()
        self.connections.update(connections or {})
        self.variables.update(variables or {})

    @property
    def connections(self) -> dict[str, ConnectionSpec]:
        """Connections by id, to add to and take from at any time. ``AIRFLOW_CONN_<ID>`` wins, as on a worker."""
        return self._supervisor.connections

    @property
    def variables(self) -> dict[str, str | None]:
        """Airflow variables by key, as text, to add to and take from at any time."""
        return self._supervisor.variables

    def __enter__(self) -> Self:
        self._installed.enter_context(self._supervisor.installed())
        return self

    def __exit__(self, *exc: object) -> None:
        self._installed.close()

    def run(
        self,
        operator: BaseOperator | MappedOperator,
        *,
        conf: Mapping[str, Any] | None = None,
        run_id: str = "test-run",
        map_index: int = -1,
        try_number: int = 1,
        max_tries: int | None = None,
        logical_date: datetime | None = LOGICAL_DATE,
        data_interval: tuple[datetime, datetime] | None = None,
        xcoms: Mapping[str | tuple[str, str] | tuple[str, str, int], Any] | None = None,
        connections: Mapping[str, ConnectionSpec] | None = None,
    ) -> TaskRun:
        """Run an attempt of `operator`, to its end or until it defers.

        Args:
            operator: the task; one without a DAG gets the DAG ``test-dag``.
            conf: the DAG run's conf, which is also how the Params that a user typed arrive.
            run_id: the DAG run's id.
            map_index: of a mapped task, from 0; -1 for another.
            try_number: the attempt, from 1.
            max_tries: as the scheduler keeps it; the operator's ``retries`` where not given.
            logical_date: of the DAG run; None for a run without one, which has no data interval either.
            data_interval: start and end; the day from `logical_date` where not given.
            xcoms: what other tasks of the run pushed: by task id (its return value), by (task id, key), or by
                (task id, key, map index).
            connections: added to the runner's.

        Raises:
            RuntimeError: called on an event loop, or the runner is not entered.
            ValueError: this task of this run ran already, or it is a task that starts in the triggerer.
        """
        if operator.start_from_trigger:
            raise ValueError(
                f"task {operator.task_id!r} starts in the triggerer, never on a worker: run it with "
                "start_from_trigger=False, or test its trigger"
            )
        if not operator.has_dag():
            operator.dag = DAG("test-dag", schedule=None, start_date=LOGICAL_DATE)
        task = TaskKey(operator.dag_id, run_id, operator.task_id, map_index)
        if self._supervisor.knows(task):
            raise ValueError(
                f"{task} ran already: go on with retry(), clear() or resume() of its TaskRun, or give another run_id"
            )
        for source, value in (xcoms or {}).items():
            task_id, key, index = _xcom_source(source)
            self._supervisor.put_xcom(TaskKey(task.dag_id, run_id, task_id, index), key, XCom.serialize_value(value))
        self.connections.update(connections or {})
        attempt = Attempt(
            id=uuid4(),
            task=task,
            operator=operator,
            dag_run=_dag_run(task, conf, logical_date, data_interval),
            try_number=try_number,
            max_tries=(operator.retries or 0) if max_tries is None else max_tries,
        )
        return run_attempt(self._supervisor, attempt)


def _xcom_source(source: str | tuple[str, str] | tuple[str, str, int]) -> tuple[str, str, int]:
    match source:
        case str():
            return source, XCom.XCOM_RETURN_KEY, -1
        case (task_id, key):
            return task_id, key, -1
        case _:
            return source


def _dag_run(
    task: TaskKey,
    conf: Mapping[str, Any] | None,
    logical_date: datetime | None,
    data_interval: tuple[datetime, datetime] | None,
) -> DagRun:
    if logical_date and not data_interval:
        data_interval = logical_date, logical_date + timedelta(days=1)
    start, end = data_interval or (None, None)
    now = datetime.now(UTC)
    return DagRun(
        dag_id=task.dag_id,
        run_id=task.run_id,
        logical_date=logical_date,
        data_interval_start=start,
        data_interval_end=end,
        run_after=end or now,
        start_date=now,
        end_date=None,
        run_type=DagRunType.MANUAL,
        state=DagRunState.RUNNING,
        conf=dict(conf or {}),
        consumed_asset_events=[],
        partition_key=None,
    )
