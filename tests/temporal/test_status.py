"""The status of flows on Temporal, in the store: a real server, workers in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from beluga_airflow.errors import StateUnavailable
from beluga_airflow.execute import status
from beluga_airflow.execute.status import RunStatus
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.temporal.batch import Batch, Item
from beluga_airflow.temporal.client import cancel
from beluga_airflow.temporal.history import told_of
from beluga_airflow.temporal.messages import BATCH_WORKFLOW, FLOW_WORKFLOW, BatchCall
from tests.statuses import terminal, watched
from tests.temporal import sample_flows
from tests.temporal.conftest import FLOWS, OwnBackends, Side


async def entry(side: Side, flow: str) -> RunStatus:
    """What is told of the one run of a flow."""
    found = RunStatus.from_json(await side.backends.store.get(f"beluga/flows/{flow}/item-1"))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "ended"),
    [
        ("branches", "completed"),
        ("skipped_end", "completed"),
        ("stop", "out_of_stock"),
        ("used_up", "failed"),
        ("flow_timeout", "timed_out"),
        ("large_end", "failed"),
    ],
)
async def test_the_store_has_the_word_of_the_result(side: Side, token: str, name: str, ended: str) -> None:
    async with watched(side.backends.store) as told, side.worker(max_cached_workflows=0):
        result, run = await side.run(name, {"token": token})
    key, end = told[-1]
    assert result.status == end.status == ended
    assert (end.error or "") == (result.error or "")[: status.LONGEST]
    assert end.steps == result.steps
    assert (end.runtime, end.attempt) == ("temporal", 1)
    assert end.owner == {"namespace": "default", "workflow_id": run.workflow_id, "run_id": run.run_id}
    assert terminal(told) == {(key, f"{run.workflow_id}/{run.run_id}", 0, ended): 1}


async def test_its_steps_are_told_while_it_runs(side: Side, token: str, eventually: Callable[..., Any]) -> None:
    async with side.worker():
        run = await side.start(FLOW_WORKFLOW, side.call("held", {"token": token}))
        await eventually(lambda: sample_flows.seen[token] == ["wait"])
        await asyncio.sleep(0.1)
        now = await entry(side, "held")
        assert (now.status, now.steps, now.total, now.ended) == ("running", {"wait": "running"}, 2, None)
        described = await side.handle(run).describe()
        assert now.started == status.moment(described.start_time)
        sample_flows.gates[token].set()
        await side.result(run)
    assert (await entry(side, "held")).steps == {"wait": "completed", "end": "completed"}


async def test_a_cancelled_flow_says_so(side: Side, token: str, eventually: Callable[..., Any]) -> None:
    async with watched(side.backends.store) as told, side.worker():
        run = await side.start(FLOW_WORKFLOW, side.call("stuck", {"token": token}))
        await eventually(lambda: sample_flows.seen[token] == ["began"])
        await cancel(side.client, side.target, run)
        result = await side.result(run)
    assert result.status == told[-1][1].status == "cancelled"
    assert [ended for *_, ended in terminal(told)] == ["cancelled"]


class Away(MemoryStore):
    """A store that refuses, or does not answer."""

    def __init__(self, *, hangs: bool) -> None:
        super().__init__()
        self.hangs = hangs

    async def get_versioned(self, key: str) -> Any:  # noqa: ARG002  # the contract's
        if self.hangs:
            await asyncio.Event().wait()
        raise StateUnavailable("the store is away")


@pytest.mark.parametrize("hangs", [True, False])
async def test_a_store_that_is_away_neither_fails_a_flow_nor_holds_it_up(
    side: Side, token: str, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    monkeypatch.setattr(status, "END_TRIES", (0.1, 0.2))
    side.backends = OwnBackends(store=Away(hangs=hangs))
    async with side.worker():
        began = time.monotonic()
        result, _ = await side.run("branches", {"token": token})
    assert result.status == "completed"
    assert time.monotonic() - began < status.ENDING + 4


async def test_who_reads_the_history_finds_the_status(side: Side, token: str) -> None:
    async with side.worker():
        _, run = await side.run("branches", {"token": token}, generation=3)
    of = await told_of(side.client, side.target, run)
    assert of is not None
    end = await entry(side, "branches")
    assert (of.key, of.run, of.generation) == ("beluga/flows/branches/item-1", end.run, 3)
    assert (of.started, of.total, of.owner) == (end.started, end.total, end.owner)


async def test_each_item_of_a_batch_is_a_flow_run_and_short_ones_are_told_once(side: Side, token: str) -> None:
    batch = Batch(side.backends.store, token)

    async def items() -> Any:
        for index, size in enumerate((7, 3, 60, 200)):
            data = {"token": token, "size": size}
            yield Item(index=index, key=str(size), scope=f"by-size/{size}", data=data)

    total = await batch.put(items(), started=0.0)
    call = BatchCall(path=f"{FLOWS}:by_size", batch=token, total=total, item_timeout=60, max_in_flight=2, page=3)
    async with watched(side.backends.store) as told, side.worker():
        await side.returned(await side.start(BATCH_WORKFLOW, call))
    ends = {(key, status): times for (key, _, _, status), times in terminal(told).items()}
    assert ends == {
        ("beluga/flows/by-size/7", "completed"): 1,
        ("beluga/flows/by-size/3", "completed"): 1,
        ("beluga/flows/by-size/60", "large"): 1,
        ("beluga/flows/by-size/200", "failed"): 1,
    }
    assert len(told) == total
    owner = dict(told[-1][1].owner)
    assert (owner["batch"], told[-1][1].runtime) == (token, "batch")
