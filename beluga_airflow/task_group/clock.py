"""How much time a flow in a task group has left: its clock goes from task to task with what they leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from airflow.sdk import Context

from beluga_airflow.graph.shape import GroupShape, Shape
from beluga_airflow.task_group.siblings import Clock

__all__ = ["OutOfTime", "TimeLeft", "clocks"]

WHOLE = ""
"""The path of the outermost flow."""


class OutOfTime(Exception):
    """A flow used up its time.

    Args:
        group: the nested flow; None: the outermost one.
    """

    def __init__(self, group: GroupShape | None) -> None:
        super().__init__("out of time")
        self.group = group


@dataclass(frozen=True, kw_only=True)
class TimeLeft:
    """Which of the flows around a step is the first to use up its time.

    Args:
        seconds: that it has left.
        group: the nested flow; None: the outermost one.
    """

    seconds: float
    group: GroupShape | None

    @classmethod
    def of(cls, shape: Shape, step: str, started: Mapping[str, Clock]) -> TimeLeft:
        """For a step of a settled shape.

        Raises:
            OutOfTime: there is none left.
        """
        now = time.time()
        ends: list[tuple[float, GroupShape | None]] = [(started[WHOLE][1] + shape.time, None)]
        ends += [(started[group.path][1] + group.timeout, group) for group in shape.around[step] if group.timeout]
        end, group = min(ends, key=lambda pair: pair[0])
        if end <= now:
            raise OutOfTime(group)
        return cls(seconds=end - now, group=group)


async def clocks(
    context: Context, shape: Shape, step: str, *, known: Mapping[str, Clock], generation: int
) -> dict[str, Clock]:
    """When the flows around a step began, by path: those that begin with it have begun with its first attempt.

    A step that somebody cleared starts the clock again: the flow may have ended days ago.

    Args:
        context: of the step's task.
        shape: settled.
        step: its path.
        known: what the other tasks left.
        generation: of the task.
    """
    clears = int(getattr(context["dag_run"], "clear_number", None) or 0)
    paths = [WHOLE, *(group.path for group in shape.around[step] if group.timeout)]
    new = [path for path in paths if path not in known or (generation and known[path][0] < clears)]
    if not new:
        return dict(known)
    began = await asyncio.to_thread(_began, context, generation)
    return {**known, **dict.fromkeys(new, (clears, began))}


def _began(context: Context, generation: int) -> float:
    """When the first attempt began: XComs are wiped before a retry, so the task state keeps it."""
    state, name = context["task_state_store"], f"beluga/began@{generation}"
    kept = state.get(name)
    if isinstance(kept, int | float):
        return float(kept)
    now = time.time()
    state.set(name, now)
    return now
