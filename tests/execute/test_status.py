"""The status of a run in the state store, and who settles it."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow import Chain, FlowResult, Graph, Stop, run
from beluga_airflow.config import Settings
from beluga_airflow.errors import InvalidFlow, StateUnavailable
from beluga_airflow.execute import Resources, status
from beluga_airflow.execute.settling import Ask, run_statuses, settled
from beluga_airflow.execute.status import RunOf, RunStatus, StatusWriter, moment, status_key
from beluga_airflow.graph import Identity
from beluga_airflow.local import run_with
from beluga_airflow.state import StateStore
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.state.sqlite import SqliteStore
from tests.running import ONCE, nothing
from tests.statuses import Told, terminal, watched

KEY = "beluga/flows/shop/o-1"


def of(**changes: Any) -> RunOf:
    return RunOf(**{"key": KEY, "run": "r", "runtime": "task", "owner": {"task_id": "t"}, **changes})


async def entry(store: StateStore, key: str = KEY) -> RunStatus:
    found = RunStatus.from_json(await store.get(key))
    assert found is not None
    return found


async def after(store: StateStore, ask: Ask) -> RunStatus:
    """What is told once somebody has seen to it."""
    now = await settled(store, KEY, ask)
    assert now is not None
    return now


def ends(told: Told) -> dict[tuple[str, int], int]:
    """How often each run and generation came to an end."""
    return {(run, generation): times for (_, run, generation, _), times in terminal(told).items()}


def gated(*, name: str = "shop") -> tuple[Chain, asyncio.Event, asyncio.Event]:
    """A chain whose second step waits."""
    began, gate = asyncio.Event(), asyncio.Event()

    async def wait(data: dict[str, Any]) -> None:
        began.set()
        await gate.wait()

    return Chain(name).add_step("first", nothing).add_step("wait", wait), began, gate


async def running(flow: Any, writer: StatusWriter, *, gives_up: bool = True) -> FlowResult:
    async def no_model(conn_id: str | None) -> Any:
        raise AssertionError

    return await run_with(
        flow,
        {},
        identity=Identity(scope="s"),
        resources=Resources(state=MemoryStore(), model=no_model),
        settings=Settings(),
        gives_up=lambda: gives_up,
        status=writer,
    )


async def test_a_run_is_told_from_its_beginning_to_its_end() -> None:
    store, (flow, began, gate) = MemoryStore(), gated()
    async with watched(store) as seen:
        task = asyncio.create_task(run(flow, {"secret": "s3cret"}, key="o-1", state=store))
        await began.wait()
        await asyncio.sleep(status.PACE * 1.5)
        now = await entry(store)
        assert (now.status, now.steps, now.ended) == ("running", {"first": "completed", "wait": "running"}, None)
        assert (now.runtime, now.total, now.attempt, now.owner) == ("run", 2, 1, {})
        gate.set()
        result = await task
    end = await entry(store)
    assert (end.status, end.steps, end.error) == (result.status, result.steps, None)
    assert end.ended == end.updated >= end.started
    assert [now.status for _, now in seen] == ["running", "running", "completed"]
    assert "s3cret" not in str(seen)


@pytest.mark.parametrize(
    ("step", "ended"),
    [
        (lambda data: None, "completed"),
        (lambda data: Stop("out_of_stock"), "out_of_stock"),
        (lambda data: Stop("running"), "running"),
        (lambda data: {}["x" * 2_000], "failed"),
        (lambda data: time.sleep(0.3), "timed_out"),
    ],
)
async def test_the_store_has_the_word_of_the_result(step: Any, ended: str) -> None:
    store = MemoryStore()
    async with watched(store) as seen:
        result = await run(Chain("shop", timeout=0.2, retry=ONCE).add_step("only", step), {}, key="o-1", state=store)
    end = await entry(store)
    assert result.status == end.status == ended
    assert end.ended is not None
    assert (end.error or "") == (result.error or "")[: status.LONGEST]
    assert [now.ended is not None for _, now in seen] == [False, True]


async def test_a_run_without_a_store_tells_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(StatusWriter, "through")
    assert (await run(Chain("shop").add_step("only", nothing), {})).ok


async def test_ends_of_nested_flows_are_no_steps() -> None:
    store = MemoryStore()
    flow = Graph("shop").add_node("ship", Chain("ship").add_step("pack", nothing)).add_node("bill", nothing)
    await run(flow, {}, key="o-1", state=store)
    end = await entry(store)
    assert (end.steps, end.total) == ({"ship.pack": "completed", "bill": "completed"}, 2)


async def test_steps_are_written_now_and_then_only() -> None:
    flow = Chain("shop")
    for number in range(100):
        flow.add_step(f"s{number}", lambda data: time.sleep(0.005))
    store = MemoryStore()
    async with watched(store) as seen:
        began = time.monotonic()
        await run(flow, {}, state=store)
        took = time.monotonic() - began
    assert len(seen) <= 3 + took / status.PACE


async def test_a_run_in_which_nothing_happens_gives_a_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "BEAT", 0.2)
    monkeypatch.setattr(status, "PACE", 0.05)
    store, (flow, began, gate) = MemoryStore(), gated()
    async with watched(store) as seen:
        task = asyncio.create_task(running(flow, StatusWriter(store, of(), pace=0.05)))
        await began.wait()
        await asyncio.sleep(0.7)
        gate.set()
        await task
    beats = [now for _, now in seen if now.steps == {"first": "completed", "wait": "running"}]
    assert 3 <= len(beats) <= 5


# a store that is away


class Away(MemoryStore):
    """A store that refuses, or does not answer."""

    def __init__(self, *, hangs: bool = False, calls: int = 10**9) -> None:
        super().__init__()
        self.hangs = hangs
        self.calls = calls

    async def compare_and_swap(self, *args: Any, **kwargs: Any) -> int | None:
        self.calls -= 1
        if self.calls < 0:
            return await super().compare_and_swap(*args, **kwargs)
        if self.hangs:
            await asyncio.Event().wait()
        raise StateUnavailable("the store is away")


@pytest.mark.parametrize("hangs", [True, False])
async def test_a_store_that_is_away_neither_fails_a_flow_nor_holds_it_up(
    hangs: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(status, "PATIENCE", 0.1)
    monkeypatch.setattr(status, "END_TRIES", (0.05, 0.1))
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        result = await running(Chain("shop").add_step("only", nothing), StatusWriter(Away(hangs=hangs), of()))
    assert result.ok
    assert time.monotonic() - began < 1.5
    why = "no answer within 0.1 s" if hangs else "the store is away"
    told = f"the status of flow run {KEY!r} is not written: {why}; the flow goes on"
    assert [record.message for record in caplog.records] == [told, told]


async def test_a_store_that_never_answers_holds_a_flow_up_for_a_moment_only() -> None:
    began = time.monotonic()
    flow = Chain("shop").add_step("only", lambda data: time.sleep(0.5))
    assert (await running(flow, StatusWriter(Away(hangs=True), of()))).ok
    assert time.monotonic() - began < 0.5 + status.ENDING + 0.5


async def test_a_task_that_tells_its_part_does_not_wait_longer_than_for_one_write() -> None:
    began = time.monotonic()
    for ends in (False, True):
        writer = StatusWriter(Away(hangs=True), of(), shared=True)
        writer.note({"only": "failed"})
        if ends:
            await writer.end(FlowResult(status="failed"))
        await writer.flush()
    assert time.monotonic() - began < status.PATIENCE + status.ENDING + 0.5


class Slow(MemoryStore):
    """A store that takes its time for everything."""

    async def get_versioned(self, key: str) -> Any:
        await asyncio.sleep(0.3)
        return await super().get_versioned(key)

    async def compare_and_swap(self, *args: Any, **kwargs: Any) -> int | None:
        await asyncio.sleep(0.3)
        return await super().compare_and_swap(*args, **kwargs)


async def test_a_flow_does_not_wait_for_a_slow_store_but_in_the_end() -> None:
    store, flow = Slow(), Chain("shop").add_step("only", lambda data: time.sleep(0.4))
    async with watched(store) as seen:
        began = time.monotonic()
        await running(flow, StatusWriter(store, of()))
        took = time.monotonic() - began
    assert [now.status for _, now in seen] == ["running", "completed"]
    assert took < 0.4 + 0.3 + 0.2


async def test_a_flow_that_is_cancelled_while_its_end_is_told_has_ended_as_it_did() -> None:
    store = Slow()
    task = asyncio.create_task(running(Chain("shop").add_step("only", nothing), StatusWriter(store, of())))
    await asyncio.sleep(0.4)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert (await entry(store)).status == "completed"


@pytest.mark.parametrize(("takes", "told"), [(0.0, ["completed"]), (0.4, ["running", "completed"])])
async def test_a_short_run_may_be_told_of_in_the_end_alone(takes: float, told: list[str]) -> None:
    store, flow = MemoryStore(), Chain("shop").add_step("only", lambda data: time.sleep(takes))
    async with watched(store) as seen:
        await running(flow, StatusWriter(store, of(), begins=0.2))
    assert [now.status for _, now in seen] == told
    assert seen[-1][1].steps == {"only": "completed"}


async def test_the_end_is_tried_again() -> None:
    store = Away(calls=3)  # the beginning, and the end twice
    assert (await running(Chain("shop").add_step("only", nothing), StatusWriter(store, of()))).ok
    end = await entry(store)
    assert (end.status, end.attempt) == ("completed", 1)


async def test_a_beginning_that_was_not_written_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "BEAT", 0.1)
    store, (flow, began, gate) = Away(calls=1), gated()
    task = asyncio.create_task(running(flow, StatusWriter(store, of(), pace=0.05)))
    await began.wait()
    await asyncio.sleep(0.3)
    assert (await entry(store)).status == "running"
    gate.set()
    await task


# retries, clears, and others with the same key


async def test_a_retry_takes_over_and_ends_it() -> None:
    store, (flow, began, gate) = MemoryStore(), gated()
    async with watched(store) as seen:
        lost = asyncio.create_task(running(flow, StatusWriter(store, of()), gives_up=False))
        await began.wait()
        lost.cancel()
        with suppress(asyncio.CancelledError):
            await lost
        assert (await entry(store)).ended is None
        gate.set()
        await running(flow, StatusWriter(store, of()))
    end = await entry(store)
    assert (end.status, end.attempt, end.started) == ("completed", 2, seen[0][1].started)
    assert ends(seen) == {("r", 0): 1}


async def test_a_retry_of_what_was_told_already_tells_nothing_twice() -> None:
    store, flow = MemoryStore(), Chain("shop").add_step("only", nothing)
    async with watched(store) as seen:
        for _ in range(2):
            await running(flow, StatusWriter(store, of()))
    assert [now.status for _, now in seen] == ["running", "completed"]


async def test_a_clear_begins_anew_and_what_ran_before_is_not_heard_any_more() -> None:
    store, (flow, began, gate) = MemoryStore(), gated()
    async with watched(store) as seen:
        old = asyncio.create_task(running(flow, StatusWriter(store, of(), pace=0.05)))
        await began.wait()
        new = asyncio.create_task(running(Chain("shop").add_step("x", nothing), StatusWriter(store, of(generation=1))))
        await new
        gate.set()
        await old
    assert ends(seen) == {("r", 1): 1}
    assert (await entry(store)).steps == {"x": "completed"}


async def test_of_two_runs_with_one_key_the_later_one_counts() -> None:
    store, flow = MemoryStore(), Chain("shop").add_step("only", nothing)
    early, late = (moment(datetime(2026, 1, day, tzinfo=UTC)) for day in (1, 2))
    await running(flow, StatusWriter(store, of(run="early", started=early)))
    await running(flow, StatusWriter(store, of(run="late", started=late)))
    await running(flow, StatusWriter(store, of(run="early again", started=early)))
    assert (await entry(store)).run == "late"


async def test_two_runs_that_began_at_once_do_not_take_the_entry_from_each_other() -> None:
    store, now = MemoryStore(), moment()
    writers = [StatusWriter(store, of(run=run, started=now), shared=True) for run in "ba"]
    async with watched(store) as seen:
        for _ in range(3):
            for writer in writers:
                writer.note({"x": "running"})
                await writer.flush()
    assert {told.run for _, told in seen} == {"b"}


async def test_a_run_that_was_held_to_be_lost_has_the_last_word() -> None:
    store, (flow, began, gate) = MemoryStore(), gated()
    task = asyncio.create_task(running(flow, StatusWriter(store, of())))
    await began.wait()

    async def failed(entry: RunStatus) -> FlowResult:
        return FlowResult(status="failed", error="lost")

    assert (await after(store, failed)).status == "failed"
    await asyncio.sleep(status.PACE * 1.5)
    assert (await entry(store)).status == "failed"  # its steps are not told any more
    gate.set()
    await task
    assert (await entry(store)).status == "completed"


@pytest.mark.parametrize(("gives_up", "told"), [(True, "cancelled"), (False, "running")])
async def test_a_cancellation_of_the_run_is_told_and_one_of_its_process_is_not(gives_up: bool, told: str) -> None:
    store, (flow, began, _) = MemoryStore(), gated()
    task = asyncio.create_task(running(flow, StatusWriter(store, of()), gives_up=gives_up))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await entry(store)).status == told


async def test_an_error_that_no_retry_helps_is_told() -> None:
    store = MemoryStore()

    async def refused() -> FlowResult:
        raise InvalidFlow("it was changed")

    from beluga_airflow.graph.progress import Progress

    progress = Progress(Settings().settle(Chain("shop").add_step("only", nothing).check()))
    with pytest.raises(InvalidFlow):
        await StatusWriter(store, of()).through(refused, progress, lambda: True)
    end = await entry(store)
    assert (end.status, end.error) == ("failed", "InvalidFlow: it was changed")


# several writers of one run


async def test_what_several_processes_tell_comes_together(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    writers = [StatusWriter(store, of(runtime="tasks", total=20), shared=True) for _ in range(20)]
    async with watched(store) as seen:
        for number, writer in enumerate(writers):
            writer.note({f"s{number}": "running"})
        for number, writer in enumerate(writers):
            writer.note({f"s{number}": "completed"})
            await writer.flush()
        assert (await entry(store)).steps == {f"s{number}": "completed" for number in range(20)}
        await asyncio.gather(*(writer.end(FlowResult(status="completed")) for writer in writers))
        # too late
        writers[0].note({"s0": "running"})
        await writers[0].flush()
    assert ends(seen) == {("r", 0): 1}
    assert seen[-1][1].steps["s0"] == "completed"
    await store.close()


async def test_notes_in_quick_succession_are_one_write() -> None:
    store = MemoryStore()
    writer = StatusWriter(store, of(runtime="temporal"), shared=True)
    async with watched(store) as seen:
        for number in range(50):
            writer.note({f"s{number}": "running"})
            await asyncio.sleep(0.001)
        await writer.flush()
    assert len(seen) <= 3
    assert len(seen[-1][1].steps) == 50


# who settles it


async def put(store: StateStore, *, silent: float = 0.0, **changes: Any) -> None:
    told = moment(datetime.now(UTC) - timedelta(seconds=silent))
    known = RunStatus(status="running", runtime="run", run="r", started=told, updated=told)
    await store.set(KEY, replace(known, **changes).to_json())


async def nobody(entry: RunStatus) -> FlowResult | None:
    return None


@pytest.mark.parametrize(("silent", "ended"), [(5.0, "running"), (31.0, "failed")])
async def test_a_run_that_nobody_has_is_lost_when_it_gives_no_sign(silent: float, ended: str) -> None:
    store = MemoryStore()
    await put(store, silent=silent, steps={"a": "completed", "b": "running"})
    now = await settled(store, KEY, nobody)
    assert now == await entry(store)
    assert now.status == ended
    if ended == "failed":
        assert str(now.error).startswith("its worker was lost: it gave no sign for 31 s")
        assert now.steps == {"a": "completed"}


async def test_an_owner_says_how_its_run_ended() -> None:
    store = MemoryStore()

    async def cancelled(entry: RunStatus) -> FlowResult:
        return FlowResult(status="cancelled", error=f"by {entry.owner['workflow_id']}")

    await put(store, silent=300, runtime="temporal", owner={"workflow_id": "w"})
    assert (await after(store, nobody)).status == "running"
    now = await settled(store, KEY, cancelled)
    assert now is not None
    assert (now.status, now.error) == ("cancelled", "by w")


async def test_several_who_settle_it_write_one_end(tmp_path: Path) -> None:
    stores = [SqliteStore(tmp_path / "state.db") for _ in range(5)]
    await put(stores[0], silent=100)
    async with watched(stores[0]) as seen:
        found = await asyncio.gather(*(settled(store, KEY, nobody) for store in stores))
    assert ends(seen) == {("r", 0): 1}
    assert {now and now.ended for now in found} == {seen[-1][1].ended}
    for store in stores:
        await store.close()


async def test_what_has_ended_stays_as_it_is() -> None:
    store = MemoryStore()
    await put(store, silent=100, status="completed", ended=moment())
    before = await store.get_versioned(KEY)
    assert (await after(store, nobody)).status == "completed"
    assert await store.get_versioned(KEY) == before
    assert await settled(store, "beluga/flows/shop/none", nobody) is None


async def test_what_is_no_entry_is_passed_over() -> None:
    store = MemoryStore()
    await put(store)
    for number, junk in enumerate([None, 7, "x", [], {}, {"status": 1}, {"status": "running", "steps": [1]}]):
        await store.set(f"beluga/flows/shop/junk-{number}", junk)
        assert await settled(store, f"beluga/flows/shop/junk-{number}", nobody) is None
    await store.set("beluga/flows/shopping/o", (await entry(store)).to_json())
    assert [key async for key, _ in run_statuses(store, "shop")] == [KEY]
    assert len([key async for key, _ in run_statuses(store)]) == 2


async def test_entries_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "KEPT", 0.2)
    store = MemoryStore()
    await running(Chain("shop").add_step("only", nothing), StatusWriter(store, of()))
    assert await store.get(KEY) is not None
    await asyncio.sleep(0.25)
    assert await store.get(KEY) is None


@pytest.mark.parametrize(
    ("scope", "key"),
    [
        (Identity.of("shop", "o-1").scope, "beluga/flows/shop/o-1"),
        (Identity.of("shop", "a/b %").scope, "beluga/flows/shop/a%2Fb %25"),
        ("shop/run/c0ffee", "beluga/flows/shop/run/c0ffee"),
        (Identity.of("dag", "run 1", "task", -1).scope, "beluga/flows/shop/dag/run 1/task/-1"),
        # a DAG that has the flow's name
        (Identity.of("shop", "run 1", "task", -1).scope, "beluga/flows/shop/shop/run 1/task/-1"),
        (Identity.of("decide", "o-1").scope, "beluga/flows/shop/decide/o-1"),
    ],
)
def test_where_a_run_is(scope: str, key: str) -> None:
    assert status_key("shop", scope) == key


def test_a_long_key_stays_apart_from_others() -> None:
    first, second = (status_key("shop", Identity.of("shop", "x" * 5_000 + end).scope) for end in "ab")
    assert first != second
    assert len(first) == len("beluga/flows/shop/") + status.KEY_LENGTH
