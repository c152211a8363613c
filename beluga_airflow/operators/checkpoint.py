"""How far a flow in one task has come, kept in Airflow's task state, so that a lost worker loses no finished step."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from airflow.sdk import Context

from beluga_airflow.graph import Outcome, Shape
from beluga_airflow.operators.runs import generation_of, run_name
from beluga_airflow.state import StateStore

__all__ = ["TaskCheckpoint"]

TASK_STATE_LIMIT = 60_000
"""Characters of one outcome that Airflow's task state takes; a larger one goes to the state store."""


class TaskCheckpoint:
    """A ``Checkpoint`` for one task: a retry finds it, a clear or a changed flow does not.

    Args:
        context: of the running task.
        shape: of the flow.
        store: for outcomes too large for the task state.
        airflow: see ``AirflowBackends``.
    """

    def __init__(self, context: Context, shape: Shape, store: StateStore, airflow: asyncio.Lock) -> None:
        self._task_state = context["task_state_store"]
        self._retried = context["ti"].try_number > 1
        self._steps = tuple(shape.order)
        self._prefix = f"beluga/{shape.fingerprint}@{generation_of(context)}"
        self._place = run_name(context)
        self._store = store
        self._airflow = airflow

    async def load(self) -> dict[str, Outcome]:
        if not self._retried:
            return {}
        outcomes = {}
        for step in self._steps:
            async with self._airflow:
                kept = await asyncio.to_thread(self._task_state.get, self._name(step))
            outcome = await self._followed(kept)
            if outcome is not None:
                outcomes[step] = Outcome.from_json(outcome)
        return outcomes

    async def save(self, step: str, outcome: Outcome) -> None:
        entry: dict[str, Any] = outcome.to_json()
        if len(json.dumps(entry)) > TASK_STATE_LIMIT:
            key = f"beluga/checkpoints/{self._place}/{self._name(step)}"
            await self._store.set(key, entry)
            entry = {"in_state_store": key}
        async with self._airflow:
            await asyncio.to_thread(self._task_state.set, self._name(step), entry)

    async def _followed(self, kept: Any) -> dict[str, Any] | None:
        if not isinstance(kept, dict) or "in_state_store" not in kept:
            return kept
        # gone where the store was lost with its machine: then the step runs again
        found: dict[str, Any] | None = await self._store.get(kept["in_state_store"])
        return found

    def _name(self, step: str) -> str:
        return f"{self._prefix}/{step}"
