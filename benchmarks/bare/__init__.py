"""State kept by hand, with a backend's own client: what somebody writes who needs this work and no more of it.

Each module has two classes. ``Bare...`` has the methods of a ``StateStore`` that are measured and the same promises for
them: JSON values, versions that grow by one with every change, a history that a watch reads. It leaves out times to
live, listings, lost connections, closed event loops, several writers in one process, and errors of ours. ``Plain...``
stores and gives back JSON, and promises nothing else.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from beluga_airflow.errors import StateUnavailable
from beluga_airflow.state import StateStore

__all__ = ["HISTORY", "Bare", "Pair", "Plain", "pairs"]

HISTORY = 100_000
"""Changes that they keep, as our stores do."""


class Plain(Protocol):
    """Values by key."""

    async def get(self, key: str) -> Any:
        """The value."""
        ...

    async def set(self, key: str, value: Any) -> Any:
        """Store it."""
        ...


class Bare(Plain, Protocol):
    """See ``StateStore``, of whose methods these are some: ``get`` reads the version too, ``set`` returns it."""

    async def compare_and_swap(self, key: str, value: Any, *, version: int) -> int | None:
        """Store it if the key has this version; the new version, or None."""
        ...

    def watch(self, key: str) -> AsyncGenerator[Any]:
        """The value that is there, then every new one."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A backend, as ours and by hand, all empty and on the same server.

    Args:
        name: of the backend.
        ours, bare, plain: the sides.
        reader: a second store of ours on the same state, as in another process; of memory there is but one.
        url: of ours, password and all; None: no other process can open it.
        versions: of the client and of the server.
        targets: what ours may cost as a multiple of the other, by work.
    """

    name: str
    ours: StateStore
    bare: Bare
    plain: Plain
    reader: StateStore
    url: str | None
    versions: Mapping[str, str]
    targets: Mapping[str, float] = field(default_factory=lambda: {"get": 1.5, "set": 1.5})


MODULES = ("plain_dict", "plain_sqlite", "redis_py", "psycopg_3")


@asynccontextmanager
async def pairs() -> AsyncIterator[tuple[list[Pair], list[str]]]:
    """Every backend that answers, and a sentence for each that does not; all that was stored goes with the block."""
    async with AsyncExitStack() as stack:
        found, away = [], []
        for module in MODULES:
            try:
                found.append(await stack.enter_async_context(importlib.import_module(f"bare.{module}").pair()))
            except StateUnavailable as error:
                away.append(f"Left out: {error}.")
        yield found, away
