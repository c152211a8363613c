"""A state store in Redis, 7 or later: shared by all who reach the server."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from redis import exceptions as foreign
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

from beluga_airflow.errors import InvalidSetting, StateError, StateUnavailable
from beluga_airflow.state.base import Change, Versioned
from beluga_airflow.state.codec import decode, encode, named
from beluga_airflow.state.redis_scripts import NAMES, SCRIPTS
from beluga_airflow.state.watching import HISTORY, Watchable, changed, gone_back, lost

__all__ = ["RedisStore"]

NAMESPACE = "beluga:{state}:"
"""What our names in Redis begin with, unless the URL says; what is in braces keeps them together in a cluster."""
ANSWER = 10.0
"""Seconds that the server has for an answer, unless the URL says ``socket_timeout``."""
PASSING = (
    foreign.ConnectionError,
    foreign.TimeoutError,
    foreign.OutOfMemoryError,
    foreign.ReadOnlyError,
    foreign.ClusterDownError,
    foreign.TryAgainError,
    OSError,
)
"""Errors after which another try may succeed."""
PASSING_CODES = ("MISCONF ", "NOREPLICAS ", "BUSY ")
"""The same, where redis-py has no class for what the server says."""


class _Line:
    """What one event loop has of the server; calls take turns, so that they take effect in the order they came."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.pool = ConnectionPool(**options)
        self._calls = Redis(connection_pool=self.pool, single_connection_client=True)
        self._scripts = {name: self._calls.register_script(text) for name, text in SCRIPTS.items()}
        self._turn = asyncio.Lock()

    async def run(self, script: str, names: Sequence[str], args: Sequence[Any], answer: float) -> Any:
        async with self._turn, asyncio.timeout(answer):
            connection = self._calls.connection
            if connection is not None and connection.is_connected and await connection.can_read():
                await connection.disconnect()  # the server has closed it meanwhile
            return await self._scripts[script](names, args)

    async def close(self) -> None:
        async with self._turn:
            await self._calls.aclose()
            await self.pool.disconnect()


class RedisStore(Watchable):
    """See ``StateStore``. Every change is one script on the server, and the server's clock counts.

    What is stored survives a restart of the server as the server is configured: with ``appendonly yes`` all but the
    last second (all, with ``appendfsync always``), without it nothing since the last snapshot; a failover loses what
    the replica had not heard yet. Who watches from a version that was lost gets ``HistoryLost``: waiting would hang,
    and then miss changes. A server that lost everything goes on with versions that it never had. One that lost a part
    goes on from an earlier one: where new changes have reached the watcher's version before it is back, nothing tells.

    ``maxmemory-policy`` must be ``noeviction`` or a ``volatile-`` one, which leave our keys alone: an ``allkeys-`` one
    throws the whole state away when memory is short. A full server refuses writes with ``StateUnavailable``.

    Args:
        url: ``redis://`` or, with TLS, ``rediss://[[user]:password@]host[:port][/database][?option=...]``; the options
            are redis-py's, such as ``ssl_ca_certs``, and ``namespace``: what all names in Redis begin with.
        history: changes that are kept.

    Raises:
        InvalidSetting: there can be no such URL.
    """

    def __init__(self, url: str, *, history: int = HISTORY) -> None:
        super().__init__()
        self._url, namespace, self._answer, self._options = _read(url)
        self._names = [namespace + name for name in NAMES]
        self._history = history
        self._lines: dict[asyncio.AbstractEventLoop, tuple[_Line, AsyncGenerator[_Line]]] = {}

    @property
    def url(self) -> str:
        return self._url

    async def get(self, key: str, default: Any = None) -> Any:
        found = await self.get_versioned(key)
        return found.value if found else default

    async def get_versioned(self, key: str) -> Versioned | None:
        entry = await self._do("get", named(key))
        return _versioned(key, entry) if entry is not None else None

    async def set(self, key: str, value: Any, *, ttl: float | None = None) -> int:
        text = encode(named(key), value)
        return int(await self._do("set", key, self._history, text, _number(ttl)))

    async def compare_and_swap(
        self, key: str, value: Any, *, version: int | None, ttl: float | None = None
    ) -> int | None:
        text = encode(named(key), value)
        swapped = await self._do("swap", key, self._history, text, _number(ttl), _number(version))
        return None if swapped is None else int(swapped)

    async def delete(self, key: str) -> bool:
        return await self._do("delete", named(key), self._history) is not None

    async def keys(self, prefix: str) -> AsyncIterator[str]:
        # pages after the last key seen, so that a long listing holds back no writer
        following, to = _range(prefix, prefix=True)
        while following is not None:
            found, following = await self._do("keys", following, to)
            for key in found:
                yield key

    async def close(self) -> None:
        await self._stop_watching()
        if asyncio.get_running_loop() in self._lines:
            await (await self._line()).close()

    async def _now(self, key: str, *, prefix: bool) -> tuple[list[Change], int]:
        version, flat = await self._do("now", *_range(key, prefix=prefix))
        found = [(name, _versioned(name, entry)) for name, entry in zip(flat[::2], flat[1::2], strict=True)]
        changes = [Change(key=name, value=entry.value, version=entry.version) for name, entry in found]
        return sorted(changes, key=lambda change: change.version), int(version)

    async def _changes(self, after: int, limit: int) -> list[Change]:
        newest, kept_from, flat = await self._do("changes", after, limit)
        if int(newest) < after:
            raise gone_back(self.url, after=after, newest=int(newest))
        if int(kept_from) > after + 1:
            raise lost(self.url, after=after, kept_from=int(kept_from))
        pairs = zip(flat[::2], flat[1::2], strict=True)
        return [changed(key, text, version) for version, (key, text) in enumerate(pairs, after + 1)]

    async def _wait(self, after: int, timeout: float) -> None:
        line = await self._line()
        with self._crossing():
            # a connection of its own, from the pool
            async with asyncio.timeout(timeout + self._answer):
                block = max(1, int(timeout * 1_000))
                await Redis(connection_pool=line.pool).xread({self._names[-1]: f"{after}-0"}, count=1, block=block)

    async def _remove_expired(self) -> None:
        while await self._do("remove_expired", self._history):
            pass

    async def _do(self, name: str, *args: str | bytes | int) -> Any:
        line = await self._line()
        with self._crossing():
            return await line.run(name, self._names, args, self._answer)

    async def _line(self) -> _Line:
        loop = asyncio.get_running_loop()
        if loop not in self._lines:
            held = self._held(loop)
            self._lines[loop] = await anext(held), held
        return self._lines[loop][0]

    async def _held(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[_Line]:
        # a loop ends its generators before it is closed, and with this one the connections that only it can close
        line = _Line(self._options)
        try:
            yield line
        finally:
            del self._lines[loop]
            await line.close()

    @contextmanager
    def _crossing(self) -> Iterator[None]:
        try:
            yield
        except (foreign.RedisError, OSError, UnicodeDecodeError) as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> StateError:
        if isinstance(error, UnicodeDecodeError):
            return StateError(f"the state store {self.url} is damaged: {error}; restore it or use another namespace")
        if _is_passing(error):
            said = str(error) or f"no answer within {self._answer:g} s"
            return StateUnavailable(f"the state store {self.url} cannot be used now: {said}; check the server")
        return StateError(
            f"the state store {self.url} refuses: {error}; check the URL's user, password and options, and what the "
            "server allows"
        )


def _is_passing(error: Exception) -> bool:
    if isinstance(error, (foreign.AuthenticationError, foreign.AuthorizationError)):
        return False
    if isinstance(error.__context__, ssl.SSLCertVerificationError):
        return False
    return isinstance(error, PASSING) or str(error).startswith(PASSING_CODES)


def _read(url: str) -> tuple[str, str, float, dict[str, Any]]:
    """A URL as it may be shown, our own options in it, and redis-py's.

    Raises:
        InvalidSetting: there can be no such URL.
    """
    try:
        if not re.fullmatch(r"(/\d*)?", urlsplit(url).path):
            raise ValueError  # redis-py would use database 0
        options: dict[str, Any] = {**parse_url(url)}
        namespace, answer = options.pop("namespace", NAMESPACE), options.pop("socket_timeout", ANSWER)
        options |= {
            "decode_responses": True,
            "socket_timeout": None,  # one timeout is around all that belongs to an answer
            # nothing is tried twice: a swap that took effect, and whose answer was lost, would seem refused
            "retry": Retry(NoBackoff(), 0),
            # they cost a question at each connect, and the pool would not notice a connection that was closed
            "maint_notifications_config": MaintNotificationsConfig(enabled=False),
        }
        # this connects to nothing yet, but looks at the options
        ConnectionPool(**options).make_connection()  # type: ignore[no-untyped-call]  # redis-py gives it no types
    except (foreign.RedisError, TypeError, ValueError):
        # what these say may hold a part of a password
        raise InvalidSetting(
            "this is no URL of a state store in Redis; use 'redis://user:password@host:6379/0' or 'rediss://...', with "
            "special characters of the password as %XX, and after '?' only options that redis-py knows"
        ) from None
    host = options.get("host", "localhost")
    place = f"[{host}]" if ":" in host else host
    shown = f"{urlsplit(url).scheme}://{place}:{options.get('port', 6379)}/{options.get('db', 0)}"
    return shown, namespace, answer, options


def _range(key: str, *, prefix: bool) -> tuple[str | bytes, str | bytes]:
    """Between which keys Redis finds one, or all that begin so: no UTF-8 holds the byte FF."""
    return f"[{named(key)}", b"(" + key.encode() + b"\xff" if prefix else f"[{key}"


def _number(number: float | None) -> str:
    return "" if number is None else repr(number)


def _versioned(key: str, entry: str) -> Versioned:
    version, _, text = entry.partition(" ")
    return Versioned(value=decode(key, text), version=int(version))
