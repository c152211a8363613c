"""What an earlier run left, read from its history: real server, real workflows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent

from beluga_airflow.errors import TemporalError
from beluga_airflow.graph import Outcome, Shape
from beluga_airflow.graph.earlier import EarlierRun
from beluga_airflow.temporal.client import Run, cancel
from beluga_airflow.temporal.ending import recorded
from beluga_airflow.temporal.history import earlier_run
from beluga_airflow.temporal.messages import DATA_CONVERTER, FLOW_WORKFLOW, STEP_ACTIVITY
from tests.temporal.conftest import Side


async def left(side: Side, run: Run) -> EarlierRun:
    earlier = await earlier_run(side.client, side.target, run)
    assert earlier is not None
    return earlier


def paid(tmp_path: Path, **others: Any) -> dict[str, Any]:
    """The input of a flow that fails behind two steps that can be undone."""
    return {"log": str(tmp_path / "log"), "gates": {}, "refuses": ["fulfil"], **others}


async def test_a_run_leaves_what_it_was_given_and_what_its_steps_did(side: Side) -> None:
    inputs = {"token": "t", "order_id": "o-1", "amount": 7}
    call = side.call("chain", inputs)
    async with side.worker():
        run = await side.start(FLOW_WORKFLOW, call)
        await side.result(run)
    # no worker is needed
    earlier = await left(side, run)
    assert (earlier.inputs, earlier.scope, earlier.undone) == (inputs, call.scope, {})
    assert earlier.fingerprint == Shape.from_json(call.shape).fingerprint
    assert earlier.outcomes["end"].state is not None
    assert {step: outcome.taken for step, outcome in earlier.outcomes.items()} == {
        "price": ("identify",),
        "identify": ("end",),
        "end": (),
    }


async def test_what_stood_in_a_run_that_was_run_again_is_left_too(side: Side) -> None:
    inputs = {"token": "t", "order_id": "o-1", "amount": 7}
    async with side.worker():
        _, first = await side.run("chain", inputs)
        outcomes = (await left(side, first)).outcomes
        kept = {"price": outcomes["price"].to_json(), "identify": outcomes["identify"].to_json()}
        _, second = await side.run("chain", inputs, kept=kept)
    events = [event async for event in side.handle(second).fetch_history_events()]
    ran = [event.activity_task_scheduled_event_attributes.activity_id for event in events]
    assert [step for step in ran if step] == ["end", "result.status"]
    assert await left(side, second) == await left(side, first)


@pytest.mark.parametrize(
    ("more", "pay"),
    [
        ({}, "undone"),
        ({"fails": {"pay.undo": 2}}, "undone"),
        ({"fails": {"pay.undo": 9}}, "its undoing failed, or has not ended"),
        ({"refuses": ["fulfil", "pay.undo"]}, "its undoing failed, or has not ended"),
    ],
)
async def test_what_was_undone_is_told_from_what_could_not_be(
    side: Side, tmp_path: Path, more: dict[str, Any], pay: str
) -> None:
    async with side.worker():
        _, run = await side.run("paid", paid(tmp_path, **more))
    earlier = await left(side, run)
    assert earlier.undone == {"pay": pay, "reserve": "undone"}
    assert earlier.outcomes.keys() == {"reserve", "pay"}


async def test_a_merge_at_the_end_is_no_step(side: Side) -> None:
    async with side.worker():
        _, run = await side.run("skipped_end", {})
    assert "result" not in (await left(side, run)).outcomes


async def test_a_run_that_goes_on_leaves_nothing_yet(side: Side) -> None:
    run = await side.start(FLOW_WORKFLOW, side.call("chain", {}))
    with pytest.raises(TemporalError, match="still runs; wait for its end, or cancel it"):
        await left(side, run)
    async with side.worker():
        await cancel(side.client, side.target, run)
        await side.result(run)
    assert (await left(side, run)).outcomes == {}


async def test_another_workflow_is_no_run_of_a_flow(side: Side) -> None:
    run = await side.start("something.else", {})
    assert await earlier_run(side.client, side.target, run) is None
    await side.handle(run).terminate()


async def test_a_run_that_the_server_does_not_know(side: Side) -> None:
    with pytest.raises(TemporalError, match="NOT_FOUND"):
        await earlier_run(side.client, side.target, Run(workflow_id=uuid4().hex, run_id=str(uuid4())))


def test_a_step_that_was_done_after_the_flow_had_given_it_up_is_in_doubt(side: Side) -> None:
    """As one that ends while the others are undone already: it is done, and nothing undoes it."""
    call = side.call("paid", {"token": "t"})
    payloads = DATA_CONVERTER.payload_converter.to_payloads([asdict(call)])
    (outcome,) = DATA_CONVERTER.payload_converter.to_payloads([Outcome(output={"paid": True}).to_json()])
    step = next(step["name"] for step in call.shape["steps"] if step["undo"])
    started, scheduled, asked, completed = (HistoryEvent(event_id=number) for number in range(1, 5))
    begin = started.workflow_execution_started_event_attributes
    begin.workflow_type.name = FLOW_WORKFLOW
    begin.input.payloads.extend(payloads)
    scheduled.event_type = EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED
    scheduled.activity_task_scheduled_event_attributes.activity_id = step
    scheduled.activity_task_scheduled_event_attributes.activity_type.name = STEP_ACTIVITY
    asked.event_type = EventType.EVENT_TYPE_ACTIVITY_TASK_CANCEL_REQUESTED
    asked.activity_task_cancel_requested_event_attributes.scheduled_event_id = 2
    completed.event_type = EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED
    completed.activity_task_completed_event_attributes.scheduled_event_id = 2
    completed.activity_task_completed_event_attributes.result.payloads.append(outcome)
    run = recorded([started, scheduled, asked, completed])
    assert run is not None
    assert (list(run.steps.late), run.outcomes[step].output) == ([step], {"paid": True})
    in_time = recorded([started, scheduled, completed])
    assert in_time is not None
    assert not in_time.steps.late
