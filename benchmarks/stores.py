"""What do a get, a set, a compare-and-swap and a watched change cost, beside the same kept by hand with the client?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

from bare import Bare, Pair, Plain, pairs
from harness import Answer, Comparison, Unequal, taking_turns, text

from beluga_airflow.state import Change, StateStore

__all__ = ["measured"]

RUNS = {"get": 100, "set": 50, "compare-and-swap": 50, "watch": 2}
"""Of a work in one turn: short turns, so that what else the machine does hits all sides alike."""
ROUNDS = 21
PATIENCE = 30.0
"""Seconds after which a watcher that was told nothing fails the question."""
KEY = "orders/o-123"
VALUE = {"order_id": "o-123", "status": "paid", "total": 99.5, "lines": [{"sku": "40117", "quantity": 2}] * 3}


def measured(runs: Mapping[str, int] = RUNS, rounds: int = ROUNDS) -> Answer:
    """One after the other: no side gains from doing several at once."""
    return asyncio.run(_measured(runs, rounds))


async def _measured(runs: Mapping[str, int], rounds: int) -> Answer:
    async with pairs() as (found, away):
        comparisons = [
            Comparison(
                work=f"{pair.name}: {work}",
                samples=await WORKS[work](pair, runs[work], rounds),
                at_most={"bare": pair.targets[work]} if work in pair.targets else {},
            )
            for pair in found
            for work in WORKS
        ]
        versions = {name: version for pair in found for name, version in pair.versions.items()}
    return Answer(
        question=f"What does shared state cost? One key of 200 characters, {rounds} rounds",
        unit="microseconds",
        comparisons=comparisons,
        versions=versions,
        notes=away,
    )


async def _gets(pair: Pair, runs: int, rounds: int) -> dict[str, list[float]]:
    def get(side: Plain | StateStore) -> Callable[[], Awaitable[Any]]:
        async def run() -> None:
            if await side.get(KEY) != VALUE:
                raise Unequal(f"{pair.name}: {type(side).__name__} does not give back what was stored")

        return run

    sides = _sides(pair)
    for side in sides.values():
        await side.set(KEY, VALUE)
    return await taking_turns({name: get(side) for name, side in sides.items()}, runs=runs, rounds=rounds)


async def _sets(pair: Pair, runs: int, rounds: int) -> dict[str, list[float]]:
    works = {name: partial(side.set, KEY, VALUE) for name, side in _sides(pair).items()}
    return await taking_turns(works, runs=runs, rounds=rounds)


def _sides(pair: Pair) -> dict[str, Plain | StateStore]:
    return {"beluga": pair.ours, "bare": pair.bare, "plain": pair.plain}


async def _swaps(pair: Pair, runs: int, rounds: int) -> dict[str, list[float]]:
    async def swap(side: Bare | StateStore) -> Callable[[], Awaitable[Any]]:
        version = await side.set(KEY, VALUE)

        async def run() -> None:
            nonlocal version
            swapped = await side.compare_and_swap(KEY, VALUE, version=version)
            if swapped != version + 1:
                raise Unequal(f"{pair.name}: {type(side).__name__} swaps version {version} for {swapped}")
            version = swapped

        return run

    return await taking_turns(
        {"beluga": await swap(pair.ours), "bare": await swap(pair.bare)}, runs=runs, rounds=rounds
    )


async def _watched(pair: Pair, runs: int, rounds: int) -> dict[str, list[float]]:
    """From the beginning of a set until a watcher that waits for it has the change."""
    await pair.ours.set(KEY, VALUE)
    await pair.bare.set(KEY, VALUE)
    async with _waiting(pair.reader) as ours, _waiting(pair.bare) as bare:
        works = {"beluga": _heard(pair, pair.ours, ours), "bare": _heard(pair, pair.bare, bare)}
        return await taking_turns(works, runs=runs, rounds=rounds)


def _heard(pair: Pair, side: Bare | StateStore, told: asyncio.Queue[Any]) -> Callable[[], Awaitable[Any]]:
    number = 0

    async def run() -> None:
        nonlocal number
        number += 1
        await side.set(KEY, number)
        async with asyncio.timeout(PATIENCE):
            value = await told.get()
        if isinstance(value, Exception):
            raise value
        if value != number:
            raise Unequal(f"{pair.name}: {type(side).__name__} was told {value}, and should be told {number}")

    return run


@asynccontextmanager
async def _waiting(side: Bare | StateStore) -> AsyncIterator[asyncio.Queue[Any]]:
    """What a watcher is told that always waits for the next change."""
    told: asyncio.Queue[Any] = asyncio.Queue()

    async def watch() -> None:
        try:
            async with aclosing(side.watch(KEY)) as changes:
                async for change in changes:
                    told.put_nowait(change.value if isinstance(change, Change) else change)
        except Exception as error:  # whatever it is, somebody waits for the next change
            told.put_nowait(error)

    task = asyncio.create_task(watch())
    try:
        await told.get()  # what was there
        yield told
    finally:
        task.cancel()
        await asyncio.wait([task])


WORKS = {"get": _gets, "set": _sets, "compare-and-swap": _swaps, "watch": _watched}

if __name__ == "__main__":
    print(text(measured()))
