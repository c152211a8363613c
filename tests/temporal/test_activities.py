from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from beluga_airflow import Chain
from beluga_airflow.config import Settings
from beluga_airflow.errors import ModelRefused, ModelUnavailable, StateUnavailable
from beluga_airflow.graph import FlowResult, Retry
from beluga_airflow.graph.locate import load_flow
from beluga_airflow.temporal.activities import Activities
from beluga_airflow.temporal.batch import Batch, Item
from beluga_airflow.temporal.messages import ItemCall, RunCall, StepCall
from beluga_airflow.testing import ScriptedModel
from tests.temporal import sample_flows
from tests.temporal.conftest import FLOWS, OwnBackends, Side


def step_call(name: str, step: str, inputs: dict[str, Any], **changes: Any) -> StepCall:
    given: dict[str, Any] = {
        "of": RunCall(flow="shop", total=1, started=0.0),
        "path": f"{FLOWS}:{name}",
        "place": load_flow(f"{FLOWS}:{name}").check().place(step).to_json(),
        "retry": Retry(maximum_attempts=2).to_json(),
        "timeout": 30.0,
        "inputs": inputs,
        "outputs": {},
        "scope": "shop/order-7",
        "generation": 3,
        "run": "dag/run/task/-1",
        "llm_conn_id": "our_llm",
        "state_conn_id": "our_state",
    }
    return StepCall(**given | changes)


def item_call(index: int, path: str = f"{FLOWS}:two_steps") -> ItemCall:
    return ItemCall(path=path, batch="b", index=index, generation=1, llm_conn_id=None, state_conn_id=None)


@pytest.fixture
def backends() -> OwnBackends:
    return OwnBackends()


@pytest.fixture
def activities(backends: OwnBackends) -> Activities:
    return Activities(backends, Settings)


def environment(**info: Any) -> ActivityEnvironment:
    surroundings = ActivityEnvironment()
    surroundings.info = dataclasses.replace(surroundings.info, **{"heartbeat_timeout": None, **info})
    return surroundings


async def batch_of(backends: OwnBackends, *inputs: dict[str, Any]) -> Batch:
    batch = Batch(backends.store, "b")

    async def items() -> Any:
        for index, data in enumerate(inputs):
            yield Item(index=index, key=f"k-{index}", scope=f"shop/{index}", data=data)

    await batch.put(items(), started=0.0)
    return batch


async def test_a_step_knows_who_it_is(activities: Activities, backends: OwnBackends) -> None:
    call = step_call("chain", "identify", {}, outputs={"price": {"total": "3"}})
    outcome = await environment(attempt=2).run(activities.step, call)
    assert outcome["output"] == {"key": "shop/order-7/identify", "attempt": 2, "generation": 3}
    assert outcome["taken"] == ["end"]
    assert backends.asked == [("our_llm", "our_state")]


async def test_what_failed_leaves_with_its_judgement_and_its_wait(activities: Activities, token: str) -> None:
    retry = Retry(maximum_attempts=5, initial_interval=3, backoff_coefficient=2, maximum_interval=100).to_json()
    call = step_call("used_up", "try", {"token": token}, retry=retry)
    with pytest.raises(ApplicationError) as caught:
        await environment(attempt=3).run(activities.step, call)
    error = caught.value
    assert (error.message, error.type, error.non_retryable) == (
        "RuntimeError: the printer is on fire",
        "RuntimeError",
        False,
    )
    assert error.next_retry_delay == timedelta(seconds=12)
    # the author's code and data stay here
    assert (error.__cause__, error.details) == (None, ())


@pytest.mark.parametrize(
    ("answer", "attempt", "delay", "for_good"),
    [
        (ModelUnavailable("busy", retry_after=7), 1, 7, False),
        (ModelUnavailable("busy", retry_after=3600), 1, 60, False),
        (ModelRefused("the key is refused"), 1, 0.5, True),
        # beyond the step's own attempts: workers were lost before
        (ModelUnavailable("busy"), 7, 5, True),
    ],
)
async def test_a_model_that_does_not_answer(
    activities: Activities, backends: OwnBackends, answer: Exception, attempt: int, delay: float, for_good: bool
) -> None:
    backends.model = ScriptedModel([answer])
    call = step_call("without_fallback", "decide", {"order_id": "o-1"})
    with pytest.raises(ApplicationError) as caught:
        await environment(attempt=attempt).run(activities.step, call)
    assert caught.value.next_retry_delay == timedelta(seconds=delay)
    assert caught.value.non_retryable is for_good


async def test_a_decision_falls_back_at_its_last_attempt_only(side: Side, token: str) -> None:
    side.backends.model = model = ScriptedModel([ModelUnavailable("busy")] * 2)
    async with side.worker():
        result, _ = await side.run("falls_back", {"token": token, "order_id": "o-1"})
    assert result.status == "completed"
    assert result.data["handling"] == "standard"
    assert result.decisions["decide"]["decided_by"] == "fallback"
    assert model.calls == 2


async def test_it_shows_signs_of_life_and_hears_that_it_is_cancelled(
    activities: Activities, token: str, eventually: Callable[..., Any]
) -> None:
    beats: list[Any] = []
    surroundings = environment(heartbeat_timeout=timedelta(seconds=0.2))
    surroundings.on_heartbeat = lambda *details: beats.append(details)
    running = asyncio.create_task(surroundings.run(activities.step, step_call("stuck", "slow", {"token": token})))
    await eventually(lambda: len(beats) >= 3)
    surroundings.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    assert sample_flows.seen[token] == ["began", "cancelled"]


async def test_a_step_that_the_code_cannot_undo_any_more_says_what_to_do(activities: Activities) -> None:
    call = step_call("paid", "fulfil", {}, outputs={"fulfil": {}})
    with pytest.raises(ApplicationError) as caught:
        await environment().run(activities.undo, call)
    assert caught.value.message == (
        f"InvalidFlow: step 'fulfil' of flow '{FLOWS}:paid' has no compensate= in this worker's code, but the run "
        "began with one; undo it by hand, and keep the code that has it deployed until the runs that began with it "
        "have ended"
    )
    assert caught.value.non_retryable


async def test_an_item_is_stored_as_it_ended(activities: Activities, backends: OwnBackends, token: str) -> None:
    batch = await batch_of(backends, {"token": token, "size": 70})
    call = item_call(0, f"{FLOWS}:by_size")
    assert await environment().run(activities.item, call) == "large"
    # a second delivery of the same item runs nothing
    assert await environment().run(activities.item, call) == "large"
    assert sample_flows.seen[token] == [70]
    (line,) = [line async for line in batch.results(1, {})]
    expected = FlowResult(status="large", data={"token": token, "size": 70}, steps={"judge": "completed"})
    assert line == {"index": 0, "key": "k-0", **expected.to_json()}


async def test_a_lost_item_goes_on_behind_its_finished_steps(
    activities: Activities, backends: OwnBackends, token: str, eventually: Callable[..., Any]
) -> None:
    await batch_of(backends, {"token": token})
    lost = environment()
    running = asyncio.create_task(lost.run(activities.item, item_call(0)))
    await eventually(lambda: sample_flows.seen[token] == ["first", "wait"])
    lost.cancel()
    await asyncio.wait([running])
    sample_flows.gates[token].set()
    sample_flows.seen[token].clear()
    assert await environment().run(activities.item, item_call(0)) == "completed"
    assert sample_flows.seen[token] == ["wait"]


async def test_a_lost_item_begins_again_when_the_flow_has_changed(
    activities: Activities,
    backends: OwnBackends,
    token: str,
    eventually: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await batch_of(backends, {"token": token})
    lost = environment()
    running = asyncio.create_task(lost.run(activities.item, item_call(0)))
    await eventually(lambda: sample_flows.seen[token] == ["first", "wait"])
    lost.cancel()
    await asyncio.wait([running])
    sample_flows.gates[token].set()
    sample_flows.seen[token].clear()
    old = sample_flows.two_steps.steps
    changed = Chain("two-steps").add_step("first", old["first"].node).add_step("between", lambda data: {"looked": True})
    monkeypatch.setattr(sample_flows, "two_steps", changed.add_step("wait", old["wait"].node))

    assert await environment().run(activities.item, item_call(0)) == "completed"

    assert sample_flows.seen[token] == ["first", "wait"]
    (line,) = [line async for line in Batch(backends.store, "b").results(1, {})]
    assert line["steps"] == {"first": "completed", "between": "completed", "wait": "completed"}


async def test_prepare_sees_that_there_are_flow_and_items(activities: Activities, backends: OwnBackends) -> None:
    with pytest.raises(
        ApplicationError, match=r"^StateError: .*item 0 of batch 'b' is not in the state store"
    ) as caught:
        await environment().run(activities.prepare, item_call(0))
    assert caught.value.non_retryable
    await batch_of(backends, {"token": "x"})
    await environment().run(activities.prepare, item_call(0))
    with pytest.raises(ApplicationError, match=r"^FlowNotFound: .*has nothing of that name") as caught:
        await environment().run(activities.prepare, item_call(0, f"{FLOWS}:gone"))
    assert caught.value.non_retryable


async def test_a_store_that_is_away_is_waited_for_longer_than_a_step_would(
    activities: Activities, backends: OwnBackends, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any) -> Any:
        raise StateUnavailable("the disk is full")

    monkeypatch.setattr(backends.store, "get", away)
    waits = []
    for attempt in range(1, 11):
        with pytest.raises(ApplicationError, match="StateUnavailable: the disk is full") as caught:
            await environment(attempt=attempt).run(activities.item, item_call(0))
        assert caught.value.next_retry_delay is not None
        waits.append(caught.value.next_retry_delay.total_seconds())
        assert caught.value.non_retryable is (attempt == 10)
    assert waits[:6] == [1, 2, 4, 8, 16, 30]
    assert sum(waits) > 120
