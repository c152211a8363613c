"""A worker in the test's own process, which shares its memory: real server, real workflows, no Airflow."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest
from temporalio.client import Client, WorkflowHandle

from beluga_airflow import FlowResult
from beluga_airflow.config import Settings
from beluga_airflow.execute import Resources
from beluga_airflow.graph import Identity
from beluga_airflow.graph.locate import load_flow
from beluga_airflow.llm.client import ModelClient
from beluga_airflow.state import StateStore
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.temporal.client import Run, Target, connect, result_of, start
from beluga_airflow.temporal.messages import FLOW_WORKFLOW, FlowCall
from beluga_airflow.temporal.worker import worker_for
from beluga_airflow.testing import ScriptedModel, TemporalServer

FLOWS = "tests.temporal.sample_flows"


@dataclass
class OwnBackends:
    """One store and one model, whatever the connections' names."""

    store: StateStore = field(default_factory=MemoryStore)
    model: ModelClient = field(default_factory=lambda: ScriptedModel([]))
    asked: list[tuple[str | None, str | None]] = field(default_factory=list)

    async def resources(self, *, llm_conn_id: str | None, state_conn_id: str | None) -> Resources:
        self.asked.append((llm_conn_id, state_conn_id))

        async def model(conn_id: str | None) -> ModelClient:
            return self.model

        return Resources(state=self.store, model=model)


@dataclass
class Side:
    """The Temporal side of one test: where it is, and what its worker uses."""

    client: Client
    target: Target
    backends: OwnBackends = field(default_factory=OwnBackends)

    @asynccontextmanager
    async def worker(self, **options: Any) -> AsyncIterator[None]:
        """A worker of this test's task queue."""
        async with worker_for(self.client, self.backends, task_queue=self.target.task_queue, **options):
            yield

    def call(self, name: str, inputs: dict[str, Any], **changes: Any) -> FlowCall:
        """The input of the workflow for a flow of sample_flows.py."""
        flow = load_flow(f"{FLOWS}:{name}")
        given: dict[str, Any] = {
            "path": f"{FLOWS}:{name}",
            "shape": Settings().settle(flow.check(), durable=True).to_json(),
            "inputs": inputs,
            "scope": Identity.of(flow.name, "item-1").scope,
        }
        return FlowCall(**given | changes)

    async def start(self, workflow: str, call: Any, workflow_id: str | None = None) -> Run:
        """Start a workflow on this test's task queue."""
        return await start(
            self.client,
            self.target,
            workflow,
            call,
            workflow_id=workflow_id or uuid4().hex,
            task_queue=self.target.task_queue,
            summary="a test",
        )

    async def run(self, name: str, inputs: dict[str, Any], **changes: Any) -> tuple[FlowResult, Run]:
        """Run a flow of sample_flows.py to its end."""
        run = await self.start(FLOW_WORKFLOW, self.call(name, inputs, **changes))
        return await self.result(run), run

    async def result(self, run: Run) -> FlowResult:
        """How a flow's run ends."""
        return FlowResult.from_json(await self.returned(run))

    async def returned(self, run: Run) -> Any:
        """What a run returns."""
        async with asyncio.timeout(60):
            return await result_of(self.client, self.target, run)

    def handle(self, run: Run) -> WorkflowHandle[Any, Any]:
        """The SDK's own handle of a run."""
        return self.client.get_workflow_handle(run.workflow_id, run_id=run.run_id)


@pytest.fixture
async def side(temporal_server: TemporalServer) -> Side:
    """The Temporal side with a task queue of its own; its worker is not running yet."""
    target = Target(address=temporal_server.address, task_queue=f"tests-{uuid4().hex}")
    return Side(client=await connect(target), target=target)


@pytest.fixture
def token() -> str:
    """What steps report under."""
    return uuid4().hex


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """Ask again and again until the answer is true; fails after half a minute."""
    return _eventually


async def _eventually(ask: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        answer = ask()
        answer = await answer if inspect.isawaitable(answer) else answer
        if answer:
            return answer
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.05)
