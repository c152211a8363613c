"""Waiting for state in the triggerer: for what a sensor wants, or for every change, for an asset's watcher."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from airflow.triggers.base import BaseEventTrigger, BaseTrigger, TaskSuccessEvent, TriggerEvent

from beluga_airflow.errors import BelugaError, HistoryLost, InvalidSetting
from beluga_airflow.hooks.state import StateHook
from beluga_airflow.state.base import Change
from beluga_airflow.triggers.condition import Condition
from beluga_airflow.triggers.cursor import WATCHER, Cursor
from beluga_airflow.triggers.portable import is_portable
from beluga_airflow.triggers.stores import shared_store

if TYPE_CHECKING:
    from beluga_airflow.state import StateStore

__all__ = ["StateChangeTrigger", "StateTrigger"]

log = logging.getLogger(__name__)

XCOM_SIZE = 50_000
"""Characters of the JSON of a value that a sensor's trigger pushes itself; a larger one is read by a worker."""
VALUE_SIZE = 10_000
"""Characters of the JSON of a value that an asset event carries."""
KEY_SIZE = 1_000
"""Characters of a key that an asset event carries."""
SETTLED = 5.0
"""Seconds after which a task may be resumed: one that is resumed while its worker is just leaving is taken for lost."""
AGAIN = 15.0
"""Seconds after which a watcher tries again what was refused."""


class StateTrigger(BaseTrigger):
    """Fires once, when a key's value is what a ``StateSensor`` waits for.

    The task ends in the triggerer, with the value as its XCom, where no worker is needed for its end.

    Args:
        key: which.
        condition: as ``Condition.to_json`` made it.
        after: the version of the last change that the sensor saw, so that none since then is missed; None: begin with
            what is there now.
        state_conn_id: the store's connection.
        on_worker: whether the task must end on a worker.
        push: whether the value becomes an XCom.
    """

    def __init__(
        self,
        *,
        key: str,
        condition: Mapping[str, Any],
        after: int | None = None,
        state_conn_id: str = StateHook.default_conn_name,
        on_worker: bool = False,
        push: bool = True,
    ) -> None:
        super().__init__()
        self.key = key
        self.condition = dict(condition)
        self.after = after
        self.state_conn_id = state_conn_id
        self.on_worker = on_worker
        self.push = push

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return (
            "beluga_airflow.triggers.state.StateTrigger",
            {
                "key": self.key,
                "condition": self.condition,
                "after": self.after,
                "state_conn_id": self.state_conn_id,
                "on_worker": self.on_worker,
                "push": self.push,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        begun = time.monotonic()
        try:
            change = await self._met()
        except BelugaError as error:
            event = TriggerEvent({"error": str(error), "is_setting": isinstance(error, InvalidSetting)})
        else:
            if not self.on_worker and is_portable(change.value, XCOM_SIZE):
                xcoms = {"return_value": change.value} if self.push else None
                yield TaskSuccessEvent(xcoms=xcoms)
                return
            event = TriggerEvent({"version": change.version})
        await asyncio.sleep(SETTLED - (time.monotonic() - begun))
        yield event

    async def _met(self) -> Change:
        after = self.after
        condition = Condition.from_json(self.condition)
        async with shared_store(self.state_conn_id) as store:
            while True:
                try:
                    async with aclosing(store.watch(self.key, after=after)) as changes:
                        async for change in changes:
                            if await condition.holds(change):
                                return change
                except HistoryLost as error:
                    log.warning("waiting for state key %r goes on with what is there now: %s", self.key, error)
                    after = None


class StateChangeTrigger(BaseEventTrigger):
    """Turns each change of a key, or of all keys with a prefix, into an asset event, for an asset's ``AssetWatcher``.

    The event's payload is ``{"key", "version", "value", "is_gone", "is_whole", "lost", "watcher"}``. ``value`` is None
    and ``is_whole`` false where key or value are too large for Airflow's database (over 1,000 and 10,000 characters),
    or hold what it cannot store. Events, with their values, stay in Airflow's database, its triggerer's log, and are
    shown in its UI: no place for secrets.

    Every change becomes one event, in order: the transaction in which Airflow stores an event moves the watcher's
    cursor too, so that a triggerer that is killed and started again, at any moment, leaves out nothing and repeats
    nothing. What is left: Airflow gives the triggers of a triggerer that has shown no sign of life for 30 s
    (``[triggerer] triggerer_health_check_threshold``) to another; if the first lives on all the same, both may fire
    what changed meanwhile. And a state backend of one's own (``[state_store] backend``) that writes elsewhere is not
    part of the transaction: a change may then come twice.

    It begins with the first change after it was started for the first time. Taken away and put back (its DAG was
    paused), it goes on where it was. Where changes it has not seen are not kept any more, one event says so: ``lost``
    is ``{"after", "kept_from"}``, the changes between those versions; its key is None. Then it goes on with what is
    kept. The cursor is in the asset's state store, under ``beluga/watcher/...``: delete it to begin with now.

    Args:
        key: the key to watch; or
        prefix: what the keys to watch begin with.
        state_conn_id: the store's connection. All who watch one store share one reader of it.

    Raises:
        InvalidSetting: not exactly one of ``key`` and ``prefix`` is given.
    """

    def __init__(
        self,
        *,
        key: str | None = None,
        prefix: str | None = None,
        state_conn_id: str = StateHook.default_conn_name,
    ) -> None:
        super().__init__()
        if (key is None) == (prefix is None):
            raise InvalidSetting("StateChangeTrigger watches either key= or prefix=; give exactly one of them")
        self.key = key
        self.prefix = prefix
        self.state_conn_id = state_conn_id

    def serialize(self) -> tuple[str, dict[str, Any]]:
        given = {"key": self.key, "prefix": self.prefix, "state_conn_id": self.state_conn_id}
        return (
            "beluga_airflow.triggers.state.StateChangeTrigger",
            {name: value for name, value in given.items() if value is not None},
        )

    @property
    def watcher(self) -> str:
        """Under which the cursor is kept: the arguments, or a digest where they are long."""
        watched = f"key/{self.key}" if self.prefix is None else f"prefix/{self.prefix}"
        name = f"{self.state_conn_id}/{watched}"
        if len(name) > 200 or not name.isprintable():
            name = hashlib.sha256(name.encode()).hexdigest()
        return f"{WATCHER}{name}"

    async def run(self) -> AsyncIterator[TriggerEvent]:
        if self.asset_state_store is None:
            raise InvalidSetting("StateChangeTrigger serves AssetWatcher only; a task waits with StateSensor")
        cursor = Cursor(self.watcher, self.asset_state_store)
        while True:
            try:
                async with shared_store(self.state_conn_id) as store, aclosing(self._events(store, cursor)) as events:
                    async for event in events:
                        yield event
            except BelugaError as error:
                log.error("%s stands still, and tries again in %g s: %s", self.watcher, AGAIN, error)
                await asyncio.sleep(AGAIN)

    async def _events(self, store: StateStore, cursor: Cursor) -> AsyncGenerator[TriggerEvent]:
        position = await cursor.settled()
        if position is None:
            position = await _last_version(store)
            await cursor.set(position)
        while True:
            try:
                # of all keys: a cursor that only moved with the watched ones would fall behind the store's history
                async with aclosing(store.watch("", prefix=True, after=position)) as changes:
                    async for change in changes:
                        position = change.version
                        if self._is_watched(change.key):
                            yield TriggerEvent(self._payload(change))
                            await cursor.fired(position)
                        else:
                            await cursor.passed(position)
            except HistoryLost as error:
                log.error("%s has missed changes, and fires an event that says so: %s", self.watcher, error)
                position = error.kept_from - 1
                yield TriggerEvent(self._lost(error))
                await cursor.fired(position)

    def _is_watched(self, key: str) -> bool:
        return key == self.key if self.prefix is None else key.startswith(self.prefix)

    def _payload(self, change: Change) -> dict[str, Any]:
        has_key = len(change.key) <= KEY_SIZE and is_portable(change.key, 10 * KEY_SIZE)
        has_value = change.size <= VALUE_SIZE and is_portable(change.value, VALUE_SIZE)
        return {
            "key": change.key if has_key else None,
            "version": change.version,
            "value": change.value if has_value else None,
            "is_gone": change.is_gone,
            "is_whole": has_key and has_value,
            "lost": None,
            "watcher": self.watcher,
        }

    def _lost(self, error: HistoryLost) -> dict[str, Any]:
        return {
            "key": None,
            "version": error.kept_from - 1,
            "value": None,
            "is_gone": False,
            "is_whole": False,
            "lost": {"after": error.after, "kept_from": error.kept_from},
            "watcher": self.watcher,
        }


async def _last_version(store: StateStore) -> int:
    async with aclosing(store.watch(f"beluga/no-key/{uuid4().hex}")) as changes:
        return (await anext(changes)).version
