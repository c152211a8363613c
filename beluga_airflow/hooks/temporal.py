"""The hook for Temporal."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from airflow.sdk import BaseHook

from beluga_airflow.errors import BelugaError
from beluga_airflow.hooks.connections import find_connection, flag, text

if TYPE_CHECKING:
    from temporalio.client import Client

    from beluga_airflow.config import Settings
    from beluga_airflow.temporal.client import Target

__all__ = ["TemporalHook"]


class TemporalHook(BaseHook):
    """Connects to a Temporal server.

    Without the connection ``temporal_default``: ``localhost:7233``, namespace ``default``, task queue
    ``beluga-workflows``, and the development server's web UI at port 8233.

    Args:
        temporal_conn_id: a connection of type ``temporal``: host and port, an API key as its password; namespace,
            task_queue, tls (on where there is a key, unless it says otherwise) and ui_url in its fields.
        settings: instead of the defaults.
    """

    conn_name_attr = "temporal_conn_id"
    default_conn_name = "temporal_default"
    conn_type = "temporal"
    hook_name = "Temporal"

    def __init__(self, temporal_conn_id: str = default_conn_name, *, settings: Settings | None = None) -> None:
        from beluga_airflow.config import Settings

        super().__init__()
        self.temporal_conn_id = temporal_conn_id
        self._settings = (settings or Settings()).workflow.temporal

    async def target(self) -> Target:
        """Where the connection leads.

        Raises:
            InvalidSetting: the connection is missing, of another type, or something in it cannot be used.
        """
        # temporalio costs most of a second, which a DAG file that only names operators must not pay
        from beluga_airflow.temporal.client import Target

        defaults = self._settings
        connection = await find_connection(
            self.temporal_conn_id, default=self.default_conn_name, conn_types=(self.conn_type,)
        )
        if connection is None:
            return Target(
                address=defaults.address,
                namespace=defaults.namespace,
                task_queue=defaults.task_queue,
                ui_url="http://localhost:8233" if defaults.address.startswith("localhost:") else None,
            )
        host, port = connection.host or "localhost", connection.port or 7233
        return Target(
            address=f"{host}:{port}",
            namespace=text(connection, "namespace") or defaults.namespace,
            task_queue=text(connection, "task_queue") or defaults.task_queue,
            api_key=connection.password or None,
            tls=flag(connection, "tls", default=bool(connection.password)),
            ui_url=text(connection, "ui_url"),
        )

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
