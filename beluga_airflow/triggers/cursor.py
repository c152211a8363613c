"""Up to which change of a store a watcher's events are stored in Airflow: kept by the transactions that store them."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow.listeners import hookimpl

if TYPE_CHECKING:
    from airflow.listeners.types import AssetEvent
    from airflow.sdk.execution_time.context import AssetStateStoreAccessor, AssetStateStoreAccessors

__all__ = ["WATCHER", "Cursor", "on_asset_event_emitted"]

log = logging.getLogger(__name__)

WATCHER = "beluga/watcher/"
"""What the name of every watcher begins with."""
IN_FLIGHT = 200
"""Events that may be on their way to Airflow's database at once: until they are there, they fill the triggerer."""
LOOK = 0.5
"""Seconds between two looks whether they are."""
PATIENCE = 60.0
"""Seconds after which a watcher whose events are not stored complains."""
PASSED = 10.0
"""Seconds after which a watcher notes how far it is, where changes go by that are not its own."""


class Cursor:
    """Where a watcher goes on when it starts again: behind the last change whose event is stored.

    The transaction in which the triggerer stores an event moves it too (``on_asset_event_emitted``), so that no moment
    at which a triggerer may die lies between the two. It is in the state of the watched assets, under ``name``.
    """

    def __init__(self, name: str, assets: AssetStateStoreAccessors) -> None:
        self.name = name
        # several assets may have one watcher; Airflow shows how to reach only one that is known by name
        self._assets: list[AssetStateStoreAccessor] = [*assets._by_name.values()]
        self._fired: int | None = None
        self._in_flight = 0
        # until one was seen to be stored
        self._limit = 1
        self._due = time.monotonic() + PASSED

    async def fired(self, version: int) -> None:
        """Note that an event was fired; waits where too many are on their way."""
        self._fired = version
        self._in_flight += 1
        if self._in_flight >= self._limit:
            await self.settled()
            self._limit = IN_FLIGHT

    async def passed(self, version: int) -> None:
        """Note that a change went by without an event: kept now and then, or the history would be left behind."""
        if time.monotonic() >= self._due:
            await self.settled()
            await self.set(version)

    async def settled(self) -> int | None:
        """Where the watcher stands, when no event is on its way any more; None: nowhere yet."""
        complaint = time.monotonic() + PATIENCE
        while (stored := await self._stored()) not in (self._fired, None) and self._fired is not None:
            if time.monotonic() > complaint:
                log.error(
                    "watcher %s: Airflow has not stored the event of change %s within %g s, and stands at %s: the "
                    "triggerer is overloaded, or has not loaded the plugin 'beluga' (see `airflow plugins`)",
                    *(self.name, self._fired, PATIENCE, stored),
                )
                complaint += PATIENCE
            await asyncio.sleep(LOOK)
        self._in_flight = 0
        return stored

    async def set(self, version: int) -> None:
        """Go on behind this change; only while no event is on its way."""
        for asset in self._assets:
            await asset.aset(self.name, version)
        self._due = time.monotonic() + PASSED
        if self._fired is not None:
            self._fired = version

    async def _stored(self) -> int | None:
        found = [await asset.aget(self.name) for asset in self._assets]
        return max((version for version in found if isinstance(version, int)), default=None)


@hookimpl
def on_asset_event_emitted(asset_event: AssetEvent) -> None:
    """Move the cursor of the watcher whose event the triggerer is about to commit, in the same transaction."""
    extra = asset_event.extra
    # as Airflow makes it of a trigger's event; what tasks and users send looks otherwise
    if asset_event.source_task_id is not None or not extra or extra.keys() != {"from_trigger", "payload"}:
        return
    payload = extra["payload"]
    if isinstance(payload, Mapping) and str(payload.get("watcher")).startswith(WATCHER):
        _move(asset_event, payload)


def _move(asset_event: AssetEvent, payload: Mapping[str, Any]) -> None:
    from airflow import settings
    from airflow.models.asset import AssetModel
    from airflow.models.asset_state_store import AssetStateStoreModel
    from airflow.state import AssetScope, get_state_backend
    from sqlalchemy import select

    name, version = payload["watcher"], payload["version"]
    # that of the transaction which stores the event: Airflow has one session a thread
    session = settings.get_session()()
    asset = asset_event.asset
    own = select(AssetModel.id).where(AssetModel.name == asset.name, AssetModel.uri == asset.uri)
    # one watcher has one place: it may look at that of an asset which gets no events now, as its DAG is paused
    others = select(AssetStateStoreModel.asset_id).where(AssetStateStoreModel.key == name)
    backend = get_state_backend()
    for asset_id in sorted({*session.scalars(own), *session.scalars(others)}):
        scope = AssetScope(asset_id=asset_id)
        stored = backend.get(scope, name, session=session)
        # a triggerer that was taken for dead may come after its successor
        if payload["lost"] is not None or stored is None or json.loads(stored) < version:
            backend.set(scope, name, json.dumps(version), session=session)
