"""What does a circuit breaker cost a call while it is closed?"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from bare import Pair, pairs
from harness import Answer, Comparison, Unequal, taking_turns, text

from beluga_airflow import CircuitBreaker
from beluga_airflow.resilience.breaker import STATES

__all__ = ["measured"]

RUNS = 50
ROUNDS = 21


def measured(runs: int = RUNS, rounds: int = ROUNDS) -> Answer:
    """A no-op coroutine behind a breaker, beside a get of the breaker's own entry from its store, and the bare call."""
    return asyncio.run(_measured(runs, rounds))


async def _measured(runs: int, rounds: int) -> Answer:
    async with pairs() as (found, away):
        samples = [await _turns(pair, runs, rounds) for pair in found]
    return Answer(
        question=f"What does a closed breaker cost a call? {rounds} rounds",
        unit="microseconds a call",
        comparisons=[Comparison(work=pair.name, samples=turns) for pair, turns in zip(found, samples, strict=True)],
        versions={name: version for pair in found for name, version in pair.versions.items()},
        notes=away,
    )


async def _turns(pair: Pair, runs: int, rounds: int) -> dict[str, list[float]]:
    calls = 0

    async def ask() -> None:
        nonlocal calls
        calls += 1

    async def fail() -> None:
        raise ConnectionError

    breaker = CircuitBreaker("payments", store=pair.ours)
    with suppress(ConnectionError):
        await breaker.call(fail)  # until something fails there is no entry
    if await pair.ours.get(f"{STATES}payments") is None:
        raise Unequal(f"{pair.name}: the breaker has no entry, so a get of it is other work")
    await breaker.call(ask)
    calls = 0
    works = {"beluga": lambda: breaker.call(ask), "get": lambda: pair.ours.get(f"{STATES}payments"), "call": ask}
    samples = await taking_turns(works, runs=runs, rounds=rounds)
    if calls != 2 * runs * (rounds + 1):
        raise Unequal(f"{pair.name}: of {2 * runs * (rounds + 1)} calls {calls} were made")
    return samples


if __name__ == "__main__":
    print(text(measured()))
