"""A state store in this process's memory: for tests, and for runs that nobody needs to survive."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from beluga_airflow.state.base import Change, Versioned
from beluga_airflow.state.codec import decode, encode, named
from beluga_airflow.state.watching import HISTORY, SWEEP, Watchable, changed, gone_back, lost

__all__ = ["MemoryStore"]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    text: str
    version: int
    ends: float | None

    @property
    def is_over(self) -> bool:
        return self.ends is not None and self.ends <= time.monotonic()


class MemoryStore(Watchable):
    """See ``StateStore``. Values are kept as JSON text, so that nobody can change them from outside.

    Args:
        history: changes that are kept.
    """

    url = "memory://"

    def __init__(self, *, history: int = HISTORY) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._version = 0
        self._log: deque[tuple[str, str | None]] = deque(maxlen=history)
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    async def get(self, key: str, default: Any = None) -> Any:
        found = await self.get_versioned(key)
        return found.value if found else default

    async def get_versioned(self, key: str) -> Versioned | None:
        entry = self._entry(named(key))
        return Versioned(value=decode(key, entry.text), version=entry.version) if entry else None

    async def set(self, key: str, value: Any, *, ttl: float | None = None) -> int:
        text = encode(named(key), value)
        with self._lock:
            return self._store(key, text, ttl)

    async def compare_and_swap(
        self, key: str, value: Any, *, version: int | None, ttl: float | None = None
    ) -> int | None:
        text = encode(named(key), value)
        with self._lock:
            entry = self._entry(key)
            return self._store(key, text, ttl) if (entry.version if entry else None) == version else None

    async def delete(self, key: str) -> bool:
        named(key)
        with self._lock:
            was_there = self._entry(key) is not None
            self._remove(key)
            return was_there

    async def keys(self, prefix: str) -> AsyncIterator[str]:
        named(prefix)
        for key in sorted(key for key in self._entries if key.startswith(prefix)):
            if self._entry(key):
                yield key

    async def close(self) -> None:
        await self._stop_watching()

    async def _now(self, key: str, *, prefix: bool) -> tuple[list[Change], int]:
        named(key)
        with self._lock:
            found = [
                Change(key=name, value=decode(name, entry.text), version=entry.version)
                for name, entry in self._entries.items()
                if (name == key or (prefix and name.startswith(key))) and not entry.is_over
            ]
            return sorted(found, key=lambda change: change.version), self._version

    async def _changes(self, after: int, limit: int) -> list[Change]:
        with self._lock:
            if self._version < after:
                raise gone_back(self.url, after=after, newest=self._version)
            first = self._version - len(self._log) + 1
            if after < first - 1:
                raise lost(self.url, after=after, kept_from=first)
            found = islice(self._log, after - first + 1, after - first + 1 + limit)
            return [changed(key, text, version) for version, (key, text) in enumerate(found, after + 1)]

    async def _wait(self, after: int, timeout: float) -> None:
        waiting = asyncio.get_running_loop(), asyncio.Event()
        self._waiting.add(waiting)
        try:
            if self._version <= after:
                async with asyncio.timeout(timeout):
                    await waiting[1].wait()
        except TimeoutError:
            return
        finally:
            self._waiting.discard(waiting)

    async def _remove_expired(self) -> None:
        with self._lock:
            self._sweep()

    def _sweep(self) -> None:
        for key in [key for key, entry in self._entries.items() if entry.is_over]:
            self._remove(key)

    def _entry(self, key: str) -> _Entry | None:
        entry = self._entries.get(key)
        return None if entry is None or entry.is_over else entry

    def _store(self, key: str, text: str, ttl: float | None) -> int:
        if self._entry(key) is None:
            self._remove(key)  # one whose time was up goes first
        ends = None if ttl is None else time.monotonic() + ttl
        version = self._note(key, text)
        self._entries[key] = _Entry(text=text, version=version, ends=ends)
        if version % SWEEP < 2:  # of the two changes that this may have made
            self._sweep()
        return version

    def _remove(self, key: str) -> None:
        if self._entries.pop(key, None) is not None:
            self._note(key, None)

    def _note(self, key: str, text: str | None) -> int:
        self._version += 1
        self._log.append((key, text))
        for loop, event in list(self._waiting):
            loop.call_soon_threadsafe(event.set)
        return self._version
