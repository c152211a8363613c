from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from beluga_airflow import CircuitBreaker, InvalidInput, RateLimit, Retry
from beluga_airflow.errors import BreakerOpen, InvalidSetting, LimitReached
from beluga_airflow.resilience import call
from beluga_airflow.state import StateStore
from beluga_airflow.state.memory import MemoryStore

QUICK = Retry(maximum_attempts=4, initial_interval=0.001, maximum_interval=0.001)


class Flaky:
    """Fails so many times, then returns what it was given."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self.failures, self.error = failures, error or OSError("no answer")
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return args, kwargs


async def test_without_anything_it_is_just_called() -> None:
    assert await call(Flaky(0), 1, b=2) == ((1,), {"b": 2})
    with pytest.raises(OSError, match="no answer"):
        await call(Flaky(1))


async def test_a_sync_function_blocks_nobody() -> None:
    gate = threading.Event()
    waiting = asyncio.create_task(call(gate.wait, 20))
    await asyncio.sleep(0.05)
    gate.set()
    assert await waiting is True


async def test_it_is_called_again_as_the_retry_says() -> None:
    flaky = Flaky(3)
    assert await call(flaky, 7, retry=QUICK) == ((7,), {})
    assert flaky.calls == 4
    for error, times in ((OSError("no"), 4), (InvalidInput("no such order"), 1)):
        flaky = Flaky(9, error)
        with pytest.raises(type(error)):
            await call(flaky, retry=QUICK)
        assert flaky.calls == times


async def test_retry_then_breaker_then_limit(store: StateStore) -> None:
    guards: dict[str, Any] = {
        "breaker": CircuitBreaker("shop", failure_threshold=2, recovery_timeout=3600),
        "limit": RateLimit("shop", requests_per_minute=100, concurrent=1),
        "store": store,
    }
    flaky = Flaky(9)
    with pytest.raises(BreakerOpen):
        await call(flaky, retry=Retry(maximum_attempts=3, initial_interval=0), **guards)
    # each attempt asked the breaker, and what it kept back took no place of the limit
    assert flaky.calls == 2
    assert sum((await store.get("beluga/limits/shop"))["requests"].values()) == 2


async def test_what_a_limit_keeps_back_is_no_failure_for_the_breaker() -> None:
    store = MemoryStore()
    limit = RateLimit("shop", concurrent=1, max_wait=0)
    guards: dict[str, Any] = {"breaker": CircuitBreaker("shop", failure_threshold=1), "limit": limit, "store": store}
    async with limit.guard(store):
        for _ in range(3):
            with pytest.raises(LimitReached):
                await call(Flaky(0), **guards)
    assert await store.get("beluga/breakers/shop") is None
    assert await call(Flaky(0), 1, **guards) == ((1,), {})


async def test_what_the_retry_lists_is_no_failure_for_the_breaker() -> None:
    store = MemoryStore()
    with pytest.raises(OSError, match="no answer"):
        await call(
            Flaky(1),
            retry=Retry(non_retryable=(OSError,)),
            breaker=CircuitBreaker("shop", failure_threshold=1),
            store=store,
        )
    assert await store.get("beluga/breakers/shop") is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"retry": 3}, "retry is 3, it must be a Retry"),
        ({"breaker": "shop"}, "breaker is 'shop', it must be a CircuitBreaker"),
        ({"breaker": RateLimit("shop", concurrent=1)}, "breaker is RateLimit("),
        ({"limit": CircuitBreaker("shop")}, "limit is CircuitBreaker("),
        ({"limit": RateLimit}, "it must be a RateLimit"),
        ({"limit": RateLimit("shop", concurrent=1)}, "limit 'shop' has no store here; give it one"),
    ],
)
async def test_what_cannot_be_used_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        await call(pytest.fail, "called", **wrong)
    assert says in str(caught.value)
