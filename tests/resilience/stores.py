"""Stores that are watched, that fail, and in whose midst a process is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from beluga_airflow.errors import StateUnavailable
from beluga_airflow.state import StateStore, Versioned

__all__ = ["Between", "Killed", "hang"]


class Killed(BaseException):
    """Stands for the loss of a process: nothing catches it, and nothing that comes after reaches the store."""


async def hang(*_: Any, **__: Any) -> None:
    """What a store does that is frozen or cut off."""
    await asyncio.sleep(3600)


class Between:
    """A store that notes what it is asked, is away when told to be, and ends its process after so many writes."""

    def __init__(self, store: StateStore, *, writes: int | None = None, away: bool = False) -> None:
        self.store = store
        self.asked: list[str] = []
        self.left = writes
        self.away = away
        self.url = store.url

    async def get(self, key: str, default: Any = None) -> Any:
        self._note("get")
        return await self.store.get(key, default)

    async def get_versioned(self, key: str) -> Versioned | None:
        self._note("get")
        return await self.store.get_versioned(key)

    async def set(self, key: str, value: Any, *, ttl: float | None = None) -> int:
        self._note("write")
        return await self.store.set(key, value, ttl=ttl)

    async def compare_and_swap(
        self, key: str, value: Any, *, version: int | None, ttl: float | None = None
    ) -> int | None:
        self._note("write")
        return await self.store.compare_and_swap(key, value, version=version, ttl=ttl)

    async def delete(self, key: str) -> bool:
        self._note("write")
        return await self.store.delete(key)

    def keys(self, prefix: str) -> AsyncIterator[str]:
        return self.store.keys(prefix)

    def watch(self, key: str, **options: Any) -> Any:
        return self.store.watch(key, **options)

    async def close(self) -> None:
        await self.store.close()

    def _note(self, what: str) -> None:
        if self.away:
            raise StateUnavailable("the state store is away")
        if self.left is not None and (self.left < 0 or (what == "write" and not self.left)):
            self.left = -1
            raise Killed
        if self.left is not None and what == "write":
            self.left -= 1
        self.asked.append(what)
