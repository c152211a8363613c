"""The status that flows in one task leave in the state store, and those of workflows that were ended from outside."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow import Chain
from beluga_airflow.execute.status import RunStatus
from beluga_airflow.operators.flow import ChainOperator
from beluga_airflow.operators.temporal import TemporalWorkflowOperator
from beluga_airflow.testing import OperatorRunner
from tests.operators import sample_flows as flows
from tests.operators.conftest import Side, until_seen
from tests.statuses import terminal, told_in

OWNER = {"dag_id": "test-dag", "run_id": "test-run", "task_id": "t", "map_index": -1}
RUN = "test-dag/test-run/t/-1"


def refuse(data: dict[str, Any]) -> None:
    if data["refused"]:
        raise ValueError(f"not {data['secret']}")


waiting = Chain("told-waiting", retry=flows.ONCE).add_step("wait", flows.at_gate)
at_will = Chain("at-will", retry=flows.ONCE).add_step("first", lambda data: None).add_step("second", refuse)


def last(state_file: Path) -> tuple[str, RunStatus]:
    return told_in(state_file)[-1]


@pytest.mark.parametrize(("flow", "ended"), [(flows.chain, "completed"), (flows.stopped, "out_of_stock")])
def test_a_flow_in_a_task_is_told(runner: OperatorRunner, token: str, state_file: Path, flow: Any, ended: str) -> None:
    run = runner.run(ChainOperator(task_id="t", flow=flow, inputs={"order_id": "o-1", "token": token}))
    key, end = last(state_file)
    assert key == f"beluga/flows/{flow.name}/{RUN}"
    assert (end.status, run.return_value["status"]) == (ended, ended)
    assert (end.runtime, end.run, end.generation, end.owner) == ("task", RUN, 0, OWNER)
    assert terminal(told_in(state_file)) == {(key, RUN, 0, ended): 1}


def test_a_clear_is_told_as_another_generation(runner: OperatorRunner, state_file: Path) -> None:
    inputs = "{{ {'refused': ti.try_number == 1, 'secret': 1} | tojson }}"
    run = runner.run(ChainOperator(task_id="t", flow=at_will, inputs=inputs))
    assert run.state == "failed"
    assert last(state_file)[1].error == "step 'second' failed: ValueError: not 1"
    assert run.clear().state == "success"
    key = f"beluga/flows/at-will/{RUN}"
    assert terminal(told_in(state_file)) == {(key, RUN, 0, "failed"): 1, (key, RUN, 1, "completed"): 1}


def test_a_business_key_names_the_run_and_its_data_is_not_told(runner: OperatorRunner, state_file: Path) -> None:
    inputs = {"refused": False, "secret": "4711", "order": "o-7"}
    runner.run(ChainOperator(task_id="t", flow=at_will, inputs=inputs, key="order"))
    key, end = last(state_file)
    assert (key, end.run) == ("beluga/flows/at-will/o-7", RUN)
    assert "4711" not in str(end)


async def test_a_workflow_that_was_terminated_is_settled_by_its_task(side: Side, token: str, state_file: Path) -> None:
    operator = TemporalWorkflowOperator(task_id="t", flow=waiting, inputs={"token": token})
    async with side.worker():
        run = await side.run(operator)
        await until_seen(token, "waiting")
        await side.handle(run).terminate(reason="by hand")
        end = await run.run_to_end()
        assert (end.state, last(state_file)[1].status) == ("failed", "cancelled")
    key, told = last(state_file)
    assert told.error == "the workflow was terminated: by hand"
    name = f"{run.xcoms['workflow_id']}/{run.xcoms['run_id']}"
    assert terminal(told_in(state_file)) == {(key, name, 0, "cancelled"): 1}


async def test_a_workflow_that_no_worker_took_is_told_by_its_task(side: Side, token: str, state_file: Path) -> None:
    run = await side.run(TemporalWorkflowOperator(task_id="t", flow=waiting, inputs={"token": token}))
    await side.handle(run).terminate()
    assert (await run.run_to_end()).state == "failed"
    ((key, told),) = await asyncio.to_thread(told_in, state_file)
    assert key == f"beluga/flows/told-waiting/test-dag/{side.run_id}/t/-1"
    assert (told.status, told.steps, told.total) == ("cancelled", {}, 1)
