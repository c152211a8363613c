from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any
from uuid import uuid4

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.worker import Replayer

from beluga_airflow import FlowResult
from beluga_airflow.errors import StateUnavailable, TemporalError
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.temporal import batch_workflow
from beluga_airflow.temporal.batch import Batch, Item
from beluga_airflow.temporal.client import Run, cancel
from beluga_airflow.temporal.messages import BATCH_WORKFLOW, DATA_CONVERTER, BatchCall
from beluga_airflow.temporal.worker import workflow_runner
from tests.temporal import sample_flows
from tests.temporal.conftest import FLOWS, Side


async def staged(side: Side, flow: str, inputs: Iterable[dict[str, Any]], **changes: Any) -> tuple[Batch, BatchCall]:
    """A batch in the side's store, and the input of its workflow."""
    batch = Batch(side.backends.store, uuid4().hex)

    async def items() -> AsyncIterator[Item]:
        for index, data in enumerate(inputs):
            yield Item(index=index, key=f"key-{index}", scope=f"{batch.name}/{index}", data=data)

    total = await batch.put(items(), started=0.0)
    given: dict[str, Any] = {
        "path": f"{FLOWS}:{flow}",
        "batch": batch.name,
        "total": total,
        "item_timeout": 60.0,
        "max_in_flight": 10,
    }
    return batch, BatchCall(**given | changes)


async def lines(batch: Batch, returned: dict[str, Any]) -> list[dict[str, Any]]:
    return [line async for line in batch.results(returned["total"], returned["lost"])]


async def test_every_item_runs_once_over_several_pages(side: Side, token: str) -> None:
    sizes = [7, 3, 60, 1, 200, 8, 9]
    batch, call = await staged(side, "by_size", [{"token": token, "size": size} for size in sizes], page=3)
    async with side.worker():
        run = await side.start(BATCH_WORKFLOW, call)
        returned = await side.returned(run)
        progress = await side.client.get_workflow_handle(run.workflow_id).query("progress")

    statuses = {"completed": 5, "large": 1, "failed": 1}
    assert returned == {"total": 7, "statuses": statuses, "lost": {}}
    assert progress == {"total": 7, "ended": 7, "in_flight": 0, "statuses": statuses}
    assert sorted(sample_flows.seen[token]) == sorted(sizes)
    assert [(line["index"], line["key"], line["status"]) for line in await lines(batch, returned)] == [
        (0, "key-0", "completed"),
        (1, "key-1", "completed"),
        (2, "key-2", "large"),
        (3, "key-3", "completed"),
        (4, "key-4", "failed"),
        (5, "key-5", "completed"),
        (6, "key-6", "completed"),
    ]
    pages = [await _history(side, run)]
    while next_run := pages[-1].events[-1].workflow_execution_continued_as_new_event_attributes.new_execution_run_id:
        pages.append(await _history(side, Run(workflow_id=run.workflow_id, run_id=next_run)))
    assert len(pages) == 3
    for page in pages:
        await Replayer(
            workflows=[batch_workflow.BatchWorkflow], workflow_runner=workflow_runner(), data_converter=DATA_CONVERTER
        ).replay_workflow(page)


async def test_bad_items_are_failed_lines_and_stop_nobody(side: Side, token: str) -> None:
    inputs = [{"token": token, "size": size} for size in (1, 200, "many", 2)]
    batch, call = await staged(side, "by_size", inputs, max_in_flight=1, item_timeout=1e14)
    async with side.worker():
        returned = await side.returned(await side.start(BATCH_WORKFLOW, call))
    assert returned["statuses"] == {"completed": 2, "failed": 2}
    assert [line["error"] for line in await lines(batch, returned)] == [
        None,
        "step 'judge' failed: RuntimeError: too large for the parcel",
        "step 'judge' failed: InvalidInput: size is a str",
        None,
    ]


async def test_a_batch_of_nothing_ends_at_once(side: Side) -> None:
    batch, call = await staged(side, "by_size", [])
    async with side.worker():
        returned = await side.returned(await side.start(BATCH_WORKFLOW, call))
    assert returned == {"total": 0, "statuses": {}, "lost": {}}
    assert await lines(batch, returned) == []


async def test_a_lost_item_is_one_failed_line(side: Side, token: str) -> None:
    batch, call = await staged(side, "by_size", [{"token": token, "size": size} for size in (1, 2, 3)])
    await side.backends.store.delete(f"beluga/batches/{batch.name}/items/{1:09d}")
    async with side.worker():
        returned = await side.returned(await side.start(BATCH_WORKFLOW, call))
    assert returned["statuses"] == {"completed": 2, "failed": 1}
    before, lost, after = await lines(batch, returned)
    assert (before["status"], after["status"]) == ("completed", "completed")
    assert (lost["index"], lost["key"], lost["status"]) == (1, "item 1", "failed")
    assert lost["error"].startswith(f"StateError: item 1 of batch {batch.name!r} is not in the state store memory://")


async def test_an_item_whose_flow_changed_while_it_was_undone_is_one_failed_line(side: Side, token: str) -> None:
    batch, call = await staged(side, "by_size", [{"token": token, "size": size} for size in (1, 2)])
    ended = FlowResult(status="failed", error="no truck", steps={"pay": "completed", "ship": "failed"})
    await batch.checkpoint(1, "of-other-code").save("undo", ended.to_json())
    async with side.worker():
        run = await side.start(BATCH_WORKFLOW, call)
        returned = await side.returned(run)
    assert returned["statuses"] == {"completed": 1, "failed": 1}
    error = (await lines(batch, returned))[1]["error"]
    assert error.startswith("InvalidFlow: the flow of this item was changed (from of-other-code to ")
    assert "and not undone: pay; undo by hand what must be" in error
    assert sample_flows.seen[token] == [1]
    # to prepare, and each item: no other attempt would find anything else
    assert await _attempts(side, run) == [1, 1, 1]


async def test_why_items_were_lost_is_kept_of_so_many(side: Side, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a batch of very many lost items could not be returned."""
    monkeypatch.setattr(batch_workflow, "LOST", 2)
    batch, call = await staged(side, "by_size", [{"token": token, "size": 1}] * 6, page=2, max_in_flight=1)
    for index in range(1, 6):
        await side.backends.store.delete(f"beluga/batches/{batch.name}/items/{index:09d}")
    async with side.worker():
        returned = await side.returned(await side.start(BATCH_WORKFLOW, call))
    assert returned["statuses"] == {"completed": 1, "failed": 5}
    assert list(returned["lost"]) == ["1", "2"]
    assert [line["error"] for line in await lines(batch, returned)][3:] == [
        "no worker could end it; the history of the workflow says why"
    ] * 3


class _ShakyStore(MemoryStore):
    """Cannot be reached for the first few answers about items."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = 0

    async def get(self, key: str, default: Any = None) -> Any:
        if "/items/" in key and self.failures:
            self.failures -= 1
            raise StateUnavailable("the state store is on holiday")
        return await super().get(key, default)


async def test_a_store_that_is_away_for_a_moment_is_waited_for(side: Side, token: str) -> None:
    store = side.backends.store = _ShakyStore()
    _, call = await staged(side, "by_size", [{"token": token, "size": 1}] * 3, max_in_flight=1)
    store.failures = 2
    async with side.worker():
        returned = await side.returned(await side.start(BATCH_WORKFLOW, call))
    assert returned == {"total": 3, "statuses": {"completed": 3}, "lost": {}}


async def test_max_in_flight_is_a_cap(side: Side, token: str, eventually: Callable[..., Any]) -> None:
    _, call = await staged(side, "gathers", [{"token": token}] * 7, max_in_flight=3, page=5)
    async with side.worker():
        run = await side.start(BATCH_WORKFLOW, call)
        await eventually(lambda: len(sample_flows.seen[token]) == 3)
        progress = await side.handle(run).query("progress")
        assert progress == {"total": 7, "ended": 0, "in_flight": 3, "statuses": {}}
        sample_flows.gates[token].set()
        returned = await side.returned(run)
    assert returned["statuses"] == {"completed": 7}
    assert Counter(sample_flows.seen[token]).total() == 7
    assert max(sample_flows.seen[token]) == 3


async def test_progress_is_told_while_it_runs(side: Side, token: str, eventually: Callable[..., Any]) -> None:
    inputs: list[dict[str, Any]] = [{"token": f"{token}-open"}, {"token": f"{token}-open"}, {"token": token}]
    _, call = await staged(side, "gathers", inputs, page=2)
    sample_flows.gates[f"{token}-open"].set()
    async with side.worker():
        run = await side.start(BATCH_WORKFLOW, call)
        await eventually(lambda: sample_flows.seen[token])
        # of the latest run, which is how someone asks who only knows the id
        progress = await side.client.get_workflow_handle(run.workflow_id).query("progress")
        assert progress == {"total": 3, "ended": 2, "in_flight": 1, "statuses": {"completed": 2}}
        sample_flows.gates[token].set()
        await side.returned(run)


@pytest.mark.parametrize("page", [1_000, 1])
async def test_cancelling_reaches_the_running_items_and_the_next_run_goes_on(
    side: Side, token: str, eventually: Callable[..., Any], page: int
) -> None:
    """Also when the batch has since gone on to its second page, under another run id."""
    inputs = [{"token": f"{token}-open"}, {"token": token}]
    batch, call = await staged(side, "two_steps", inputs, page=page)
    sample_flows.gates[f"{token}-open"].set()
    async with side.worker():
        run = await side.start(BATCH_WORKFLOW, call, batch.name)
        await eventually(lambda: sample_flows.seen[token] == ["first", "wait"])
        attached = await side.start(BATCH_WORKFLOW, call, batch.name)
        assert attached == run
        await cancel(side.client, side.target, run)
        returned = await side.returned(run)
        assert (returned["status"], returned["error"]) == ("cancelled", "the workflow was cancelled")
        await eventually(lambda: sample_flows.seen[token] == ["first", "wait", "cancelled"])

        sample_flows.gates[token].set()
        again = await side.start(BATCH_WORKFLOW, call, batch.name)
        returned = await side.returned(again)
    assert returned["statuses"] == {"completed": 2}
    assert again.run_id != run.run_id
    # what had ended is not run again, nor the finished step of what had not
    assert sample_flows.seen[f"{token}-open"] == ["first", "wait"]
    assert sample_flows.seen[token] == ["first", "wait", "cancelled", "wait"]


async def test_a_worker_with_another_store_is_told_so(side: Side, token: str) -> None:
    _, call = await staged(side, "by_size", [{"token": token, "size": 1}])
    side.backends.store = MemoryStore()
    async with side.worker():
        run = await side.start(BATCH_WORKFLOW, call)
        with pytest.raises(TemporalError) as caught:
            await side.returned(run)
    assert str(caught.value) == (
        f"StateError: item 0 of batch {call.batch!r} is not in the state store memory://, which keeps it for 30 days; "
        "Airflow's tasks and the worker must use the same store: give both the same beluga_state connection "
        f"(workflow {run.workflow_id!r}, run {run.run_id})"
    )
    assert await _attempts(side, run) == [1]


async def test_a_flow_that_the_worker_cannot_import_fails_the_batch_at_once(side: Side, token: str) -> None:
    _, call = await staged(side, "by_size", [{"token": token, "size": 1}], path="shop_of_another.flows:orders")
    async with side.worker():
        run = await side.start(BATCH_WORKFLOW, call)
        with pytest.raises(TemporalError) as caught:
            await side.returned(run)
    assert str(caught.value).startswith("FlowNotFound: flow 'shop_of_another.flows:orders' cannot be imported")
    assert "No module named 'shop_of_another'" in str(caught.value)
    assert "Python path (a worker: --import)" in str(caught.value)
    assert await _attempts(side, run) == [1]


async def _history(side: Side, run: Run) -> Any:
    return await side.handle(run).fetch_history()


async def _attempts(side: Side, run: Run) -> list[int]:
    """How often each activity was started."""
    return [
        event.activity_task_started_event_attributes.attempt
        for event in (await _history(side, run)).events
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_STARTED
    ]
