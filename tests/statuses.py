"""What becomes of the statuses of flow runs, for the tests of those who write them."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, closing
from pathlib import Path

from beluga_airflow.execute.status import FLOWS, RunStatus
from beluga_airflow.state import StateStore

__all__ = ["Told", "terminal", "told_in", "watched"]

Told = list[tuple[str, RunStatus]]
"""Entries in the order in which they were written, each with its key."""


@asynccontextmanager
async def watched(store: StateStore) -> AsyncIterator[Told]:
    """All that is written meanwhile."""
    seen: Told = []

    async def watch() -> None:
        async for change in store.watch(FLOWS, prefix=True):
            seen.append(_known(change.key, change.value))

    task = asyncio.create_task(watch())
    await asyncio.sleep(0.05)
    yield seen
    await asyncio.sleep(0.1)
    task.cancel()


def told_in(file: Path) -> Told:
    """All that was ever written into a SQLite store."""
    with closing(sqlite3.connect(file)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'change'").fetchone():
            return []  # who was to write was killed before
        rows = db.execute("SELECT key, value FROM change WHERE key LIKE ? ORDER BY version", (f"{FLOWS}%",)).fetchall()
    return [_known(key, json.loads(value)) for key, value in rows]


def terminal(told: Iterable[tuple[str, RunStatus]]) -> Counter[tuple[str, str, int, str]]:
    """How often each run (by key, run and generation) came to which end."""
    ends: Counter[tuple[str, str, int, str]] = Counter()
    before: dict[str, str | None] = {}
    for key, now in told:
        if now.ended is not None and before.get(key) != now.ended:
            ends[key, now.run, now.generation, now.status] += 1
        before[key] = now.ended
    return ends


def _known(key: str, value: object) -> tuple[str, RunStatus]:
    entry = RunStatus.from_json(value)
    assert entry is not None, value
    return key, entry
