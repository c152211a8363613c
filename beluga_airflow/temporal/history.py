"""What an earlier run of a flow did, read from its history: no worker is needed for that."""

from __future__ import annotations

from datetime import UTC

from temporalio.client import Client

from beluga_airflow.errors import TemporalError
from beluga_airflow.execute.status import RunOf, moment, status_key
from beluga_airflow.graph.earlier import EarlierRun
from beluga_airflow.temporal.client import Run, Target, translated
from beluga_airflow.temporal.ending import recorded
from beluga_airflow.temporal.messages import run_name

__all__ = ["earlier_run", "told_of"]


async def told_of(client: Client, target: Target, run: Run) -> RunOf | None:
    """Of which flow's run a workflow tells the status; None: it is no run of a flow.

    Raises:
        TemporalUnavailable: no server answers.
        TemporalError: the server does not know the run (any more).
    """
    with translated(target):
        handle = client.get_workflow_handle(run.workflow_id, run_id=run.run_id)
        first = [await anext(handle.fetch_history_events(page_size=1))]
    found = recorded(first)
    if found is None:
        return None
    return RunOf(
        key=status_key(found.shape.flow, found.call["scope"]),
        run=run_name(run.workflow_id, run.run_id),
        generation=found.call["generation"],
        runtime="temporal",
        total=found.shape.count,
        started=moment(first[0].event_time.ToDatetime(UTC)),
        owner={"namespace": target.namespace, "workflow_id": run.workflow_id, "run_id": run.run_id},
    )


async def earlier_run(client: Client, target: Target, run: Run) -> EarlierRun | None:
    """What a closed run left; None: it is no run of a flow.

    Raises:
        TemporalUnavailable: no server answers.
        TemporalError: the server does not know the run (any more), or it is not closed: what it did may be undone yet.
    """
    with translated(target):
        handle = client.get_workflow_handle(run.workflow_id, run_id=run.run_id)
        is_closed = (await handle.describe()).close_time is not None
        events = [event async for event in handle.fetch_history_events()]
    found = recorded(events)
    if found is None:
        return None
    if not is_closed:
        raise TemporalError(
            f"workflow {run.workflow_id!r}, run {run.run_id}, still runs; wait for its end, or cancel it"
        )
    undos = found.undos
    late = [step for step in found.steps.late if found.shape.by_name[step].undo]
    return EarlierRun(
        fingerprint=found.shape.fingerprint,
        inputs=found.call["inputs"],
        scope=found.call["scope"],
        outcomes=found.outcomes,
        undone={
            **dict.fromkeys(late, "it was done when the flow had given it up"),
            **dict.fromkeys([*undos.cut_off, *undos.errors], "its undoing failed, or has not ended"),
            **dict.fromkeys(undos.outcomes, "undone"),
        },
    )
