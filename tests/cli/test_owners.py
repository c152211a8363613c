"""Who is asked whether a run goes on: workflows on a real Temporal server. Of Airflow see test_status.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest

from beluga_airflow.cli import owners as module
from beluga_airflow.cli.owners import Owners
from beluga_airflow.execute.status import RunStatus, moment
from beluga_airflow.graph import FlowResult
from beluga_airflow.temporal.batch import Batch, Item
from beluga_airflow.temporal.client import Run, Target, connect
from beluga_airflow.temporal.messages import FLOW_WORKFLOW
from beluga_airflow.testing import OperatorRunner, TemporalServer
from tests.temporal.conftest import Side


@pytest.fixture
async def side(temporal_server: TemporalServer, operator_runner: OperatorRunner) -> Side:
    operator_runner.connections["temporal_default"] = temporal_server.connection
    target = Target(address=temporal_server.address, task_queue=f"tests-{uuid4().hex}")
    return Side(client=await connect(target), target=target)


def entry(run: Run | None = None, **owner: Any) -> RunStatus:
    named = {} if run is None else {"namespace": "default", "workflow_id": run.workflow_id, "run_id": run.run_id}
    now = moment()
    return RunStatus(status="running", runtime="temporal", run="r", started=now, updated=now, owner={**named, **owner})


@asynccontextmanager
async def asked(side: Side) -> AsyncIterator[Owners]:
    owners = Owners(side.backends.store, "temporal_default")
    yield owners
    assert owners.silent == {}
    owners.close()


async def test_a_workflow_says_how_it_ended(side: Side) -> None:
    token = uuid4().hex
    async with asked(side) as owners:
        run = await side.start(FLOW_WORKFLOW, side.call("branches", {"token": token}))
        assert await owners.ended(entry(run)) is None
        await side.handle(run).terminate(reason="enough")
        result = await owners.ended(entry(run))
        assert result is not None
        assert (result.status, result.error) == ("cancelled", "the workflow was terminated: enough")
        async with side.worker():
            told, run = await side.run("used_up", {"token": token})
        assert await owners.ended(entry(run)) == told
        assert told.status == "failed"


async def test_what_another_server_has_is_left_to_it(side: Side) -> None:
    async with asked(side) as owners:
        assert await owners.ended(entry(Run(workflow_id="none", run_id=str(uuid4())))) is None
        run = await side.start(FLOW_WORKFLOW, side.call("branches", {}))
        await side.handle(run).terminate()
        assert await owners.ended(entry(run, namespace="another")) is None


async def test_an_item_is_lost_where_its_batch_has_ended_without_it(side: Side) -> None:
    async with asked(side) as owners:
        run = await side.start(FLOW_WORKFLOW, side.call("branches", {}))
        item = entry(run, batch="b", item=3)
        assert await owners.ended(item) is None
        await side.handle(run).terminate()
        lost = await owners.ended(item)
        assert lost is not None
        assert (lost.status, lost.error) == (
            "failed",
            "the workflow of its batch has ended (TERMINATED) without it: its worker was lost",
        )
        item_of_batch = Item(index=3, key="k", scope="s", data={})
        await Batch(side.backends.store, "b").end(item_of_batch, FlowResult(status="large"))
        ended = await owners.ended(item)
        assert ended is not None
        assert ended.status == "large"


@pytest.mark.parametrize(
    "owner",
    [
        {"task_id": "t"},
        {"dag_id": [], "run_id": {}, "task_id": 7, "map_index": "x"},
        {"workflow_id": None},
        {"workflow_id": "w", "namespace": "default", "run_id": ["r"]},
        {"workflow_id": "w", "namespace": "default", "run_id": "r", "batch": 1, "item": "x"},
    ],
)
async def test_an_entry_that_somebody_else_wrote_keeps_nobody_from_being_asked(
    side: Side, owner: dict[str, Any]
) -> None:
    async with asked(side) as owners:
        assert await owners.ended(entry(**owner)) is None
        assert owners.silent == {}


async def test_a_run_of_which_the_server_does_not_speak_is_no_reason_to_ask_of_no_other(side: Side) -> None:
    owners = Owners(side.backends.store, "temporal_default")
    assert await owners.ended(entry(Run(workflow_id="w", run_id="no uuid"))) is None
    run = await side.start(FLOW_WORKFLOW, side.call("branches", {}))
    await side.handle(run).terminate()
    assert await owners.ended(entry(run)) is not None


async def test_a_server_that_is_back_is_asked_again(
    side: Side, operator_runner: OperatorRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN", 0.1)
    there = operator_runner.connections["temporal_default"]
    operator_runner.connections["temporal_default"] = {"conn_type": "temporal", "host": "127.0.0.1", "port": 1}
    run = await side.start(FLOW_WORKFLOW, side.call("branches", {}))
    await side.handle(run).terminate()
    async with asked(side) as owners:
        assert await owners.ended(entry(run)) is None
        assert list(owners.silent) == ["Temporal"]
        operator_runner.connections["temporal_default"] = there
        await asyncio.sleep(0.2)
        assert await owners.ended(entry(run)) is not None


@pytest.mark.parametrize(
    ("undo", "status"), [(None, None), ("running", None), ("up_for_retry", None), ("failed", "failed")]
)
async def test_a_group_goes_on_while_it_undoes(
    side: Side, monkeypatch: pytest.MonkeyPatch, undo: str | None, status: str | None
) -> None:
    states = {"g.result": "upstream_failed", "g.undo": undo}
    monkeypatch.setattr(module, "_task", lambda owner: (states[owner["task_id"]], None))
    owner = {"dag_id": "d", "run_id": "r", "task_id": "g.result", "undo": "g.undo", "map_index": -1}
    async with asked(side) as owners:
        ended = await owners.ended(entry(**owner))
    assert (ended and ended.status) == status


async def test_a_server_that_is_away_is_asked_once(side: Side, operator_runner: OperatorRunner) -> None:
    operator_runner.connections["temporal_default"] = {"conn_type": "temporal", "host": "127.0.0.1", "port": 1}
    owners = Owners(side.backends.store, "temporal_default")
    for _ in range(2):
        assert await owners.ended(entry(Run(workflow_id="w", run_id="r"))) is None
    assert list(owners.silent) == ["Temporal"]
    assert owners.silent["Temporal"].startswith("Temporal cannot be asked which runs go on: the Temporal server at 127")
