"""JSON texts in a dict of this process."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from bare import HISTORY, Pair
from beluga_airflow.state.memory import MemoryStore

__all__ = ["BareDict", "PlainDict", "pair"]


class PlainDict:
    """See ``Plain``."""

    def __init__(self) -> None:
        self._entries: dict[str, str] = {}

    async def get(self, key: str) -> Any:
        return json.loads(self._entries[key])

    async def set(self, key: str, value: Any) -> None:
        self._entries[key] = json.dumps(value)


class BareDict:
    """See ``Bare``."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[str, int]] = {}
        self._log: deque[tuple[int, str, str]] = deque(maxlen=HISTORY)
        self._version = 0
        self._changed = asyncio.Event()

    async def get(self, key: str) -> Any:
        return json.loads(self._entries[key][0])

    async def set(self, key: str, value: Any) -> int:
        text = json.dumps(value)
        self._version += 1
        self._entries[key] = text, self._version
        self._log.append((self._version, key, text))
        self._changed.set()
        return self._version

    async def compare_and_swap(self, key: str, value: Any, *, version: int) -> int | None:
        return await self.set(key, value) if self._entries[key][1] == version else None

    async def watch(self, key: str) -> AsyncGenerator[Any]:
        last = self._version
        yield await self.get(key)
        while True:
            await self._changed.wait()
            self._changed.clear()
            missed = self._version - last
            for version, name, text in list(self._log)[len(self._log) - missed :]:
                last = version
                if name == key:
                    yield json.loads(text)


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    """No target: what is measured is a few lines of Python, and no client."""
    store = MemoryStore()
    yield Pair(
        name="memory", ours=store, bare=BareDict(), plain=PlainDict(), reader=store, url=None, versions={}, targets={}
    )
    await store.close()
