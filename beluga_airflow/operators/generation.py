"""Which generation of a task this is: a retry keeps it, a user's clear raises it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from airflow.sdk import Context
from airflow.sdk.exceptions import TaskAwaitingInput, TaskDeferred

__all__ = ["generation"]

KEY = "beluga/attempt"
"""Under which the task state holds what the last attempt saw."""


@asynccontextmanager
async def generation(context: Context) -> AsyncIterator[int]:
    """How often a user has cleared this task, while an attempt of it runs; an attempt that is resumed keeps it.

    A clear of a task that has ended, or waits without a worker, raises its ``max_tries``; one of a running task does
    not, and only the clears of the whole DAG run are counted then. So every attempt keeps what it saw in the task
    state, and whether it runs: one that was lost while it ran, after which somebody cleared something, counts as
    cleared; one that failed by itself, or waits, does not.
    """
    state = context["task_state_store"]
    before = await asyncio.to_thread(state.get, KEY)
    now = _seen(context)
    number = _number(before if isinstance(before, dict) else {}, now, counted=_counted(context["ti"]))
    entry = {**now, "generation": number, "running": True}
    if entry != before:
        await asyncio.to_thread(state.set, KEY, entry)
    try:
        yield number
    except (Exception, TaskDeferred, TaskAwaitingInput):
        # no worker has it any more: whatever somebody clears meanwhile is another task, or shows in `max_tries`
        await asyncio.to_thread(state.set, KEY, {**entry, "running": False})
        raise


def _seen(context: Context) -> dict[str, Any]:
    ti = context["ti"]
    clears = getattr(context["dag_run"], "clear_number", None)
    return {"try_number": int(ti.try_number), "max_tries": int(ti.max_tries), "clears": int(clears or 0)}


def _counted(ti: Any) -> int:
    """The generation as far as Airflow's own numbers tell it: the attempt at the last clear."""
    return max(0, int(ti.max_tries) - int(ti.task.retries or 0))


def _number(before: Mapping[str, Any], now: Mapping[str, Any], *, counted: int) -> int:
    if not before:
        return counted
    kept = int(before["generation"])
    if now["max_tries"] != before["max_tries"]:
        # not `counted` alone: somebody may have changed retries= meanwhile
        return max(counted, kept + 1)
    is_resumed = now["try_number"] == before["try_number"]
    cleared_while_running = now["clears"] != before["clears"] and before["running"] and not is_resumed
    return kept + 1 if cleared_while_running else kept
