"""Waiting for a run on Temporal, in the triggerer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from beluga_airflow.errors import BelugaError
from beluga_airflow.hooks.temporal import TemporalHook

__all__ = ["TemporalRunTrigger"]


class TemporalRunTrigger(BaseTrigger):
    """Fires when a run is closed, however it ended; whoever resumes asks Temporal for the result.

    A user who clears the waiting task or marks it failed cancels the run. A triggerer that goes away does not.
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
        """A user acted on the waiting task: cancel the run."""
        from beluga_airflow.temporal.client import Run, cancel

        client, target = await TemporalHook(self.temporal_conn_id).client()
        await cancel(client, target, Run(workflow_id=self.workflow_id, run_id=self.run_id))
