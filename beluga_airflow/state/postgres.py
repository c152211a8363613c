"""A state store in a PostgreSQL database, 15 or later: shared by all who reach its server."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any
from urllib.parse import quote

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict

from beluga_airflow.errors import InvalidSetting, StateError, StateUnavailable
from beluga_airflow.state.base import Change, Versioned
from beluga_airflow.state.codec import decode, encode, named
from beluga_airflow.state.postgres_sql import ABOUT, CHANGES, EXPIRE, GET, KEYS, LAST, LISTEN, MAKE, NOW, WRITE, WRITES
from beluga_airflow.state.watching import HISTORY, PAGE, Watchable, changed, gone_back, lost

__all__ = ["PostgresStore"]

Write = tuple[bytes, str | None, float | None, int | None]
"""The key, its value (None: delete it), its seconds to live, the version it must have (0: it must be missing)."""
Waiting = tuple[Write, asyncio.Future[int | None]]

CONNECT_SECONDS = 10
"""How long a host may take to let us in, where the URL has no ``connect_timeout``."""
ANSWER_SECONDS = 30.0
"""How long an operation may take: a server that is frozen or cut off says nothing at all."""
GROUP = 500
"""Writes that share one commit: a commit costs more than many writes."""
BYTES = 16_000_000
"""What the values of such writes, or of one read of changes, take together, unless one alone is larger."""
CENTURY = 100 * 365 * 86_400.0
"""The longest time to live, in seconds: PostgreSQL's calendar has an end."""
PLAIN = re.compile(r"postgres(?:ql)?://(?:[^@/]*@)?[^@]*")
"""A URL whose password has no ``/`` and no ``@`` but as percent-escapes."""
REFUSED = re.compile(
    r"authentication failed|does not exist|no pg_hba\.conf entry|no password supplied|permission denied|certificate"
    r"|not permitted to log in|SSL was required|no such (user|database)"
)
"""What is said to those who are not let in and will not be later: libpq tells no code of it."""


class PostgresStore(Watchable):
    """See ``StateStore``. Each event loop has up to three connections: to read, to write, and to hear of changes.

    Its tables and functions, ``beluga_state…``, are made on first use in the first schema of the search path: with
    ``?options=-csearch_path%3Dname`` another schema is another store. Behind PgBouncer's transaction mode all works,
    but nobody is told of changes: a watch finds them by looking every second.

    Args:
        url: as libpq has it: ``postgresql://user:password@host:port/database?sslmode=verify-full``.
        history: changes that are kept at least; up to ten times as many while they are younger than a week.

    Raises:
        InvalidSetting: libpq cannot read the URL.
    """

    def __init__(self, url: str, *, history: int = HISTORY) -> None:
        super().__init__()
        try:
            # libpq would take what follows a raw sign in a password for a host, and show it
            given = conninfo_to_dict(url) if PLAIN.fullmatch(url) else None
        except (psycopg.Error, UnicodeEncodeError):
            given = None
        if given is None:
            # not what libpq says, which may repeat the password
            form = "'postgresql://user:password@host:port/database', special characters as %-escapes"
            raise InvalidSetting(f"the PostgreSQL URL of a state store cannot be read; write it as {form}")
        self._url = _shown(given)
        self._history = history
        defaults = {"connect_timeout": CONNECT_SECONDS, "fallback_application_name": "beluga"}
        self._settings = {**defaults, **given, "client_encoding": "utf8"}
        self._clients: dict[asyncio.AbstractEventLoop, _Client] = {}

    @property
    def url(self) -> str:
        return self._url

    async def get(self, key: str, default: Any = None) -> Any:
        found = await self.get_versioned(key)
        return found.value if found else default

    async def get_versioned(self, key: str) -> Versioned | None:
        rows = await self._client().read.ask(GET, [named(key).encode()])
        return Versioned(value=decode(key, rows[0][0]), version=rows[0][1]) if rows else None

    async def set(self, key: str, value: Any, *, ttl: float | None = None) -> int:
        text = encode(named(key), value)
        version = await self._client().write((key.encode(), text, _seconds(ttl), None))
        assert version is not None  # it has no condition
        return version

    async def compare_and_swap(
        self, key: str, value: Any, *, version: int | None, ttl: float | None = None
    ) -> int | None:
        text = encode(named(key), value)
        expected = 0 if version is None else version if 0 < version < 2**63 else -1  # which no key has
        return await self._client().write((key.encode(), text, _seconds(ttl), expected))

    async def delete(self, key: str) -> bool:
        return await self._client().write((named(key).encode(), None, None, None)) is not None

    async def keys(self, prefix: str) -> AsyncIterator[str]:
        start, end = _span(prefix, prefix=True)
        while True:
            rows = await self._client().read.ask(KEYS, {"start": start, "end": end, "limit": PAGE})
            for (key,) in rows:
                yield key.decode()
            if len(rows) < PAGE:
                return
            start = rows[-1][0] + b"\0"

    async def close(self) -> None:
        await self._stop_watching()
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()
        self._forget_ended_loops()

    async def _now(self, key: str, *, prefix: bool) -> tuple[list[Change], int]:
        start, end = _span(key, prefix=prefix)
        rows = await self._client().read.ask(NOW, {"start": start, "end": end})
        return [changed(key.decode(), *rest) for _, key, *rest in rows if key is not None], rows[0][0]

    async def _changes(self, after: int, limit: int) -> list[Change]:
        rows = await self._client().read.ask(CHANGES, {"after": after, "limit": limit, "bytes": BYTES})
        if rows and rows[0][0] != after + 1:
            raise lost(self.url, after=after, kept_from=rows[0][0])
        if not rows and (newest := (await self._client().read.ask(LAST, []))[0][0]) < after:
            raise gone_back(self.url, after=after, newest=newest)
        return [changed(key.decode(), text, version) for version, key, text in rows]

    async def _wait(self, after: int, timeout: float) -> None:
        await self._client().ear.hear(after, timeout)

    async def _remove_expired(self) -> None:
        await self._client().change.ask(EXPIRE, [self._history])

    def _client(self) -> _Client:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._forget_ended_loops()
            self._clients[loop] = _Client(self._url, self._settings, self._history)
        return self._clients[loop]

    def _forget_ended_loops(self) -> None:
        for loop in [loop for loop in list(self._clients) if loop.is_closed()]:
            self._clients.pop(loop).discard()


class _Client:
    """What one event loop has of a store: its connections, and the writes that wait for the next commit."""

    def __init__(self, url: str, settings: dict[str, Any], history: int) -> None:
        self._lines = self.read, self.change, self.ear = [_Line(url, settings) for _ in range(3)]
        self._history = history
        self._waiting: deque[Waiting] = deque()
        self._task: asyncio.Task[None] | None = None

    async def write(self, write: Write) -> int | None:
        """The version of the change, or None where there was none to make."""
        future: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((write, future))
        if self._task is None:
            # a task of its own: many wait for one commit, and any of them may be cancelled
            self._task = asyncio.create_task(self._write_all())
        return await future

    async def close(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])
        for line in self._lines:
            async with line.lock:  # what was asked before is answered
                line.discard()

    def discard(self) -> None:
        for line in self._lines:
            line.discard()

    async def _write_all(self) -> None:
        group: list[Waiting] = []
        try:
            while group := self._next_group():
                await self._commit(group)
        finally:
            self._task = None
            for _, future in [*group, *self._waiting]:  # there are some only where this task was cancelled
                future.cancel()

    def _next_group(self) -> list[Waiting]:
        group: list[Waiting] = []
        size = 0
        while self._waiting and len(group) < GROUP and size < BYTES:
            write, future = self._waiting.popleft()
            if not future.done():
                group.append((write, future))
                size += len(write[1] or "")
        return group

    async def _commit(self, group: list[Waiting]) -> None:
        writes = [write for write, _ in group]
        try:
            if len(writes) == 1:  # arrays would cost it a tenth of a millisecond
                rows = await self.change.ask(WRITE, [*writes[0], self._history])
            else:
                rows = await self.change.ask(WRITES, [self._history, *map(list, zip(*writes, strict=True))])
        except Exception as error:  # whatever it is, somebody waits for an answer
            for _, future in group:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), (version,) in zip(group, rows, strict=True):
                if not future.done():
                    future.set_result(version)


class _Line:
    """One connection: made when it is needed, thrown away when anything went wrong with it."""

    def __init__(self, url: str, settings: dict[str, Any]) -> None:
        self._url = url
        self._settings = settings
        self.lock = asyncio.Lock()
        self._db: AsyncConnection | None = None

    async def ask(self, statement: str, values: list[Any] | dict[str, Any]) -> list[Any]:
        """The rows that a statement gives; each is a transaction of its own."""
        async with self._taken(ANSWER_SECONDS):
            db = self._live() or await self._open()
            return await (await db.execute(statement, values, binary=True)).fetchall()

    async def hear(self, after: int, timeout: float) -> None:
        """Wait until somebody tells of a change after this one, or until the time is up."""
        async with self._taken(ANSWER_SECONDS + timeout):
            db = self._live()
            if db is None:
                # it has not heard what came before, so the caller looks at once
                await (await self._open()).execute(LISTEN)
                return
            while (before := db.pgconn.notifies()) is not None:  # read with its last words: nothing else would come
                if _is_after(before.extra.decode(errors="replace"), after):
                    return
            async with aclosing(db.notifies(timeout=timeout)) as told:
                async for notice in told:
                    if _is_after(notice.payload, after):
                        return

    def discard(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.pgconn.finish()

    @asynccontextmanager
    async def _taken(self, seconds: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(seconds), self.lock:
                try:
                    yield
                except BaseException:
                    self.discard()
                    raise
        except (psycopg.Error, TimeoutError) as error:
            raise _translated(self._url, error) from None

    def _live(self) -> AsyncConnection | None:
        """The connection, unless the server has ended it since."""
        if self._db is not None:
            try:
                self._db.pgconn.consume_input()  # its last words
                self._db.pgconn.consume_input()  # its end
            except psycopg.OperationalError:
                self.discard()
        return self._db

    async def _open(self) -> AsyncConnection:
        db = self._db = await AsyncConnection.connect(**self._settings, autocommit=True)
        [(is_made, backend)] = await (await db.execute(ABOUT)).fetchall()
        if not is_made:
            await db.execute(MAKE)
        if backend != db.pgconn.backend_pid:
            db.prepare_threshold = None  # a pooler may give each statement to another server process
        return db


def _is_after(payload: str, after: int) -> bool:
    try:
        return int(payload.partition(" ")[0]) > after
    except ValueError:
        return True  # not ours: anybody may use the channel


def _seconds(ttl: float | None) -> float | None:
    return None if ttl is None else max(0.0, min(CENTURY, ttl))


def _span(key: str, *, prefix: bool) -> tuple[bytes, bytes]:
    """The first of the keys that are meant, and the first behind them: UTF-8 has no byte 255."""
    start = named(key).encode()
    return start, start + (b"\xff" if prefix else b"\0")


def _shown(given: dict[str, Any]) -> str:
    """The URL without user and query, of what libpq read in it."""
    hosts, ports = (str(given.get(name) or "").split(",") for name in ("host", "port"))
    ports = ports * len(hosts) if len(ports) == 1 else ports
    places = [
        (f"[{host}]" if ":" in host else quote(host, safe="")) + (f":{port}" if port else "")
        for host, port in zip(hosts, ports, strict=False)
    ]
    return f"postgresql://{','.join(places)}/{quote(str(given.get('dbname') or ''), safe='')}"


def _translated(url: str, error: psycopg.Error | TimeoutError) -> StateError:
    if isinstance(error, TimeoutError):
        return StateUnavailable(f"the state store {url} did not answer in {ANSWER_SECONDS:g} s; see how its server is")
    # not the details: they may repeat what is stored
    words = " ".join((error.diag.message_primary or str(error)).split())[:300]
    said = "".join(sign if sign.isprintable() else "?" for sign in words)
    if _is_passing(error):
        return StateUnavailable(f"the state store {url} cannot be used now: {said}; see that its server runs")
    return StateError(f"the state store {url} refuses: {said}; check its URL, and what its user may do")


def _is_passing(error: psycopg.Error) -> bool:
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) and not REFUSED.search(str(error))
    # 25006: a replica, until the primary is found; 28: not let in; 54: too large
    is_worth_a_try = isinstance(error, psycopg.OperationalError) and error.sqlstate[:2] not in ("28", "54")
    return is_worth_a_try or error.sqlstate == "25006"
