"""A task on Temporal that is started again: after a clear, after a lost attempt, after its workflow was cut off."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from airflow.sdk import get_current_context
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from airflow.sdk.execution_time import comms

from beluga_airflow import Chain, InvalidInput, StepContext
from beluga_airflow.errors import TemporalUnavailable
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.operators.batch import TemporalBatchOperator
from beluga_airflow.operators.temporal import TemporalWorkflowOperator
from beluga_airflow.testing import TaskRun
from beluga_airflow.triggers.temporal import TemporalRunTrigger
from tests.operators import sample_flows as flows
from tests.operators.conftest import GOLD, Side, until_seen

seen = flows.seen
refunds: defaultdict[str, threading.Event] = defaultdict(threading.Event)
"""Refunds wait until the test opens the gate of their token."""


def charge(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
    seen[data["token"]].append(f"charge {context.idempotency_key}")
    return {"paid": True}


async def refund(data: dict[str, Any], context: StepContext) -> None:
    seen[data["token"]].append("refund begun")
    if data.get("account") == "closed":
        raise InvalidInput("the account is closed")
    while not refunds[data["token"]].is_set():  # noqa: ASYNC110  # the test opens it from another loop
        await asyncio.sleep(0.01)
    seen[data["token"]].append("refunded")


paid = Chain("paid", retry=flows.ONCE).add_step("charge", charge, compensate=refund).add_step("wait", flows.at_gate)
broken = (
    Chain("broken", retry=flows.ONCE).add_step("charge", charge, compensate=refund).add_step("fulfil", flows.fragile)
)
brief = (
    Chain("brief", retry=flows.ONCE, timeout=2)
    .add_step("charge", charge, compensate=refund, timeout=1)
    .add_step("wait", flows.at_gate)
)


def operator(flow: Any = paid, **arguments: Any) -> TemporalWorkflowOperator:
    return TemporalWorkflowOperator(task_id="t", flow=flow, **arguments)


def batch(token: str, **arguments: Any) -> TemporalBatchOperator:
    items = [{"id": 1, "token": token}]
    return TemporalBatchOperator(task_id="t", flow=paid, items=items, key="id", **arguments)


def told(token: str) -> list[str]:
    """What the steps did, but for their keys; when a step hears of a cancellation is not the matter here."""
    entries = [entry for entry in seen[token] if entry != "cancelled"]
    return [entry.partition(" ")[0] if entry.startswith("charge") else entry for entry in entries]


def keys(token: str) -> set[str]:
    return {entry for entry in seen[token] if entry.startswith("charge")}


def of_another_task(run: TaskRun) -> TaskRun:
    """The task after a user cleared another one of its DAG run."""
    run._attempt.dag_run.clear_number = (run._attempt.dag_run.clear_number or 0) + 1
    return run


def open_gates(token: str) -> None:
    refunds[token].set()
    flows.gates[token].set()


@contextmanager
def away(side: Side, port: int) -> Iterator[None]:
    """While no Temporal server is where the connection says."""
    there = side.runner.connections["temporal_default"]
    side.runner.connections["temporal_default"] = {"conn_type": "temporal", "host": "127.0.0.1", "port": port}
    try:
        yield
    finally:
        side.runner.connections["temporal_default"] = there


# cleared while it waits


@pytest.mark.parametrize("kind", ["flow", "batch"])
@pytest.mark.parametrize("triggerer", ["knew", "never knew"])
async def test_a_clear_begins_when_what_ran_before_has_undone_its_steps(
    side: Side, token: str, kind: str, triggerer: str
) -> None:
    task = operator(inputs={"token": token}) if kind == "flow" else batch(token)
    async with side.worker():
        first = await side.run(task)
        await until_seen(token, "waiting")
        assert first.deferral is not None
        if triggerer == "knew":
            await first.deferral.trigger().on_kill()
            await until_seen(token, "refund begun")
        second = await side.clear(first)
        assert second.state == "deferred"
        assert second.deferral is not None
        assert second.deferral.kwargs == first.deferral.kwargs, "it waits for what ran before"
        assert second.links["Temporal run"].endswith(second.deferral.kwargs["run_id"])
        await until_seen(token, "refund begun")
        waiting = asyncio.create_task(second.run_trigger())
        assert await asyncio.wait({waiting}, timeout=0.5) == (set(), {waiting})
        assert told(token) == ["charge", "waiting", "refund begun"]
        refunds[token].set()
        third = await asyncio.to_thread(second.resume, await waiting)
        assert third.state == "deferred"
        flows.gates[token].set()
        end = await third.run_to_end()
    assert end.state == "success", end.error
    assert end.xcoms.get("workflow_id", "").endswith("@1")
    assert told(token) == ["charge", "waiting", "refund begun", "refunded", "charge", "waiting"]
    assert len(keys(token)) == 1, "both charges have one key, so that one must be undone before the other begins"


async def test_whoever_waits_for_what_ran_before_may_be_lost_or_cleared_itself(side: Side, token: str) -> None:
    async with side.worker():
        first = await side.run(operator(inputs={"token": token}, retries=1))
        await until_seen(token, "waiting")
        second = await side.clear(first)
        third = await side.retry(second.lose())
        fourth = await side.clear(of_another_task(third))
        for run in (second, third, fourth):
            assert run.deferral is not None
            assert run.deferral.method == "execute_after"
            assert run.deferral.kwargs["run_id"] == first.deferral.kwargs["run_id"]  # type: ignore[union-attr]  # seen
        open_gates(token)
        end = await fourth.run_to_end()
    assert end.state == "success", end.error
    assert end.return_value["data"]["paid"]
    assert told(token).count("charge") == 2
    assert end.xcoms["workflow_id"].endswith("@3"), "the attempt at the last clear"


@pytest.mark.parametrize("workflow_id", [None, "order-{{ params.order }}"])
async def test_what_ran_before_is_found_where_the_task_state_is_lost(
    side: Side, token: str, workflow_id: str | None
) -> None:
    async with side.worker():
        first = await side.run(operator(inputs={"token": token}, workflow_id=workflow_id), conf={"order": token})
        await until_seen(token, "waiting")
        first._supervisor.clear_task_state(first._attempt.task)
        second = await side.clear(first)
        assert second.deferral is not None
        assert second.deferral.method == "execute_after"
        open_gates(token)
        end = await second.run_to_end()
    assert end.state == "success", end.error
    assert told(token) == ["charge", "waiting", "refund begun", "refunded", "charge", "waiting"]


async def test_the_wait_for_what_ran_before_is_bounded_too(side: Side, token: str, unused_tcp_port: int) -> None:
    first = await side.run(operator(inputs={"token": token}))
    second = await side.clear(first)  # no worker is up: nothing ends
    assert (second.state, second.deferral and second.deferral.timeout) == ("deferred", None)
    with away(side, unused_tcp_port):
        lost = await side.clear(second)
    assert (lost.state, type(lost.error)) == ("failed", TemporalUnavailable)
    await side.handle(first).terminate()


# told to end


@pytest.mark.parametrize("number", [0, 1])
async def test_a_task_that_is_told_to_end_starts_nothing(side: Side, token: str, number: int) -> None:
    def source() -> Iterator[dict[str, Any]]:
        if told_to_end:
            get_current_context()["ti"].task.on_kill()
        yield {"id": 1, "token": token}

    told_to_end = number == 0
    task = TemporalBatchOperator(task_id="t", flow=paid, items=source, key="id", retries=1)
    task.items = source()
    run = await side.run(task)
    if number:
        told_to_end = True
        task.items = source()
        await side.handle(run).terminate()
        run = await side.clear(run)
    assert (run.state, type(run.error)) == ("up_for_retry", AirflowException)
    assert "workflow_id" not in run.xcoms
    with pytest.raises(Exception, match="not found"):
        await side.client.get_workflow_handle(f"test-dag/{side.run_id}/t/-1@{number}").describe()
    told_to_end = False
    task.items = source()
    open_gates(token)
    async with side.worker():
        end = await (await side.retry(run)).run_to_end()
    assert end.return_value["statuses"] == {"completed": 1}
    assert end.return_value["workflow_id"].endswith(f"@{number}")


async def test_a_clear_of_the_task_while_it_is_told_to_end_counts(side: Side, token: str) -> None:
    class Slow(TemporalWorkflowOperator):
        async def start(self, *arguments: Any, **options: Any) -> Any:
            run = await super().start(*arguments, **options)
            if told_to_end:
                self.on_kill()
            await asyncio.sleep(0)
            return run

    told_to_end = True

    first = await side.run(Slow(task_id="t", flow=paid, inputs={"token": token}, retries=1))
    assert (first.state, type(first.error)) == ("up_for_retry", AirflowException)
    told_to_end = False
    async with side.worker():
        await until_seen(token, "waiting")
        second = await side.retry(of_another_task(first))
        assert second.deferral is not None
        assert second.deferral.method == "execute_after", "a clear of a running task shows in the DAG run's clears only"
        open_gates(token)
        end = await second.run_to_end()
    assert end.state == "success", end.error
    assert end.xcoms["workflow_id"].endswith("@1")


# other tasks are cleared


async def test_a_clear_of_another_task_while_this_one_waits_is_none_of_this_one(side: Side, token: str) -> None:
    async with side.worker():
        first = await side.run(operator(inputs={"token": token}, retries=1))
        second = await side.retry(of_another_task(first).lose())
        assert second.xcoms["run_id"] == first.xcoms["run_id"]
        third = await asyncio.to_thread(of_another_task(second).time_out)
        assert third.state == "failed"
        flows.gates[token].set()
        end = await of_another_task(second).run_to_end()
    assert (end.state, told(token)) == ("success", ["charge", "waiting"])


async def test_a_clear_of_another_task_after_the_result_could_not_be_read(
    side: Side, token: str, unused_tcp_port: int
) -> None:
    flows.gates[token].set()
    async with side.worker():
        first = await side.run(operator(inputs={"token": token}, retries=1))
        event = await first.run_trigger()
        with away(side, unused_tcp_port):
            second = await asyncio.to_thread(first.resume, event)
        assert (second.state, type(second.error)) == ("up_for_retry", TemporalUnavailable)
        end = await (await side.retry(of_another_task(second))).run_to_end()
    assert (end.state, told(token)) == ("success", ["charge", "waiting"])
    assert end.xcoms["workflow_id"].endswith("@0")


# lost, and its workflow closed meanwhile


async def test_a_flow_that_failed_while_nobody_looked_is_not_run_again(side: Side, token: str) -> None:
    flows.broken.add(token)
    open_gates(token)
    async with side.worker():
        first = await side.run(operator(broken, inputs={"token": token}, retries=3))
        await first.run_trigger()
        flows.broken.discard(token)
        end = await side.retry(first.lose())
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert str(end.error) == (
        "flow failed: step 'fulfil' failed: ConnectionError: the bank is closed; undone: 'charge'"
    )
    assert end.xcoms["run_id"] == first.xcoms["run_id"]
    assert told(token) == ["charge", "fragile", "refund begun", "refunded"]


async def test_a_decision_of_a_flow_that_failed_while_nobody_looked_is_not_paid_again(
    side: Side, token: str, model_server: ModelServer
) -> None:
    flows.broken.add(token)
    async with side.worker():
        first = await side.run(operator(flows.decided_then_broken, inputs={**GOLD, "token": token}, retries=1))
        await first.run_trigger()
        end = await side.retry(first.lose())
    assert (end.state, model_server.calls) == ("failed", 1)
    assert end.xcoms["decisions"]["handling"]["answer"] == "expedite"


async def test_a_flow_that_was_cancelled_while_nobody_looked_is_not_run_again(side: Side, token: str) -> None:
    open_gates(token)
    flows.gates[token].clear()
    async with side.worker():
        first = await side.run(operator(inputs={"token": token}, retries=3))
        await until_seen(token, "waiting")
        await side.handle(first).cancel()
        await first.run_trigger()
        end = await side.retry(first.lose())
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert str(end.error) == "flow cancelled: the workflow was cancelled; undone: 'charge'"
    assert told(token).count("charge") == 1


@pytest.mark.parametrize("how", ["terminated", "timed out"])
async def test_a_workflow_that_was_cut_off_goes_on_behind_its_finished_steps(
    side: Side, token: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = paid
    if how == "timed out":
        flow = brief
        monkeypatch.setattr("beluga_airflow.operators.temporal.GRACE", -2.0)
    async with side.worker():
        first = await side.run(operator(flow, inputs={"token": token}, retries=1))
        await until_seen(token, "waiting")
        if how == "terminated":
            await side.handle(first).terminate()
    await first.run_trigger()
    assert await side.status(first) == how.upper().replace(" ", "_")
    monkeypatch.undo()
    open_gates(token)
    async with side.worker():
        second = await side.retry(first.lose())
        assert second.state == "deferred"
        assert second.xcoms["workflow_id"] == first.xcoms["workflow_id"]
        assert second.xcoms["run_id"] != first.xcoms["run_id"]
        end = await second.run_to_end()
    assert end.state == "success", end.error
    assert end.return_value["data"] == {"token": token, "paid": True, "waited": True}
    assert told(token).count("charge") == 1
    assert "refund begun" not in told(token)


async def test_a_workflow_that_was_cut_off_while_it_undid_is_a_matter_for_a_person(side: Side, token: str) -> None:
    flows.broken.add(token)
    async with side.worker():
        first = await side.run(operator(broken, inputs={"token": token}, retries=3))
        await until_seen(token, "refund begun")
        await side.handle(first).terminate()
        refunds[token].set()
        end = await side.retry(first.lose())
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    for part in (
        f"workflow 'test-dag/{side.run_id}/t/-1@0', run {first.xcoms['run_id']}, was ended from outside while it undid",
        "finished were 'charge', of which: 'charge' (its undoing failed, or has not ended)",
        "undo the rest by hand, then clear the task to run the flow again",
    ):
        assert part in str(end.error)
    assert told(token).count("charge") == 1


async def test_a_workflow_that_was_cut_off_before_its_flow_changed_is_a_matter_for_a_person(
    side: Side, token: str
) -> None:
    task = operator(inputs={"token": token}, retries=3)
    async with side.worker():
        first = await side.run(task)
        await until_seen(token, "waiting")
        await side.handle(first).terminate()
    task.flow = broken
    end = await side.retry(first.lose())
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert "flow 'broken' has changed since" in str(end.error)
    assert "behind the finished steps ('charge')" in str(end.error)


# what was undone, and what was not


async def test_a_refund_that_failed_after_a_cancellation_is_loud(side: Side, token: str) -> None:
    async with side.worker():
        run = await side.run(operator(inputs={"token": token, "account": "closed"}))
        await until_seen(token, "waiting")
        await side.handle(run).cancel()
        end = await run.run_to_end()
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert str(end.error) == (
        "flow cancelled: the workflow was cancelled; "
        "step 'charge' could not be undone: InvalidInput: the account is closed"
    )


async def test_what_a_terminated_flow_leaves_is_loud(side: Side, token: str) -> None:
    async with side.worker():
        run = await side.run(operator(inputs={"token": token}))
        await until_seen(token, "waiting")
        await side.handle(run).terminate(reason="wrong order")
        end = await run.run_to_end()
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert str(end.error) == (
        "flow cancelled: the workflow was terminated: wrong order; "
        "step 'charge' could not be undone: the workflow was ended before that"
    )


# marked by a user


@pytest.mark.parametrize(
    ("state", "status"),
    [("success", "RUNNING"), ("failed", "CANCELED"), (None, "CANCELED"), ("deferred", "CANCELED")],
)
@pytest.mark.parametrize("map_index", [-1, 3])
async def test_a_task_that_is_marked_as_success_leaves_its_workflow_running(
    side: Side, token: str, state: str | None, status: str, map_index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    answer = side.runner._supervisor._answer

    def answered(msg: Any) -> Any:
        if not isinstance(msg, comms.GetTaskStates):
            return answer(msg)
        asked.append(msg)
        name = "t" if map_index < 0 else f"t_{map_index}"
        return comms.TaskStatesResult(task_states={side.run_id: {"another": "success", name: state}})

    monkeypatch.setattr(side.runner._supervisor, "_answer", answered)
    async with side.worker():
        run = await side.run(operator(flows.gated, inputs={"token": token}), map_index=map_index)
        await until_seen(token, "waiting")
        assert run.deferral is not None
        trigger = run.deferral.trigger()
        assert isinstance(trigger, TemporalRunTrigger)
        monkeypatch.setattr(trigger, "_task_instance", run._attempt.task)
        await trigger.on_kill()
        if status == "CANCELED":
            await run.run_trigger()
        assert await side.status(run) == status
        flows.gates[token].set()
    (one,) = asked
    assert (one.dag_id, one.run_ids, one.task_ids, one.map_index) == ("test-dag", [side.run_id], ["t"], map_index)


async def test_a_cancellation_that_the_triggerer_breaks_off_comes_to_its_end(side: Side, token: str) -> None:
    async with side.worker():
        run = await side.run(operator(flows.gated, inputs={"token": token}))
        await until_seen(token, "waiting")
        assert run.deferral is not None
        killing = asyncio.create_task(run.deferral.trigger().on_kill())
        await asyncio.sleep(0)
        killing.cancel()
        assert await asyncio.wait({killing}) == ({killing}, set())
        assert killing.cancelled()
        await asyncio.wait_for(run.run_trigger(), 30)
        assert await side.status(run) == "CANCELED"


async def test_a_cancellation_that_fails_is_told(
    side: Side, token: str, unused_tcp_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    run = await side.run(operator(flows.gated, inputs={"token": token}))
    assert run.deferral is not None
    with away(side, unused_tcp_port):
        await run.deferral.trigger().on_kill()
    assert f"run {run.xcoms['run_id']}, could not be asked to end, and goes on: cancel it in Temporal" in caplog.text
    await side.handle(run).terminate()
