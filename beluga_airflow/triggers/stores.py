"""One open store for all who wait for it in an event loop: they share its connections and its one reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from beluga_airflow.hooks.state import StateHook

if TYPE_CHECKING:
    from beluga_airflow.state import StateStore

__all__ = ["shared_store"]


@dataclass
class _Shared:
    store: StateStore
    users: int = 0


_open: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Shared]] = WeakKeyDictionary()
"""By the URL, password included: a connection that was changed leads to another store from then on."""


@asynccontextmanager
async def shared_store(state_conn_id: str) -> AsyncIterator[StateStore]:
    """The store behind a connection, the same object for all who use it at once in this event loop.

    Raises:
        InvalidSetting: the connection is missing, or no backend serves its URL.
    """
    from beluga_airflow.state import open_store

    url = await StateHook(state_conn_id).store_url()
    stores = _open.setdefault(asyncio.get_running_loop(), {})
    shared = stores.get(url) or stores.setdefault(url, _Shared(open_store(url)))
    shared.users += 1
    try:
        yield shared.store
    finally:
        shared.users -= 1
        if not shared.users:
            # first out of sight: who comes while this one closes opens another
            del stores[url]
            await shared.store.close()
