"""The contract of a state store: JSON values by key, shared by whoever opens the same store."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Change", "StateStore", "Versioned"]


@dataclass(frozen=True, kw_only=True)
class Versioned:
    """A stored value, and the version of the change that set it."""

    value: Any
    version: int


@dataclass(frozen=True, kw_only=True)
class Change:
    """What became of a key.

    Args:
        key: which.
        value: JSON, what it holds from then on; None where it is gone.
        version: of the change. A watch that was left here goes on with ``after=version``.
        is_gone: the key is not there: it was deleted, its time was up, or, at the beginning of a watch, it never was.
        size: characters of the value's JSON.
    """

    key: str
    value: Any = None
    version: int
    is_gone: bool = False
    size: int = field(default=0, compare=False, repr=False)


class StateStore(Protocol):
    """Keys are texts, values are JSON (None included: a stored None differs from a missing key).

    Versions are whole numbers that grow by one with every change of the store, and never begin again, not after a
    delete either. A key whose time is up is gone for every method at once; those who watch hear of it within seconds.

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

    async def set(self, key: str, value: Any, *, ttl: float | None = None) -> int:
        """Store ``value`` and return its version; on return it survives the loss of this process.

        Args:
            key: which.
            value: JSON.
            ttl: seconds after which the key is gone, unless it was set again; None: it stays.
        """
        ...

    async def compare_and_swap(
        self, key: str, value: Any, *, version: int | None, ttl: float | None = None
    ) -> int | None:
        """Store ``value`` if the key still has ``version`` (None: if it is missing); ``ttl`` as in ``set``.

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

    def watch(self, key: str, *, prefix: bool = False, after: int | None = None) -> AsyncGenerator[Change]:
        """What is there now, then every change in order, for ever; a store that is away is waited for.

        A reader may be slow: nobody waits for it, and it loses nothing as long as the store's history reaches.

        Args:
            key: the key, or, with ``prefix``, what the keys begin with.
            prefix: whether to watch all keys that begin so.
            after: the version of the last change that was seen. Then what is there now is left out, and every change
                since then comes.

        Raises:
            HistoryLost: the store does not keep all changes after that one any more, or has lost that one itself; watch
                without ``after``.
        """
        ...

    async def close(self) -> None:
        """Let go of what this store holds open; what is stored stays."""
        ...
