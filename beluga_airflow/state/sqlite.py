"""A state store in one SQLite file: shared by the processes of one machine, and the default."""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from tenacity import retry, retry_if_exception, stop_after_delay, wait_random

from beluga_airflow.errors import StateError, StateUnavailable
from beluga_airflow.state.base import Versioned
from beluga_airflow.state.codec import decode, encode, named

__all__ = ["SqliteStore"]

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], Any]
Item = tuple[Work, Future[Any]]
Inbox = queue.SimpleQueue[Item | None]

BUSY_SECONDS = 30.0
"""How long a write waits for another process's write."""
GROUP = 500
"""Operations that share one commit: a commit costs more than many writes."""
PAGE = 1_000
"""Keys that one read of a listing takes."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT NOT NULL, version INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS version (one INTEGER PRIMARY KEY CHECK (one = 1), last INTEGER NOT NULL);
INSERT OR IGNORE INTO version VALUES (1, 0);
"""


def _is_busy(error: BaseException) -> bool:
    # the low byte; the others tell kinds of being busy apart
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


class SqliteStore:
    """See ``StateStore``. One thread owns the connection and commits what has gathered in one go.

    Args:
        path: the file; it and its folder are made, readable by their owner only.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path).expanduser().absolute()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._inbox: Inbox = queue.SimpleQueue()

    @property
    def url(self) -> str:
        return f"sqlite:///{self._path}"

    async def get(self, key: str, default: Any = None) -> Any:
        found = await self.get_versioned(key)
        return found.value if found else default

    async def get_versioned(self, key: str) -> Versioned | None:
        def work(db: sqlite3.Connection) -> Any:
            return db.execute("SELECT value, version FROM state WHERE key = ?", (key,)).fetchone()

        named(key)
        row = await self._do(work)
        return Versioned(value=decode(key, row[0]), version=row[1]) if row else None

    async def set(self, key: str, value: Any) -> int:
        text = encode(named(key), value)
        return await self._do(lambda db: _store(db, key, text))

    async def compare_and_swap(self, key: str, value: Any, *, version: int | None) -> int | None:
        text = encode(named(key), value)

        def work(db: sqlite3.Connection) -> int | None:
            row = db.execute("SELECT version FROM state WHERE key = ?", (key,)).fetchone()
            return _store(db, key, text) if (row[0] if row else None) == version else None

        return await self._do(work)

    async def delete(self, key: str) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            _next_version(db)
            return db.execute("DELETE FROM state WHERE key = ?", (key,)).rowcount > 0

        named(key)
        return await self._do(work)

    async def keys(self, prefix: str) -> AsyncIterator[str]:
        # pages after the last key seen, so that a long listing holds back no writer
        last = named(prefix)
        comparison = ">="
        while True:
            page = await self._do(_page(comparison, last))
            for key in page:
                if not key.startswith(prefix):
                    return
                yield key
            if len(page) < PAGE:
                return
            last, comparison = page[-1], ">"

    async def close(self) -> None:
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._inbox.put(None)
        if thread is not None:
            await asyncio.to_thread(thread.join)

    async def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        future: Future[T] = Future()
        with self._lock:
            if self._thread is None:
                # an inbox of its own: the thread before may still be at work
                self._inbox = queue.SimpleQueue()
                self._thread = threading.Thread(target=self._run, args=(self._inbox,), name="beluga-state", daemon=True)
                self._thread.start()
            self._inbox.put((work, future))
        return await asyncio.wrap_future(future)

    def _run(self, inbox: Inbox) -> None:
        db: sqlite3.Connection | None = None
        ended = False
        while not ended:
            group, ended = _gathered(inbox)
            try:
                if group:
                    db = db or self._open()
                    _commit(db, group)
            except Exception as error:  # whatever it is, somebody waits for an answer
                _discard(db)
                db = None
                for _, future in group:
                    future.set_exception(self._translated(error))
        _discard(db)

    # of several that open a new file at once, SQLite refuses some at once, without waiting for BUSY_SECONDS
    @retry(
        retry=retry_if_exception(_is_busy), stop=stop_after_delay(BUSY_SECONDS), wait=wait_random(0, 0.1), reraise=True
    )
    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path.touch(mode=0o600)
        db = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.executescript(SCHEMA)
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _translated(self, error: Exception) -> StateError:
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            return StateError(f"the state store {self.url} is damaged: {error}; restore it or move it away")
        return StateUnavailable(f"the state store {self.url} cannot be used now: {error}; check the file and its disk")


def _gathered(inbox: Inbox) -> tuple[list[Item], bool]:
    """What waits, at least one operation, unless the end (the second value) came before it."""
    group: list[Item] = []
    while not group or (len(group) < GROUP and not inbox.empty()):
        item = inbox.get()
        if item is None:
            return group, True
        if item[1].set_running_or_notify_cancel():  # from here on it cannot be cancelled any more
            group.append(item)
    return group, False


def _commit(db: sqlite3.Connection, group: list[Item]) -> None:
    db.execute("BEGIN IMMEDIATE")
    results = [work(db) for work, _ in group]
    db.execute("COMMIT")
    for (_, future), result in zip(group, results, strict=True):
        future.set_result(result)


def _discard(db: sqlite3.Connection | None) -> None:
    if db is not None:
        db.close()


def _next_version(db: sqlite3.Connection) -> int:
    return int(db.execute("UPDATE version SET last = last + 1 RETURNING last").fetchone()[0])


def _store(db: sqlite3.Connection, key: str, text: str) -> int:
    version = _next_version(db)
    db.execute("INSERT OR REPLACE INTO state VALUES (?, ?, ?)", (key, text, version))
    return version


def _page(comparison: str, last: str) -> Callable[[sqlite3.Connection], list[str]]:
    # `comparison` is one of our own two operators, never a caller's text
    statement = f"SELECT key FROM state WHERE key {comparison} ? ORDER BY key LIMIT {PAGE}"  # noqa: S608
    return lambda db: [row[0] for row in db.execute(statement, (last,))]
