"""The hook for Temporal."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from airflow.sdk import BaseHook, Connection

from beluga_airflow.errors import BelugaError
from beluga_airflow.hooks.connections import find_connection, flag, text
from beluga_airflow.hooks.settings import settings_in_force

if TYPE_CHECKING:
    from temporalio.client import Client

    from beluga_airflow.config import Settings
    from beluga_airflow.temporal.client import Target

__all__ = ["TemporalHook"]


class TemporalHook(BaseHook):
    """Connects to a Temporal server.

    What the connection does not say, or all where there is no ``temporal_default``, is as the configuration file says,
    or ``localhost:7233``, namespace ``default``, task queue ``beluga-workflows``. Without a connection the web UI of a
    server on this machine is the development server's, at port 8233.

    Args:
        temporal_conn_id: a connection of type ``temporal``: host and port, an API key as its password; namespace,
            task_queue, tls (on where there is a key, unless it says otherwise) and ui_url in its fields.
        settings: instead of those in force when it connects.
    """

    conn_name_attr = "temporal_conn_id"
    default_conn_name = "temporal_default"
    conn_type = "temporal"
    hook_name = "Temporal"

    def __init__(self, temporal_conn_id: str = default_conn_name, *, settings: Settings | None = None) -> None:
        super().__init__()
        self.temporal_conn_id = temporal_conn_id
        self._settings = settings

    async def target(self) -> Target:
        """Where the connection leads.

        Raises:
            InvalidSetting: the connection is missing, of another type, or something in it cannot be used.
        """
        # temporalio costs most of a second, which a DAG file that only names operators must not pay
        from beluga_airflow.temporal.client import Target

        settings = (self._settings or settings_in_force()).workflow.temporal
        connection = await self.connection()
        if connection is None:
            is_local = settings.address.startswith("localhost:")
            return Target(
                address=settings.address,
                namespace=settings.namespace,
                task_queue=settings.task_queue,
                ui_url="http://localhost:8233" if is_local else None,
            )
        told = self.told(connection)
        return Target(
            address=told.get("address", settings.address),
            namespace=told.get("namespace", settings.namespace),
            task_queue=told.get("task_queue", settings.task_queue),
            api_key=connection.password or None,
            tls=flag(connection, "tls", default=bool(connection.password)),
            ui_url=text(connection, "ui_url"),
        )

    async def connection(self) -> Connection | None:
        """The connection; None where it is the default one and nobody made it.

        Raises:
            InvalidSetting: a connection that was asked for by name does not exist, or cannot be used.
        """
        return await find_connection(
            self.temporal_conn_id, default=self.default_conn_name, conn_types=(self.conn_type,)
        )

    @staticmethod
    def told(connection: Connection) -> dict[str, str]:
        """What a connection says in place of settings, by their names."""
        told = {name: text(connection, name) for name in ("namespace", "task_queue")}
        if connection.host or connection.port:
            told["address"] = f"{connection.host or 'localhost'}:{connection.port or 7233}"
        return {name: value for name, value in told.items() if value is not None}

    async def client(self) -> tuple[Client, Target]:
        """A connected client, and where it leads.

        Raises:
            TemporalUnavailable: no server answers.
            TemporalError: it refuses.
            InvalidSetting: the connection cannot be used.
        """
        from beluga_airflow.temporal.client import connect

        target = await self.target()
        return await connect(target), target

    def test_connection(self) -> tuple[bool, str]:
        """Ask the server for the namespace: whether it answered, and in words what happened."""

        async def test() -> str:
            from beluga_airflow.temporal.client import check

            client, target = await self.client()
            return await check(client, target)

        try:
            return True, asyncio.run(test())
        except BelugaError as error:
            return False, str(error)
