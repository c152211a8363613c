"""Asking whoever has a flow's run, Airflow or Temporal, whether it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from beluga_airflow.errors import BelugaError, TemporalError, TemporalUnavailable
from beluga_airflow.execute.status import LONGEST, RunStatus
from beluga_airflow.graph import FlowResult
from beluga_airflow.hooks.temporal import TemporalHook
from beluga_airflow.state import StateStore

__all__ = ["Owners"]

TASK = {"dag_id": str, "run_id": str, "task_id": str, "map_index": int}
WORKFLOW = {"namespace": str, "workflow_id": str, "run_id": str}
ITEM = {**WORKFLOW, "batch": str, "item": int}
"""What the owners of runs are, of those that we wrote."""
AGAIN = 30.0
"""Seconds until who could not be asked is asked again."""
OVER = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})
"""States of a task that nobody runs again by himself."""


class Owners:
    """Asks them. Who cannot be asked is left alone for a while, and its runs as they are.

    Args:
        store: where the statuses are.
        temporal_conn_id: the server that is asked.

    Attributes:
        silent: who cannot be asked, each with why.
    """

    def __init__(self, store: StateStore, temporal_conn_id: str) -> None:
        self._store = store
        self._hook = TemporalHook(temporal_conn_id)
        self._temporal: Any = None
        self.silent: dict[str, str] = {}
        self._silent_since: dict[str, float] = {}

    async def ended(self, entry: RunStatus) -> FlowResult | None:
        """How the run of an entry ended; None: somebody goes on with it, or nobody can say."""
        owner = entry.owner
        is_temporal = "workflow_id" in owner
        kind = (ITEM if "batch" in owner else WORKFLOW) if is_temporal else TASK
        if not all(type(owner.get(name)) is wanted for name, wanted in kind.items()):
            return None  # somebody else's entry
        by, ask = ("Temporal", self._by_temporal) if is_temporal else ("Airflow", self._by_airflow)
        now = asyncio.get_running_loop().time()
        if now < self._silent_since.get(by, -AGAIN) + AGAIN:
            return None
        try:
            ended = await ask(owner)
        except Exception as error:  # a database or a server may be away in many ways
            told = str(error) if isinstance(error, BelugaError) else f"{type(error).__name__}: {error}"
            self.silent[by] = f"{by} cannot be asked which runs go on: {told[:LONGEST]}"
            if not isinstance(error, TemporalError) or isinstance(error, TemporalUnavailable):
                self._silent_since[by] = now  # else it refused to speak of this run
            return None
        self.silent.pop(by, None)
        return ended

    async def _by_airflow(self, owner: Mapping[str, Any]) -> FlowResult | None:
        found = await asyncio.to_thread(_task, owner)
        if found is None or found[0] not in OVER:
            return None
        # the last task of a group is over as soon as a step has failed; this one undoes it then, and tells the end
        undo = owner.get("undo")
        if undo is not None and await self._goes_on({**owner, "task_id": undo}):
            return None
        state, returned = found
        task = f"its task {owner['task_id']!r} of DAG run {owner['run_id']!r} ended ({state})"
        if state == "success" and returned is not None:
            status = returned.get("status") if isinstance(returned, dict) else None
            return FlowResult(status=status if isinstance(status, str) else "completed")
        return FlowResult(
            status="failed",
            error=f"{task}, and nobody told how the flow did: its worker was lost, or somebody marked it",
        )

    async def _goes_on(self, owner: Mapping[str, Any]) -> bool:
        found = await asyncio.to_thread(_task, owner)
        return found is not None and found[0] not in OVER

    async def _by_temporal(self, owner: Mapping[str, Any]) -> FlowResult | None:
        from beluga_airflow.temporal.batch import Batch
        from beluga_airflow.temporal.client import Run, closed_as, result_of

        if self._temporal is None:
            self._temporal = await self._hook.client()
        client, target = self._temporal
        if owner.get("namespace") != target.namespace:
            return None
        run = Run(workflow_id=owner["workflow_id"], run_id=owner["run_id"])
        closed = await closed_as(client, target, run)
        if closed is None:
            return None
        if "batch" not in owner:
            try:
                return FlowResult.from_json(await result_of(client, target, run))
            except TemporalUnavailable:
                raise
            except TemporalError as error:  # it failed of something else than its flow
                return FlowResult(status="failed", error=str(error))
        status = await Batch(self._store, owner["batch"]).ended(owner["item"])
        lost = f"the workflow of its batch has ended ({closed}) without it: its worker was lost"
        return FlowResult(status=status) if status else FlowResult(status="failed", error=lost)

    def close(self) -> None:
        """Let go of what was opened."""
        self._temporal = None


def _task(owner: Mapping[str, Any]) -> tuple[str | None, Any] | None:
    """The state of a task and what it returned; None: this Airflow has none of that name."""
    from airflow.models.taskinstance import TaskInstance
    from airflow.models.xcom import XComModel
    from airflow.utils.session import create_session
    from sqlalchemy import select

    dag_id, run_id, task_id, index = (owner[name] for name in ("dag_id", "run_id", "task_id", "map_index"))
    with create_session(scoped=False) as session:
        row = session.execute(
            select(TaskInstance.state).where(
                TaskInstance.dag_id == dag_id,
                TaskInstance.run_id == run_id,
                TaskInstance.task_id == task_id,
                TaskInstance.map_index == index,
            )
        ).one_or_none()
        if row is None:
            return None
        returned = session.scalars(
            XComModel.get_many(
                run_id=run_id, key="return_value", dag_ids=dag_id, task_ids=task_id, map_indexes=index, limit=1
            )
        ).first()
        return row[0], None if returned is None else XComModel.deserialize_value(returned)
