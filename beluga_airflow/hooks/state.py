"""The hook for state stores."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from airflow.sdk import BaseHook

from beluga_airflow.errors import BelugaError
from beluga_airflow.hooks.connections import find_connection, text
from beluga_airflow.state import StateStore, open_store

__all__ = ["StateHook"]


class StateHook(BaseHook):
    """Connects to a state store.

    Without the connection ``beluga_state_default`` it is the SQLite file ``beluga/state.db`` under ``AIRFLOW_HOME``,
    shared by the processes of this machine.

    Args:
        state_conn_id: a connection of type ``beluga_state`` with the store's ``url`` in its fields.
    """

    conn_name_attr = "state_conn_id"
    default_conn_name = "beluga_state_default"
    conn_type = "beluga_state"
    hook_name = "Beluga state store"

    def __init__(self, state_conn_id: str = default_conn_name) -> None:
        super().__init__()
        self.state_conn_id = state_conn_id

    async def store(self) -> StateStore:
        """The store; the caller closes it.

        Raises:
            InvalidSetting: the connection is missing, or no backend serves its URL.
        """
        connection = await find_connection(
            self.state_conn_id, default=self.default_conn_name, conn_types=(self.conn_type,)
        )
        url = None if connection is None else text(connection, "url")
        return open_store(url or default_url())

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, from a plain ``@task``.

        Raises:
            StateUnavailable: the store cannot be reached.
        """

        async def get() -> Any:
            store = await self.store()
            try:
                return await store.get(key, default)
            finally:
                await store.close()

        return asyncio.run(get())

    def set(self, key: str, value: Any) -> None:
        """Store a JSON value, from a plain ``@task``.

        Raises:
            StateUnavailable: the store cannot be reached.
            StateError: the value is not JSON.
        """

        async def put() -> None:
            store = await self.store()
            try:
                await store.set(key, value)
            finally:
                await store.close()

        asyncio.run(put())

    def test_connection(self) -> tuple[bool, str]:
        """Write and read back a value: whether that worked, and in words what happened."""

        async def test() -> str:
            store = await self.store()
            try:
                version = await store.set("beluga/connection-test", True)
                await store.delete("beluga/connection-test")
            finally:
                await store.close()
            return f"the state store {store.url} takes and gives back values (version {version})"

        try:
            return True, asyncio.run(test())
        except BelugaError as error:
            return False, str(error)


def default_url() -> str:
    """The URL of the store that serves where no connection is made."""
    home = Path(os.environ.get("AIRFLOW_HOME", "~/airflow")).expanduser().absolute()
    return f"sqlite:///{home / 'beluga' / 'state.db'}"
