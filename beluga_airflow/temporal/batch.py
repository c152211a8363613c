"""A batch in the state store: its items, how far each has come, and how each ended."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from beluga_airflow.errors import StateError
from beluga_airflow.execute.checkpoints import KEPT, begin_anew
from beluga_airflow.graph import FlowResult
from beluga_airflow.state import StateStore

__all__ = ["Batch", "Item", "ItemCheckpoint"]

LONGER = KEPT + 86_400.0
"""Seconds that each part of a batch stays: while it is known that the batch was stored, no part of it is gone."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item of a batch.

    Args:
        index: its place in the input, from 0.
        key: the business key, or its place as text where the batch has none.
        scope: of the identity under which the flow runs for it.
        data: the flow's input.
    """

    index: int
    key: str
    scope: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """A batch by its name, in one state store."""

    store: StateStore
    name: str

    async def put(self, items: AsyncIterable[Item], *, started: float) -> int:
        """Store the items, in their order; returns how many there are.

        An attempt that was lost on the way may begin again: only the last word makes the batch a stored one.
        """
        total = 0
        async for item in items:
            entry = {"key": item.key, "scope": item.scope, "data": item.data}
            await self.store.set(self._key("items", item.index), entry, ttl=LONGER)
            total += 1
        await self.store.set(f"beluga/batches/{self.name}/staged", {"total": total, "started": started}, ttl=KEPT)
        return total

    async def staged(self) -> int | None:
        """How many items were stored, or None while not all of them are."""
        entry = await self.store.get(f"beluga/batches/{self.name}/staged")
        return None if entry is None else int(entry["total"])

    async def started(self) -> float:
        """When the items were stored: seconds since 1970.

        Raises:
            StateError: the batch is gone, or some of its results may be.
        """
        entry = await self.store.get(f"beluga/batches/{self.name}/staged")
        if entry is None:
            raise StateError(
                f"batch {self.name!r} is not in the state store {self.store.url} any more, which keeps its results for "
                "30 days after the batch was begun; clear the task to run it again"
            )
        return float(entry["started"])

    async def item(self, index: int) -> Item:
        """The item at a place.

        Raises:
            StateError: this store has no such item.
        """
        entry = await self.store.get(self._key("items", index))
        if entry is None:
            raise StateError(
                f"item {index} of batch {self.name!r} is not in the state store {self.store.url}, which keeps it for "
                "30 days; Airflow's tasks and the worker must use the same store: give both the same beluga_state "
                "connection"
            )
        return Item(index=index, **entry)

    async def end(self, item: Item, result: FlowResult) -> None:
        """Store how an item ended, and forget how far it had come."""
        entry = {"key": item.key, **result.to_json()}
        await self.store.set(self._key("results", item.index), entry, ttl=LONGER)
        await self.store.delete(self._key("steps", item.index))

    async def ended(self, index: int) -> str | None:
        """The status with which an item ended, or None while it has not."""
        entry = await self.store.get(self._key("results", index))
        return None if entry is None else str(entry["status"])

    async def results(self, total: int, lost: dict[str, str]) -> AsyncIterator[dict[str, Any]]:
        """How each item ended, in the order of the input, each once; ``lost``: those that no worker could end."""
        for index in range(total):
            entry = await self.store.get(self._key("results", index))
            if entry is None:
                item = await self.store.get(self._key("items", index), {"key": f"item {index}"})
                error = lost.get(str(index), "no worker could end it; the history of the workflow says why")
                entry = {"key": item["key"], **FlowResult(status="failed", error=error).to_json()}
            yield {"index": index, **entry}

    def checkpoint(self, index: int, fingerprint: str) -> ItemCheckpoint:
        """Where the outcomes of an item's steps are kept while it runs."""
        return ItemCheckpoint(self.store, self._key("steps", index), fingerprint)

    async def forget(self) -> None:
        """Remove everything of this batch from the store."""
        async for key in self.store.keys(f"beluga/batches/{self.name}/"):
            await self.store.delete(key)

    def _key(self, what: str, index: int) -> str:
        # a fixed width, so that a listing is in the order of the input
        return f"beluga/batches/{self.name}/{what}/{index:09d}"


@dataclass
class ItemCheckpoint:
    """A ``Checkpoint`` in one value of the store: an item has few steps. A changed flow does not find it.

    Args:
        store: the batch's.
        key: of the value.
        fingerprint: of the shape of the flow that runs.
    """

    store: StateStore
    key: str
    fingerprint: str
    _entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def load(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The entries kept so far, of those named.

        Raises:
            InvalidFlow: the flow has changed while it was being undone.
        """
        kept = await self.store.get(self.key)
        if kept is None:
            return {}
        if kept["fingerprint"] != self.fingerprint:
            begin_anew(
                kept["entries"],
                flow="the flow of this item",
                before=kept["fingerprint"],
                now=self.fingerprint,
                again="a clear of the batch's task runs all its items from their beginning",
            )
            # the first entry that is saved takes the place of them all, also for a flow that is changed back
            return {}
        self._entries = dict(kept["entries"])
        return {name: self._entries[name] for name in names if name in self._entries}

    async def save(self, name: str, entry: dict[str, Any]) -> None:
        self._entries[name] = entry
        entry = {"fingerprint": self.fingerprint, "entries": dict(self._entries)}
        await self.store.set(self.key, entry, ttl=LONGER)
