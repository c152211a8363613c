from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from pytest_mock import MockerFixture

from beluga_airflow import CircuitBreaker, InvalidInput, Retry, telemetry
from beluga_airflow.errors import BreakerOpen, InvalidSetting, LimitReached, ModelRefused, ModelUnavailable
from beluga_airflow.resilience import breaker, shared
from beluga_airflow.resilience.breaker import BreakerState, breakers
from beluga_airflow.state import StateStore, open_store
from beluga_airflow.state.memory import MemoryStore
from tests.resilience.stores import Between, Killed, hang
from tests.state.backends import Place

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 60
STATE, PROBE = "beluga/breakers/shop", "beluga/probes/shop"
LONG = 3600.0


class PaymentError(OSError):
    pass


def fails(error: BaseException | None = None) -> Any:
    raise error or PaymentError("no answer")


async def fail(guard: CircuitBreaker, times: int = 1, error: BaseException | None = None, of: Any = None) -> None:
    for _ in range(times):
        with pytest.raises(type(error) if error else PaymentError):
            await (guard.call(of) if of else guard.call(fails, error))


async def state_of(store: StateStore) -> str:
    entry = await store.get(STATE)
    return str(entry["state"]) if entry else "closed"


async def recovered(store: StateStore) -> None:
    """As if the time were over for which nobody is let in."""
    assert await store.delete(PROBE)


async def opened(store: StateStore) -> CircuitBreaker:
    guard = CircuitBreaker("shop", failure_threshold=1, recovery_timeout=LONG, store=store)
    await fail(guard)
    assert await state_of(store) == "open"
    return guard


# its life


async def test_it_opens_after_so_many_failures_in_a_row_and_closes_after_one_success(store: StateStore) -> None:
    guard = CircuitBreaker("shop", failure_threshold=3, recovery_timeout=0.5, store=store)
    await fail(guard, 2)
    assert await state_of(store) == "closed"
    began = time.monotonic()
    await fail(guard)
    with pytest.raises(BreakerOpen):
        await guard.call(fails)

    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                assert await guard.call(lambda: "well") == "well"
                break
            except BreakerOpen:
                await asyncio.sleep(0.02)

    assert time.monotonic() - began >= 0.5
    entry = await store.get(STATE)
    assert entry == {"state": "closed", "failures": 0, "changes": 3, "since": entry["since"]}
    assert datetime.fromisoformat(entry["since"]).utcoffset() == timedelta(0)


async def test_a_success_begins_the_count_again(store: StateStore) -> None:
    guard = CircuitBreaker("shop", failure_threshold=2, store=store)
    for _ in range(3):
        await fail(guard)
        await guard.call(lambda: None)
    assert await state_of(store) == "closed"
    await fail(guard, 2)
    assert await state_of(store) == "open"


async def test_an_open_one_calls_nothing_and_says_what_to_do(store: StateStore) -> None:
    guard = await opened(store)
    with pytest.raises(BreakerOpen) as caught:
        await guard.call(pytest.fail, "called")
    entry = await store.get(STATE)
    assert str(caught.value).startswith(f"breaker 'shop' is open since {entry['since']}, after 1 failures in a row")
    assert "see what is wrong behind it" in str(caught.value)
    assert LONG - DEADLINE < caught.value.retry_after <= LONG
    # what the message offers
    await store.delete(STATE)
    assert await guard.call(lambda: 1) == 1


async def test_a_probe_that_fails_keeps_it_open_for_as_long_again(store: StateStore) -> None:
    guard = await opened(store)
    for changes in (3, 5):
        await recovered(store)
        await fail(guard)
        entry = await store.get(STATE)
        assert (entry["state"], entry["changes"]) == ("open", changes)
        with pytest.raises(BreakerOpen):
            await guard.call(pytest.fail, "called")


async def test_one_probe_at_a_time(store: StateStore) -> None:
    guard = await opened(store)
    await recovered(store)
    gate, running = asyncio.Event(), 0

    async def probe() -> str:
        nonlocal running
        running += 1
        await gate.wait()
        return "well"

    calls = [asyncio.create_task(guard.call(probe)) for _ in range(10)]
    async with asyncio.timeout(DEADLINE):
        while sum(call.done() for call in calls) < 9:  # noqa: ASYNC110  # of tasks
            await asyncio.sleep(0.01)
        assert (running, await state_of(store)) == (1, "half_open")
        with pytest.raises(BreakerOpen, match=r"half open since .*: one call tries whether it goes again") as caught:
            await guard.call(probe)
        # those who wait are not to use up their attempts while the probe is under way
        assert caught.value.retry_after == breaker.LEASE
        gate.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert results.count("well") == 1
    assert sum(isinstance(result, BreakerOpen) for result in results) == 9
    assert await state_of(store) == "closed"


async def test_a_probe_holds_its_lease_as_long_as_it_runs(store: StateStore, mocker: MockerFixture) -> None:
    mocker.patch.object(breaker, "LEASE", 0.9)
    guard = await opened(store)
    await recovered(store)
    async with guard.guard():
        for _ in range(3):
            await asyncio.sleep(0.45)
            with pytest.raises(BreakerOpen):
                await guard.call(pytest.fail, "called")
    assert await state_of(store) == "closed"


async def test_a_probe_that_lost_its_lease_has_no_say(store: StateStore) -> None:
    guard = await opened(store)
    await recovered(store)
    async with guard.guard():
        await recovered(store)  # its lease ran out
        with pytest.raises(PaymentError):
            async with guard.guard():
                fails()
    assert await state_of(store) == "open"
    with pytest.raises(BreakerOpen):
        await guard.call(pytest.fail, "called")


async def test_a_probe_that_lost_its_lease_to_one_that_still_runs_has_no_say(store: StateStore) -> None:
    guard = await opened(store)
    await recovered(store)
    first = guard.guard()
    await first.__aenter__()
    await recovered(store)
    async with guard.guard():
        await first.__aexit__(None, None, None)
        assert await state_of(store) == "half_open"
        with pytest.raises(BreakerOpen):
            await guard.call(pytest.fail, "called")
    assert await state_of(store) == "closed"


async def test_a_call_that_began_before_a_change_has_no_say_after_it(store: StateStore) -> None:
    guard = CircuitBreaker("shop", failure_threshold=1, recovery_timeout=LONG, store=store)

    async def slow() -> None:
        await fail(guard)
        await recovered(store)
        await guard.call(lambda: None)
        fails()

    await fail(guard, of=slow)
    assert await store.get(STATE) == {**await store.get(STATE), "state": "closed", "failures": 0, "changes": 3}


# what counts

NO_FAILURES = [
    InvalidInput("no such order"),
    ModelRefused("the key is refused"),
    LimitReached("wait"),
    BreakerOpen("another"),
    asyncio.CancelledError(),
    SystemExit(1),
]


@pytest.mark.parametrize("error", NO_FAILURES, ids=lambda error: type(error).__name__)
async def test_what_is_no_failure(error: BaseException) -> None:
    store = MemoryStore()
    guard = CircuitBreaker("shop", failure_threshold=1, recovery_timeout=LONG, store=store)

    async def ends(error: BaseException) -> None:
        raise error

    with pytest.raises(type(error)):
        await guard.call(ends, error)
    assert await store.get(STATE) is None
    # as the end of a probe it decides nothing, and the next call is the probe at once
    await fail(guard)
    for _ in range(2):
        if await store.get(PROBE) == "open":
            await recovered(store)
        with pytest.raises(type(error)):
            await guard.call(ends, error)
        assert await state_of(store) == "half_open"
    assert await guard.call(lambda: 1) == 1
    assert await state_of(store) == "closed"


async def test_what_a_retry_lists_is_no_failure() -> None:
    store = MemoryStore()
    guard = CircuitBreaker("shop", failure_threshold=1, store=store)
    for listed in ("PaymentError", OSError):
        with pytest.raises(PaymentError):
            async with guard.guard(retry=Retry(non_retryable=(listed,))):
                fails()
    assert await store.get(STATE) is None


@pytest.mark.parametrize("error", [ModelUnavailable("overloaded"), ValueError("odd"), TimeoutError()])
async def test_what_is_a_failure(error: Exception) -> None:
    store = MemoryStore()
    await fail(CircuitBreaker("shop", failure_threshold=1, store=store), error=error)
    assert await state_of(store) == "open"


async def test_the_closed_path_is_one_read(store: StateStore) -> None:
    watched = Between(store)
    guard = CircuitBreaker("shop", store=watched)
    for _ in range(3):
        await guard.call(lambda: None)
    assert watched.asked == ["get"] * 3
    await fail(guard)
    await guard.call(lambda: None)
    watched.asked.clear()
    await guard.call(lambda: None)
    assert watched.asked == ["get"]


async def test_functions_are_called_as_they_are() -> None:
    guard = CircuitBreaker("shop", store=MemoryStore())

    async def both(a: int, *, b: int) -> tuple[int, int]:
        return a, b

    assert await guard.call(both, 1, b=2) == (1, 2)
    assert await guard.call(lambda a, b: both(a, b=b), 1, b=2) == (1, 2)
    assert await guard.call(dict, a=1) == {"a": 1}


# whose store


async def test_its_own_store_goes_before_the_given_one() -> None:
    own, given = MemoryStore(), MemoryStore()
    for guard in (CircuitBreaker("own", failure_threshold=1, store=own), CircuitBreaker("given", failure_threshold=1)):
        with pytest.raises(PaymentError):
            async with guard.guard(given):
                fails()
    assert [found.name for found in await breakers(own)] == ["own"]
    assert [found.name for found in await breakers(given)] == ["given"]
    with pytest.raises(
        InvalidSetting, match=r"breaker 'given' has no store here; give it one, store=open_store\(url\)"
    ):
        await CircuitBreaker("given").call(fails)


async def test_while_the_store_is_away_calls_go_on_unguarded(caplog: pytest.LogCaptureFixture) -> None:
    guard = CircuitBreaker("shop", failure_threshold=1, store=Between(MemoryStore(), away=True))
    assert await guard.call(lambda: 1) == 1
    await fail(guard, 3)
    assert "breaker 'shop' guards nothing for now: the state store is away" in caplog.text


async def test_a_store_that_goes_away_meanwhile_changes_no_result() -> None:
    for ends in (lambda: 1, fails):
        store = Between(MemoryStore())
        guard = await opened(store)
        await recovered(store)
        try:
            async with guard.guard():
                store.away = True
                assert ends() == 1
        except PaymentError:
            assert ends is fails
        store.away = False
        assert await state_of(store) == "half_open"
        with pytest.raises(BreakerOpen):
            await guard.call(pytest.fail, "called")


async def test_a_store_that_hangs_is_one_that_is_away(caplog: pytest.LogCaptureFixture, mocker: MockerFixture) -> None:
    mocker.patch.object(shared, "ANSWER", 0.05)
    store = Between(MemoryStore())
    guard = CircuitBreaker("shop", failure_threshold=1, store=store)
    mocker.patch.object(store, "get_versioned", hang)
    async with asyncio.timeout(DEADLINE / 2):
        assert await guard.call(lambda: 1) == 1
    assert "breaker 'shop' guards nothing for now: the state store memory://" in caplog.text


@pytest.mark.parametrize("recovery_timeout", [1e15, 1e300, timedelta.max])
async def test_it_may_stay_open_for_ever(store: StateStore, recovery_timeout: Any) -> None:
    guard = CircuitBreaker("shop", failure_threshold=1, recovery_timeout=recovery_timeout, store=store)
    await fail(guard)
    with pytest.raises(BreakerOpen):
        await guard.call(pytest.fail, "called")


@pytest.mark.parametrize("since", ["9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"])
async def test_an_entry_from_the_ends_of_the_calendar_keeps_it_open(since: str) -> None:
    store = MemoryStore()
    await store.set(STATE, {"state": "open", "failures": 1, "changes": 1, "since": since})
    await store.set(PROBE, "open")
    with pytest.raises(BreakerOpen) as caught:
        await CircuitBreaker("shop", store=store).call(pytest.fail, "called")
    assert 0 <= caught.value.retry_after <= 30


async def test_an_entry_that_makes_no_sense_is_that_of_a_new_breaker(store: StateStore) -> None:
    guard = CircuitBreaker("shop", failure_threshold=1, recovery_timeout=LONG, store=store)
    since = datetime.now(UTC).isoformat()
    good = {"state": "open", "failures": 1, "changes": 1, "since": since}
    bad: list[Any] = [None, "open", [], {}, {**good, "state": "ajar"}, {**good, "failures": -1}]
    bad += [{**good, "changes": "1"}, {**good, "failures": True}, {**good, "since": "soon"}, {**good, "since": None}]
    bad += [{**good, "since": "2026-01-01T00:00:00"}]
    for entry in bad:
        await store.set(STATE, entry)
        assert await guard.call(lambda: 1) == 1
    await fail(guard)
    assert (await store.get(STATE))["state"] == "open"


# a process lost between any two writes leaves something sound


async def calls(guard: CircuitBreaker) -> None:
    """Two failures, a probe that fails, one that is cut off, one that succeeds."""
    await fail(guard, 2)
    await recovered(guard.store)  # type: ignore[arg-type]  # it has one
    await fail(guard)
    await recovered(guard.store)  # type: ignore[arg-type]
    await fail(guard, error=InvalidInput("no"))
    await guard.call(lambda: None)


async def test_a_process_lost_between_any_two_writes() -> None:
    writes = 0
    seen = set()
    while True:
        store = MemoryStore()
        guard = CircuitBreaker("shop", failure_threshold=2, recovery_timeout=LONG, store=Between(store, writes=writes))
        try:
            await calls(guard)
            break
        except Killed:
            seen.add((await state_of(store), await store.get(PROBE) is not None))
        await sound(store)
        writes += 1
    assert writes > 12
    assert len(seen) > 4


async def sound(store: MemoryStore) -> None:
    """Whatever is left: once the leases are over one probe, and only one, is let in, and then all."""
    guard = CircuitBreaker("shop", failure_threshold=2, recovery_timeout=LONG, store=store)
    if await state_of(store) != "closed":
        await store.delete(PROBE)
        async with guard.guard():
            assert await state_of(store) == "half_open"
            with pytest.raises(BreakerOpen):
                await guard.call(pytest.fail, "called")
    for _ in range(2):
        await guard.call(lambda: None)
    assert await state_of(store) == "closed"
    # and it opens again, for its whole time
    await fail(guard, 2)
    assert await state_of(store) == "open"
    with pytest.raises(BreakerOpen):
        await guard.call(pytest.fail, "called")


# what is told of it


async def test_changes_are_logged_and_counted(caplog: pytest.LogCaptureFixture, mocker: MockerFixture) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    mocker.patch.object(metrics, "get_meter", provider.get_meter)
    telemetry._breaker_changes.cache_clear()
    store = MemoryStore()
    with caplog.at_level(logging.WARNING):
        guard = await opened(store)
        await recovered(store)
        await guard.call(lambda: None)
    telemetry._breaker_changes.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "breaker 'shop' is open, it was closed (failures in a row: 1)",
        "breaker 'shop' is half_open, it was open (failures in a row: 1)",
        "breaker 'shop' is closed, it was half_open (failures in a row: 0)",
    ]
    data: Any = reader.get_metrics_data()
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    assert metric.name == "beluga.breaker.changes"
    counted = {(point.attributes["name"], point.attributes["state"]): point.value for point in metric.data.data_points}
    assert counted == {("shop", "open"): 1, ("shop", "half_open"): 1, ("shop", "closed"): 1}
    provider.shutdown()


async def test_all_breakers_of_a_store(store: StateStore) -> None:
    assert await breakers(store) == []
    for name, threshold in (("b", 1), ("a:x", 5)):
        with pytest.raises(PaymentError):
            await CircuitBreaker(name, failure_threshold=threshold, store=store).call(fails)
    first, second = await breakers(store)
    assert first == BreakerState(name="a:x", state="closed", failures=1, changes=0, since=first.since)
    assert second == BreakerState(name="b", state="open", failures=1, changes=1, since=second.since)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": ""}, r"the name '' of a breaker must be 1 to 200 letters, digits, '-', '_', '.' or ':'"),
        ({"name": "a/b"}, "the name 'a/b'"),
        ({"name": "a" * 201}, "the name 'aaa"),
        ({"name": 7}, "the name 7"),
        ({"failure_threshold": 0}, "failure_threshold of breaker 'shop' is 0, it must be a whole number, 1 or more"),
        ({"failure_threshold": True}, "failure_threshold of breaker 'shop' is True"),
        ({"recovery_timeout": 0}, "recovery_timeout of breaker 'shop' is 0, it must be 0.001 seconds or more, or a"),
        ({"recovery_timeout": float("nan")}, "is nan"),
        ({"recovery_timeout": "30s"}, "is '30s'"),
        ({"store": "redis://localhost"}, "the store of breaker 'shop' is a str; give a StateStore, as open_store"),
    ],
)
def test_what_cannot_be_used_is_refused_when_it_is_made(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        CircuitBreaker(**{"name": "shop", **settings})
    assert says in str(caught.value)


def test_a_breaker_is_plain_data() -> None:
    guard = CircuitBreaker("shop", recovery_timeout=timedelta(minutes=1))
    assert guard == CircuitBreaker("shop", recovery_timeout=timedelta(minutes=1))
    assert repr(guard).startswith("CircuitBreaker(name='shop', failure_threshold=5, recovery_timeout=")


# several processes


async def process(url: str, what: str, *options: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.resilience.caller", url, what, *options),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )


async def told(caller: asyncio.subprocess.Process) -> str:
    assert caller.stdout is not None
    return (await caller.stdout.readline()).decode().strip()


async def test_failures_of_all_processes_count_together(shared_place: Place) -> None:
    url = shared_place.url()
    store = open_store(url)
    async with asyncio.timeout(DEADLINE):
        callers = [await process(url, "fail", "20") for _ in range(3)]
        assert [await caller.wait() for caller in callers] == [0, 0, 0]
    assert (await store.get(STATE))["failures"] == 60
    await store.close()


async def test_a_killed_prober_is_succeeded(shared_place: Place) -> None:
    url = shared_place.url()
    store = open_store(url)
    guard = await opened(store)
    await recovered(store)
    async with asyncio.timeout(DEADLINE):
        prober = await process(url, "probe", "1.2")
        assert await told(prober) == "probing"
        await asyncio.sleep(1.5)  # longer than its lease, which it renews
        with pytest.raises(BreakerOpen):
            await guard.call(pytest.fail, "called")
        prober.kill()
        await prober.wait()
        with pytest.raises(BreakerOpen):
            await guard.call(pytest.fail, "called")
        while True:
            try:
                assert await guard.call(lambda: "well") == "well"
                break
            except BreakerOpen:
                await asyncio.sleep(0.05)
    assert await state_of(store) == "closed"
    await store.close()
