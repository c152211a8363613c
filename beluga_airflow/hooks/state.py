"""The hook for state stores."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from airflow.sdk import BaseHook, Connection

from beluga_airflow.config.settings import RULES
from beluga_airflow.errors import BelugaError, InvalidSetting
from beluga_airflow.hooks.connections import find_connection, flag, text
from beluga_airflow.hooks.settings import airflow_home, settings_in_force

if TYPE_CHECKING:
    from beluga_airflow.config import Settings
    from beluga_airflow.state import StateStore

__all__ = ["StateHook"]

REDIS_OPTIONS = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_keyfile", "ssl_certfile", "ssl_check_hostname")
POSTGRES_OPTIONS = (
    *("sslmode", "sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl"),
    *("application_name", "connect_timeout", "options", "target_session_attrs"),
)
"""Of a connection's extra: what the clients take of it."""


class StateHook(BaseHook):
    """Connects to a state store.

    Without the connection ``beluga_state_default`` it is ``state.url`` of the configuration file, or the SQLite file
    ``beluga/state.db`` under ``AIRFLOW_HOME``, shared by the processes of this machine.

    Args:
        state_conn_id: a connection of type ``beluga_state`` with the store's ``url`` in its fields, or one of Airflow's
            own types ``redis``, ``postgres`` or ``sqlite``.
        settings: instead of those in force when the store is opened.
    """

    conn_name_attr = "state_conn_id"
    default_conn_name = "beluga_state_default"
    conn_type = "beluga_state"
    hook_name = "Beluga state store"

    def __init__(self, state_conn_id: str = default_conn_name, *, settings: Settings | None = None) -> None:
        super().__init__()
        self.state_conn_id = state_conn_id
        self._settings = settings

    async def store(self) -> StateStore:
        """The store; the caller closes it.

        Raises:
            InvalidSetting: the connection is missing, or no backend serves its URL.
        """
        from beluga_airflow.state import open_store

        return open_store(await self.store_url())

    async def store_url(self) -> str:
        """Where the store is, with its password.

        Raises:
            InvalidSetting: the connection is missing, or something in it cannot be used.
        """
        settings = self._settings or settings_in_force()
        connection = await self.connection()
        told = self.told(connection) if connection else {}
        return told.get("url") or settings.state.url or default_url()

    async def connection(self) -> Connection | None:
        """The connection; None where it is the default one and nobody made it.

        Raises:
            InvalidSetting: a connection that was asked for by name does not exist, or cannot be used.
        """
        return await find_connection(
            self.state_conn_id, default=self.default_conn_name, conn_types=(self.conn_type, *URLS)
        )

    @staticmethod
    def told(connection: Connection) -> dict[str, str]:
        """What a connection says in place of settings, by their names.

        Raises:
            InvalidSetting: something in it cannot be used.
        """
        make = URLS.get(connection.conn_type or "")
        url = make(connection) if make else text(connection, "url")
        kind, holds = RULES["url"]
        if url and not holds(url):
            raise InvalidSetting(
                f"what connection {connection.conn_id!r} names cannot be used (it is not shown, as it may hold a "
                f"password), it must be {kind}"
            )
        return {"url": url} if url else {}

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
                version = await store.set("beluga/connection-test", True, ttl=60)
                await store.delete("beluga/connection-test")
            finally:
                await store.close()
            return f"the state store {store.url} takes and gives back values (version {version})"

        try:
            return True, asyncio.run(test())
        except BelugaError as error:
            return False, str(error)


def _redis_url(connection: Connection) -> str:
    scheme = "rediss" if flag(connection, "ssl", False) else "redis"
    options = {name: text(connection, name) for name in REDIS_OPTIONS}
    return _joined(scheme, connection, 6379, text(connection, "db") or "0", options)


def _postgres_url(connection: Connection) -> str:
    options = {name: text(connection, name) for name in POSTGRES_OPTIONS}
    return _joined("postgresql", connection, 5432, connection.schema or "postgres", options)


def _sqlite_url(connection: Connection) -> str:
    if not connection.host:
        raise InvalidSetting(
            f"connection {connection.conn_id!r} of type 'sqlite' names no file; write its path as host"
        )
    return f"sqlite:///{connection.host}"


URLS = {"redis": _redis_url, "postgres": _postgres_url, "sqlite": _sqlite_url}
"""How the parts of Airflow's own connections make a URL, by connection type."""


def _joined(scheme: str, connection: Connection, port: int, path: str, options: Mapping[str, str | None]) -> str:
    login, password = (quote(part or "", safe="") for part in (connection.login, connection.password))
    user = f"{login}:{password}@" if login or password else ""
    host = connection.host or "localhost"
    where = f"[{host}]" if ":" in host else host
    query = urlencode({name: value for name, value in options.items() if value is not None}, quote_via=quote)
    return f"{scheme}://{user}{where}:{connection.port or port}/{quote(path, safe='')}{'?' if query else ''}{query}"


def default_url() -> str:
    """The URL of the store that serves where neither a connection nor a file says another."""
    return f"sqlite:///{airflow_home() / 'beluga' / 'state.db'}"
