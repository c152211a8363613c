"""Guards of steps: the same by run(), in a task group, on Temporal and in a batch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pytest_mock import MockerFixture

from beluga_airflow import Chain, CircuitBreaker, Decision, FlowResult, Graph, InvalidFlow, RateLimit, Retry, run
from beluga_airflow.errors import BreakerOpen, LimitReached, ModelUnavailable, StepTimeout
from beluga_airflow.llm.client import Usage
from beluga_airflow.llm.guarded import GuardedModel
from beluga_airflow.resilience import shared
from beluga_airflow.resilience.breaker import breakers
from beluga_airflow.resilience.limits import limits
from beluga_airflow.state import StateStore, open_store
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.temporal.messages import BATCH_WORKFLOW
from beluga_airflow.testing import ScriptedModel
from beluga_airflow.testing.scripted_model import reply
from tests.execute.attempts import once
from tests.resilience import guarded_flows as flows
from tests.resilience.stores import hang
from tests.task_group.conftest import tasks_of  # noqa: F401  # a fixture
from tests.temporal.conftest import Side, side  # noqa: F401  # a fixture
from tests.temporal.test_batch_workflow import lines, staged

DEADLINE = 60
PACKAGE = "tests.resilience.guarded_flows"
STATE = "beluga/breakers/shop"


@pytest.fixture
def token() -> str:
    return uuid4().hex


@pytest.fixture(autouse=True)
def impatient(mocker: MockerFixture) -> None:
    """An open breaker asks for an hour, and steps give it a minute each time."""
    mocker.patch("beluga_airflow.graph.retry.RETRY_AFTER_BOUND", 0.01)


async def looks(store: StateStore) -> tuple[str, int]:
    (found,) = await breakers(store)
    return found.state, found.failures


async def by_run(store: StateStore, name: str, inputs: dict[str, Any]) -> FlowResult:
    return await run(getattr(flows, name), inputs, state=store)


async def test_a_step_that_fails_opens_its_breaker_for_all_runs(token: str) -> None:
    store = MemoryStore()
    result = await by_run(store, "guarded", {"token": token, "answer": "nothing"})
    assert "BreakerOpen: breaker 'shop' is open since" in str(result.error)
    assert (flows.calls[token], await looks(store)) == (2, ("open", 2))
    again = await run(flows.guarded, {"token": token, "answer": "nothing"}, state=store)
    assert "BreakerOpen" in str(again.error)
    assert flows.calls[token] == 2


async def test_a_step_behind_guards_returns_what_it_returns(token: str) -> None:
    store = MemoryStore()
    result = await by_run(store, "guarded", {"token": token, "answer": "yes"})
    assert (result.status, result.data["answered"]) == ("completed", "yes")
    assert await store.get(STATE) is None


async def test_invalid_input_opens_nothing(token: str) -> None:
    store = MemoryStore()
    for _ in range(3):
        result = await by_run(store, "guarded", {"token": token, "answer": "no such order"})
        assert "InvalidInput: no such order" in str(result.error)
    assert await store.get(STATE) is None


async def test_out_of_time_at_a_limit_is_no_timeout_of_the_step(token: str) -> None:
    store = MemoryStore()
    assert (await by_run(store, "limited", {"token": token, "answer": "yes"})).ok
    result = await by_run(store, "limited", {"token": token, "answer": "yes"})
    assert "LimitReached: limit 'shop' is reached (1 requests a minute)" in str(result.error)
    assert "this call may wait 0 s" in str(result.error)
    assert (flows.calls[token], await store.get(STATE)) == (1, None)


async def test_what_a_limit_took_counts_in_the_attempts_time() -> None:
    store, limit = MemoryStore(), RateLimit("shop", concurrent=1)
    breaker = CircuitBreaker("shop", failure_threshold=1)
    flow = Chain("f").add_step("a", lambda data: asyncio.sleep(0.8), breaker=breaker, limit=limit)

    @asynccontextmanager
    async def busy(seconds: float) -> AsyncIterator[None]:
        async with limit.guard(store):
            ending = asyncio.create_task(asyncio.sleep(seconds))
            yield
            await ending

    async def other() -> None:
        async with busy(0.3):
            began.set()

    assert (await once(flow, state=store, timeout=1.1)).output == {}
    began = asyncio.Event()
    holding = asyncio.create_task(other())
    await began.wait()
    with pytest.raises(StepTimeout, match=r"step 'a' took longer than its timeout of 1.1 s"):
        await once(flow, state=store, timeout=1.1)
    await holding
    assert await looks(store) == ("open", 1)


@pytest.mark.parametrize("guards", [{"breaker": CircuitBreaker("shop")}, {"limit": RateLimit("shop", concurrent=1)}])
async def test_a_store_that_hangs_takes_nothing_of_the_steps_time(
    guards: dict[str, Any], mocker: MockerFixture
) -> None:
    mocker.patch.object(shared, "ANSWER", 0.6)
    store = MemoryStore()
    mocker.patch.object(store, "get_versioned", hang)
    flow = Chain("f").add_step("a", lambda data: asyncio.sleep(0.01), **guards)
    assert (await once(flow, state=store, timeout=0.5)).output == {}


async def test_a_step_that_a_limit_left_too_little_time_is_not_begun() -> None:
    store, limit = MemoryStore(), RateLimit("shop", concurrent=1, max_wait=100)
    began: list[Any] = []

    async def work(data: Any) -> None:
        began.append(data)
        await asyncio.sleep(0.4)

    flow = Chain("f").add_step("a", work, limit=limit)
    async with limit.guard(store):
        late = asyncio.create_task(once(flow, state=store, timeout=1.0))
        await asyncio.sleep(0.8)
    # it would have been cut short in the midst of its work, and done twice
    with pytest.raises(LimitReached):
        await late
    assert began == []
    assert (await once(flow, state=store, timeout=1.0)).output == {}


async def test_what_undoes_a_step_is_not_guarded(token: str) -> None:
    store = MemoryStore()
    undone: list[str] = []
    breaker = CircuitBreaker("shop", failure_threshold=1, recovery_timeout=3600)
    flow = Chain("f", retry=Retry(maximum_attempts=1))
    flow.add_step("a", lambda data: None, breaker=breaker, compensate=lambda data: undone.append("a"))
    flow.add_step("b", lambda data: 1 / 0, breaker=breaker)
    result = await run(flow, {}, state=store)
    assert (result.status, undone, result.undone) == ("failed", ["a"], {"a": "undone"})


async def test_steps_of_nested_flows_are_guarded(token: str) -> None:
    store = MemoryStore()
    flow = Graph("outer").add_node("inner", flows.guarded)
    result = await run(flow, {"token": token, "answer": "nothing"}, state=store)
    assert "BreakerOpen" in str(result.error)
    assert await looks(store) == ("open", 2)


# a decision is guarded where it asks its model

DECISION = Decision(
    "Which?",
    choices=["left", "right"],
    reads=["x"],
    output_key="way",
    fallback="right",
    max_reprompts=0,
    rules=[(lambda data: data["x"] == "known", "left")],
)


def deciding(**guards: Any) -> Chain:
    return Chain("f").add_step("a", DECISION, **guards)


async def test_a_decision_whose_breaker_is_open_takes_its_fallback_on_the_last_attempt() -> None:
    store = MemoryStore()
    flow = deciding(breaker=CircuitBreaker("shop", failure_threshold=1, recovery_timeout=3600))
    down = ScriptedModel([ModelUnavailable("down")])
    # a failure is one, though the decision has an answer
    assert (await once(flow, inputs={"x": 1}, model=down, state=store)).output == {"way": "right"}
    assert await looks(store) == ("open", 1)

    with pytest.raises(BreakerOpen):
        await once(flow, inputs={"x": 2}, state=store, last=False)
    outcome = await once(flow, inputs={"x": 3}, state=store)
    assert outcome.output == {"way": "right"}
    assert outcome.decision is not None
    assert outcome.decision["decided_by"] == "fallback"
    assert "breaker 'shop' is open since" in outcome.decision["reason"]
    # what needs no model needs no breaker
    assert (await once(flow, inputs={"x": "known"}, state=store)).output == {"way": "left"}
    assert (await once(flow, inputs={"x": 3}, state=store)).output == {"way": "right"}


async def test_a_decision_over_its_limit_takes_its_fallback_on_the_last_attempt() -> None:
    store = MemoryStore()
    flow = deciding(limit=RateLimit("shop", requests_per_minute=1, max_wait=0))
    assert (await once(flow, inputs={"x": 1}, model=ScriptedModel(["left"]), state=store)).output == {"way": "left"}
    with pytest.raises(LimitReached):
        await once(flow, inputs={"x": 2}, state=store, last=False)
    assert (await once(flow, inputs={"x": 2}, state=store)).output == {"way": "right"}


@pytest.mark.parametrize("answer", ["no such choice", reply(trouble="the model refused to answer")])
async def test_a_model_that_answers_what_does_not_fit_has_not_failed(answer: Any) -> None:
    store = MemoryStore()
    flow = deciding(breaker=CircuitBreaker("shop", failure_threshold=1))
    outcome = await once(flow, inputs={"x": 1}, model=ScriptedModel([answer]), state=store)
    assert outcome.output == {"way": "right"}
    assert await store.get(STATE) is None


async def test_out_of_time_at_the_limit_of_its_model_is_no_failure_of_the_model() -> None:
    store, limit = MemoryStore(), RateLimit("m", concurrent=1, max_wait=100)
    model = GuardedModel(ScriptedModel([]), limit=limit, store=store)
    flow = deciding(breaker=CircuitBreaker("shop", failure_threshold=1))
    async with limit.guard(store):
        with pytest.raises(LimitReached):
            await once(flow, inputs={"x": 1}, model=model, state=store, timeout=1.0, last=False)  # type: ignore[arg-type]  # any client
    assert await store.get(STATE) is None


async def test_the_tokens_of_a_decision_are_estimated_and_settled() -> None:
    store = MemoryStore()
    flow = deciding(limit=RateLimit("shop", tokens_per_minute=3_000, max_wait=0))
    for x, tokens in ((1, 40), (2, 60)):
        model = ScriptedModel([reply('{"answer": "left", "reason": "so"}', usage=Usage(input=tokens - 10, output=10))])
        assert (await once(flow, inputs={"x": x}, model=model, state=store)).output == {"way": "left"}
    assert (await limits(store))[0].tokens == 100
    # the next is estimated at its longest answer, 500 tokens, and more
    async with RateLimit("shop", tokens_per_minute=3_000, max_wait=0).guard(store, tokens=2_500):
        with pytest.raises(LimitReached, match="3000 tokens a minute"):
            await once(flow, inputs={"x": 3}, state=store, last=False)


# on the other runtimes, with no more code


async def test_in_a_task_group(token: str, tasks_of: Any, tmp_path: Path) -> None:  # noqa: F811  # the fixture
    def runs() -> str:
        tasks = tasks_of(flows.guarded, inputs={"token": token, "answer": "nothing"})
        tasks.run("ask")
        tasks.retry("ask")
        last = tasks.retry("ask")
        assert last.state.value == "failed"
        return str(last.error)

    assert "BreakerOpen: breaker 'shop' is open since" in await asyncio.to_thread(runs)
    store = open_store(f"sqlite:///{tmp_path / 'state.db'}")
    assert (flows.calls[token], await looks(store)) == (2, ("open", 2))
    await store.close()


async def test_on_temporal(token: str, side: Side, mocker: MockerFixture) -> None:  # noqa: F811  # the fixture
    mocker.patch("tests.temporal.conftest.FLOWS", PACKAGE)
    async with side.worker():
        result, _ = await side.run("guarded", {"token": token, "answer": "nothing"})
        assert "BreakerOpen: breaker 'shop' is open since" in str(result.error)
        again, _ = await side.run("limited", {"token": token, "answer": "yes"})
        assert "BreakerOpen: breaker 'shop' is open since" in str(again.error)
    assert (flows.calls[token], await looks(side.backends.store)) == (2, ("open", 2))


async def test_in_a_batch(token: str, side: Side) -> None:  # noqa: F811  # the fixture
    items = [{"token": token, "answer": "nothing"}] * 4
    batch, call = await staged(side, "chain", items, path=f"{PACKAGE}:guarded", max_in_flight=1)
    async with side.worker():
        returned = await side.returned(await side.start(BATCH_WORKFLOW, call))
    assert returned["statuses"] == {"failed": 4}
    assert all("BreakerOpen" in line["error"] for line in await lines(batch, returned))
    assert (flows.calls[token], await looks(side.backends.store)) == (2, ("open", 2))


# what the check says


@pytest.mark.parametrize(
    ("node", "guards", "says"),
    [
        (len, {"breaker": "shop"}, "step 'a': breaker is 'shop', it must be a CircuitBreaker"),
        (len, {"breaker": CircuitBreaker}, "step 'a': breaker is <class"),
        (len, {"limit": CircuitBreaker("shop")}, "step 'a': limit is CircuitBreaker(name='shop'"),
        (
            flows.guarded,
            {"limit": RateLimit("shop", concurrent=1)},
            "step 'a': it has a limit, but is a flow, and what is guarded is one call: give the limit to its steps",
        ),
    ],
)
def test_a_guard_that_can_mean_nothing_is_refused(node: Any, guards: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidFlow) as caught:
        Chain("f").add_step("a", node, **guards).check()
    assert says in str(caught.value)


def test_guards_are_no_part_of_a_flows_shape() -> None:
    plain, guarded = Chain("f").add_step("a", len), Chain("f").add_step("a", len, breaker=CircuitBreaker("shop"))
    assert plain.check() == guarded.check()
    assert plain.check().fingerprint == guarded.check().fingerprint
