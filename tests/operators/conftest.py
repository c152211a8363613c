"""Operators by the runner, against a model server, a state file, and a Temporal server with a worker in the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from temporalio.client import Client, WorkflowHandle

from beluga_airflow.hooks.backends import AirflowBackends
from beluga_airflow.hooks.settings import settings_in_force
from beluga_airflow.hooks.temporal import TemporalHook
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.temporal.worker import worker_for
from beluga_airflow.testing import OperatorRunner, TaskRun, TemporalServer
from tests.operators import sample_flows

KEY = "sk-hush-0b1eKEY9"
GOLD = {"order_id": "o-1", "tier": "gold"}


@pytest.fixture
def model_rules() -> Any:
    return [{"when": {"tier": "gold"}, "question": "handled", "answer": "expedite", "reason": "gold goes first"}]


@pytest.fixture
def token() -> str:
    """What steps report under."""
    return uuid4().hex


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
def runner(operator_runner: OperatorRunner, model_server: ModelServer, state_file: Path) -> OperatorRunner:
    """The runner with a model and a state store behind the default connections."""
    extra = {"provider": "simulated", "base_url": model_server.base_url}
    connections = operator_runner.connections
    connections["beluga_llm_default"] = {"conn_type": "beluga_llm", "password": KEY, "extra": extra}
    connections["beluga_state_default"] = {"conn_type": "beluga_state", "extra": {"url": f"sqlite:///{state_file}"}}
    return operator_runner


@dataclass
class Side:
    """The Temporal side of one test."""

    runner: OperatorRunner
    client: Client
    run_id: str
    """Of the DAG run, where a test names none: all tests share one server, and workflow ids are made from it."""

    async def run(self, operator: Any, **options: Any) -> TaskRun:
        """An attempt, until it ends or defers."""
        return await asyncio.to_thread(self.runner.run, operator, **{"run_id": self.run_id, **options})

    async def run_to_end(self, operator: Any, **options: Any) -> TaskRun:
        """An attempt to its end, its trigger included, with a worker."""
        async with self.worker():
            return await (await self.run(operator, **options)).run_to_end()

    async def retry(self, run: TaskRun) -> TaskRun:
        return await asyncio.to_thread(run.retry)

    async def clear(self, run: TaskRun) -> TaskRun:
        return await asyncio.to_thread(run.clear)

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[None]:
        """A worker of this test's task queue, which finds its connections as a worker of Airflow's does."""
        client, target = await TemporalHook().client()
        async with (
            AirflowBackends() as backends,
            worker_for(client, backends, task_queue=target.task_queue, settings=settings_in_force),
        ):
            yield

    def handle(self, run: TaskRun) -> WorkflowHandle[Any, Any]:
        return self.client.get_workflow_handle(run.xcoms["workflow_id"], run_id=run.xcoms["run_id"])

    async def status(self, run: TaskRun) -> str:
        description = await self.handle(run).describe()
        assert description.status is not None
        return description.status.name

    async def history(self, run: TaskRun) -> str:
        """The run's history, as text."""
        return (await self.handle(run).fetch_history()).to_json()


@pytest.fixture
async def side(runner: OperatorRunner, temporal_server: TemporalServer) -> Side:
    """A task queue of the test's own; its worker is not running yet."""
    connection = temporal_server.connection
    connection["extra"] = {**connection["extra"], "task_queue": f"tests-{uuid4().hex}"}
    runner.connections["temporal_default"] = connection
    return Side(runner, await temporal_server.client(), f"run-{uuid4().hex}")


async def until_seen(token: str, what: str) -> None:
    """Wait until a step has reported."""
    async with asyncio.timeout(30):
        while what not in sample_flows.seen[token]:  # noqa: ASYNC110  # steps run in threads, which have no event for it
            await asyncio.sleep(0.01)


def lines_of(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
