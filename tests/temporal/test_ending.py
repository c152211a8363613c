"""What is told of workflows that could not tell their end themselves: a real server ends them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.worker import Worker

from beluga_airflow import Chain, InvalidInput, Retry
from beluga_airflow.config import Settings
from beluga_airflow.graph import FlowResult, Identity, Outcome
from beluga_airflow.graph.locate import load_flow
from beluga_airflow.temporal.client import Run, Target, cancel, connect
from beluga_airflow.temporal.flow_workflow import LEAVING, FlowWorkflow
from beluga_airflow.temporal.messages import BATCH_WORKFLOW, FLOW_WORKFLOW, BatchCall, FlowCall
from beluga_airflow.temporal.worker import workflow_runner
from beluga_airflow.testing import TemporalServer, temporal_server
from tests.temporal.conftest import Side

ONCE = Retry(maximum_attempts=1)
NOT_BEGUN = "the workflow was ended before that"
IN_FLIGHT = "it ran when the flow ended, and may have done its work: see whether it did"
begun: defaultdict[str, list[str]] = defaultdict(list)
gates: defaultdict[str, threading.Event] = defaultdict(threading.Event)


def quick(data: dict[str, Any]) -> None:
    begun[data["token"]].append("quick")


def slow(name: str) -> Any:
    """A step that waits until the test opens its gate."""

    async def step(data: dict[str, Any]) -> None:
        begun[data["token"]].append(name)
        while not gates[f"{name} {data['token']}"].is_set():  # noqa: ASYNC110  # the test opens it from another loop
            await asyncio.sleep(0.01)

    return step


def refused(data: dict[str, Any]) -> None:
    raise InvalidInput("x" * 1_000)


flow = (
    Chain("slow", retry=ONCE)
    .add_step("first", quick, compensate=slow("first.undo"))
    .add_step("second", quick, compensate=refused)
    .add_step("plain", quick)
    .add_step("third", slow("third"), compensate=slow("third.undo"))
    .add_step("last", slow("last"))
)


async def takes_no_notice(data: dict[str, Any]) -> None:
    """A step that goes on although it is cancelled, until the test opens its gate."""
    begun[data["token"]].append("pay")
    while not gates[f"pay {data['token']}"].is_set():
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            begun[data["token"]].append("pay hears")


def in_a_thread(data: dict[str, Any]) -> None:
    begun[data["token"]].append("pay")
    gates[f"pay {data['token']}"].wait(60)


async def fails_when_cancelled(data: dict[str, Any]) -> None:
    begun[data["token"]].append("pay")
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise ConnectionError("the bank hung up") from None


def fails(data: dict[str, Any]) -> None:
    begun[data["token"]].append("pay")
    raise ConnectionError("the bank is closed")


def paying(name: str, pay: Any, retry: Retry = ONCE) -> Chain:
    """A payment as it is given, behind a reservation."""
    return (
        Chain(name, retry=retry)
        .add_step("reserve", quick, compensate=tell("reserve.undo"))
        .add_step("pay", pay, compensate=tell("pay.undo"))
        .add_step("last", quick)
    )


def tell(name: str) -> Any:
    return lambda data: begun[data["token"]].append(name)


slow_to_pay = paying("slow-to-pay", slow("pay"))
stubborn = paying("stubborn", takes_no_notice)
threaded = paying("threaded", in_a_thread)
fails_late = paying("fails-late", fails_when_cancelled, Retry(maximum_attempts=3))
waits_to_retry = paying("waits-to-retry", fails, Retry(maximum_attempts=3, initial_interval=60, maximum_interval=60))


def call(token: str, name: str = "flow", timeout: float | None = None, **changes: Any) -> FlowCall:
    path = f"{__name__}:{name}"
    shape = Settings().settle(load_flow(path).check(), durable=True).to_json()
    scope = Identity.of("slow", token).scope
    given = shape if timeout is None else {**shape, "timeout": timeout}
    return FlowCall(path=path, shape=given, inputs={"token": token}, scope=scope, **changes)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[TemporalServer]:
    """A server that ends a workflow whose history has more than a few events."""
    settings = (*temporal_server.DYNAMIC_CONFIG, "limit.historyCount.error=12")
    monkeypatch.setattr(temporal_server, "DYNAMIC_CONFIG", settings)
    with TemporalServer() as server:
        yield server


def let_go(token: str, *names: str) -> None:
    for name in names:
        gates[f"{name} {token}"].set()


async def until(token: str, name: str) -> None:
    async with asyncio.timeout(30):
        while name not in begun[token]:  # noqa: ASYNC110  # steps run in threads, which have no event for it
            await asyncio.sleep(0.01)


async def test_what_a_terminated_flow_leaves_undone_is_told(side: Side, token: str) -> None:
    async with side.worker():
        run = await side.start(FLOW_WORKFLOW, call(token))
        await until(token, "third")
        await side.handle(run).terminate(reason="a mistake")
        let_go(token, "third")
        result = await side.result(run)
    assert result.status == "cancelled"
    assert result.undone == {"third": IN_FLIGHT, "second": NOT_BEGUN, "first": NOT_BEGUN}
    assert result.error == (
        f"the workflow was terminated: a mistake; step 'third' could not be undone: {IN_FLIGHT}; "
        f"step 'second' could not be undone: {NOT_BEGUN}; step 'first' could not be undone: {NOT_BEGUN}"
    )


async def test_a_flow_that_was_terminated_while_it_undid_its_steps(side: Side, token: str) -> None:
    let_go(token, "third")
    async with side.worker():
        run = await side.start(FLOW_WORKFLOW, call(token))
        await until(token, "last")
        await side.handle(run).cancel()
        let_go(token, "last")
        await until(token, "third.undo")
        await side.handle(run).terminate()
        let_go(token, "third.undo")
        result = await side.result(run)
    begun_only = "its undoing had begun when the workflow was ended: see how far it came"
    assert result.undone == {"third": begun_only, "second": NOT_BEGUN, "first": NOT_BEGUN}


@pytest.mark.parametrize("late", [False, True])
async def test_what_a_cancelled_flow_undid_and_could_not_undo_is_told(side: Side, token: str, *, late: bool) -> None:
    async with side.worker():
        run = await side.start(FLOW_WORKFLOW, call(token))
        await until(token, "third")
        await side.handle(run).cancel()
        if late:
            let_go(token, "third", "third.undo")  # it has not heard of the cancellation yet, and does its work
        await until(token, "first.undo")
        assert ("third.undo" in begun[token]) == late
        let_go(token, "first.undo")
        result = await side.result(run)
    assert result.status == "cancelled"
    refusal = "InvalidInput: " + "x" * 486
    assert len(refusal) == 500, "what others said is bounded"
    assert result.undone == {"third": "undone" if late else IN_FLIGHT, "second": refusal, "first": "undone"}
    third = "" if late else f"step 'third' could not be undone: {IN_FLIGHT}; "
    assert result.error == f"the workflow was cancelled; {third}step 'second' could not be undone: {refusal}"


async def test_a_step_that_is_done_after_the_flow_ran_out_of_time_is_undone(side: Side, token: str) -> None:
    async with side.worker():
        run = await side.start(FLOW_WORKFLOW, call(token, timeout=1.0))
        await until(token, "third")
        await until_cancelled(side, run)
        let_go(token, "third", "third.undo", "first.undo")
        result = await side.result(run)
    assert result.status == "timed_out"
    assert str(result.error).startswith("flow 'slow' used up its timeout of 1 s in step 'third'; step 'second' could")
    assert result.undone["third"] == "undone"
    assert begun[token].index("third.undo") < begun[token].index("first.undo")


async def until_cancelled(side: Side, run: Run) -> None:
    """Wait until the flow has asked an activity to end."""
    await until_happened(side, run, EventType.EVENT_TYPE_ACTIVITY_TASK_CANCEL_REQUESTED)


async def until_happened(side: Side, run: Run, kind: EventType.ValueType) -> None:
    async with asyncio.timeout(30):
        while kind not in [event.event_type async for event in side.handle(run).fetch_history_events()]:  # noqa: ASYNC110  # the server has no event for it
            await asyncio.sleep(0.02)


# what is in flight when the flow ends, by its timeout or by a person


async def ended_in_flight(side: Side, name: str, timeout: float | None) -> tuple[FlowResult, str]:
    """How a flow ends whose payment is in flight, and its token; without a timeout it is cancelled."""
    token = uuid4().hex
    run = await side.start(FLOW_WORKFLOW, call(token, name, timeout))
    await until(token, "pay")
    if timeout is None:
        await cancel(side.client, side.target, run)
    return await side.result(run), token


def told(flow_name: str, timeout: float | None) -> str:
    if timeout is None:
        return "the workflow was cancelled"
    return f"flow {flow_name!r} used up its timeout of {timeout:g} s in step 'pay'"


@pytest.mark.parametrize("cached", [0, 1000])
async def test_a_step_that_takes_no_notice_holds_the_end_for_a_bounded_time_and_is_told(
    side: Side, cached: int, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    async with side.worker(max_cached_workflows=cached):
        ends = [ended_in_flight(side, "stubborn", timeout) for timeout in (None, 2.0)]
        results = await asyncio.gather(*ends)
        took = time.monotonic() - began
        for _, token in results:
            let_go(token, "pay")
    assert LEAVING < took < LEAVING + 10
    for (result, token), timeout in zip(results, (None, 2.0), strict=True):
        assert "pay hears" in begun[token], "the wait is longer than a cancellation is on its way"
        assert begun[token][-1] == "reserve.undo"
        assert result.undone == {"pay": IN_FLIGHT, "reserve": "undone"}
        assert result.error == f"{told('stubborn', timeout)}; step 'pay' could not be undone: {IN_FLIGHT}"
    assert "tasks remain" not in caplog.text
    assert "never retrieved" not in caplog.text


@pytest.mark.parametrize(("name", "flow_name"), [("threaded", "threaded"), ("fails_late", "fails-late")])
async def test_a_step_that_was_cut_off_is_told_since_it_may_have_done_its_work(
    side: Side, name: str, flow_name: str
) -> None:
    """The one's thread goes on; the other makes an error of its cancellation: no second attempt follows."""
    async with side.worker():
        results = await asyncio.gather(*(ended_in_flight(side, name, timeout) for timeout in (None, 2.0)))
        for _, token in results:
            let_go(token, "pay")
    for (result, token), timeout in zip(results, (None, 2.0), strict=True):
        assert begun[token] == ["quick", "pay", "reserve.undo"]
        assert result.undone == {"pay": IN_FLIGHT, "reserve": "undone"}
        assert result.error == f"{told(flow_name, timeout)}; step 'pay' could not be undone: {IN_FLIGHT}"


@pytest.mark.parametrize("timeout", [None, 2.0])
async def test_a_step_that_waits_for_its_next_attempt_has_not_run(side: Side, timeout: float | None) -> None:
    async with side.worker():
        result, token = await ended_in_flight(side, "waits_to_retry", timeout)
    assert begun[token] == ["quick", "pay", "reserve.undo"]
    assert (result.error, result.undone) == (told("waits-to-retry", timeout), {"reserve": "undone"})


@pytest.mark.parametrize("timeout", [None, 1.0])
async def test_a_step_that_no_worker_took_has_not_run(side: Side, token: str, timeout: float | None) -> None:
    workflows = Worker(
        side.client, task_queue=side.target.task_queue, workflows=[FlowWorkflow], workflow_runner=workflow_runner()
    )
    async with workflows:
        run = await side.start(FLOW_WORKFLOW, call(token, "slow_to_pay", timeout))
        await until_happened(side, run, EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED)
        if timeout is None:
            await cancel(side.client, side.target, run)
        result = await side.result(run)
    assert result.undone == {}


@pytest.mark.parametrize("cached", [0, 1000])
async def test_a_flow_that_is_out_of_time_and_then_cancelled_undoes_what_is_done(
    side: Side, token: str, cached: int
) -> None:
    async with side.worker(max_cached_workflows=cached):
        run = await side.start(FLOW_WORKFLOW, call(token, "slow_to_pay", 1.0))
        await until_cancelled(side, run)
        await cancel(side.client, side.target, run)
        await until_happened(side, run, EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED)
        let_go(token, "pay")
        result = await side.result(run)
    assert begun[token] == ["quick", "pay", "pay.undo", "reserve.undo"]
    # how it ended stands
    assert (result.status, result.error) == ("timed_out", told("slow-to-pay", 1.0))
    assert result.undone == {"pay": "undone", "reserve": "undone"}


async def test_a_flow_that_is_cancelled_and_then_out_of_time_stays_cancelled(side: Side, token: str) -> None:
    async with side.worker():
        run = await side.start(FLOW_WORKFLOW, call(token, "stubborn", 2.0))
        await until(token, "pay")
        await cancel(side.client, side.target, run)
        await until_cancelled(side, run)
        await asyncio.sleep(2.5)
        let_go(token, "pay")
        result = await side.result(run)
    assert result.status == "cancelled"
    assert result.undone == {"pay": "undone", "reserve": "undone"}


async def timed_out(side: Side, given: FlowCall, *, seconds: int) -> Run:
    handle = await side.client.start_workflow(
        FLOW_WORKFLOW,
        given,
        id=uuid4().hex,
        task_queue=side.target.task_queue,
        run_timeout=timedelta(seconds=seconds),
    )
    return Run(workflow_id=handle.id, run_id=str(handle.first_execution_run_id))


async def test_a_flow_whose_workers_were_gone_leaves_what_it_had_finished(side: Side, token: str) -> None:
    let_go(token, "third")
    async with side.worker():
        run = await timed_out(side, call(token), seconds=4)
        await until(token, "last")
        assert (await side.result(run)).status == "timed_out"
        let_go(token, "last")
    result = await side.result(run)
    assert result.status == "timed_out"
    assert str(result.error).startswith(
        "the Temporal server ended the workflow after 4 s: its workers were gone, so that the flow could not end by "
        f"itself; see that a worker serves its task queue '{side.target.task_queue}', then run the flow again; step "
    )
    assert result.undone == dict.fromkeys(("third", "second", "first"), NOT_BEGUN)


async def test_a_flow_that_no_worker_took_leaves_what_it_was_to_go_on_behind(side: Side, token: str) -> None:
    kept = {"first": Outcome(output={}, taken=("second",)).to_json()}
    result = await side.result(await timed_out(side, call(token, kept=kept), seconds=1))
    assert result.status == "timed_out"
    assert "no worker took it, so that none of its steps was run or undone" in str(result.error)
    assert result.undone == {"first": NOT_BEGUN}


async def test_a_workflow_that_the_server_ended_for_its_size_has_failed(narrow: TemporalServer, token: str) -> None:
    target = Target(address=narrow.address, task_queue=f"tests-{token}")
    side = Side(client=await connect(target), target=target)
    batch = BatchCall(path=f"{__name__}:flow", batch=token, total=1, item_timeout=1, max_in_flight=1)
    for workflow, given in ((FLOW_WORKFLOW, call(token)), (BATCH_WORKFLOW, batch)):
        run = await side.start(workflow, given)
        with pytest.raises(Exception, match=r"history count exceeds limit|already completed"):  # noqa: PT012  # which one
            for number in range(20):
                await side.handle(run).signal("anything", number)
        returned = await side.returned(run)
        assert (returned["status"], returned["error"]) == (
            "failed",
            "the Temporal server ended the workflow: Workflow history count exceeds limit.",
        )
