"""Reading the statuses of runs, and settling those of runs that nobody has any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from beluga_airflow.execute.checkpoints import KEPT
from beluga_airflow.execute.status import FLOWS, SILENT, RunStatus
from beluga_airflow.graph import FlowResult
from beluga_airflow.state import StateStore

__all__ = ["Ask", "run_statuses", "settled"]

Ask = Callable[[RunStatus], Awaitable[FlowResult | None]]
"""Asks whoever has a run how it ended; None: it goes on, or may do so, or nobody can say."""
AT_ONCE = 100
"""Entries that are asked for at once."""
TRIES = 10


async def run_statuses(store: StateStore, flow: str | None = None) -> AsyncIterator[tuple[str, RunStatus]]:
    """The statuses in a store, of all flows or of one, with their keys; what is none is passed over.

    Raises:
        StateUnavailable: the store cannot be reached.
    """
    keys = [key async for key in store.keys(f"{FLOWS}{flow}/" if flow else FLOWS)]
    for begin in range(0, len(keys), AT_ONCE):
        page = keys[begin : begin + AT_ONCE]
        for key, value in zip(page, await asyncio.gather(*map(store.get, page)), strict=True):
            entry = RunStatus.from_json(value)
            if entry is not None:
                yield key, entry


async def settled(store: StateStore, key: str, ask: Ask) -> RunStatus | None:
    """The status of a run; where nobody goes on with it, its terminal status is written first.

    A run that nobody has is lost when its process gives no sign; who has another is asked.

    Args:
        store: where it is.
        key: of the entry.
        ask: asks the owner.

    Returns:
        the status; None: there is none.

    Raises:
        StateUnavailable: the store cannot be reached.
    """
    for _ in range(TRIES):
        found = await store.get_versioned(key)
        entry = RunStatus.from_json(found.value) if found else None
        if found is None or entry is None or entry.ended is not None:
            return entry
        result = await ask(entry) if entry.owner else _lost(entry)
        if result is None:
            return entry
        entry = entry.ended_as(result)
        if await store.compare_and_swap(key, entry.to_json(), version=found.version, ttl=KEPT) is not None:
            return entry
    return entry


def _lost(entry: RunStatus) -> FlowResult | None:
    if not entry.is_silent:
        return None
    return FlowResult(
        status="failed",
        error=f"its worker was lost: it gave no sign for {entry.silence:.0f} s (more than {SILENT:g} s), and nobody "
        "goes on with it",
    )
