"""A flow on Temporal as a task: a real server, a worker in the test, the trigger as the triggerer runs it."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowFailException, TaskDeferralError, TaskDeferralTimeout

from beluga_airflow import Chain
from beluga_airflow.errors import FlowNotFound, InvalidSetting, TemporalUnavailable
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.operators.temporal import TemporalWorkflowOperator
from beluga_airflow.testing import TemporalServer
from beluga_airflow.triggers.temporal import TemporalRunTrigger
from tests.operators import sample_flows as flows
from tests.operators.conftest import GOLD, Side, until_seen

PATH = "tests.operators.sample_flows"


def operator(flow: Any = flows.chain, **arguments: Any) -> TemporalWorkflowOperator:
    return TemporalWorkflowOperator(task_id="t", flow=flow, **arguments)


async def test_the_task_waits_without_a_worker_and_ends_with_the_flow(
    side: Side, token: str, temporal_server: TemporalServer
) -> None:
    inputs = {"order_id": "{{ params.order }}", "token": token}
    run = await side.run(operator(inputs=inputs), conf={"order": "o-7"})
    assert run.state == "deferred"
    assert run.deferral is not None
    assert run.deferral.trigger_class == "beluga_airflow.triggers.temporal.TemporalRunTrigger"
    workflow_id = f"test-dag/{side.run_id}/t/-1@0"
    assert run.deferral.kwargs == {
        "temporal_conn_id": "temporal_default",
        "workflow_id": workflow_id,
        "run_id": run.xcoms["run_id"],
    }
    assert run.deferral.timeout is None
    assert flows.seen[token] == [], "no worker is up yet"
    async with side.worker():
        end = await run.run_to_end()
    assert end.state == "success"
    assert end.return_value == {
        "status": "completed",
        "data": {
            "order_id": "o-7",
            "token": token,
            "valid": True,
            "idempotency_key": f"test-dag/{side.run_id}/t/-1/charge",
            "attempt": 1,
            "generation": 0,
        },
    }
    assert end.xcoms.keys() == {"return_value", "workflow_id", "run_id"}
    page = f"test-dag%2F{side.run_id}%2Ft%2F-1%400/{end.xcoms['run_id']}"
    link = f"{temporal_server.ui_url}/namespaces/default/workflows/{page}"
    assert run.links == {"Temporal run": link}, "while it waits"
    assert end.links == {"Temporal run": link}
    assert end.xcoms["workflow_id"] == workflow_id


@pytest.mark.parametrize("inputs", [GOLD, json.dumps(GOLD)])
async def test_decisions_are_pushed_by_step(side: Side, model_server: ModelServer, inputs: Any) -> None:
    end = await side.run_to_end(operator(flows.decided, inputs=inputs))
    assert end.return_value["data"]["handling"] == "expedite"
    assert end.xcoms["decisions"]["handling"]["reason"] == "gold goes first"
    assert end.xcoms["decisions"]["handling"]["simulated"] is True
    assert model_server.calls == 1


async def test_a_stop_is_a_success_with_its_status(side: Side, token: str) -> None:
    end = await side.run_to_end(operator(f"{PATH}:stopped", inputs={"token": token}))
    assert end.return_value == {"status": "out_of_stock", "data": {"token": token, "product_id": "p-1"}}


async def test_a_flow_that_failed_fails_the_task_for_good(side: Side, token: str) -> None:
    flows.broken.add(token)
    end = await side.run_to_end(operator(flows.decided_then_broken, inputs={**GOLD, "token": token}, retries=3))
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert str(end.error) == "flow failed: step 'pay' failed: ConnectionError: the bank is closed"
    assert end.return_value is None
    assert end.xcoms["decisions"]["handling"]["answer"] == "expedite"
    assert await side.status(end) == "FAILED"


async def test_a_flow_that_was_too_slow_fails_the_task_for_good(side: Side, token: str) -> None:
    end = await side.run_to_end(operator(flows.late, inputs={"token": token}, retries=3))
    assert end.state == "failed"
    assert str(end.error).startswith("flow timed_out: flow 'late' used up its timeout of 0.2 s in step 'never'")


# lost and found


async def test_a_retry_attaches_to_what_runs(side: Side, token: str) -> None:
    async with side.worker():
        first = await side.run(operator(flows.gated, inputs={"token": token}, retries=1))
        await until_seen(token, "waiting")
        second = await side.retry(first.lose())
        assert (second.state, second.try_number) == ("deferred", 2)
        assert second.xcoms["run_id"] == first.xcoms["run_id"]
        flows.gates[token].set()
        end = await second.run_to_end()
    assert end.state == "success"
    assert flows.seen[token] == ["waiting", "charge"]


async def test_what_completed_while_nobody_looked_is_taken(side: Side, token: str) -> None:
    inputs = {"order_id": "o-1", "token": token}
    async with side.worker():
        first = await side.run(operator(inputs=inputs, retries=1))
        await side.handle(first).result()
    # no worker any more: nothing runs again
    end = await (await side.retry(first.lose())).run_to_end()
    assert (end.state, end.return_value["status"]) == ("success", "completed")
    assert end.xcoms["run_id"] == first.xcoms["run_id"]
    assert flows.seen[token] == ["validate", "charge"]


@pytest.mark.parametrize("workflow_id", [None, "order-{{ params.order }}"])
async def test_a_clear_runs_the_flow_again(side: Side, token: str, workflow_id: str | None) -> None:
    inputs = {"order_id": "o-1", "token": token}
    conf = {"order": token}
    async with side.worker():
        run = await side.run(operator(inputs=inputs, workflow_id=workflow_id), conf=conf)
        ends = [await run.run_to_end()]
        for _ in range(2):
            run = await side.clear(ends[-1])
            ends.append(await run.run_to_end())
    assert flows.seen[token] == ["validate", "charge"] * 3
    name = workflow_id and f"order-{token}"
    own = [f"test-dag/{side.run_id}/t/-1@{number}" for number in range(3)]
    ids = [end.xcoms["workflow_id"] for end in ends]
    assert ids == ([name, f"{name}@1", f"{name}@2"] if name else own)
    data = [end.return_value["data"] for end in ends]
    assert [each["generation"] for each in data] == [0, 1, 2]
    assert len({each["idempotency_key"] for each in data}) == 1


async def test_the_same_workflow_id_twice_is_one_workflow(side: Side, token: str) -> None:
    inputs = {"order_id": "o-1", "token": token}
    ends = [
        await side.run_to_end(operator(inputs=inputs, workflow_id=f"order-{token}"), run_id=f"{token}-{number}")
        for number in (1, 2)
    ]
    assert ends[0].return_value == ends[1].return_value
    assert flows.seen[token] == ["validate", "charge"]


async def test_a_business_key_is_the_same_for_every_dag(side: Side, token: str) -> None:
    keys = set()
    async with side.worker():
        for number in (1, 2):
            task = operator(inputs={"order_id": "o-7", "token": token}, key="order_id")
            run = await side.run(task, run_id=f"{token}-{number}")
            keys.add((await run.run_to_end()).return_value["data"]["idempotency_key"])
    assert keys == {"order-chain/o-7/charge"}


async def test_mapped_tasks_have_workflows_of_their_own(side: Side, token: str) -> None:
    with DAG("orders", schedule=None):
        mapped = TemporalWorkflowOperator.partial(task_id="t", flow=flows.chain).expand(
            inputs=[{"order_id": name, "token": token} for name in ("a", "b")]
        )
    async with side.worker():
        runs = [await side.run(mapped, map_index=index) for index in (0, 1)]
        ends = [await run.run_to_end() for run in runs]
    assert [end.return_value["data"]["order_id"] for end in ends] == ["a", "b"]
    assert [end.xcoms["workflow_id"] for end in ends] == [f"orders/{side.run_id}/t/{index}@0" for index in (0, 1)]


# cancelling


async def test_a_user_who_clears_the_waiting_task_cancels_its_workflow(side: Side, token: str) -> None:
    async with side.worker():
        first = await side.run(operator(flows.gated, inputs={"token": token}))
        await until_seen(token, "waiting")
        assert first.deferral is not None
        await first.deferral.trigger().on_kill()  # what the triggerer does when a user acts
        second = await side.clear(first)
        await until_seen(token, "cancelled")
        flows.gates[token].set()
        end = await second.run_to_end()
    assert end.state == "success"
    assert end.xcoms["workflow_id"].endswith("@1")
    assert await side.status(first) == "CANCELED"
    assert flows.seen[token].count("charge") == 1


async def test_a_workflow_that_was_cancelled_fails_its_task(side: Side, token: str) -> None:
    async with side.worker():
        run = await side.run(operator(flows.gated, inputs={"token": token}, retries=2))
        await until_seen(token, "waiting")
        await side.handle(run).cancel()
        end = await run.run_to_end()
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert str(end.error).startswith("flow cancelled: ")


async def test_a_workflow_that_was_terminated_fails_its_task(side: Side, token: str) -> None:
    run = await side.run(operator(flows.gated, inputs={"token": token}, retries=2))
    await side.handle(run).terminate("by hand")
    end = await run.run_to_end()
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert "terminated" in str(end.error)


async def test_a_trigger_that_goes_away_cancels_nothing(side: Side, token: str) -> None:
    async with side.worker():
        run = await side.run(operator(flows.gated, inputs={"token": token}))
        await until_seen(token, "waiting")
        waiting = asyncio.create_task(run.run_trigger())
        done, _ = await asyncio.wait({waiting}, timeout=0.3)
        assert not done
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await side.status(run) == "RUNNING"
        flows.gates[token].set()
        assert (await run.run_to_end()).state == "success"


async def test_killing_what_is_closed_or_unknown_is_harmless(side: Side, token: str) -> None:
    end = await side.run_to_end(operator(inputs={"order_id": "o-1", "token": token}))
    for workflow_id, run_id in [
        (end.xcoms["workflow_id"], end.xcoms["run_id"]),
        ("never-started", "00000000-0000-4000-8000-000000000000"),
    ]:
        trigger = TemporalRunTrigger(temporal_conn_id="temporal_default", workflow_id=workflow_id, run_id=run_id)
        await trigger.on_kill()
    assert await side.status(end) == "COMPLETED"


# what goes wrong


async def test_a_server_that_is_down_is_retried_by_airflow(side: Side, token: str, unused_tcp_port: int) -> None:
    there = side.runner.connections["temporal_default"]
    side.runner.connections["temporal_default"] = {
        "conn_type": "temporal",
        "host": "127.0.0.1",
        "port": unused_tcp_port,
    }
    first = await side.run(operator(inputs={"order_id": "o-1", "token": token}, retries=1))
    assert first.state == "up_for_retry"
    assert isinstance(first.error, TemporalUnavailable)
    assert f"127.0.0.1:{unused_tcp_port}" in str(first.error)
    side.runner.connections["temporal_default"] = there
    async with side.worker():
        assert (await (await side.retry(first)).run_to_end()).state == "success"


async def test_a_server_that_restarts_while_the_task_waits_is_waited_for(side: Side, token: str) -> None:
    with TemporalServer() as server:
        side.runner.connections["temporal_default"] = server.connection
        run = await side.run(operator(flows.gated, inputs={"token": token}))
        waiting = asyncio.create_task(run.run_trigger())
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.restart)
        async with side.worker():
            flows.gates[token].set()
            event = await waiting
        end = await asyncio.to_thread(run.resume, event)
    assert (end.state, end.return_value["data"]["waited"]) == ("success", True)


async def test_a_server_that_is_down_when_the_wait_is_over(side: Side, token: str, unused_tcp_port: int) -> None:
    async with side.worker():
        run = await side.run(operator(inputs={"order_id": "o-1", "token": token}, retries=1))
        event = await run.run_trigger()
    there = side.runner.connections["temporal_default"]
    side.runner.connections["temporal_default"] = {
        "conn_type": "temporal",
        "host": "127.0.0.1",
        "port": unused_tcp_port,
    }
    first = await asyncio.to_thread(run.resume, event)
    assert (first.state, type(first.error)) == ("up_for_retry", TemporalUnavailable)
    side.runner.connections["temporal_default"] = there
    end = await (await side.retry(first)).run_to_end()
    assert (end.state, flows.seen[token]) == ("success", ["validate", "charge"])


async def test_a_run_that_the_server_does_not_know_fails_for_good(side: Side) -> None:
    run = await side.run(operator(flows.chain, inputs={"order_id": "o"}, retries=2))
    trigger = TemporalRunTrigger(
        temporal_conn_id="temporal_default", workflow_id="gone", run_id="00000000-0000-4000-8000-000000000000"
    )
    (event,) = [event async for event in trigger.run()]
    end = await asyncio.to_thread(run.resume, event)
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert "NOT_FOUND" in str(end.error)
    await side.handle(run).terminate()


async def test_a_trigger_whose_connection_is_gone_says_so(side: Side) -> None:
    run = await side.run(operator(flows.chain, inputs={"order_id": "o"}, temporal_conn_id="temporal_default"))
    side.runner.connections["temporal_default"] = {"conn_type": "http"}
    end = await run.run_to_end()
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert "connection 'temporal_default' is of type 'http'" in str(end.error)


async def test_the_wait_may_be_bounded(side: Side, token: str) -> None:
    task = operator(flows.gated, inputs={"token": token}, wait_timeout=timedelta(seconds=0.2), retries=1)
    async with side.worker():
        run = await side.run(task)
        assert run.deferral is not None
        assert run.deferral.timeout == timedelta(seconds=0.2)
        late = await run.run_to_end()
        assert (late.state, type(late.error)) == ("up_for_retry", TaskDeferralTimeout)
        assert isinstance(late.error, TaskDeferralError | TaskDeferralTimeout)
        assert await side.status(run) == "RUNNING", "the workflow goes on"
        flows.gates[token].set()
        await side.handle(run).result()
        end = await (await side.retry(late)).run_to_end()
    assert (end.state, flows.seen[token]) == ("success", ["waiting", "charge"])


async def test_a_flow_that_the_worker_has_not_is_named(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    run = await side.run(operator(f"{PATH}:chain", inputs={"order_id": "o"}, retries=2))
    monkeypatch.delattr(flows, "chain")  # as a worker with other code has it
    async with side.worker():
        end = await run.run_to_end()
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert f"FlowNotFound: flow '{PATH}:chain'" in str(end.error)
    assert "nothing of that name" in str(end.error)


async def test_a_missing_llm_connection_on_the_worker_is_named(side: Side) -> None:
    end = await side.run_to_end(operator(flows.decided, inputs=GOLD, llm_conn_id="nowhere", retries=2))
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert "there is no connection 'nowhere'; make one of type 'beluga_llm'" in str(end.error)


async def test_without_a_worker_the_server_ends_the_flow_in_its_time(
    side: Side, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beluga_airflow.operators.temporal.GRACE", 0.5)
    run = await side.run(operator(flows.late, inputs={"token": token}, task_queue=f"nobody-{token}"))
    end = await run.run_to_end()
    assert end.state == "failed"
    assert isinstance(end.error, AirflowFailException)
    assert "no worker took it, so that none of its steps was run or undone" in str(end.error)
    assert f"see that a worker serves its task queue 'nobody-{token}'" in str(end.error)


async def test_another_task_queue_may_be_named(side: Side, token: str) -> None:
    inputs = {"order_id": "o-1", "token": token}
    run = await side.run(operator(inputs=inputs, task_queue="{{ params.queue }}"), conf={"queue": f"own-{token}"})
    description = await side.handle(run).describe()
    assert description.task_queue == f"own-{token}"
    await side.handle(run).terminate()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"inputs": "no json"}, "InvalidInput: the input is a text that is not JSON"),
        ({"inputs": {"a": {1}}}, "InvalidOutput: the input of flow 'order-chain'['a'] is a set"),
        ({"inputs": {"a": 1}, "key": "n"}, "key='n' names no field of the input; there is: a"),
        ({"inputs": {"a": 1}, "temporal_conn_id": "nowhere"}, "there is no connection 'nowhere'"),
        ({"inputs": {"a": "x" * 3_000_000}}, "cannot be started"),
    ],
)
async def test_what_cannot_be_started_fails_for_good(side: Side, arguments: dict[str, Any], says: str) -> None:
    run = await side.run(operator(retries=2, **arguments))
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert says in str(run.error)


def local_flow() -> Chain:
    return Chain("local").add_step("validate", flows.validate)


@pytest.mark.parametrize(
    ("flow", "error", "says"),
    [
        (
            local_flow(),
            FlowNotFound,
            "flow 'local', made in 'tests.operators.test_temporal', cannot be found by a worker",
        ),
        ("nowhere:flow", FlowNotFound, "cannot be imported in this process"),
        ({"a": 1}, InvalidSetting, "flow= is a dict, it must be a Chain or a Graph"),
    ],
)
def test_a_flow_that_no_worker_finds_is_an_import_error_of_the_dag(
    flow: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as caught:
        operator(flow)
    assert says in str(caught.value)


def test_the_trigger_is_made_again_from_what_it_says() -> None:
    trigger = TemporalRunTrigger(temporal_conn_id="c", workflow_id="w", run_id="r")
    path, arguments = trigger.serialize()
    module, _, name = path.rpartition(".")
    assert (module, name) == (TemporalRunTrigger.__module__, TemporalRunTrigger.__name__)
    assert TemporalRunTrigger(**arguments).serialize() == trigger.serialize()
    assert arguments == {"temporal_conn_id": "c", "workflow_id": "w", "run_id": "r"}


async def test_a_model_that_cannot_be_asked_is_seen_before_anything_is_paid(side: Side, token: str) -> None:
    inputs = {"order_id": "o-1", "tier": "gold", "token": token}
    end = await side.run_to_end(operator(flows.paid_then_decided, inputs=inputs, llm_conn_id="nowhere"))
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    assert "there is no connection 'nowhere'" in str(end.error)
    assert flows.seen[token] == []
