"""Do 10 watchers hear of 100,000 changes, each once and in order? And what do they cost those who write?"""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from bare import Pair, pairs
from harness import Answer, Comparison, text

from beluga_airflow.state import StateStore, open_store

__all__ = ["measured"]

CHANGES = 100_000
WATCHERS = 10
WRITERS = 100
"""That write at the same time, each its own key."""
PREFIX = "orders/"
PATIENCE = 30.0
"""Seconds without a change, after the last was written, after which what has not come is lost."""


@dataclass
class Watcher:
    """One who watches all the orders, and the versions of what it was told, in that order."""

    store: StateStore
    after: int
    versions: list[int] = field(default_factory=list)

    async def watch(self, changes: int) -> None:
        """Until the last change came."""
        async with aclosing(self.store.watch(PREFIX, prefix=True, after=self.after)) as told:
            async for change in told:
                self.versions.append(change.version)
                if change.version >= self.after + changes:
                    return


def measured(changes: int = CHANGES, watchers: int = WATCHERS) -> Answer:
    """A tenth of the changes with nobody watching, then all of them with the watchers."""
    return asyncio.run(_measured(changes, watchers))


async def _measured(changes: int, watchers: int) -> Answer:
    few = max(1, changes // 10)
    async with pairs() as (found, away):
        comparisons, heard = [], []
        for pair in found:
            began = await _write(pair, few)
            unwatched = time.perf_counter() - began
            last = await pair.ours.set(PREFIX, None)
            watching = [Watcher(store=pair.ours, after=last) for _ in range(watchers)]
            began = await _watch(pair, watching, changes)
            watched = time.perf_counter() - began
            samples = {"beluga": [watched * 1e6 / changes], "unwatched": [unwatched * 1e6 / few]}
            comparisons.append(Comparison(work=pair.name, samples=samples))
            heard.append(verdict(pair.name, watching, changes))
        versions = {name: version for pair in found for name, version in pair.versions.items()}
    return Answer(
        question=f"Is any change lost? {changes:,} changes by {WRITERS} writers, {watchers} watchers",
        unit="microseconds a change, until the last watcher has the last one",
        comparisons=comparisons,
        versions=versions,
        notes=[*heard, *away],
    )


async def _watch(pair: Pair, watching: Sequence[Watcher], changes: int) -> float:
    """When the writing began."""
    tasks = [asyncio.create_task(each.watch(changes)) for each in watching]
    began = await _write(pair, changes)
    late, seen, before = set(tasks), 0, -1
    while late and seen > before:
        before = seen
        ended, late = await asyncio.wait(tasks, timeout=PATIENCE)
        seen = sum(len(each.versions) for each in watching)
    for task in late:
        task.cancel()
    await asyncio.gather(*ended)  # raises what ended one too early
    await asyncio.gather(*late, return_exceptions=True)
    return began


async def _write(pair: Pair, changes: int) -> float:
    """Make the changes, in a process of their own where the store can be shared; when the first of them began."""
    if pair.url is None:
        return await write(pair.ours, changes)
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, str(changes), stdin=PIPE, stdout=PIPE)
    # not as an argument, which others can see: it may have a password
    answer, _ = await process.communicate(pair.url.encode())
    if process.returncode:
        raise RuntimeError(f"{pair.name}: the writers ended with exit code {process.returncode}; it says why above")
    return float(answer)


async def write(store: StateStore, changes: int) -> float:
    """Make the changes; when the first of them began, by the clock that all processes of a machine share."""

    async def write_own(writer: int) -> None:
        for number in range(writer, changes, WRITERS):
            await store.set(f"{PREFIX}{writer}", {"number": number, "status": "paid"})

    began = time.perf_counter()
    await asyncio.gather(*(write_own(writer) for writer in range(WRITERS)))
    return began


async def _write_elsewhere(url: str, changes: int) -> float:
    store = open_store(url)
    try:
        await store.get(PREFIX)  # connected before it begins
        return await write(store, changes)
    finally:
        await store.close()


def verdict(backend: str, watching: Sequence[Watcher], changes: int) -> str:
    """What the watchers were told, for a reader."""
    due = len(watching) * changes
    lost = sum(changes - len({*each.versions}) for each in watching)
    twice = sum(len(each.versions) - len({*each.versions}) for each in watching)
    ordered = all(each.versions == sorted(each.versions) for each in watching)
    met = not lost and not twice and ordered
    return (
        f"{backend}: of {due:,} changes due, {lost:,} were lost and {twice:,} came twice; "
        f"{'all' if ordered else 'not all'} came in order. Target: none lost: {'met' if met else 'missed'}."
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(asyncio.run(_write_elsewhere(sys.stdin.read(), int(sys.argv[1]))))
    else:
        print(text(measured()))
