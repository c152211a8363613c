from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from temporalio.api.enums.v1 import WorkflowTaskFailedCause
from temporalio.client import WorkflowHistory
from temporalio.worker import Replayer
from temporalio.workflow import NondeterminismError

from beluga_airflow import Chain, FlowResult, Graph, run
from beluga_airflow.config import Settings
from beluga_airflow.graph.locate import load_flow
from beluga_airflow.graph.progress import Progress
from beluga_airflow.temporal.batch_workflow import BatchWorkflow
from beluga_airflow.temporal.client import Target, cancel, connect
from beluga_airflow.temporal.flow_workflow import FlowWorkflow
from beluga_airflow.temporal.messages import DATA_CONVERTER, FLOW_WORKFLOW, PAYLOAD_LIMIT
from beluga_airflow.temporal.worker import workflow_runner
from beluga_airflow.testing import ScriptedModel, TemporalServer
from tests.temporal import sample_flows
from tests.temporal.conftest import FLOWS as PACKAGE
from tests.temporal.conftest import Side

HISTORIES = sorted((Path(__file__).parent / "histories").glob("*.json"))

# flow, input, the status it must end with; its result by run() and on Temporal must be the same
FLOWS: list[tuple[str, dict[str, Any], str]] = [
    ("chain", {"order_id": "o-1", "amount": "19.99"}, "completed"),
    ("chain", {"order_id": 7}, "failed"),
    ("branches", {}, "completed"),
    ("when", {"size": 12}, "completed"),
    ("when", {"size": 1}, "completed"),
    ("join_any", {"card": True}, "completed"),
    ("join_any", {"card": False}, "completed"),
    ("stop", {}, "out_of_stock"),
    ("failure", {}, "failed"),
    ("two_failures", {}, "failed"),
    ("retried", {}, "completed"),
    ("used_up", {}, "failed"),
    ("refused", {}, "failed"),
    ("listed", {}, "failed"),
    ("short_waits", {}, "completed"),
    ("at_once", {}, "completed"),
    ("patient", {}, "completed"),
    ("waits_to_retry", {}, "timed_out"),
    ("step_timeout", {}, "failed"),
    ("flow_timeout", {}, "timed_out"),
    ("finishes", {}, "completed"),
    ("skipped_end", {}, "completed"),
    ("skipped_conflict", {}, "failed"),
    ("in_turn", {}, "completed"),
    ("decision", {"order_id": "o-1"}, "completed"),
    ("by_rule", {"size": 3}, "completed"),
    ("reducers", {}, "completed"),
    ("conflict", {}, "failed"),
    ("bad_reducer", {}, "failed"),
    ("missing", {}, "failed"),
    ("not_json", {}, "failed"),
    ("exits", {}, "failed"),
    ("order_of_keys", {"trip": {"home": 1, "beach": 2, "alps": 3}}, "completed"),
]


@pytest.mark.parametrize(("name", "inputs", "status"), FLOWS, ids=[f"{name}-{n}" for n, (name, *_) in enumerate(FLOWS)])
async def test_the_same_on_temporal_as_by_run(
    side: Side, token: str, name: str, inputs: dict[str, Any], status: str
) -> None:
    flow = load_flow(f"{PACKAGE}:{name}")
    model = ScriptedModel(["no such choice", "expedite"])
    local = await run(flow, {**inputs, "token": token}, key="item-1", model=model)
    seen = sample_flows.seen.pop(token, [])

    side.backends.model = ScriptedModel(["no such choice", "expedite"])
    async with side.worker():
        durable, started = await side.run(name, {**inputs, "token": token})
        history = await side.handle(started).fetch_history()

    assert local.status == status
    assert _plain(durable) == _plain(local)
    if status != "timed_out":  # what was abandoned may have come to nothing, or not have heard of it yet
        assert sorted(sample_flows.seen[token], key=str) == sorted(seen, key=str)
    await _replayer().replay_workflow(history)


@pytest.mark.parametrize(("name", "cap"), [("capped", 2), ("serial", 1), ("wide", 6)])
async def test_max_workers_is_a_cap(
    side: Side, token: str, eventually: Callable[..., Any], name: str, cap: int
) -> None:
    async with side.worker():
        started = await side.start(FLOW_WORKFLOW, side.call(name, {"token": token}))
        await eventually(lambda: len(sample_flows.seen[token]) == cap)
        progress = await side.handle(started).query("progress")
        assert (len(progress["running"]), progress["finished"]) == (cap, ["first"])
        sample_flows.gates[token].set()
        assert (await side.result(started)).status == "completed"
    assert max(sample_flows.seen[token]) == cap
    assert len(sample_flows.seen[token]) == 6


@pytest.mark.parametrize(("name", "status"), [("stops_early", "out_of_stock"), ("fails_early", "failed")])
async def test_when_it_ends_early_what_runs_finishes_and_nothing_new_starts(
    side: Side, token: str, eventually: Callable[..., Any], name: str, status: str
) -> None:
    async with side.worker():
        started = await side.start(FLOW_WORKFLOW, side.call(name, {"token": token}))

        async def first_has_ended() -> bool:
            progress = await side.handle(started).query("progress")
            return "first" in [*progress["finished"], *progress["failed"]]

        await eventually(first_has_ended)
        sample_flows.gates[token].set()
        result = await side.result(started)
    assert result.status == status
    assert result.steps["beside"] == "completed"
    assert "after_beside" not in result.steps
    assert not {"after_first", "after_beside"} & set(sample_flows.seen[token])


async def test_an_error_that_no_protocol_carries_is_told_and_not_retried(side: Side, token: str) -> None:
    async with side.worker():
        result, _ = await side.run("refused", {"token": token, "order_id": "\udfff'\x00"})
    assert result.status == "failed"
    assert result.error == "step 'check' failed: InvalidInput: no order has the id \\udfff'\x00"
    assert sample_flows.seen[token] == ["refused"]


@pytest.mark.parametrize("name", ["branches", "retried", "decision"])
async def test_a_worker_that_remembers_no_workflow_comes_to_the_same_end(side: Side, token: str, name: str) -> None:
    side.backends.model = ScriptedModel(["expedite"])
    async with side.worker(max_cached_workflows=0):
        result, _ = await side.run(name, {"token": token, "order_id": "o-1"})
    assert result.status == "completed"


async def test_the_shape_travels_as_data(side: Side, token: str) -> None:
    """The code has since got a step in front and another order."""
    old = Chain("changed").add_step("two", sample_flows.mark("two")).add_step("one", sample_flows.mark("one"))
    shape = Settings().settle(old.check(), durable=True).to_json()
    async with side.worker():
        result, _ = await side.run("changed", {"token": token}, shape=shape)
    assert result.steps == {"two": "completed", "one": "completed"}
    assert sample_flows.seen[token] == ["two", "one"]


async def test_a_run_in_flight_ends_on_its_shape_when_the_code_changes(
    side: Side, token: str, eventually: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with side.worker(max_cached_workflows=0):
        started = await side.start(FLOW_WORKFLOW, side.call("held", {"token": token}))
        await eventually(lambda: sample_flows.seen[token] == ["wait"])
        changed = Chain("held", timeout=1)
        for name in ("before", "wait", "between", "end"):
            changed.add_step(name, sample_flows.mark(f"new-{name}"))
        monkeypatch.setattr(sample_flows, "held", changed)
        sample_flows.gates[token].set()
        result = await side.result(started)
    assert result.steps == {"wait": "completed", "end": "completed"}
    assert sample_flows.seen[token] == ["wait", "new-end"]


async def test_a_step_that_the_code_has_no_more_fails_the_run_with_what_to_do(side: Side, token: str) -> None:
    old = Chain("changed").add_step("one", sample_flows.mark("one")).add_step("gone", sample_flows.mark("gone"))
    shape = Settings().settle(old.check(), durable=True).to_json()
    async with side.worker():
        result, _ = await side.run("changed", {"token": token}, shape=shape)
    assert result.status == "failed"
    assert result.error == (
        "step 'gone' failed: FlowNotFound: flow 'tests.temporal.sample_flows:changed' has no step 'gone' in this "
        "worker's code, but the run began with one; deploy the code that has it and start the run again"
    )


async def test_cancelling_reaches_the_running_step(side: Side, token: str, eventually: Callable[..., Any]) -> None:
    async with side.worker():
        started = await side.start(FLOW_WORKFLOW, side.call("stuck", {"token": token}))
        await eventually(lambda: sample_flows.seen[token] == ["began"])
        await cancel(side.client, side.target, started)
        result = await side.result(started)
        assert (result.status, result.error) == ("cancelled", "the workflow was cancelled")
        await eventually(lambda: "cancelled" in sample_flows.seen[token])


async def test_a_run_outlives_the_server(token: str, eventually: Callable[..., Any]) -> None:
    with TemporalServer() as server:
        target = Target(address=server.address, task_queue=token)
        side = Side(client=await connect(target), target=target)
        async with side.worker():
            started = await side.start(FLOW_WORKFLOW, side.call("held", {"token": token}))
            await eventually(lambda: sample_flows.seen[token] == ["wait"])
            await asyncio.to_thread(server.kill)
            sample_flows.gates[token].set()
            await asyncio.to_thread(server.restart)
            assert (await side.result(started)).status == "completed"
    assert sample_flows.seen[token][-1] == "end"
    assert sample_flows.seen[token].count("end") == 1


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("large_result", "step 'one' failed: TooLarge: 2.5 MB of data in one piece"),
        ("large_sum", "step 'end' failed: TooLarge: 2.4 MB of data in one piece"),
        ("large_end", "the flow's result cannot be returned: TooLarge: 2.4 MB of data in one piece"),
    ],
)
async def test_what_is_too_large_fails_clearly_and_at_once(side: Side, token: str, name: str, error: str) -> None:
    async with side.worker():
        result, started = await side.run(name, {"token": token})
    assert result.status == "failed"
    assert result.error == (
        f"{error}, and Temporal carries {PAYLOAD_LIMIT / 1e6:g} MB; keep what is large in a file or a table, and pass "
        "its name"
    )
    # the workflow never tried to send it
    for event in (await side.handle(started).fetch_history()).events:
        cause = event.workflow_task_failed_event_attributes.cause
        assert cause != WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_PAYLOADS_TOO_LARGE
    assert sample_flows.seen[token].count("large") <= 3


too_large_to_return = Graph("too-large-to-return").add_node(
    "pay", sample_flows.mark("pay"), compensate=sample_flows.mark("pay.undo")
)
for branch in ("a", "b", "c"):
    too_large_to_return.add_node(branch, sample_flows.large(branch, 800_000)).add_edge("pay", branch)


async def test_a_flow_that_cannot_hand_over_its_result_is_undone(side: Side, token: str) -> None:
    shape = Settings().settle(too_large_to_return.check(), durable=True).to_json()
    async with side.worker():
        path = f"{__name__}:too_large_to_return"
        result, run = await side.run("branches", {"token": token}, path=path, shape=shape)
        history = await side.handle(run).fetch_history()
    assert (result.status, result.data, result.undone) == ("failed", {}, {"pay": "undone"})
    assert str(result.error).startswith("the flow's result cannot be returned: TooLarge: 2.4 MB of data in one piece")
    assert sorted(sample_flows.seen[token]) == ["large", "large", "large", "pay", "pay.undo"]
    await _replayer().replay_workflow(history)


async def test_more_in_flight_than_the_server_takes_in_one_go_ends_with_its_reason(side: Side, token: str) -> None:
    async with side.worker():
        result, _ = await side.run("branches_at_once", {"token": token, "text": "a" * 1_900_000})
    assert result.status == "failed"
    assert str(result.error).startswith("the Temporal server ended the workflow: ")


@pytest.mark.parametrize("file", HISTORIES, ids=[file.stem for file in HISTORIES])
async def test_runs_that_began_on_an_earlier_version_can_go_on(file: Path) -> None:
    replayed = await _replayer().replay_workflow(_stored(file))
    assert replayed.replay_failure is None


async def test_another_order_of_steps_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the checks: a workflow that starts steps in another order cannot replay what was recorded."""
    start = Progress.start
    monkeypatch.setattr(Progress, "start", lambda self: start(self)[::-1])
    branches = next(file for file in HISTORIES if file.stem == "branches")
    with pytest.raises(NondeterminismError, match=r"left.* does not match activity id .*right"):
        await _replayer().replay_workflow(_stored(branches))


def _stored(file: Path) -> WorkflowHistory:
    return WorkflowHistory.from_json(file.stem, file.read_text())


def _replayer() -> Replayer:
    return Replayer(
        workflows=[FlowWorkflow, BatchWorkflow], workflow_runner=workflow_runner(), data_converter=DATA_CONVERTER
    )


def _plain(result: FlowResult) -> dict[str, Any]:
    """A result without what differs from run to run: how long the model took."""
    data = result.to_json()
    for record in data["decisions"].values():
        del record["latency_ms"]
    return data
