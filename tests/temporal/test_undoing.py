"""Undoing on Temporal, whatever becomes of its workers: real server, real workflows, processes that are killed."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from temporalio.api.enums.v1 import EventType, PendingActivityState
from temporalio.worker import Replayer, Worker

from beluga_airflow import Chain
from beluga_airflow import run as run_here
from beluga_airflow.config import Settings
from beluga_airflow.state import StateStore, open_store
from beluga_airflow.temporal.activities import Activities
from beluga_airflow.temporal.batch import Batch, Item
from beluga_airflow.temporal.client import Run, cancel
from beluga_airflow.temporal.flow_workflow import FlowWorkflow
from beluga_airflow.temporal.messages import BATCH_WORKFLOW, DATA_CONVERTER, FLOW_WORKFLOW, BatchCall
from beluga_airflow.temporal.worker import workflow_runner
from beluga_airflow.testing import TemporalServer
from tests.temporal import sample_flows
from tests.temporal.conftest import FLOWS, Side
from tests.temporal.worker_process import WorkerProcess, environment_of

Eventually = Callable[..., Any]
BOTH = {"pay": "undone", "reserve": "undone"}
FORWARD = ("reserve", "pay", "fulfil")


@dataclass(frozen=True)
class Case:
    """One run of the flow `paid`, which waits at a place until its gate is opened."""

    folder: Path
    name: str
    gate: str = ""

    def inputs(self, **others: Any) -> dict[str, Any]:
        gates = {self.gate: str(self.file("gate"))} if self.gate else {}
        return {"log": str(self.file("log")), "gates": gates, "refuses": ["fulfil"], **others}

    def file(self, what: str) -> Path:
        return self.folder / f"{self.name}.{what}"

    def told(self) -> list[list[str]]:
        """What its steps told: place, step, key, and in which process."""
        lines = self.file("log").read_text().splitlines() if self.file("log").exists() else []
        return [line.split() for line in lines]

    def is_there(self) -> bool:
        """Whether the run waits at its gate."""
        return bool(self.told()) and " ".join(self.told()[-1][:2]) == self.gate

    def open(self) -> None:
        self.file("gate").touch()

    @property
    def done(self) -> list[str]:
        """What its steps did, in order."""
        return [step for place, step, *_ in self.told() if place == "did"]

    @property
    def keys(self) -> Counter[str]:
        """How often each key was used for something that was done."""
        return Counter(key for place, _, key, _ in self.told() if place == "did")


# how it ends

ENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "undone": ("paid", {"refuses": ["fulfil"]}),
    "undone after the last attempt": ("paid", {"fails": {"fulfil": 9}}),
    "undone late": ("paid", {"refuses": ["fulfil"], "fails": {"pay.undo": 2}}),
    "not undone": ("paid", {"refuses": ["fulfil"], "fails": {"pay.undo": 9}}),
    "refused": ("paid", {"refuses": ["fulfil", "pay.undo", "reserve.undo"]}),
    "out of time": ("timed", {}),
    "out of time inside": ("timed_inside", {}),
    "nothing to undo": ("paid", {"refuses": ["reserve"]}),
    "completed": ("paid", {}),
}


@pytest.mark.parametrize(("flow", "inputs"), ENDS.values(), ids=ENDS)
async def test_the_same_is_undone_on_temporal_as_by_run(
    side: Side, tmp_path: Path, flow: str, inputs: dict[str, Any]
) -> None:
    """By a worker that remembers no workflow: what it undoes, it undoes by replaying the run."""
    here, there = (Case(tmp_path, name, gate_of(flow)) for name in ("here", "there"))
    expected = await run_here(getattr(sample_flows, flow), here.inputs(**{"refuses": [], **inputs}), key="item-1")
    async with side.worker(max_cached_workflows=0):
        result, run = await side.run(flow, there.inputs(**{"refuses": [], **inputs}))
        history = await side.handle(run).fetch_history()
    done = here.done, there.done
    for case in (here, there):
        case.open()

    assert done[0] == done[1]
    assert replace(result, data={}) == replace(expected, data={})
    assert bool(result.undone) is any(step.endswith(".undo") for step in done[1])
    replayer = Replayer(workflows=[FlowWorkflow], workflow_runner=workflow_runner(), data_converter=DATA_CONVERTER)
    await replayer.replay_workflow(history)


def gate_of(flow: str) -> str:
    """Where a flow with a timeout uses up its time."""
    return {"timed": "begins fulfil", "timed_inside": "begins order.fulfil"}.get(flow, "")


async def test_what_the_code_cannot_undo_any_more_is_told(
    side: Side, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, "changed")
    call = side.call("paid", case.inputs())
    changed = Chain("paid", retry=sample_flows.QUICK)
    for name, step in sample_flows.paid.steps.items():
        changed.add_step(name, step.node, compensate=None if name == "pay" else step.compensate)
    monkeypatch.setattr(sample_flows, "paid", changed)

    async with side.worker():
        result = await side.result(await side.start(FLOW_WORKFLOW, call))

    assert result.undone["reserve"] == "undone"
    assert result.undone["pay"].startswith(
        f"InvalidFlow: step 'pay' of flow '{FLOWS}:paid' has no compensate= in this worker's code, but the run began"
    )
    assert result.undone["pay"] in str(result.error)
    assert [step for step in case.done if step.endswith(".undo")] == ["reserve.undo"]


# cancelling


async def test_cancelling_undoes_the_finished_steps(side: Side, tmp_path: Path, eventually: Eventually) -> None:
    case = Case(tmp_path, "cancelled", "begins fulfil")
    async with side.worker():
        run = await side.start(FLOW_WORKFLOW, side.call("paid", case.inputs()))
        await eventually(case.is_there)
        await cancel(side.client, side.target, run)
        result = await side.result(run)
        case.open()
        progress = await side.handle(run).query("progress")
    assert await status(side, run) == "CANCELED"
    assert (result.status, result.error) == ("cancelled", "the workflow was cancelled")
    assert progress["undone"] == {"pay": None, "reserve": None}
    assert case.done[:4] == ["reserve", "pay", "pay.undo", "reserve.undo"]


async def test_what_cannot_be_undone_of_a_cancelled_run_keeps_nobody_else_from_it(
    side: Side, tmp_path: Path, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(tmp_path, "cancelled", "begins fulfil")
    async with side.worker():
        run = await side.start(FLOW_WORKFLOW, side.call("paid", case.inputs(refuses=["pay.undo"])))
        await eventually(case.is_there)
        await cancel(side.client, side.target, run)
        await side.result(run)
        case.open()
        progress = await side.handle(run).query("progress")
    assert await status(side, run) == "CANCELED"
    assert progress["undone"] == {"pay": "InvalidInput: pay.undo cannot be", "reserve": None}
    assert "step 'pay' could not be undone: InvalidInput: pay.undo cannot be" in caplog.text


async def test_cancelling_a_run_that_is_being_undone_does_not_stop_that(
    side: Side, tmp_path: Path, eventually: Eventually
) -> None:
    case = Case(tmp_path, "cancelled", "begins pay.undo")
    async with side.worker():
        run = await side.start(FLOW_WORKFLOW, side.call("paid", case.inputs()))
        await eventually(case.is_there)
        await cancel(side.client, side.target, run)
        case.open()
        result = await side.result(run)
    assert case.done == ["reserve", "pay", "fulfil", "pay.undo", "reserve.undo"]
    # it had failed before
    assert (result.status, result.undone) == ("failed", BOTH)


@pytest.mark.parametrize("flow", ["untimed", "timed", "timed_inside"])
@pytest.mark.parametrize("first", ["the step", "the end"])
async def test_a_step_that_ended_while_nobody_ran_the_workflow_is_undone(
    side: Side, tmp_path: Path, eventually: Eventually, flow: str, first: str
) -> None:
    """The next worker hears at once that the payment was made and that the flow is over."""
    pay = "order.pay" if flow == "timed_inside" else "pay"
    case = Case(tmp_path, flow, f"begins {pay}")
    async with steps_of(side):
        async with workflows_of(side):
            run = await side.start(FLOW_WORKFLOW, side.call(flow, case.inputs()))
            await eventually(case.is_there)

        async def end_the_step() -> None:
            case.open()
            await eventually(lambda: happened(side, run, EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED))

        async def end_the_flow() -> None:
            if flow == "untimed":
                await cancel(side.client, side.target, run)
            else:
                await eventually(lambda: happened(side, run, EventType.EVENT_TYPE_TIMER_FIRED))

        for end in (end_the_step, end_the_flow) if first == "the step" else (end_the_flow, end_the_step):
            await end()
        async with workflows_of(side):
            result = await side.result(run)
    assert result.status == ("cancelled" if flow == "untimed" else "timed_out")
    assert case.done == [pay, f"{pay}.undo"]


# batches: an item's flow runs in one activity


async def staged(store: StateStore, name: str, *cases: Case, **inputs: Any) -> tuple[Batch, BatchCall]:
    """A batch of the flow `paid` in a store, and the input of its workflow."""
    batch = Batch(store, name)

    async def items() -> AsyncIterator[Item]:
        for index, case in enumerate(cases):
            yield Item(index=index, key=case.name, scope=f"paid/{case.name}", data=case.inputs(**inputs))

    total = await batch.put(items(), started=0.0)
    call = BatchCall(path=f"{FLOWS}:paid", batch=name, total=total, item_timeout=60.0, max_in_flight=10)
    return batch, call


async def test_items_that_fail_are_undone(side: Side, tmp_path: Path) -> None:
    cases = [Case(tmp_path, "refused"), Case(tmp_path, "refunded-late")]
    batch, call = await staged(side.backends.store, uuid4().hex, *cases, fails={"pay.undo": 2})
    async with side.worker():
        returned = await side.returned(await side.start(BATCH_WORKFLOW, call))
    assert returned["statuses"] == {"failed": 2}
    assert [line["undone"] async for line in batch.results(2, {})] == [BOTH, BOTH]
    for case in cases:
        assert case.keys == Counter(keys_of(case, *FORWARD, *["pay.undo"] * 3, "reserve.undo"))


async def test_cancelling_a_batch_undoes_what_its_running_items_have_finished(
    side: Side, tmp_path: Path, eventually: Eventually
) -> None:
    case = Case(tmp_path, "cancelled", "begins fulfil")
    batch, call = await staged(side.backends.store, uuid4().hex, case)
    async with side.worker():
        run = await side.start(BATCH_WORKFLOW, call, batch.name)
        await eventually(case.is_there)
        await cancel(side.client, side.target, run)
        await side.returned(run)
        assert await status(side, run) == "CANCELED"
        await eventually(lambda: "reserve.undo" in case.done, 20)
        case.open()
        # what was undone is not gone on with, or it would be sent unpaid
        returned = await side.returned(await side.start(BATCH_WORKFLOW, call, batch.name))
    assert returned["statuses"] == {"cancelled": 1}
    (line,) = [line async for line in batch.results(1, {})]
    assert (line["error"], line["undone"]) == ("the run was cancelled", BOTH)
    undone = [step for step in case.done if step != "fulfil"]
    assert undone == ["reserve", "pay", "pay.undo", "reserve.undo"]


async def test_a_worker_that_stops_undoes_nothing_and_another_goes_on(
    side: Side, tmp_path: Path, eventually: Eventually
) -> None:
    case = Case(tmp_path, "moved", "begins fulfil")
    batch, call = await staged(side.backends.store, uuid4().hex, case, refuses=[])
    async with side.worker(graceful=timedelta(0)):
        run = await side.start(BATCH_WORKFLOW, call)
        await eventually(case.is_there)
    assert case.done == ["reserve", "pay"]
    case.open()
    async with side.worker():
        returned = await side.returned(run)
    assert returned["statuses"] == {"completed": 1}
    assert [line["undone"] async for line in batch.results(1, {})] == [{}]
    # the thread that was left at the gate may tell of itself too
    assert [step for step in case.done if step != "fulfil"] == ["reserve", "pay"]


async def test_a_worker_that_stops_while_it_undoes_leaves_the_rest_to_another(
    side: Side, tmp_path: Path, eventually: Eventually
) -> None:
    case = Case(tmp_path, "moved", "begins pay.undo")
    batch, call = await staged(side.backends.store, uuid4().hex, case)
    async with side.worker(graceful=timedelta(0)):
        run = await side.start(BATCH_WORKFLOW, call)
        await eventually(case.is_there)
    assert case.done == [*FORWARD]
    case.open()
    async with side.worker():
        returned = await side.returned(run)
    assert returned["statuses"] == {"failed": 1}
    assert [line["undone"] async for line in batch.results(1, {})] == [BOTH]
    assert case.done[:3] == [*FORWARD]
    assert case.keys.keys() == {*keys_of(case, *FORWARD, "pay.undo", "reserve.undo")}


# a worker that is killed

PLACES = {"before": "begins pay.undo", "after": "did pay.undo", "between": "begins reserve.undo"}
"""Where a run of the flow `paid` waits for the end of its worker."""


async def test_when_a_worker_is_killed_while_it_undoes_another_goes_on_with_that(
    side: Side, temporal_server: TemporalServer, tmp_path: Path, eventually: Eventually
) -> None:
    """In all places at once: that a worker is lost is noticed after ten seconds."""
    flows = {name: Case(tmp_path, name, gate) for name, gate in PLACES.items()}
    items = {name: Case(tmp_path, f"item-{name}", gate) for name, gate in PLACES.items()}
    fails, blocker = Case(tmp_path, "fails", "begins fulfil"), Case(tmp_path, "blocker", "begins reserve")
    cases = [*flows.values(), *items.values(), fails]
    connection = temporal_server.connection
    connection["extra"] = {**connection["extra"], "task_queue": side.target.task_queue}
    environment = environment_of(tmp_path, {"temporal_default": connection})
    store = open_store(f"sqlite:///{tmp_path / 'state.db'}")
    batch, call = await staged(store, uuid4().hex, *items.values())

    async def start(case: Case) -> Run:
        return await side.start(FLOW_WORKFLOW, side.call("paid", case.inputs(), scope=f"paid/{case.name}"))

    with WorkerProcess(tmp_path, environment, "--concurrency", str(len(cases))) as first:
        runs = {case: await start(case) for case in (*flows.values(), fails)}
        items_run = await side.start(BATCH_WORKFLOW, call)
        for case in cases:
            await eventually(case.is_there)
        # the worker is full: another run gets the room of the step that now fails, and what undoes it must wait
        blocking = await start(blocker)
        await eventually(lambda: waits_for_room(side, blocking, "reserve"))
        fails.open()
        await eventually(blocker.is_there)
        await eventually(lambda: waits_for_room(side, runs[fails], "pay.undo"))
        first.process.kill()
        first.process.wait()
    for case in (*cases, blocker):
        case.open()
    with WorkerProcess(tmp_path, environment) as second:
        results = [await side.result(run) for run in (*runs.values(), blocking)]
        returned = await side.returned(items_run)
        lines = [line async for line in batch.results(len(items), {})]
        await store.close()
        assert second.stop() == 0

    assert returned["statuses"] == {"failed": len(items)}
    assert [result.undone for result in results] == [BOTH] * len(results)
    assert [line["undone"] for line in lines] == [BOTH] * len(lines)
    for case in cases:
        # what was done and could not be told is done again, under the same key; all else is done once
        twice = keys_of(case, "pay.undo") if case.gate == PLACES["after"] else []
        assert case.keys == Counter([*keys_of(case, *FORWARD, "pay.undo", "reserve.undo"), *twice])
        pids = {int(pid) for _, step, _, pid in case.told() if step == "reserve.undo"}
        assert second.process.pid in pids
    # the refund that waited was begun by the second worker alone
    assert {pid for _, step, _, pid in fails.told() if step == "pay.undo"} == {str(second.process.pid)}


async def waits_for_room(side: Side, run: Run, activity: str) -> bool:
    """Whether an activity was scheduled, and no worker has taken it yet."""
    pending = (await side.handle(run).describe()).raw_description.pending_activities
    scheduled = PendingActivityState.PENDING_ACTIVITY_STATE_SCHEDULED
    return [each.activity_id for each in pending if each.state == scheduled] == [activity]


# helpers


def keys_of(case: Case, *steps: str) -> list[str]:
    return [f"paid/{case.name}/{step}" for step in steps]


def steps_of(side: Side) -> Worker:
    """A worker that runs steps, and no workflows."""
    activities = Activities(side.backends, Settings).all()
    return Worker(side.client, task_queue=side.target.task_queue, activities=activities)


def workflows_of(side: Side) -> Worker:
    """A worker that runs workflows, and no steps."""
    return Worker(
        side.client, task_queue=side.target.task_queue, workflows=[FlowWorkflow], workflow_runner=workflow_runner()
    )


async def happened(side: Side, run: Run, kind: Any) -> int:
    """How many events of a kind there are."""
    return sum(event.event_type == kind for event in (await side.handle(run).fetch_history()).events)


async def status(side: Side, run: Run) -> str:
    description = await side.handle(run).describe()
    assert description.status is not None
    return description.status.name
