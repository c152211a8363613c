"""Budgets: nothing is spent beyond them, by however many at once, over real HTTP and in every store."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest_mock import MockerFixture

from beluga_airflow import Budget, Chain, Decision, InvalidFlow, run
from beluga_airflow.errors import (
    BudgetSpent,
    InvalidSetting,
    LimitReached,
    ModelRefused,
    ModelUnavailable,
    StateError,
    StateUnavailable,
)
from beluga_airflow.graph import Identity
from beluga_airflow.llm import purse
from beluga_airflow.llm.budget import purse_of_connection, purses_of, reserved
from beluga_airflow.llm.client import ModelClient, ModelReply, ModelRequest, Usage
from beluga_airflow.llm.decide import DecisionRecord, decide
from beluga_airflow.llm.estimate import estimated
from beluga_airflow.llm.guarded import GuardedModel
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.llm.purse import NANO, Amount, Purse, Reservation
from beluga_airflow.resilience.shared import SoonStore
from beluga_airflow.state import StateStore, open_store
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.testing import ScriptedModel
from beluga_airflow.testing.scripted_model import reply
from tests.llm.conftest import DATUM, ClientFactory
from tests.llm.spending import NAME
from tests.resilience.stores import Between
from tests.state.backends import Place

ROOT = Path(__file__).parents[2]
DEADLINE = 60
DATA = {"tier": "gold", "note": DATUM}
ORDER = Identity.of("shop", "run-1", "handle", 3, task=("shop", "run-1", "handle"))
ASK = ModelRequest(messages=({"role": "user", "content": "hello"},), schema={}, max_tokens=50)


def handling(budget: Any, **changes: Any) -> Decision:
    given = {"choices": ("expedite", "standard"), "reads": ("tier", "note"), "max_tokens": 50, "budget": budget}
    return Decision("Which QUESTIONMARK queue?", **{**given, **changes})


def purses(store: StateStore, *budgets: Budget, identity: Identity = ORDER, flow: str = "orders") -> list[Purse]:
    return purses_of(budgets, flow=flow, identity=identity, state=store)


class Desk:
    """Where one test decides."""

    def __init__(self, client: ModelClient, state: StateStore) -> None:
        self.client, self.state = client, state

    async def decide(
        self, decision: Decision, *, key: str = "k", identity: Identity = ORDER, **options: Any
    ) -> DecisionRecord:
        assert decision.faults() == []

        async def model(_: str | None) -> ModelClient:
            return self.client

        found = purses(self.state, *decision.budgets, identity=identity)
        return await decide(decision, DATA, key=key, state=self.state, model=model, purses=found, **options)

    async def spent(self, key: str = "beluga/budgets/task/shop/run-1/handle") -> tuple[int, int]:
        """Tokens and billionths of dollars; nothing is held any more."""
        entry = await self.state.get(key)
        assert entry["held"] == {}
        tokens, dollars = entry["spent"]
        return tokens, dollars


@pytest.fixture
async def store(place: Place) -> AsyncIterator[StateStore]:
    store = place.opened()
    yield store
    await store.close()


@pytest.fixture
def desk(model_server: ModelServer, client_of: ClientFactory) -> Desk:
    return Desk(client_of(model_server), MemoryStore())


class Paid:
    """A client whose simulation counts as a model that costs."""

    def __init__(self, client: ModelClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def answer(self, request: ModelRequest) -> ModelReply:
        return replace(await self._client.answer(request), simulated=False)


async def called(server: ModelServer) -> None:
    """The server has been called."""
    while not server.calls:  # noqa: ASYNC110  # another thread's
        await asyncio.sleep(0.01)


# what is spent


async def test_decisions_spend_what_they_used_until_too_little_is_left(
    store: StateStore, model_server: ModelServer, client_of: ClientFactory
) -> None:
    desk = Desk(client_of(model_server), store)
    used = 0
    for number in range(100):
        decision = handling(Budget(tokens=2_000))
        try:
            record = await desk.decide(decision, key=str(number))
        except BudgetSpent as error:
            spent = error
            break
        used += sum(record.tokens.values())
        assert await desk.spent() == (used, 0)
    assert model_server.calls == number > 3
    assert used <= 2_000
    assert not spent.retryable
    assert spent.retry_after is None
    assert str(spent).startswith(
        "the budget of task 'handle' of run 'run-1' of DAG 'shop' has too little left: spent are "
        f"{used:,} of 2,000 tokens, and this call may use "
    )
    assert str(spent).endswith("; it begins anew with the next DAG run: wait for that, or give it a higher bound")


@pytest.mark.parametrize("last", [True, False])
async def test_over_budget_the_decision_is_uncertain_in_any_attempt(
    desk: Desk, model_server: ModelServer, last: bool
) -> None:
    record = await desk.decide(handling(Budget(tokens=10), fallback="standard"), last=last)
    assert (record.answer, record.decided_by, record.calls) == ("standard", "fallback", 0)
    assert "has too little left: spent are 0 of 10 tokens" in str(record.reason)
    assert model_server.calls == 0
    with pytest.raises(BudgetSpent):
        await desk.decide(handling(Budget(tokens=10), fallback="standard", on_uncertain="fail"), key="other", last=last)


async def test_over_budget_a_step_fails_and_is_not_retried(model_server: ModelServer) -> None:
    model = ScriptedModel([])
    result = await run(Chain("c").add_step("s", handling(Budget(tokens=10))), DATA, model=model)
    assert result.status == "failed"
    assert "BudgetSpent: the budget of run 'c/run/" in str(result.error)
    assert model.calls == 0


async def test_a_rule_or_a_record_spends_nothing(desk: Desk) -> None:
    await desk.decide(handling(Budget(tokens=10), rules=[(lambda _: True, "standard")]))
    kept = await desk.decide(handling(None), key="paid")
    assert await desk.decide(handling(Budget(tokens=10)), key="paid") == kept


async def test_reprompts_are_calls_of_their_own(desk: Desk, model_server: ModelServer) -> None:
    model_server.fail("bad_answer", times=1)
    record = await desk.decide(handling(Budget(tokens=5_000)))
    assert record.calls == 2
    assert await desk.spent() == (sum(record.tokens.values()), 0)
    model_server.fail("bad_answer", times=1)
    await desk.state.set("beluga/budgets/task/shop/run-1/handle", {"spent": [4_300, 0], "held": {}})
    record = await desk.decide(handling(Budget(tokens=5_000), fallback="standard"), key="other")
    assert (record.decided_by, record.calls) == ("fallback", 1), "there is enough for the first, not for the second"


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        ("status", {"status": 500}, ModelUnavailable),
        ("overloaded", {}, ModelUnavailable),
        ("wrong_key", {}, ModelRefused),
    ],
)
async def test_a_call_that_was_not_answered_costs_nothing(
    desk: Desk, model_server: ModelServer, kind: str, options: dict[str, Any], error: type[Exception]
) -> None:
    model_server.fail(kind, **options)
    with pytest.raises(error):
        await desk.decide(handling(Budget(tokens=5_000)))
    assert await desk.spent() == (0, 0)


@pytest.mark.parametrize(
    ("kind", "options"), [("slow", {"delay": 30}), ("reset", {}), ("half_body", {}), ("not_json", {})]
)
async def test_what_may_have_been_answered_costs_what_was_reserved(
    model_server: ModelServer, client_of: ClientFactory, kind: str, options: dict[str, Any]
) -> None:
    desk = Desk(client_of(model_server, timeout=0.3), MemoryStore())
    model_server.fail(kind, **options)
    with pytest.raises(ModelUnavailable):
        await desk.decide(handling(Budget(tokens=5_000)))
    tokens, _ = await desk.spent()
    assert tokens > 300


async def test_a_cancelled_call_costs_what_was_reserved(desk: Desk, model_server: ModelServer) -> None:
    model_server.fail("slow", delay=30)
    task = asyncio.create_task(desk.decide(handling(Budget(tokens=5_000))))
    async with asyncio.timeout(DEADLINE):
        await called(model_server)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    assert (await desk.spent())[0] > 300


async def test_an_endpoint_that_tells_no_usage_used_all_that_was_reserved() -> None:
    store = MemoryStore()
    model = ScriptedModel([reply('{"answer": "standard", "reason": ""}', usage=Usage())])
    await Desk(model, store).decide(handling(Budget(tokens=5_000)))
    (request,) = model.requests
    assert await Desk(model, store).spent() == (estimated(request).total, 0)


async def test_the_estimate_is_above_what_the_server_counts(desk: Desk, model_server: ModelServer) -> None:
    for note in ("", "a word " * 300, "0123 " * 300, '{"a": [1, 2]}' * 100, "\u6f22\u5b57" * 300, "e\u0301" * 300):
        request = replace(ASK, messages=({"role": "user", "content": note + "Answer anything."},))
        told = await desk.client.answer(request)
        assert told.usage.input <= estimated(request).input


# many at once


async def spender(url: str, server: ModelServer, *arguments: object) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.llm.spending", url, server.base_url, *map(str, arguments)),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )


def entry_of_today() -> str:
    return f"beluga/budgets/day/{datetime.now(UTC):%Y-%m-%d}/name/{NAME}"


async def test_200_decisions_in_several_processes_never_exceed_a_budget_by_one_call(
    shared_place: Place, model_server: ModelServer
) -> None:
    url, budget = shared_place.url(), 8_000
    model_server.fail("slow", delay=0.05, every=1)
    async with asyncio.timeout(DEADLINE):
        processes = [await spender(url, model_server, name, 50, budget) for name in "abcd"]
        told = [(await each.communicate())[0].decode().split() for each in processes]
    numbers = [int(number) for words in told for number in words[::2]]
    deciders = [word for words in told for word in words[1::2]]
    paid = [number for number in numbers if number]
    assert len(numbers) == 200
    assert deciders.count("model") == len(paid) == model_server.calls
    assert sum(paid) <= budget, "the server's own counts"
    assert sum(paid) > budget - 700, "as many as could be afforded"
    store = open_store(url)
    assert await store.get(entry_of_today()) == {"spent": [sum(paid), 0], "held": {}}
    await store.close()


async def test_what_a_killed_process_reserved_comes_free(shared_place: Place, model_server: ModelServer) -> None:
    url = shared_place.url()
    store = open_store(url)
    model_server.fail("slow", delay=60)
    async with asyncio.timeout(DEADLINE):
        process = await spender(url, model_server, "a", 1, 600, "lease", 1.5)
        await called(model_server)
        held = await store.get(entry_of_today())
        process.kill()
        await process.wait()
        assert (len(held["held"]), held["spent"]) == (1, [0, 0])
        other = await spender(url, model_server, "b", 1, 600)
        told, _ = await other.communicate()
    assert told.decode().split()[1] == "model", "it waited for the lease to run out"
    assert model_server.calls == 2
    await store.close()


async def test_a_worker_killed_behind_the_record_does_not_call_the_model_again(
    shared_place: Place, model_server: ModelServer
) -> None:
    url = shared_place.url()
    async with asyncio.timeout(DEADLINE):
        process = await spender(url, model_server, "a", 1, 5_000, "recorded")
        assert await process.wait() == -9
        again = await spender(url, model_server, "a", 1, 5_000)
        told, _ = await again.communicate()
    assert told.decode().split()[1] == "model"
    assert model_server.calls == 1


async def test_a_worker_killed_before_it_could_write_the_record_calls_once_more(
    tmp_path: Path, model_server: ModelServer
) -> None:
    # nobody but the model knows of that answer: this is the one moment that cannot be told from a call never made
    url = f"sqlite:///{tmp_path}/state.db"
    async with asyncio.timeout(DEADLINE):
        process = await spender(url, model_server, "a", 1, 5_000, "answered")
        assert await process.wait() == -9
        again = await spender(url, model_server, "a", 1, 5_000)
        await again.communicate()
    assert model_server.calls == 2


async def test_others_wait_for_what_is_only_held(store: StateStore) -> None:
    (one,) = purses(store, Budget(tokens=100))

    async def spend(estimate: int, used: int) -> None:
        reservation = Reservation(Amount(tokens=estimate), lambda *_: 0)
        async with one.holding(reservation, 20):
            await asyncio.sleep(0.01)
            reservation.spent = Amount(tokens=used)

    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(*(spend(60, 8) for _ in range(6)))
    assert (await store.get(one.key))["spent"] == [48, 0]
    with pytest.raises(BudgetSpent):
        await spend(60, 8)


async def test_who_cannot_wait_any_longer_tries_again_later() -> None:
    (one,) = purses(MemoryStore(), Budget(tokens=100))
    held = Reservation(Amount(tokens=60), lambda *_: 0)
    async with one.holding(held, 0):
        with pytest.raises(LimitReached, match="is held by 1 calls under way") as caught:
            async with one.holding(Reservation(Amount(tokens=60), lambda *_: 0), 0.1):
                raise AssertionError
    assert caught.value.retryable


Call = st.tuples(st.integers(1, 50), st.integers(0, 50), st.sampled_from(["ends", "fails", "lost"]))


@settings(deadline=None, max_examples=60)
@given(calls=st.lists(st.lists(Call, max_size=6), min_size=1, max_size=4), bound=st.integers(1, 120))
def test_whatever_happens_no_more_is_spent_or_held_than_the_budget(
    calls: list[list[tuple[int, int, str]]], bound: int
) -> None:
    class Watched(MemoryStore):
        async def compare_and_swap(self, key: str, value: Any, **options: Any) -> int | None:
            held = sum(tokens for tokens, _, _ in value["held"].values())
            assert value["spent"][0] + held <= bound
            await asyncio.sleep(0)  # others come in between
            return await super().compare_and_swap(key, value, **options)

    async def all_of_them() -> None:
        store, spent, lost = Watched(), 0, 0

        async def worker(turns: list[tuple[int, int, str]]) -> None:
            nonlocal spent, lost
            # no turns of one event loop: as in processes of their own
            (one,) = purses(store, Budget(tokens=bound))
            for estimate, used, how in turns:
                reservation = Reservation(Amount(tokens=estimate), lambda *_: 0)
                if how == "lost":
                    with suppress(BudgetSpent, LimitReached):
                        await one._reserve(token_hex(4), reservation.estimate, 0)
                        lost += 1
                    continue
                with suppress(BudgetSpent, LimitReached, OSError):
                    async with one.holding(reservation, 0):
                        reservation.spent = reservation.estimate
                        await asyncio.sleep(0)
                        if how == "fails":
                            spent += estimate
                            raise OSError
                        reservation.spent = Amount(tokens=min(used, estimate))
                        spent += min(used, estimate)

        await asyncio.gather(*(worker(turns) for turns in calls))
        (one,) = purses(store, Budget(tokens=bound))
        entry = await store.get(one.key, {"spent": [0, 0], "held": {}})
        assert entry["spent"][0] == spent <= bound
        assert len(entry["held"]) == lost

    async def brief(_: int) -> None:
        await asyncio.sleep(0)

    with mock.patch.object(purse, "pause", brief):
        asyncio.run(all_of_them())


async def test_what_was_lost_is_forgotten_when_its_lease_is_over(store: StateStore, mocker: MockerFixture) -> None:
    clock = mocker.patch.object(purse, "now", return_value=1_800_000_000.0)
    (one,) = purses(store, Budget(tokens=100))
    await one._reserve("lost", Amount(tokens=80), 0)
    with pytest.raises(LimitReached):
        await one._reserve("other", Amount(tokens=30), 0)
    clock.return_value += purse.LEASE
    await one._reserve("other", Amount(tokens=30), 0)
    assert (await store.get(one.key))["held"].keys() == {"other"}


async def test_a_call_that_takes_long_holds_its_reservation(mocker: MockerFixture) -> None:
    mocker.patch.object(purse, "LEASE", 0.15)
    (one,) = purses(MemoryStore(), Budget(tokens=100))
    async with one.holding(Reservation(Amount(tokens=60), lambda *_: 0), 0):
        await asyncio.sleep(0.5)
        with pytest.raises(LimitReached):
            await one._reserve("other", Amount(tokens=60), 0)


# dollars


async def test_dollars_are_counted_by_the_price_list(model_server: ModelServer, client_of: ClientFactory) -> None:
    client = Paid(client_of(model_server, provider="openai", model="gpt-4o"))
    desk = Desk(client, MemoryStore())
    budget = Budget(dollars=0.004)
    cost = 0.0
    for number in range(3):
        record = await desk.decide(handling(budget), key=str(number))
        assert record.cost_usd is not None
        cost += record.cost_usd
        _, nano = await desk.spent()
        assert nano == pytest.approx(cost * NANO, abs=number + 1)
    assert 0 < cost <= 0.004
    tokens = sum(record.tokens.values())
    await desk.state.set("beluga/budgets/task/shop/run-1/handle", {"spent": [tokens, 3_900_000], "held": {}})
    with pytest.raises(BudgetSpent, match=r"spent are 0\.0039 of 0\.004 dollars, and this call may use 0\.00"):
        await desk.decide(handling(budget), key="other")


async def test_an_unknown_price_is_an_error_only_where_a_budget_is_in_dollars(
    model_server: ModelServer, client_of: ClientFactory
) -> None:
    desk = Desk(client_of(model_server, provider="openai", model="nobody-knows-it"), MemoryStore())
    await desk.decide(handling(Budget(tokens=5_000)))
    with pytest.raises(InvalidSetting) as caught:
        await desk.decide(handling(Budget(dollars=1.0), fallback="standard"), key="other")
    assert not caught.value.retryable
    assert str(caught.value) == (
        "nobody knows what model 'nobody-knows-it' of provider 'openai' costs, and the budget of task 'handle' of run "
        "'run-1' of DAG 'shop' is in dollars: bound it in tokens, or name a model that genai-prices lists"
    )
    assert model_server.calls == 1


async def test_simulations_cost_nothing(desk: Desk) -> None:
    await desk.decide(handling(Budget(dollars=0.000001)))
    tokens, dollars = await desk.spent()
    assert tokens > 0
    assert dollars == 0


# whose budget


@pytest.mark.parametrize(
    ("budget", "key", "told"),
    [
        (Budget(tokens=1), "task/shop/run-1/handle", "the budget of task 'handle' of run 'run-1' of DAG 'shop'"),
        (
            Budget(tokens=1, name="a/b"),
            "task/shop/run-1/handle/name/a%2Fb",
            "the budget 'a/b' of task 'handle' of run 'run-1' of DAG 'shop'",
        ),
        (Budget(tokens=1, per="dag_run"), "dag_run/shop/run-1", "the budget of run 'run-1' of DAG 'shop'"),
        (
            Budget(tokens=1, per="dag_run", name="n"),
            "dag_run/shop/run-1/name/n",
            "the budget 'n' of run 'run-1' of DAG 'shop'",
        ),
        (Budget(tokens=1, per="day"), "day/2027-01-15/of/shop", "the budget of 2027-01-15 (UTC) of DAG 'shop'"),
        (Budget(tokens=1, per="day", name="n"), "day/2027-01-15/name/n", "the budget 'n' of 2027-01-15 (UTC)"),
    ],
)
def test_whose_a_budget_is(mocker: MockerFixture, budget: Budget, key: str, told: str) -> None:
    mocker.patch("beluga_airflow.llm.budget.now", return_value=1_800_000_000.0)
    (found,) = purses(MemoryStore(), budget)
    assert (found.key, found.told) == (f"beluga/budgets/{key}", told)


def test_without_airflow_a_run_is_all_there_is() -> None:
    identity = Identity.of("orders", "o-1")
    budgets = (Budget(tokens=1), Budget(tokens=1, per="dag_run"), Budget(tokens=1, per="day"))
    keys = {found.key for found in purses(MemoryStore(), *budgets, identity=identity)}
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    assert keys == {
        "beluga/budgets/task/orders%2Fo-1",
        "beluga/budgets/dag_run/orders%2Fo-1",
        f"beluga/budgets/day/{today}/of/orders",
    }


def test_long_names_are_told_apart_all_the_same() -> None:
    keys = {
        found.key for name in ("x" * 500, "x" * 501) for found in purses(MemoryStore(), Budget(tokens=1, name=name))
    }
    assert len(keys) == 2
    assert max(map(len, keys)) < 230


def test_the_items_and_map_indexes_of_a_task_share_it_and_a_clear_does_not_begin_it_anew() -> None:
    other = Identity.of("shop", "run-1", "handle", 4, generation=2, task=("shop", "run-1", "handle"))
    assert purses(MemoryStore(), Budget(tokens=1), identity=other)[0].key == "beluga/budgets/task/shop/run-1/handle"


async def test_bounds_of_one_purse_hold_together(desk: Desk) -> None:
    several = (Budget(tokens=5_000), Budget(tokens=700, dollars=1.0), Budget(tokens=4_000, per="dag_run"))
    found = purses(desk.state, *several)
    assert [(each.tokens, each.nanodollars) for each in found] == [(4_000, None), (700, NANO)]
    record = await desk.decide(handling(several))
    used = sum(record.tokens.values())
    assert await desk.spent() == await desk.spent("beluga/budgets/dag_run/shop/run-1") == (used, 0)
    with pytest.raises(BudgetSpent, match=r"of 700 tokens, and this call may use .*; 0 of 1 dollars"):
        await desk.decide(handling(several), key="other")
    assert await desk.spent("beluga/budgets/dag_run/shop/run-1") == (used, 0), "what was reserved there is free again"


async def test_a_day_begins_anew_at_midnight_in_utc(mocker: MockerFixture) -> None:
    midnight = datetime(2027, 1, 16, tzinfo=UTC).timestamp()
    clocks = [mocker.patch(f"beluga_airflow.llm.{room}.now", return_value=midnight - 1) for room in ("budget", "purse")]
    store = MemoryStore()
    desk = Desk(ScriptedModel(lambda _: "standard"), store)
    budget = Budget(tokens=1_000, per="day")
    await desk.decide(handling(budget))
    await store.set("beluga/budgets/day/2027-01-15/of/shop", {"spent": [999, 0], "held": {}})
    with pytest.raises(BudgetSpent, match="it begins anew at 2027-01-16 00:00 UTC") as caught:
        await desk.decide(handling(budget), key="other")
    assert caught.value.retry_after == 1
    for clock in clocks:
        clock.return_value = midnight
    assert (await desk.decide(handling(budget), key="other")).decided_by == "model"


async def test_entries_end(mocker: MockerFixture) -> None:
    kept: list[float | None] = []

    class Noting(MemoryStore):
        async def compare_and_swap(
            self, key: str, value: Any, *, version: int | None, ttl: float | None = None
        ) -> int | None:
            kept.append(ttl)
            return await super().compare_and_swap(key, value, version=version, ttl=ttl)

    store = Noting()
    for budget in (Budget(tokens=1), Budget(tokens=1, per="day")):
        (one,) = purses(store, budget)
        await one._reserve("h", Amount(tokens=1), 0)
    task, day = kept
    assert task == 30 * 86_400
    assert day is not None
    assert 86_400 <= day <= 2 * 86_400


# connections


async def test_a_connection_has_a_budget_of_its_own(model_server: ModelServer, client_of: ClientFactory) -> None:
    store = MemoryStore()
    model = GuardedModel(client_of(model_server), budget=(Budget(tokens=400, per="day"), "own"), store=store)
    ask = replace(ASK, max_tokens=300)
    used = (await model.answer(ask)).usage.total
    found = purse_of_connection(Budget(tokens=1, per="day"), "own", store)
    assert (await store.get(found.key))["spent"] == [used, 0]
    with pytest.raises(BudgetSpent, match=r"the budget of \d+-\d+-\d+ \(UTC\) of connection 'own'") as caught:
        await model.answer(replace(ask, max_tokens=400))
    assert caught.value.connection == "own"


@pytest.mark.parametrize("last", [True, False])
async def test_where_a_connections_budget_is_spent_another_one_is_asked(
    model_server: ModelServer, client_of: ClientFactory, last: bool
) -> None:
    store = MemoryStore()

    async def model(conn_id: str | None) -> ModelClient:
        client = client_of(model_server.url_of(str(conn_id)), conn_id=conn_id)
        budget = (Budget(tokens=10, per="day"), "primary") if conn_id == "primary" else None
        return GuardedModel(client, budget=budget, store=store)

    decision = handling(None, llm_conn_id="primary", fallback_conn_ids=["backup"])
    record = await decide(decision, DATA, key="k", state=store, model=model, last=last)
    assert record.connection == "backup"


async def test_where_the_decisions_budget_is_spent_nobody_else_is_asked(desk: Desk, model_server: ModelServer) -> None:
    with pytest.raises(BudgetSpent):
        await desk.decide(handling(Budget(tokens=10), fallback_conn_ids=["backup"]))
    assert model_server.calls == 0


# stores


async def test_nobody_spends_what_he_cannot_count() -> None:
    model = ScriptedModel(["standard"])
    away = Between(MemoryStore(), away=True)
    with pytest.raises(StateUnavailable):
        async with reserved(purses(away, Budget(tokens=5_000)), model, ASK):  # type: ignore[arg-type]  # as a store
            raise AssertionError
    assert model.calls == 0


async def test_a_store_that_goes_away_meanwhile_keeps_no_answer_back(caplog: pytest.LogCaptureFixture) -> None:
    away = Between(MemoryStore())
    async with reserved(purses(away, Budget(tokens=5_000)), ScriptedModel([]), ASK) as reservation:  # type: ignore[arg-type]  # as a store
        assert reservation is not None
        away.away = True
        reservation.settle(reply("x"))
    assert "110 tokens were spent that could not be counted: the state store is away" in caplog.text


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        {"spent": [1, 0]},
        {"spent": [-1, 0], "held": {}},
        {"spent": [1.5, 0], "held": {}},
        {"spent": [1], "held": {}},
        {"spent": [1, 0], "held": {"x": [1, 0]}},
        {"spent": [1, 0], "held": {"x": [1, 0, "soon"]}},
        {"spent": [1, 0], "held": []},
    ],
)
async def test_an_entry_that_is_no_budget_is_told(entry: Any) -> None:
    store = MemoryStore()
    (one,) = purses(store, Budget(tokens=5_000))
    await store.set(one.key, entry)
    with pytest.raises(StateError, match="is no budget that this version can read: deploy the version that wrote it"):
        async with reserved([one], ScriptedModel([]), ASK):
            raise AssertionError


async def test_leases_far_ahead_are_none_of_ours() -> None:
    store = MemoryStore()
    (one,) = purses(store, Budget(tokens=100))
    await store.set(one.key, {"spent": [0, 0], "held": {"x": [100, 0, 9e15], "y": [100, 0, float("1e3")]}})
    await one._reserve("h", Amount(tokens=100), 0)
    assert isinstance(one.store, SoonStore)


# the definition


@pytest.mark.parametrize(
    ("budget", "fault"),
    [
        ("much", "budget is 'much', it must be a Budget or a list of them"),
        (7, "budget is 7"),
        ([Budget(tokens=1), 7], "budget holds 7, it must hold Budgets"),
        (Budget(), "budget: it bounds nothing, give tokens or dollars"),
        (Budget(tokens=0), "budget: tokens is 0, it must be a whole number, 1 or more"),
        (Budget(tokens=True), "budget: tokens is True"),
        (Budget(dollars=0), "budget: dollars is 0, it must be a number above 0, at most 1,000,000,000"),
        (Budget(dollars=float("nan")), "budget: dollars is nan"),
        (Budget(dollars=10**400), "budget: dollars is 1000"),
        (Budget(tokens=1, per="week"), "budget: per is 'week', it must be one of 'task', 'dag_run', 'day'"),  # type: ignore[arg-type]
        (Budget(tokens=1, name=" "), "budget: name is ' ', it must be a text that is not empty"),
    ],
)
def test_what_cannot_mean_anything_is_told_when_it_is_checked(budget: Any, fault: str) -> None:
    with pytest.raises(InvalidFlow) as caught:
        Chain("c").add_step("s", handling(budget)).check()
    assert fault in str(caught.value)
