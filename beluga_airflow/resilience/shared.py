"""What the guards share: names, durations, the store they are kept in, and what to do after a collision."""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from beluga_airflow.errors import InvalidSetting, StateUnavailable
from beluga_airflow.graph.parts import told
from beluga_airflow.graph.retry import is_duration, is_whole, seconds
from beluga_airflow.resilience.bounded import bounded
from beluga_airflow.state import StateStore, Versioned

__all__ = ["TRIES", "SoonStore", "duration", "named", "pause", "store_of", "turn", "whole"]

NAME = re.compile(r"[A-Za-z0-9_.:-]{1,200}")
TRIES = 50
"""Collisions with others after which one gives up."""
TURN = 1.0
"""Seconds that one waits for the others of one's event loop."""
PAUSES = (0.002, 0.2)
"""Seconds: the first and the longest pause after a collision."""
ANSWER = 4.0
"""Seconds that the store has for each answer: a step's attempt, which may need two before its time begins, is given up
by Temporal 10 s after its timeout."""


def named(what: str, name: Any, store: Any) -> str:
    """What a guard is called in messages, if its name and its store can be used.

    Raises:
        InvalidSetting: they cannot.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidSetting(
            f"the name {told(name)} of a {what} must be 1 to 200 letters, digits, '-', '_', '.' or ':'"
        )
    if store is not None and not hasattr(store, "compare_and_swap"):
        raise InvalidSetting(
            f"the store of {what} {name!r} is a {type(store).__name__}; give a StateStore, as open_store(url) does, or "
            "leave it out"
        )
    return f"{what} {name!r}"


def whole(of: str, name: str, number: Any) -> None:
    """Hold a setting to a whole number, 1 or more.

    Raises:
        InvalidSetting: it is none.
    """
    if not is_whole(number) or number < 1:
        raise InvalidSetting(f"{name} of {of} is {told(number)}, it must be a whole number, 1 or more")


def duration(of: str, name: str, value: float | timedelta, *, least: float) -> float:
    """A setting as seconds, above or at ``least``.

    Raises:
        InvalidSetting: it is no such duration.
    """
    if not is_duration(value) or not least <= seconds(value) < math.inf:
        raise InvalidSetting(f"{name} of {of} is {told(value)}, it must be {least:g} seconds or more, or a timedelta")
    return seconds(value)


class SoonStore:
    """What guards ask of a state store. One that hangs is one that is away: calls do not wait for it."""

    def __init__(self, store: StateStore) -> None:
        self._store = store

    @property
    def url(self) -> str:
        return self._store.url

    async def get_versioned(self, key: str) -> Versioned | None:
        with bounded(ANSWER, self._late):
            return await self._store.get_versioned(key)

    async def compare_and_swap(
        self, key: str, value: Any, *, version: int | None, ttl: float | None = None
    ) -> int | None:
        with bounded(ANSWER, self._late):
            return await self._store.compare_and_swap(key, value, version=version, ttl=ttl)

    def _late(self) -> StateUnavailable:
        return StateUnavailable(f"the state store {self.url} did not answer within {ANSWER:g} s; see how it is")


def store_of(of: str, own: StateStore | None, given: StateStore | None) -> SoonStore:
    """Where a guard is kept: in its own store, else in that of whoever runs it.

    Raises:
        InvalidSetting: there is none.
    """
    store = given if own is None else own
    if store is None:
        raise InvalidSetting(f"{of} has no store here; give it one, store=open_store(url)")
    return SoonStore(store)


Turns = WeakValueDictionary[tuple[str, str], asyncio.Lock]
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()


@asynccontextmanager
async def turn(store: SoonStore, key: str) -> AsyncIterator[None]:
    """Read and write an entry in turn with the others of this event loop, so as to collide with other processes only.

    It saves work, no more: behind a store that hangs, nobody waits for all who came before.
    """
    locks = _turns.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
    lock = locks.setdefault((store.url, key), asyncio.Lock())
    try:
        async with asyncio.timeout(TURN):
            await lock.acquire()
    except TimeoutError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


async def pause(tries: int) -> None:
    """Wait after a collision: the longer the more there were, and not all who collided the same."""
    first, longest = PAUSES
    await asyncio.sleep(random.uniform(0, min(first * 2 ** min(tries, 20), longest)))  # noqa: S311  # no secret
