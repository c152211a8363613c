from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from beluga_airflow.errors import InvalidInput, InvalidSetting, TemporalError, TemporalUnavailable
from beluga_airflow.temporal import client as module
from beluga_airflow.temporal.client import (
    Run,
    Target,
    cancel,
    check,
    closed,
    connect,
    open_run,
    result_of,
    start,
    was_cut_off,
)
from beluga_airflow.temporal.messages import FLOW_WORKFLOW
from beluga_airflow.testing import TemporalServer
from tests.temporal import sample_flows
from tests.temporal.conftest import Side


async def test_a_running_workflow_is_attached_to(side: Side, token: str) -> None:
    call = side.call("chain", {"token": token})
    first = await side.start(FLOW_WORKFLOW, call, token)
    assert await side.start(FLOW_WORKFLOW, call, token) == first
    await side.handle(first).terminate()


async def test_a_completed_workflow_is_taken_as_it_is(side: Side, token: str) -> None:
    call = side.call("branches", {"token": token})
    async with side.worker():
        first = await side.start(FLOW_WORKFLOW, call, token)
        result = await side.result(first)
        again = await side.start(FLOW_WORKFLOW, call, token)
        assert again == first
        assert await side.result(again) == result
    assert sorted(sample_flows.seen[token]) == ["left", "right", "start"]


async def test_after_a_failed_workflow_a_new_one_starts(side: Side, token: str) -> None:
    call = side.call("refused", {"token": token})
    async with side.worker():
        first = await side.start(FLOW_WORKFLOW, call, token)
        assert (await side.result(first)).status == "failed"
        again = await side.start(FLOW_WORKFLOW, call, token)
        assert (await side.result(again)).status == "failed"
    assert again.run_id != first.run_id
    assert sample_flows.seen[token] == ["refused", "refused"]
    # each run keeps its own result
    assert (await side.result(first)).status == "failed"


@pytest.mark.parametrize("flow", ["branches", "refused"])
async def test_what_is_to_run_once_is_taken_as_it_ended(side: Side, token: str, flow: str) -> None:
    call = side.call(flow, {"token": token})
    where: dict[str, Any] = {"workflow_id": token, "task_queue": side.target.task_queue, "summary": "a test"}
    async with side.worker():
        first = await start(side.client, side.target, FLOW_WORKFLOW, call, **where, once=True)
        assert not first.closed
        assert await open_run(side.client, side.target, token) == first
        result = await side.result(first)
        again = await start(side.client, side.target, FLOW_WORKFLOW, call, **where, once=True)
    assert (again, again.closed) == (first, True)
    assert await open_run(side.client, side.target, token) is None
    assert not await was_cut_off(side.client, side.target, again)
    assert await side.result(again) == result


async def test_what_was_never_started_is_not_open(side: Side, token: str) -> None:
    assert await open_run(side.client, side.target, token) is None


async def test_after_a_terminated_workflow_a_new_one_starts(side: Side, token: str) -> None:
    call = side.call("branches", {"token": token})
    first = await side.start(FLOW_WORKFLOW, call, token)
    await side.handle(first).terminate(reason="somebody pulled the plug")
    again = await side.start(FLOW_WORKFLOW, call, token)
    assert again.run_id != first.run_id
    assert await was_cut_off(side.client, side.target, first)
    async with side.worker():
        assert (await side.result(again)).status == "completed"
    lost = await side.result(first)
    assert (lost.status, lost.error) == ("cancelled", "the workflow was terminated: somebody pulled the plug")


async def test_a_workflow_that_the_server_ended_is_timed_out(side: Side, token: str) -> None:
    handle = await side.client.start_workflow(
        FLOW_WORKFLOW,
        side.call("branches", {"token": token}),
        id=token,
        task_queue=side.target.task_queue,
        run_timeout=timedelta(seconds=1),
    )
    result = await side.result(Run(workflow_id=token, run_id=str(handle.first_execution_run_id)))
    assert (result.status, result.error) == (
        "timed_out",
        "the Temporal server ended the workflow after 1 s: no worker took it, so that none of its steps was run or "
        f"undone; see that a worker serves its task queue '{side.target.task_queue}', then run the flow again",
    )


async def test_a_workflow_may_have_a_timeout_that_no_clock_reaches(side: Side, token: str) -> None:
    call = side.call("branches", {"token": token})
    run = await start(
        side.client,
        side.target,
        FLOW_WORKFLOW,
        call,
        workflow_id=token,
        task_queue=side.target.task_queue,
        summary="a test",
        timeout=1e14,
    )
    async with side.worker():
        assert (await side.result(run)).status == "completed"


async def test_a_cancelled_workflow_that_no_worker_had_begun(side: Side, token: str) -> None:
    run = await side.start(FLOW_WORKFLOW, side.call("branches", {"token": token}), token)
    await cancel(side.client, side.target, run)
    async with side.worker():
        assert (await side.result(run)).status == "cancelled"
    assert sample_flows.seen[token] == []


async def test_cancelling_what_is_closed_or_unknown_changes_nothing(side: Side, token: str) -> None:
    async with side.worker():
        result, run = await side.run("branches", {"token": token})
        await cancel(side.client, side.target, run)
        assert await side.result(run) == result
    await cancel(side.client, side.target, Run(workflow_id=token, run_id=str(uuid4())))


async def test_a_run_that_the_server_does_not_know(side: Side, token: str) -> None:
    run = Run(workflow_id=token, run_id=str(uuid4()))
    with pytest.raises(TemporalError, match=r"refused: .*not found.* \(NOT_FOUND\)"):
        await result_of(side.client, side.target, run)
    with pytest.raises(TemporalError, match=r"\(NOT_FOUND\)"):
        await closed(side.target, run)


async def test_an_input_that_is_too_large_is_refused_before_it_is_sent(side: Side, token: str) -> None:
    call = side.call("branches", {"token": token, "text": "a" * 2_100_000})
    with pytest.raises(InvalidInput, match=rf"workflow '{token}' cannot be started: TooLarge: 2\.1 MB of data"):
        await side.start(FLOW_WORKFLOW, call, token)


async def test_closed_returns_however_the_run_ended(side: Side, token: str) -> None:
    async with side.worker():
        for name in ("branches", "used_up"):
            run = await side.start(FLOW_WORKFLOW, side.call(name, {"token": token}))
            await asyncio.wait_for(closed(side.target, run), 60)
            assert (await side.handle(run).describe()).close_time is not None


async def test_all_who_wait_share_a_client_and_one_that_gives_up_disturbs_nobody(
    side: Side, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections: list[Target] = []

    async def counted(target: Target) -> Client:
        connections.append(target)
        return await connect(target)

    monkeypatch.setattr(module, "connect", counted)
    run = await side.start(FLOW_WORKFLOW, side.call("branches", {"token": token}))
    waiters = [asyncio.create_task(closed(side.target, run)) for _ in range(20)]
    await asyncio.wait(waiters, timeout=0.1)
    waiters[0].cancel()
    assert await asyncio.wait(waiters[:1]) == ({waiters[0]}, set())
    async with side.worker():
        await asyncio.wait_for(asyncio.gather(*waiters[1:]), 60)
    assert waiters[0].cancelled()
    assert connections == [side.target]


async def test_closed_waits_for_a_server_that_is_down_at_first_and_over_a_restart(
    token: str, eventually: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "beluga_airflow")
    with TemporalServer() as server:
        target = Target(address=server.address, task_queue="nobody")
        side = Side(client=await connect(target), target=target)
        run = await side.start(FLOW_WORKFLOW, side.call("branches", {"token": token}))
        server.kill()
        waiter = asyncio.create_task(closed(target, run))
        await eventually(lambda: "cannot be reached" in caplog.text)
        assert f"waiting for workflow {run.workflow_id!r}: the Temporal server at {server.address}" in caplog.text
        assert "trying again in 1 s" in caplog.text

        await asyncio.to_thread(server.restart)
        ask = asyncio.create_task(closed(target, run))
        await eventually(lambda: target in module._shared[asyncio.get_running_loop()])
        await asyncio.to_thread(server.restart)
        assert not waiter.done()
        assert not ask.done()

        client = await connect(target)
        await client.get_workflow_handle(run.workflow_id).terminate()
        await asyncio.wait_for(asyncio.gather(waiter, ask), 60)


async def test_a_server_that_is_not_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        target = Target(address=f"127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(TemporalUnavailable) as caught:
            await connect(target)
    assert str(caught.value) == (
        f"the Temporal server at {target.address}, namespace 'default' cannot be reached; see that it runs and that "
        "the temporal connection names it"
    )
    assert caught.value.retryable


@pytest.mark.parametrize("address", ["", "no address", "host:port", "host:99999", "http://host:7233/path?x"])
async def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises((InvalidSetting, TemporalUnavailable), match=r"Temporal server"):
        await connect(Target(address=address))


async def test_check_tells_whether_there_is_such_a_namespace(side: Side, temporal_server: TemporalServer) -> None:
    assert await check(side.client, side.target) == (
        f"the Temporal server at {temporal_server.address} answers and has the namespace 'default'"
    )
    elsewhere = Target(address=temporal_server.address, namespace="elsewhere")
    with pytest.raises(TemporalError, match=r"namespace 'elsewhere' refused: Namespace elsewhere is not found"):
        await check(await connect(elsewhere), elsewhere)


@pytest.mark.parametrize("status", RPCStatusCode)
def test_every_status_of_the_server_becomes_an_error_of_ours(status: RPCStatusCode) -> None:
    target = Target(address="temporal.example:7233", api_key="key-4711")
    with pytest.raises(TemporalError) as caught, module.translated(target):
        raise RPCError("the server's words", status, b"")
    assert isinstance(caught.value, TemporalUnavailable) is (status in module.AWAY)
    assert status.name in str(caught.value)
    assert "temporal.example:7233" in str(caught.value)
    assert "key-4711" not in f"{caught.value!r} {target!r}"
    if status in (RPCStatusCode.UNAUTHENTICATED, RPCStatusCode.PERMISSION_DENIED):
        assert "refuses the key" in str(caught.value)


def test_a_link_leads_to_the_run_whatever_its_name() -> None:
    run = Run(workflow_id="dag/run 1/task?@0", run_id="r-1")
    target = Target(namespace="my space", ui_url="http://ui:8233/")
    assert target.link(run) == "http://ui:8233/namespaces/my%20space/workflows/dag%2Frun%201%2Ftask%3F%400/r-1"
    assert Target().link(run) is None


async def test_a_server_that_dies_refuses_what_is_asked_of_it(token: str) -> None:
    with TemporalServer() as server:
        target = Target(address=server.address)
        side = Side(client=await connect(target), target=target)
        call = side.call("branches", {"token": token})
        run = await side.start(FLOW_WORKFLOW, call)
        server.kill()
        asked = (
            start(side.client, target, FLOW_WORKFLOW, call, workflow_id="x", task_queue="x", summary="x"),
            result_of(side.client, target, run),
            cancel(side.client, target, run),
            check(side.client, target),
            open_run(side.client, target, run.workflow_id),
            was_cut_off(side.client, target, run),
        )
        answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(answer) for answer in answers] == [TemporalUnavailable] * 6
