"""Waiting for a run on Temporal, in the triggerer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from beluga_airflow.errors import BelugaError
from beluga_airflow.hooks.temporal import TemporalHook

__all__ = ["TemporalRunTrigger"]

log = logging.getLogger(__name__)

_under_way: set[asyncio.Task[None]] = set()
"""What is done for users who acted: the event loop itself would forget it."""


class TemporalRunTrigger(BaseTrigger):
    """Fires when a run is closed, however it ended; whoever resumes asks Temporal for the result.

    A user who clears the waiting task or marks it failed cancels the run; one who marks it as success lets it run on. A
    triggerer that goes away cancels nothing.
    """

    def __init__(self, *, temporal_conn_id: str, workflow_id: str, run_id: str) -> None:
        super().__init__()
        self.temporal_conn_id = temporal_conn_id
        self.workflow_id = workflow_id
        self.run_id = run_id

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return (
            "beluga_airflow.triggers.temporal.TemporalRunTrigger",
            {
                "temporal_conn_id": self.temporal_conn_id,
                "workflow_id": self.workflow_id,
                "run_id": self.run_id,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        from beluga_airflow.temporal.client import Run, closed

        run = Run(workflow_id=self.workflow_id, run_id=self.run_id)
        try:
            await closed(await TemporalHook(self.temporal_conn_id).target(), run)
        except BelugaError as error:
            yield TriggerEvent({"workflow_id": run.workflow_id, "run_id": run.run_id, "error": str(error)})
            return
        yield TriggerEvent({"workflow_id": run.workflow_id, "run_id": run.run_id})

    async def on_kill(self) -> None:
        """A user acted on the waiting task: cancel the run, unless the task is a success by that."""
        # a triggerer that finds this still under way a moment later breaks it off: it must come to its end all the same
        work = asyncio.create_task(self._cancel_run())
        _under_way.add(work)
        work.add_done_callback(_under_way.discard)
        await asyncio.shield(work)

    async def _cancel_run(self) -> None:
        from beluga_airflow.temporal.client import Run, cancel

        run = f"workflow {self.workflow_id}, run {self.run_id},"
        try:
            if await self._state() == "success":
                log.info("the task was marked as success: %s goes on", run)
                return
            client, target = await TemporalHook(self.temporal_conn_id).client()
            await cancel(client, target, Run(workflow_id=self.workflow_id, run_id=self.run_id))
        except Exception:  # a triggerer would say no more of it than this
            log.exception("%s could not be asked to end, and goes on: cancel it in Temporal", run)
            return
        log.info("%s was asked to end", run)

    async def _state(self) -> str | None:
        """The state that the task has now; None: none yet after a clear, or no triggerer made this trigger."""
        from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

        ti = self.task_instance
        if ti is None:
            return None
        index = -1 if ti.map_index is None else ti.map_index
        ask = partial(RuntimeTaskInstance.get_task_states, ti.dag_id, map_index=index)
        # it blocks, and this loop is every trigger's
        states = await asyncio.to_thread(ask, task_ids=[ti.task_id], run_ids=[ti.run_id])
        name = ti.task_id if index < 0 else f"{ti.task_id}_{index}"
        state: str | None = states.get(ti.run_id, {}).get(name)
        return state
