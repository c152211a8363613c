"""How far a flow in one task has come, kept in Airflow's task state, so that a lost worker loses no finished step."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from airflow.sdk import Context

from beluga_airflow.execute.checkpoints import KEPT, begin_anew
from beluga_airflow.graph import Shape
from beluga_airflow.graph.shape import UNDO
from beluga_airflow.operators.runs import run_name
from beluga_airflow.state import StateStore

__all__ = ["TaskCheckpoint"]

TASK_STATE_LIMIT = 60_000
"""Characters of one outcome that Airflow's task state takes; a larger one goes to the state store."""


class TaskCheckpoint:
    """A ``Checkpoint`` for one task: a retry finds it, a clear or a changed flow does not.

    Args:
        context: of the running task.
        shape: of the flow.
        generation: of the task.
        store: for outcomes too large for the task state.
        airflow: see ``AirflowBackends``.

    Attributes:
        entries: all that is kept.
    """

    def __init__(
        self, context: Context, shape: Shape, generation: int, store: StateStore, airflow: asyncio.Lock
    ) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self._task_state = context["task_state_store"]
        self._retried = context["ti"].try_number > 1
        self._shape = shape
        self._generation = generation
        self._number = 0  # of the changes of the flow between attempts
        self._place = run_name(context)
        self._store = store
        self._airflow = airflow

    async def load(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The entries kept so far, of those named.

        Raises:
            InvalidFlow: the flow has changed while it was being undone.
        """
        mark = await self._get(self._mark) if self._retried else None
        if mark is not None:
            self._number = mark["number"]
            if mark["fingerprint"] == self._shape.fingerprint:
                self.entries = await self._kept(names)
            else:
                await self._start_anew(mark["fingerprint"])
        return dict(self.entries)

    async def save(self, name: str, entry: dict[str, Any]) -> None:
        if not self.entries:
            await self._set(self._mark, {"fingerprint": self._shape.fingerprint, "number": self._number})
        self.entries[name] = entry
        if len(json.dumps(entry)) > TASK_STATE_LIMIT:
            key = f"beluga/checkpoints/{self._place}/{self._name(name)}"
            await self._store.set(key, entry, ttl=KEPT)
            entry = {"in_state_store": key}
        await self._set(self._name(name), entry)

    async def _kept(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        found = {name: await self._followed(await self._get(self._name(name))) for name in names}
        return {name: entry for name, entry in found.items() if entry is not None}

    async def _start_anew(self, before: str) -> None:
        kept = await self._kept([UNDO])
        if kept:
            kept |= await self._kept(name for step in kept[UNDO]["steps"] for name in (step, f"{step}.{UNDO}"))
        begin_anew(
            kept,
            flow=f"flow {self._shape.flow!r}",
            before=before,
            now=self._shape.fingerprint,
            again="a clear of this task runs the flow from its beginning",
        )
        # outcomes of the changed flow must not meet those that are kept, also when it is changed back
        self._number += 1

    async def _get(self, name: str) -> Any:
        async with self._airflow:
            return await asyncio.to_thread(self._task_state.get, name)

    async def _set(self, name: str, value: Any) -> None:
        async with self._airflow:
            await asyncio.to_thread(self._task_state.set, name, value)

    async def _followed(self, kept: Any) -> dict[str, Any] | None:
        if not isinstance(kept, dict) or "in_state_store" not in kept:
            return kept
        # gone where the store was lost with its machine, or long ago: then the step runs again
        found: dict[str, Any] | None = await self._store.get(kept["in_state_store"])
        return found

    def _name(self, step: str) -> str:
        return f"beluga/flow@{self._generation}.{self._number}/{step}"

    @property
    def _mark(self) -> str:
        return f"beluga/flow@{self._generation}"
