"""sqlite3 with our settings: WAL, synchronous=NORMAL. In a thread, so that the event loop is free meanwhile."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bare import HISTORY, Pair
from beluga_airflow.state.sqlite import POLL, SqliteStore

__all__ = ["BareSqlite", "PlainSqlite", "pair"]

SCHEMA = """
PRAGMA journal_mode=WAL;
PRAGMA synchronous=NORMAL;
CREATE TABLE plain (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE entry (key TEXT PRIMARY KEY, value TEXT NOT NULL, version INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE change (version INTEGER PRIMARY KEY, key TEXT NOT NULL, value TEXT NOT NULL);
"""


class PlainSqlite:
    """See ``Plain``. On the event loop, which does nothing else meanwhile."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA synchronous=NORMAL")

    async def get(self, key: str) -> Any:
        return json.loads(self._db.execute("SELECT value FROM plain WHERE key = ?", (key,)).fetchone()[0])

    async def set(self, key: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO plain VALUES (?, ?)", (key, json.dumps(value)))

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()


class BareSqlite:
    """See ``Bare``."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.executescript(SCHEMA)

    async def get(self, key: str) -> Any:
        statement = "SELECT value, version FROM entry WHERE key = ?"
        row = await asyncio.to_thread(lambda: self._db.execute(statement, (key,)).fetchone())
        return json.loads(row[0])

    async def set(self, key: str, value: Any) -> int:
        return await asyncio.to_thread(self._store, key, json.dumps(value), None)

    async def compare_and_swap(self, key: str, value: Any, *, version: int) -> int | None:
        return await asyncio.to_thread(self._store, key, json.dumps(value), version)

    async def watch(self, key: str) -> AsyncGenerator[Any]:
        last = (await asyncio.to_thread(lambda: self._db.execute("SELECT max(version) FROM change").fetchone()))[0]
        yield await self.get(key)
        statement = "SELECT version, key, value FROM change WHERE version > ? ORDER BY version"

        def following(after: int) -> list[tuple[int, str, str]]:
            return self._db.execute(statement, (after,)).fetchall()

        while True:
            rows = await asyncio.to_thread(following, last)
            for version, name, text in rows:
                last = version
                if name == key:
                    yield json.loads(text)
            if not rows:
                await asyncio.sleep(POLL)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def _store(self, key: str, text: str, expected: int | None) -> Any:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            if expected is not None:
                row = db.execute("SELECT version FROM entry WHERE key = ?", (key,)).fetchone()
                if row != (expected,):
                    return None
            version = db.execute("INSERT INTO change (key, value) VALUES (?, ?)", (key, text)).lastrowid
            db.execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?)", (key, text, version))
            if version and version % 1_000 == 0:
                db.execute("DELETE FROM change WHERE version <= ?", (version - HISTORY,))
            return version
        finally:
            db.execute("COMMIT")


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    """Two files in one folder."""
    with tempfile.TemporaryDirectory() as folder:
        path, by_hand = Path(folder, "state.db"), Path(folder, "bare.db")
        store, reader, bare, plain = SqliteStore(path), SqliteStore(path), BareSqlite(by_hand), PlainSqlite(by_hand)
        versions = {"SQLite": sqlite3.sqlite_version}
        yield Pair(name="SQLite", ours=store, bare=bare, plain=plain, reader=reader, url=store.url, versions=versions)
        plain.close()
        bare.close()
        await reader.close()
        await store.close()
