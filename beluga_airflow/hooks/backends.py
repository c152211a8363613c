"""What steps need from outside, by the names of Airflow connections; for operators and for the worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from airflow.sdk.exceptions import AirflowTaskTerminated, AirflowTaskTimeout

from beluga_airflow.config import LLMSettings, Settings, StateSettings
from beluga_airflow.hooks.llm import LLMHook
from beluga_airflow.hooks.settings import settings_in_force
from beluga_airflow.hooks.state import StateHook

if TYPE_CHECKING:
    from beluga_airflow.execute import Resources
    from beluga_airflow.llm.client import ModelClient
    from beluga_airflow.state import StateStore

__all__ = ["INTERRUPTS", "AirflowBackends"]

INTERRUPTS = (AirflowTaskTerminated, AirflowTaskTimeout)
"""What Airflow raises in a task's process, wherever its code may be, to end the task."""


class AirflowBackends:
    """Opens each connection once in its event loop, when it is first needed, and closes all of them together.

    ``airflow`` is held by whoever asks Airflow for something meanwhile: its in-process supervisor, under
    ``dag.test()``, answers one caller at a time.

    Args:
        settings: asked whenever something is needed: what other settings opened is not used any more.
    """

    def __init__(self, settings: Callable[[], Settings] = settings_in_force) -> None:
        self.airflow = asyncio.Lock()
        self._settings = settings
        self._stores: dict[tuple[str, StateSettings], StateStore] = {}
        self._clients: dict[tuple[str, LLMSettings, StateStore], ModelClient] = {}
        self._refused: list[ModelClient] = []

    async def resources(self, *, llm_conn_id: str | None, state_conn_id: str | None) -> Resources:
        """The resources behind these connections; None: the default ones.

        Raises:
            InvalidSetting: the state connection cannot be used.
        """
        from beluga_airflow.execute import Resources

        default_model = llm_conn_id or LLMHook.default_conn_name

        async def model(conn_id: str | None) -> ModelClient:
            return await self._model(conn_id or default_model, store)

        store = await self.store(state_conn_id)
        return Resources(state=store, model=model, interrupts=INTERRUPTS)

    async def store(self, state_conn_id: str | None) -> StateStore:
        """The state store behind a connection; None: the default one.

        Raises:
            InvalidSetting: the connection cannot be used.
        """
        settings = self._settings()
        name = state_conn_id or StateHook.default_conn_name
        async with self.airflow:
            key = name, settings.state
            if key not in self._stores:
                self._stores[key] = await StateHook(name, settings=settings).store()
            return self._stores[key]

    async def _model(self, conn_id: str, store: StateStore) -> ModelClient:
        settings = self._settings()
        async with self.airflow:
            key = conn_id, settings.llm, store  # where the guards of the connection are kept
            client = self._clients.get(key)
            if client is None or client.refused:
                # one that was refused may have been mended; the old client is closed with the rest, others may use it
                self._clients[key] = await LLMHook(conn_id, state=store, settings=settings).client()
                if client is not None:
                    self._refused.append(client)
            return self._clients[key]

    async def close(self) -> None:
        """Close everything that was opened."""
        stores, self._stores = self._stores, {}
        clients, self._clients = [*self._clients.values(), *self._refused], {}
        self._refused = []
        for client in clients:
            await client.close()
        for store in stores.values():
            await store.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
