"""Watching a store: one reader of its history for all who watch it in an event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import TypeVar
from weakref import WeakKeyDictionary

from beluga_airflow.errors import HistoryLost, StateUnavailable
from beluga_airflow.state.base import Change
from beluga_airflow.state.codec import decode

__all__ = ["HISTORY", "PAGE", "SWEEP", "Watchable", "changed", "gone_back", "lost"]

log = logging.getLogger(__name__)
T = TypeVar("T")

HISTORY = 100_000
"""Changes that a store keeps at least."""
PAGE = 1_000
"""Changes that one read takes."""
SWEEP = 100
"""Changes after which a write removes as many keys whose time is up: where nobody watches, nobody else does."""
WINDOW = 10_000
"""The newest changes, which the reader keeps for all who watch; who is behind them reads for himself."""
WINDOW_SIZE = 64_000_000
"""Characters of JSON in the window, beyond its newest change."""
PATIENCE = 1.0
"""Seconds after which a reader to whom nobody said anything looks by itself, and has what is over its time removed."""
AWAY = (0.1, 5.0)
"""The first and the longest wait, in seconds, between two tries to reach a store that is away."""


def changed(key: str, text: str | None, version: int) -> Change:
    """A change as a history keeps it; ``text``: the JSON of the value, None where the key was removed."""
    if text is None:
        return Change(key=key, version=version, is_gone=True)
    return Change(key=key, value=decode(key, text), version=version, size=len(text))


def lost(url: str, *, after: int, kept_from: int) -> HistoryLost:
    """The error of a reader that comes too late."""
    return HistoryLost(
        f"the state store {url} does not keep changes {after + 1} to {kept_from - 1} any more; watch without after=, "
        "and compare what is there now with what was known",
        after=after,
        kept_from=kept_from,
    )


def gone_back(url: str, *, after: int, newest: int) -> HistoryLost:
    """The error of a reader that has seen more than there is: it would wait, and then miss what comes meanwhile."""
    return HistoryLost(
        f"the state store {url} is at version {newest}, and change {after} was seen: it has lost what it stored since, "
        "was restored, or is another; watch without after=, and compare what is there now with what was known",
        after=after,
        kept_from=newest + 1,
    )


class Watchable(ABC):
    """What stores share: ``watch``, over what each can tell of its history."""

    def __init__(self) -> None:
        self._readers: WeakKeyDictionary[asyncio.AbstractEventLoop, _Reader] = WeakKeyDictionary()

    @property
    @abstractmethod
    def url(self) -> str:
        """Where this store is, without any password."""

    @abstractmethod
    async def _now(self, key: str, *, prefix: bool) -> tuple[list[Change], int]:
        """What is there now, in the order of versions, and the version of the store's last change at that moment."""

    @abstractmethod
    async def _changes(self, after: int, limit: int) -> list[Change]:
        """The changes of all keys that follow, at most ``limit``, in order and without a gap.

        Raises:
            HistoryLost: they are not all kept any more, or the store has not come so far.
        """

    @abstractmethod
    async def _wait(self, after: int, timeout: float) -> None:
        """Wait until there is a change after this one, or not much longer than ``timeout`` seconds."""

    @abstractmethod
    async def _remove_expired(self) -> None:
        """Remove the keys whose time is up, each as a change."""

    async def watch(self, key: str, *, prefix: bool = False, after: int | None = None) -> AsyncGenerator[Change]:
        """See ``StateStore``."""
        with self._reader() as reader:
            if after is None:
                changes, last = await _patiently(self.url, partial(self._now, key, prefix=prefix))
                if not changes and not prefix:
                    changes = [Change(key=key, version=last, is_gone=True)]
                for change in changes:
                    yield change
            else:
                last = after
            while True:
                for change in await reader.following(last):
                    last = change.version
                    if change.key == key or (prefix and change.key.startswith(key)):
                        yield change

    def _reader(self) -> _Reader:
        loop = asyncio.get_running_loop()
        reader = self._readers.get(loop)
        if reader is None:
            reader = self._readers[loop] = _Reader(self)
        return reader

    async def _stop_watching(self) -> None:
        """End the reader of this event loop; those of others end with theirs."""
        reader = self._readers.pop(asyncio.get_running_loop(), None)
        if reader is not None:
            await reader.end()


class _Reader:
    """Reads on while somebody watches, and keeps the newest changes."""

    def __init__(self, store: Watchable) -> None:
        self._store = store
        self._window: deque[Change] = deque()
        self._size = 0
        self._watches = 0
        self._task: asyncio.Task[None] | None = None
        self._waiting: set[asyncio.Future[None]] = set()

    def __enter__(self) -> _Reader:
        self._watches += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._watches -= 1
        if not self._watches and self._task is not None:
            self._task.cancel()
            self._task = None
            self._forget()

    async def end(self) -> None:
        """End, for all who watch."""
        for future in self._waiting:
            future.cancel()
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def following(self, after: int) -> list[Change]:
        """The next changes; waits until there is one.

        Raises:
            HistoryLost: they are not all kept any more.
        """
        while True:
            if not self._window or not self._window[0].version - 1 <= after <= self._window[-1].version:
                # behind the window, before it is there, or ahead of a store that has lost data
                changes = await _patiently(self._store.url, partial(self._store._changes, after, PAGE))
            else:
                # versions have no gaps
                changes = [*islice(self._window, after - self._window[0].version + 1, None)]
            if changes:
                return changes
            if self._window and self._window[-1].version > after:
                continue  # one came while that was read
            if self._task is None:
                self._task = asyncio.create_task(self._read(after))
            await self._next_change()

    async def _next_change(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)

    async def _read(self, after: int) -> None:
        try:
            await self._read_on(after)
        except Exception as error:
            self._task = None
            for future in self._waiting:
                if not future.done():
                    future.set_exception(error)

    async def _read_on(self, after: int) -> None:
        looked = -PATIENCE  # when it was last seen to what is over its time
        while True:
            try:
                changes = await _patiently(self._store.url, partial(self._store._changes, after, PAGE))
            except HistoryLost as error:
                # those who watch have the same error when they read for themselves
                self._forget()
                after = error.kept_from - 1
                self._ring()
                continue
            if changes:
                self._keep(changes)
                after = changes[-1].version
                self._ring()
                continue
            await _patiently(self._store.url, partial(self._store._wait, after, PATIENCE))
            if time.monotonic() - looked >= PATIENCE:  # not at each change: it is a question to the store
                await _patiently(self._store.url, self._store._remove_expired)
                looked = time.monotonic()

    def _keep(self, changes: list[Change]) -> None:
        self._window.extend(changes)
        self._size += sum(change.size for change in changes)
        while len(self._window) > 1 and (len(self._window) > WINDOW or self._size > WINDOW_SIZE):
            self._size -= self._window.popleft().size

    def _forget(self) -> None:
        self._window.clear()
        self._size = 0

    def _ring(self) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_result(None)


async def _patiently(url: str, ask: Callable[[], Awaitable[T]]) -> T:
    wait, longest = AWAY
    while True:
        try:
            return await ask()
        except StateUnavailable as error:
            log.warning("watching the state store %s: %s; trying again in %g s", url, error, wait)
            await asyncio.sleep(wait)
            wait = min(wait * 2, longest)
