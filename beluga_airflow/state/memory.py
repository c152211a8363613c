"""A state store in this process's memory: for tests, and for runs that nobody needs to survive."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from beluga_airflow.state.base import Versioned
from beluga_airflow.state.codec import decode, encode, named

__all__ = ["MemoryStore"]


class MemoryStore:
    """See ``StateStore``. Values are kept as JSON text, so that nobody can change them from outside."""

    url = "memory://"

    def __init__(self) -> None:
        self._values: dict[str, tuple[str, int]] = {}
        self._version = 0

    async def get(self, key: str, default: Any = None) -> Any:
        found = await self.get_versioned(key)
        return found.value if found else default

    async def get_versioned(self, key: str) -> Versioned | None:
        found = self._values.get(named(key))
        return Versioned(value=decode(key, found[0]), version=found[1]) if found else None

    async def set(self, key: str, value: Any) -> int:
        return self._store(key, encode(named(key), value))

    async def compare_and_swap(self, key: str, value: Any, *, version: int | None) -> int | None:
        text = encode(named(key), value)
        found = self._values.get(key)
        return self._store(key, text) if (found[1] if found else None) == version else None

    async def delete(self, key: str) -> bool:
        self._version += 1
        return self._values.pop(named(key), None) is not None

    async def keys(self, prefix: str) -> AsyncIterator[str]:
        named(prefix)
        for key in sorted(key for key in self._values if key.startswith(prefix)):
            yield key

    async def close(self) -> None:
        """Nothing to let go of."""

    def _store(self, key: str, text: str) -> int:
        self._version += 1
        self._values[key] = (text, self._version)
        return self._version
