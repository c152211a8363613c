"""The contract of a state store: JSON values by key, shared by whoever opens the same store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["StateStore", "Versioned"]


@dataclass(frozen=True, kw_only=True)
class Versioned:
    """A stored value and its version, a number that grows with every change of the store and never restarts."""

    value: Any
    version: int


class StateStore(Protocol):
    """Keys are texts, values are JSON (None included: a stored None differs from a missing key).

    Every method raises ``StateUnavailable`` when the store cannot be reached now, and ``StateError`` when it refuses.
    """

    @property
    def url(self) -> str:
        """Where this store is, without any password: for messages."""
        ...

    async def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, or ``default`` where there is none."""
        ...

    async def get_versioned(self, key: str) -> Versioned | None:
        """The value of ``key`` with its version, or None where there is none."""
        ...

    async def set(self, key: str, value: Any) -> int:
        """Store ``value`` and return its version; on return it survives the loss of this process."""
        ...

    async def compare_and_swap(self, key: str, value: Any, *, version: int | None) -> int | None:
        """Store ``value`` if the key still has ``version`` (None: if it is missing).

        Returns:
            the new version, or None where the key had another.
        """
        ...

    async def delete(self, key: str) -> bool:
        """Remove ``key``; whether it was there."""
        ...

    def keys(self, prefix: str) -> AsyncIterator[str]:
        """All keys that begin with ``prefix``, in order."""
        ...

    async def close(self) -> None:
        """Let go of what this store holds open; what is stored stays."""
        ...
