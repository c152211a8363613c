"""A process that calls behind guards: ``python -m tests.resilience.caller URL WHAT OPTION``."""

from __future__ import annotations

import asyncio
import sys
import time

from beluga_airflow import CircuitBreaker, RateLimit
from beluga_airflow.resilience import breaker, limits
from beluga_airflow.state import StateStore, open_store


async def fail(store: StateStore, times: str) -> None:
    """Fail so often behind one breaker that stays closed."""
    guard = CircuitBreaker("shop", failure_threshold=1_000, store=store)
    for _ in range(int(times)):
        try:
            async with guard.guard():
                raise OSError("no answer")
        except OSError:
            continue


async def probe(store: StateStore, lease: str) -> None:
    """Be the probe, with a lease of so many seconds, until killed."""
    breaker.LEASE = float(lease)
    async with CircuitBreaker("shop", store=store).guard():
        print("probing", flush=True)
        await asyncio.sleep(3600)


async def hold(store: StateStore, lease: str) -> None:
    """Take the only place of a limit, with a lease of so many seconds, until killed."""
    limits.LEASE = float(lease)
    async with RateLimit("shop", concurrent=1, store=store).guard():
        print("holding", flush=True)
        await asyncio.sleep(3600)


async def begin(store: StateStore, times: str) -> None:
    """Begin so many calls of a limit, all at once, and tell when each began."""
    guard = RateLimit("shop", requests_per_minute=20, max_wait=0, store=store)

    async def one() -> None:
        try:
            async with guard.guard():
                print(time.time(), flush=True)
        except limits.LimitReached:
            print("reached", flush=True)

    await asyncio.gather(*(one() for _ in range(int(times))))


async def main(url: str, what: str, option: str) -> None:
    store = open_store(url)
    await {"fail": fail, "probe": probe, "hold": hold, "begin": begin}[what](store, option)
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
