"""What the history of a closed run tells beyond its end: what its steps did, what was undone, and who ended it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent

from beluga_airflow.graph import FlowResult, Outcome, Shape
from beluga_airflow.graph.progress import Progress
from beluga_airflow.graph.shape import UNDO
from beluga_airflow.temporal.flow_workflow import message_of
from beluga_airflow.temporal.messages import DATA_CONVERTER, FLOW_WORKFLOW, STEP_ACTIVITY, UNDO_ACTIVITY

__all__ = ["Recorded", "recorded", "terminated", "timed_out", "with_undoing"]

SERVER = "history-service"
"""As whom a Temporal server ends a workflow itself."""
LONGEST = 500
"""Characters of what a person or a step's undoing said."""
NOT_BEGUN = "the workflow was ended before that"
BEGUN = "its undoing had begun when the workflow was ended: see how far it came"
COMPLETED = EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED
CANCELED = EventType.EVENT_TYPE_ACTIVITY_TASK_CANCELED
ENDED = (
    COMPLETED,
    CANCELED,
    EventType.EVENT_TYPE_ACTIVITY_TASK_FAILED,
    EventType.EVENT_TYPE_ACTIVITY_TASK_TIMED_OUT,
)


def terminated(events: Sequence[HistoryEvent]) -> FlowResult:
    """The result of a flow whose workflow a person or the server ended at once."""
    end = events[-1].workflow_execution_terminated_event_attributes
    if end.identity == SERVER:
        why = f"the Temporal server ended the workflow: {end.reason[:LONGEST]}"
        return FlowResult(status="failed", error=why)
    return FlowResult(status="cancelled", error=f"the workflow was terminated: {end.reason[:LONGEST]}")


def timed_out(events: Sequence[HistoryEvent]) -> FlowResult:
    """The result of a flow whose workflow the server ended because its time was used up."""
    queue = events[0].workflow_execution_started_event_attributes.task_queue.name
    seconds = (events[-1].event_time.ToDatetime() - events[0].event_time.ToDatetime()).total_seconds()
    was_taken = any(event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_STARTED for event in events)
    what = (
        "its workers were gone, so that the flow could not end by itself"
        if was_taken
        else "no worker took it, so that none of its steps was run or undone"
    )
    error = (
        f"the Temporal server ended the workflow after {seconds:.0f} s: {what}; see that a worker serves its task "
        f"queue {queue!r}, then run the flow again"
    )
    return FlowResult(status="timed_out", error=error)


def with_undoing(result: FlowResult, events: Sequence[HistoryEvent]) -> FlowResult:
    """``result`` with what was undone, and what could not be or was left, as the flow itself would have told it."""
    run = recorded(events)
    if run is None:
        return result
    progress = Progress(run.shape, run.outcomes)
    progress.cut_off(run.steps.cut_off)
    undos = run.undos
    ends = {**dict.fromkeys(undos.cut_off, BEGUN), **undos.errors, **dict.fromkeys(undos.outcomes)}
    progress.undone.update({step: _short(ends.get(step, NOT_BEGUN)) for step in progress.to_undo})
    return progress.after_undoing(result)


@dataclass
class _Activities:
    """The activities of one type, by step: what they returned, why they failed, and which were cut off."""

    outcomes: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    cut_off: dict[str, None] = field(default_factory=dict)
    """Those that had not ended, or had been asked to and did, in any way but the good one."""
    late: dict[str, None] = field(default_factory=dict)
    """Those that were done although they had been asked to end."""


@dataclass
class Recorded:
    """What the history of a flow's run holds.

    Args:
        call: the input of its workflow, as JSON.
        shape: of the flow.
        steps: the activities of its steps.
        undos: those that undo one.
    """

    call: dict[str, Any]
    shape: Shape
    steps: _Activities = field(default_factory=_Activities)
    undos: _Activities = field(default_factory=_Activities)

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """Of the finished steps, with those that it was given of an earlier run."""
        outcomes = {**self.call.get("kept", {}), **self.steps.outcomes}
        return {step: Outcome.from_json(outcome) for step, outcome in outcomes.items()}


def recorded(events: Sequence[HistoryEvent]) -> Recorded | None:
    """What a history holds; None: it is that of no flow."""
    started = events[0].workflow_execution_started_event_attributes
    if started.workflow_type.name != FLOW_WORKFLOW:
        return None
    call = _value(started.input.payloads)
    run = Recorded(call=call, shape=Shape.from_json(call["shape"]))
    kinds = {STEP_ACTIVITY: run.steps, UNDO_ACTIVITY: run.undos}
    scheduled: dict[int, tuple[_Activities, str]] = {}
    asked: set[int] = set()
    for event in events:
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
            activity = event.activity_task_scheduled_event_attributes
            kind = kinds.get(activity.activity_type.name)
            if kind is not None:
                step = activity.activity_id if kind is run.steps else activity.activity_id.removesuffix(f".{UNDO}")
                scheduled[event.event_id] = kind, step
                kind.cut_off[step] = None
        elif event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_CANCEL_REQUESTED:
            asked.add(event.activity_task_cancel_requested_event_attributes.scheduled_event_id)
        elif event.event_type in ENDED:
            ended = getattr(event, str(event.WhichOneof("attributes")))
            if ended.scheduled_event_id in scheduled:
                _end(*scheduled[ended.scheduled_event_id], event, ended, was_asked=ended.scheduled_event_id in asked)
    return run


def _end(kind: _Activities, step: str, event: HistoryEvent, ended: Any, *, was_asked: bool) -> None:
    if event.event_type == COMPLETED:
        kind.outcomes[step] = _value(ended.result.payloads)
        kind.late.update({step: None} if was_asked else {})
    elif was_asked and ended.started_event_id:
        return  # nobody knows how far it came
    elif event.event_type != CANCELED:
        kind.errors[step] = _message(ended.failure)
    del kind.cut_off[step]


def _short(text: str | None) -> str | None:
    return None if text is None else text[:LONGEST]


def _message(failure: Any) -> str:
    error: Any = DATA_CONVERTER.failure_converter.from_failure(failure, DATA_CONVERTER.payload_converter)
    return message_of(error)


def _value(payloads: Any) -> Any:
    return DATA_CONVERTER.payload_converter.from_payloads(payloads)[0]
