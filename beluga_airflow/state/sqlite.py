"""A state store in one SQLite file: shared by the processes of one machine, and the default."""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tenacity import retry, retry_if_exception, stop_after_delay, wait_random

from beluga_airflow.errors import StateError, StateUnavailable
from beluga_airflow.state.base import Change, Versioned
from beluga_airflow.state.codec import decode, encode, named
from beluga_airflow.state.watching import HISTORY, PAGE, SWEEP, Watchable, changed, gone_back, lost

__all__ = ["SqliteStore"]

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], Any]
Item = tuple[Work, Future[Any], bool]
"""What to do, for whom, and whether it writes."""
Inbox = queue.SimpleQueue[Item | None]

BUSY_SECONDS = 30.0
"""How long a write waits for another process's write."""
GROUP = 500
"""Operations that share one commit: a commit costs more than many writes."""

POLL = 0.05
"""Seconds between two looks for changes of other processes."""
PRUNED = 1_000
"""Changes after which the history is pruned again."""
HISTORY_BYTES = 256_000_000
"""Of values in the history; it is shorter where they are large, but never than the last PRUNED changes."""

# the last change is always kept, and with it the version; `total` is the length of all values so far
SCHEMA = """
CREATE TABLE IF NOT EXISTS entry
    (key TEXT PRIMARY KEY, value TEXT NOT NULL, version INTEGER NOT NULL, ends REAL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS entry_ends ON entry (ends) WHERE ends IS NOT NULL;
CREATE TABLE IF NOT EXISTS change
    (version INTEGER PRIMARY KEY, key TEXT NOT NULL, value TEXT, total INTEGER NOT NULL);
"""
ONE = "SELECT key, value, version FROM entry WHERE key = :key AND (ends IS NULL OR ends > :now)"
ALL_BY_VERSION = """
SELECT key, value, version FROM entry
WHERE key >= :key AND substr(key, 1, length(:key)) = :key AND (ends IS NULL OR ends > :now) ORDER BY version
"""


def _is_busy(error: BaseException) -> bool:
    # the low byte; the others tell kinds of being busy apart
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


class SqliteStore(Watchable):
    """See ``StateStore``. One thread owns the connection and commits what has gathered in one go.

    Args:
        path: the file; it and its folder are made, readable by their owner only.
        history: changes that are kept.
    """

    def __init__(self, path: str | Path, *, history: int = HISTORY) -> None:
        super().__init__()
        self._path = Path(path).expanduser().absolute()
        self._history = history
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
            statement = "SELECT value, version FROM entry WHERE key = ? AND (ends IS NULL OR ends > ?)"
            return db.execute(statement, (key, time.time())).fetchone()

        named(key)
        row = await self._do(work)
        return Versioned(value=decode(key, row[0]), version=row[1]) if row else None

    async def set(self, key: str, value: Any, *, ttl: float | None = None) -> int:
        text = encode(named(key), value)
        return await self._do(lambda db: self._store(db, key, text, ttl), writes=True)

    async def compare_and_swap(
        self, key: str, value: Any, *, version: int | None, ttl: float | None = None
    ) -> int | None:
        text = encode(named(key), value)

        def work(db: sqlite3.Connection) -> int | None:
            self._remove(db, key, over_only=True)
            row = db.execute("SELECT version FROM entry WHERE key = ?", (key,)).fetchone()
            return self._store(db, key, text, ttl) if (row[0] if row else None) == version else None

        return await self._do(work, writes=True)

    async def delete(self, key: str) -> bool:
        def work(db: sqlite3.Connection) -> bool:
            was_over = self._remove(db, key, over_only=True)
            return not was_over and self._remove(db, key)

        named(key)
        return await self._do(work, writes=True)

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
        await self._stop_watching()
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._inbox.put(None)
        if thread is not None:
            await asyncio.to_thread(thread.join)

    async def _now(self, key: str, *, prefix: bool) -> tuple[list[Change], int]:
        def work(db: sqlite3.Connection) -> tuple[list[tuple[str, str, int]], int]:
            statement = ALL_BY_VERSION if prefix else ONE
            return db.execute(statement, {"key": key, "now": time.time()}).fetchall(), _version(db)

        named(key)
        rows, version = await self._do(work)
        return [Change(key=name, value=decode(name, text), version=at) for name, text, at in rows], version

    async def _changes(self, after: int, limit: int) -> list[Change]:
        def work(db: sqlite3.Connection) -> tuple[int | None, int, list[tuple[int, str, str | None]]]:
            statement = "SELECT version, key, value FROM change WHERE version > ? ORDER BY version LIMIT ?"
            return _first(db), _version(db), db.execute(statement, (after, limit)).fetchall()

        first, newest, rows = await self._do(work)
        if newest < after:
            raise gone_back(self.url, after=after, newest=newest)
        if first is not None and after < first - 1:
            raise lost(self.url, after=after, kept_from=first)
        return [changed(key, text, version) for version, key, text in rows]

    async def _wait(self, after: int, timeout: float) -> None:
        ends = time.monotonic() + timeout
        while await self._do(_version) <= after and time.monotonic() < ends:  # noqa: ASYNC110  # of other processes
            await asyncio.sleep(POLL)

    async def _remove_expired(self) -> None:
        if await self._do(partial(_over, limit=1)):
            await self._do(self._sweep, writes=True)

    def _sweep(self, db: sqlite3.Connection, limit: int = -1) -> None:
        for key in _over(db, limit=limit):
            self._remove(db, key, over_only=True)

    def _store(self, db: sqlite3.Connection, key: str, text: str, ttl: float | None) -> int:
        self._remove(db, key, over_only=True)
        version = self._note(db, key, text)
        ends = None if ttl is None else time.time() + ttl
        db.execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?)", (key, text, version, ends))
        if version % SWEEP < 2:  # of the two changes that this may have made
            self._sweep(db, SWEEP)
        return version

    def _remove(self, db: sqlite3.Connection, key: str, *, over_only: bool = False) -> bool:
        """Remove a key, or only one whose time is up; whether it was there."""
        over = time.time() if over_only else None
        was_there = (
            db.execute("DELETE FROM entry WHERE key = ?1 AND (?2 IS NULL OR ends <= ?2)", (key, over)).rowcount > 0
        )
        if was_there:
            self._note(db, key, None)
        return was_there

    def _note(self, db: sqlite3.Connection, key: str, text: str | None) -> int:
        statement = """
            INSERT INTO change (key, value, total)
            VALUES (?, ?, ? + coalesce((SELECT total FROM change ORDER BY version DESC LIMIT 1), 0))
        """
        version = int(db.execute(statement, (key, text, len(text or ""))).lastrowid or 0)
        if version % PRUNED == 0:
            self._prune(db, version)
        return version

    def _prune(self, db: sqlite3.Connection, version: int) -> None:
        statement = """
            SELECT version FROM change
            WHERE total >= (SELECT total FROM change WHERE version = ?) - ? ORDER BY version LIMIT 1
        """
        (small_enough,) = db.execute(statement, (version, HISTORY_BYTES)).fetchone()
        keep = max(version - self._history + 1, min(small_enough, version - PRUNED + 1))
        db.execute("DELETE FROM change WHERE version < ?", (keep,))

    async def _do(self, work: Callable[[sqlite3.Connection], T], *, writes: bool = False) -> T:
        future: Future[T] = Future()
        with self._lock:
            if self._thread is None:
                # an inbox of its own: the thread before may still be at work
                self._inbox = queue.SimpleQueue()
                self._thread = threading.Thread(target=self._run, args=(self._inbox,), name="beluga-state", daemon=True)
                self._thread.start()
            self._inbox.put((work, future, writes))
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
                for _, future, _ in group:
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
    # who only reads must not wait for another process's write
    db.execute("BEGIN IMMEDIATE" if any(writes for _, _, writes in group) else "BEGIN DEFERRED")
    results = [work(db) for work, _, _ in group]
    db.execute("COMMIT")
    for (_, future, _), result in zip(group, results, strict=True):
        future.set_result(result)


def _discard(db: sqlite3.Connection | None) -> None:
    if db is not None:
        db.close()


def _over(db: sqlite3.Connection, *, limit: int) -> list[str]:
    """The keys whose time is up; a negative limit: all of them."""
    statement = "SELECT key FROM entry WHERE ends <= ? ORDER BY ends LIMIT ?"
    return [row[0] for row in db.execute(statement, (time.time(), limit))]


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT coalesce(max(version), 0) FROM change").fetchone()[0])


def _first(db: sqlite3.Connection) -> int | None:
    first: int | None = db.execute("SELECT min(version) FROM change").fetchone()[0]
    return first


def _page(comparison: str, last: str) -> Callable[[sqlite3.Connection], list[str]]:
    # `comparison` is one of our own two operators, never a caller's text
    statement = f"SELECT key FROM entry WHERE key {comparison} ? AND (ends IS NULL OR ends > ?) ORDER BY key LIMIT ?"  # noqa: S608
    return lambda db: [row[0] for row in db.execute(statement, (last, time.time(), PAGE))]
