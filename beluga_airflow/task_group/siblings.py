"""What the tasks of a group leave for each other: states, outcomes, clocks, failures."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from airflow.sdk import Context

from beluga_airflow.graph import FlowResult, Outcome, Shape
from beluga_airflow.graph.progress import IN_FLIGHT

__all__ = ["ATTEMPT", "FAILURE", "UNDONE", "Clock", "Left", "Members", "Siblings", "read"]

ATTEMPT = "attempt"
"""The XCom under which a step that can be undone leaves the number of an attempt when it begins."""
FAILURE = "failure"
"""The XCom under which a step that failed for good leaves how the flow ends by that."""
UNDONE = "undone"
"""The XCom under which the task that undoes leaves which attempts of which steps it set out to undo."""

Clock = tuple[int, float]
"""When a flow began: the clears of the DAG run by then, and the time, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Members:
    """What each task of a group knows of the others.

    Args:
        group_id: of the group, with those around it.
        shape: of the flow, not settled: what it leaves open is looked up when a task starts.
        tasks: the id of the task of each step.
        result: the id of the last task.
        undo: the id of the task that undoes, where any step can be undone.
    """

    group_id: str
    shape: Shape
    tasks: Mapping[str, str]
    result: str
    undo: str | None = None


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a step that finished leaves.

    Args:
        outcome: of the step.
        started: when the flows that it is in began, by path; the outermost one's is empty.
        attempt: the number of the task's attempt; no two of a task have the same, through clears too. What somebody
            marked as success counts as the attempt that had begun last, 0 where none had.
    """

    outcome: Outcome
    started: Mapping[str, Clock] = field(default_factory=dict)
    attempt: int = 0

    def to_json(self) -> dict[str, Any]:
        """This as JSON."""
        started = {path: list(clock) for path, clock in self.started.items()}
        return {**self.outcome.to_json(), "started": started, "attempt": self.attempt}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Left:
        """What ``to_json`` wrote."""
        outcome = {key: value for key, value in data.items() if key not in ("started", "attempt")}
        started = {path: (int(clears), float(moment)) for path, (clears, moment) in data["started"].items()}
        return cls(outcome=Outcome.from_json(outcome), started=started, attempt=data["attempt"])


@dataclass(frozen=True, kw_only=True)
class Siblings:
    """How tasks of one group, of one map index, stand.

    Args:
        states: the state of each step's task.
        left: what the finished ones left; of the failed ones, those that were done and could not be followed.
        failures: of the failed ones, each as how the flow ends by it.
        undone: which attempts of which steps an earlier failure undid.
    """

    states: Mapping[str, str | None]
    left: Mapping[str, Left]
    failures: Mapping[str, FlowResult]
    undone: Mapping[str, int]

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """The outcomes of the finished steps."""
        return {step: left.outcome for step, left in self.left.items()}

    @property
    def stopped(self) -> str | None:
        """The first step that stopped the flow."""
        return next((step for step, left in self.left.items() if left.outcome.stop), None)

    def in_state(self, *states: str) -> list[str]:
        """The steps whose tasks are in one of these states."""
        return [step for step, state in self.states.items() if state in states]

    def started(self) -> dict[str, Clock]:
        """When the flows began, by path: the newest clear counts, and in it the earliest time."""
        found: dict[str, Clock] = {}
        for left in self.left.values():
            for path, (clears, moment) in left.started.items():
                known = found.get(path, (-1, 0.0))
                if clears > known[0] or (clears == known[0] and moment < known[1]):
                    found[path] = (clears, moment)
        return found


def read(context: Context, members: Members, steps: Iterable[str]) -> Siblings:
    """How the tasks of these steps stand; asks Airflow, so it blocks."""
    states = _states(context, members, list(steps))
    left = {step: _left(context, members, step) for step, state in states.items() if state == "success"}
    failures = {}
    for step in (step for step, state in states.items() if state == "failed"):
        failures[step], done = _failure(context, members, step)
        left |= {} if done is None else {step: done}
    undone = None if members.undo is None else _pulled(context, members.undo, UNDONE)
    return Siblings(states=states, left=left, failures=failures, undone=undone or {})


def _states(context: Context, members: Members, steps: Collection[str]) -> dict[str, str | None]:
    ti, index = context["ti"], _index(context)
    found = ti.get_task_states(
        dag_id=ti.dag_id, map_index=index, task_group_id=members.group_id, run_ids=[ti.run_id]
    ).get(ti.run_id, {})
    suffix = "" if index < 0 else f"_{index}"
    return {step: found.get(f"{members.tasks[step]}{suffix}") for step in steps}


def _left(context: Context, members: Members, step: str) -> Left:
    data = _pulled(context, members.tasks[step], "return_value")
    if data is not None:
        return Left.from_json(data)
    # somebody marked it as success: as if it had returned nothing
    targets = members.shape.conditions[step]
    outcome = Outcome(output={}, taken=tuple(name for name, when in targets.items() if when is None))
    return Left(outcome=outcome, attempt=_pulled(context, members.tasks[step], ATTEMPT) or 0)


def _failure(context: Context, members: Members, step: str) -> tuple[FlowResult, Left | None]:
    """How the flow ends by a step that failed, and what the step left if it was done all the same."""
    task_id = members.tasks[step]
    data = _pulled(context, task_id, FAILURE)
    if data is not None:
        left = Left.from_json(data["left"]) if "left" in data else None
        return FlowResult(status=data["status"], error=data["error"], undone=data.get("undone", {})), left
    # a lost worker, or somebody marked it as failed
    why = f"its task {task_id!r} ended without an outcome, and its log says why"
    # an attempt that can be undone says so when it begins
    in_flight = _pulled(context, task_id, ATTEMPT) is not None
    return FlowResult(
        status="failed", error=f"step {step!r} failed: {why}", undone={step: IN_FLIGHT} if in_flight else {}
    ), None


def _index(context: Context) -> int:
    """The map index of this task; -1 where it is not mapped."""
    index = context["ti"].map_index
    return -1 if index is None else int(index)


def _pulled(context: Context, task_id: str, key: str) -> Any:
    """What a task of this map index left under this key; None where it left nothing."""
    # explicitly: the default is all map indexes
    return context["ti"].xcom_pull(task_ids=task_id, key=key, map_indexes=_index(context))
