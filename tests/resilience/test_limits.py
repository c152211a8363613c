from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest_mock import MockerFixture

from beluga_airflow import RateLimit, resilience
from beluga_airflow.errors import InvalidSetting, LimitReached
from beluga_airflow.resilience import limits, shared
from beluga_airflow.resilience.limits import LimitState
from beluga_airflow.resilience.limits import limits as limits_of
from beluga_airflow.state import StateStore, open_store
from beluga_airflow.state.memory import MemoryStore
from tests.resilience.stores import Between, hang
from tests.resilience.test_breaker import process, told
from tests.state.backends import Place

DEADLINE = 60
KEY = "beluga/limits/shop"


class Clock:
    """Stands in for the clock of a worker, and for its sleep, which takes no time."""

    def __init__(self, at: float = 1_800_000_000.0) -> None:
        self.at = at
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.at

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.at += seconds


@pytest.fixture
def clock(mocker: MockerFixture) -> Clock:
    clock = Clock()
    mocker.patch.object(limits, "now", clock)
    return clock


async def waits(guard: RateLimit, **options: Any) -> float:
    """Seconds that a call would wait, which is booked."""
    _, wait = await limits._Keeper(guard, guard.store).book(options.get("tokens", 0), options.get("patience", 1_000.0))  # type: ignore[arg-type]  # it has one
    return wait


# requests and tokens a minute


async def test_bursts_are_allowed_and_what_comes_then_waits(store: StateStore, clock: Clock) -> None:
    guard = RateLimit("shop", requests_per_minute=3, store=store)
    assert [await waits(guard) for _ in range(7)] == [0.0, 0.0, 0.0, 65.0, 65.0, 65.0, 130.0]
    clock.at += 131
    assert [await waits(guard) for _ in range(3)] == [0.0, 0.0, 64.0]


async def test_nobody_waits_longer_than_he_can_and_then_books_nothing(store: StateStore, clock: Clock) -> None:
    guard = RateLimit("shop", requests_per_minute=1, max_wait=30, store=store)
    assert await guard.call(lambda: 1) == 1
    before = await store.get_versioned(KEY)
    clock.at += 40
    for wait, within, says in ((20, None, None), (None, None, 30), (None, 10, 10), (None, -1, 0)):
        if wait:
            clock.at -= wait
        with pytest.raises(LimitReached) as caught:
            async with guard.guard(within=within):
                pytest.fail("let through")
        if says is not None:
            assert f"this call may wait {says} s" in str(caught.value)
        assert str(caught.value).startswith(
            "limit 'shop' is reached (1 requests a minute): its next place is 45 s away"
        )
        assert caught.value.retry_after == pytest.approx(45)
    assert await store.get_versioned(KEY) == before


async def test_tokens_are_booked_by_estimate_and_settled(store: StateStore, clock: Clock) -> None:
    guard = RateLimit("shop", tokens_per_minute=100, max_wait=0, store=store)
    async with guard.guard(tokens=80) as booking:
        with pytest.raises(LimitReached, match="100 tokens a minute"):
            await waits(guard, tokens=30, patience=0.0)
        booking.settle(50)
    assert await waits(guard, tokens=30) == 0.0
    async with guard.guard(tokens=20) as booking:
        booking.settle(70)  # more than anybody thought
    assert (await limits_of(store))[0].tokens == 150
    # what was not known before holds back those who come after
    assert await waits(guard, tokens=1) == 65.0
    assert await waits(guard, tokens=0) == 0.0


async def test_what_did_not_say_what_it_used_used_its_estimate(clock: Clock) -> None:
    guard = RateLimit("shop", tokens_per_minute=100, store=MemoryStore())
    with pytest.raises(OSError, match="no answer"):
        async with guard.guard(tokens=80):
            raise OSError("no answer")
    assert await waits(guard, tokens=30) == 65.0


async def test_who_does_not_say_how_many_tokens_uses_one(clock: Clock) -> None:
    guard = RateLimit("shop", tokens_per_minute=2, max_wait=0, store=MemoryStore())
    for _ in range(2):
        await guard.call(lambda: None)
    with pytest.raises(LimitReached, match="2 tokens a minute"):
        await guard.call(pytest.fail, "called")
    with pytest.raises(LimitReached, match="2 tokens a minute"):
        await resilience.call(pytest.fail, "called", limit=guard)


async def test_an_estimate_above_the_bound_books_all_of_it(clock: Clock) -> None:
    guard = RateLimit("shop", tokens_per_minute=100, store=MemoryStore())
    assert [await waits(guard, tokens=100_000) for _ in range(2)] == [0.0, 65.0]


async def test_settling_comes_too_late_for_a_minute_that_is_over(clock: Clock) -> None:
    guard = RateLimit("shop", tokens_per_minute=100, store=MemoryStore())
    async with guard.guard(tokens=10) as booking:
        clock.at += 120
        booking.settle(5_000)
    assert await waits(guard, tokens=100) == 0.0


async def test_both_bounds_hold(clock: Clock) -> None:
    guard = RateLimit("shop", requests_per_minute=2, tokens_per_minute=10, store=MemoryStore())
    assert await waits(guard, tokens=10) == 0.0
    assert await waits(guard, tokens=1) == 65.0
    assert await waits(guard) == 0.0
    assert await waits(guard) == 65.0


async def test_a_call_waits_until_its_place(clock: Clock, mocker: MockerFixture) -> None:
    guard = RateLimit("shop", requests_per_minute=1, max_wait=100, store=MemoryStore())
    mocker.patch("asyncio.sleep", clock.sleep)
    began = clock.at
    for _ in range(2):
        await guard.call(lambda: None)
    assert (clock.at - began, clock.slept) == (65.0, [65.0])


async def test_who_is_cancelled_while_waiting_gives_the_place_back(store: StateStore, clock: Clock) -> None:
    guard = RateLimit("shop", requests_per_minute=1, tokens_per_minute=10, concurrent=5, max_wait=100, store=store)
    await guard.call(lambda: None)
    waiting = asyncio.create_task(guard.call(pytest.fail, "called"))
    async with asyncio.timeout(DEADLINE):
        while not (await store.get(KEY))["holders"]:  # noqa: ASYNC110  # of the store
            await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (await store.get(KEY))["holders"] == {}
    assert await waits(guard) == 65.0


@given(
    bound=st.integers(1, 8),
    calls=st.lists(st.tuples(st.floats(0, 40), st.integers(1, 5), st.integers(0, 12)), max_size=25),
)
@settings(deadline=None)
def test_no_minute_ever_exceeds_the_bound(bound: int, calls: list[tuple[float, int, int]]) -> None:
    """Whoever comes whenever, with requests of any size: the moments at which they begin, in any 60 seconds."""
    guard = RateLimit("shop", requests_per_minute=bound, tokens_per_minute=10)
    moment, entry = 1_800_000_000.0, {}
    begun: list[tuple[float, int]] = []
    for passed, several, tokens in calls:
        moment += passed
        for _ in range(several):
            page = limits._Page(entry, moment)
            number = min(tokens, 10)
            bucket = page.first(guard, number, moment)
            page.add(guard, bucket, 1, number)
            entry = page.to_json()
            begun.append((max(moment, bucket * limits.BUCKET), number))
    for start, _ in begun:
        within = [number for at, number in begun if start <= at < start + 60]
        assert len(within) <= bound
        assert sum(within) <= 10


# calls at once


async def test_no_more_at_once_than_that(store: StateStore) -> None:
    guard = RateLimit("shop", concurrent=3, store=store)
    running, most = 0, 0

    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1

    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(*(guard.call(work) for _ in range(12)))
    assert most == 3
    assert (await store.get(KEY))["holders"] == {}


async def test_a_failed_call_gives_its_place_back(store: StateStore) -> None:
    guard = RateLimit("shop", concurrent=1, max_wait=0, store=store)

    async def fails(error: BaseException) -> None:
        with pytest.raises(LimitReached, match=r"1 calls at once\): no place came free") as caught:
            await guard.call(pytest.fail, "called")
        assert caught.value.retry_after is None
        raise error

    for error in (OSError("no"), asyncio.CancelledError(), SystemExit(1)):
        with pytest.raises(type(error)):
            await guard.call(fails, error)
    assert await guard.call(lambda: 1) == 1


async def test_who_is_cancelled_while_booking_leaves_no_place_behind(store: StateStore, mocker: MockerFixture) -> None:
    guard = RateLimit("shop", requests_per_minute=9, concurrent=1, max_wait=0, store=store)
    swap, landed = store.compare_and_swap, asyncio.Event()

    async def cut_short(*args: Any, **options: Any) -> None:
        await swap(*args, **options)
        landed.set()
        mocker.stop(patched)
        await hang()

    patched = mocker.patch.object(store, "compare_and_swap", cut_short)
    booking = asyncio.create_task(guard.call(pytest.fail, "called"))
    await landed.wait()
    booking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await booking
    assert (await limits_of(store))[0].holders == 0
    assert await guard.call(lambda: 1) == 1


async def test_who_is_cancelled_while_it_ends_leaves_no_place_behind(store: StateStore, mocker: MockerFixture) -> None:
    guard = RateLimit("shop", concurrent=1, max_wait=0, store=store)
    get, ending, gate = store.get_versioned, asyncio.Event(), asyncio.Event()

    async def slow(key: str) -> Any:
        ending.set()
        await gate.wait()
        return await get(key)

    async def holds() -> None:
        async with guard.guard():
            mocker.patch.object(store, "get_versioned", slow)

    holding = asyncio.create_task(holds())
    await ending.wait()
    holding.cancel()
    await asyncio.sleep(0.01)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await holding
    assert await guard.call(lambda: 1) == 1


async def test_a_call_holds_its_place_as_long_as_it_runs(store: StateStore, mocker: MockerFixture) -> None:
    mocker.patch.object(limits, "LEASE", 0.9)
    guard = RateLimit("shop", concurrent=1, max_wait=0, store=store)
    async with guard.guard():
        for _ in range(3):
            await asyncio.sleep(0.45)
            with pytest.raises(LimitReached):
                await guard.call(pytest.fail, "called")


async def test_the_place_of_a_killed_call_comes_free(shared_place: Place) -> None:
    url = shared_place.url()
    store = open_store(url)
    guard = RateLimit("shop", concurrent=1, max_wait=0, store=store)
    async with asyncio.timeout(DEADLINE):
        holder = await process(url, "hold", "1.2")
        assert await told(holder) == "holding"
        await asyncio.sleep(1.5)
        with pytest.raises(LimitReached):
            await guard.call(pytest.fail, "called")
        holder.kill()
        await holder.wait()
        assert await RateLimit("shop", concurrent=1, store=store).call(lambda: 1) == 1
    await store.close()


async def test_several_processes_share_the_bound(shared_place: Place) -> None:
    url = shared_place.url()
    async with asyncio.timeout(DEADLINE):
        callers = [await process(url, "begin", "15") for _ in range(3)]
        outputs = [(await caller.communicate())[0].decode().split() for caller in callers]
    assert [caller.returncode for caller in callers] == [0, 0, 0]
    lines = [line for output in outputs for line in output]
    assert len(lines) == 45
    assert lines.count("reached") == 25
    store = open_store(url)
    assert [found.requests for found in await limits_of(store)] == [20]
    await store.close()


# its store


async def test_one_write_books_and_nothing_more_is_asked(store: StateStore) -> None:
    watched = Between(store)
    guard = RateLimit("shop", requests_per_minute=10, store=watched)
    await guard.call(lambda: None)
    assert watched.asked == ["get", "write"]


async def test_while_the_store_is_away_calls_go_on_unlimited(caplog: pytest.LogCaptureFixture) -> None:
    store = Between(MemoryStore(), away=True)
    guard = RateLimit("shop", concurrent=1, max_wait=0, store=store)
    async with guard.guard(tokens=5) as booking, guard.guard():
        booking.settle(7)
    assert "limit 'shop' limits nothing for now: the state store is away" in caplog.text
    store.away = False
    async with guard.guard():
        store.away = True
    store.away = False


async def test_behind_a_store_that_hangs_nobody_waits_for_all_who_came_before(mocker: MockerFixture) -> None:
    mocker.patch.object(shared, "TURN", 0.05)
    store = Between(MemoryStore())
    gate = asyncio.Event()

    async def hangs(key: str) -> None:
        reading.append(key)
        await gate.wait()

    reading: list[str] = []
    mocker.patch.object(store, "get_versioned", hangs)
    guard = RateLimit("shop", requests_per_minute=100, store=store)
    calls = [asyncio.create_task(guard.call(lambda: None)) for _ in range(5)]
    async with asyncio.timeout(DEADLINE):
        while len(reading) < 5:  # noqa: ASYNC110  # of the store
            await asyncio.sleep(0.01)
    for call in calls:
        call.cancel()
    assert all(
        isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*calls, return_exceptions=True)
    )


async def test_a_store_that_hangs_is_one_that_is_away(caplog: pytest.LogCaptureFixture, mocker: MockerFixture) -> None:
    mocker.patch.object(shared, "ANSWER", 0.05)
    store = Between(MemoryStore())
    guard = RateLimit("shop", concurrent=2, store=store)
    async with asyncio.timeout(DEADLINE / 2):
        async with guard.guard():
            mocker.patch.object(store, "compare_and_swap", hang)
        async with guard.guard() as booking:
            assert booking.waited == 0
    assert "limit 'shop' limits nothing for now: the state store memory://" in caplog.text


async def test_many_of_one_process_take_turns(store: StateStore) -> None:
    guard = RateLimit("shop", requests_per_minute=1_000, concurrent=1_000, store=store)
    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(*(guard.call(asyncio.sleep, 0) for _ in range(100)))
    (found,) = await limits_of(store)
    assert (found.requests, found.holders) == (100, 0)


async def test_an_entry_that_makes_no_sense_counts_for_nothing(store: StateStore) -> None:
    guard = RateLimit("shop", requests_per_minute=1, concurrent=1, max_wait=0, store=store)
    now = int(time.time() // limits.BUCKET)
    bad: list[Any] = [None, 7, [], {"requests": 1, "tokens": [], "holders": "x"}, {"holders": {"a": "b", "c": 1e300}}]
    bad += [{"requests": {"x": 1, str(now): "1", str(now + 1): -5, "9" * 5_000: 1, str(now + 10**7): 1}}]
    for entry in bad:
        await store.set(KEY, entry)
        assert await guard.call(lambda: 1) == 1


async def test_what_is_over_is_forgotten(store: StateStore, clock: Clock) -> None:
    guard = RateLimit("shop", requests_per_minute=100, concurrent=5, store=store)
    for _ in range(30):
        await guard.call(lambda: None)
        clock.at += 10
    entry = await store.get(KEY)
    assert len(entry["requests"]) <= limits.RUN
    assert entry["holders"] == {}


async def test_an_unused_limit_leaves_nothing(clock: Clock, mocker: MockerFixture) -> None:
    store = MemoryStore()
    swap = mocker.spy(store, "compare_and_swap")
    await RateLimit("shop", requests_per_minute=100, store=store).call(lambda: None)
    assert 60 <= swap.call_args.kwargs["ttl"] <= 70


async def test_all_limits_of_a_store(store: StateStore, clock: Clock) -> None:
    assert await limits_of(store) == []
    async with (
        RateLimit("b", tokens_per_minute=100, concurrent=2, store=store).guard(tokens=30),
        RateLimit("a", requests_per_minute=5, store=store).guard(),
    ):
        assert await limits_of(store) == [
            LimitState(name="a", requests=1, tokens=0, holders=0),
            LimitState(name="b", requests=0, tokens=30, holders=1),
        ]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "limit 'shop' limits nothing; give at least one of requests_per_minute, tokens_per_minute, concurrent"),
        ({"name": "a b", "concurrent": 1}, "the name 'a b' of a limit must be"),
        ({"requests_per_minute": 0}, "requests_per_minute of limit 'shop' is 0, it must be a whole number, 1 or more"),
        ({"tokens_per_minute": 1.5}, "tokens_per_minute of limit 'shop' is 1.5"),
        ({"concurrent": "3"}, "concurrent of limit 'shop' is '3'"),
        ({"concurrent": 1, "max_wait": -1}, "max_wait of limit 'shop' is -1, it must be 0 seconds or more"),
        ({"concurrent": 1, "max_wait": 50_000}, "max_wait of limit 'shop' is 50000, it must be at most 43200 s"),
        ({"concurrent": 1, "store": 7}, "the store of limit 'shop' is a int"),
    ],
)
def test_what_cannot_be_used_is_refused_when_it_is_made(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        RateLimit(**{"name": "shop", **settings})
    assert says in str(caught.value)
