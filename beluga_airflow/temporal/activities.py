"""What a worker runs for the workflows: one attempt of a step, or one item of a batch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol
from urllib.parse import unquote
from weakref import WeakValueDictionary

from temporalio import activity
from temporalio.exceptions import ApplicationError

from beluga_airflow.config import Settings
from beluga_airflow.errors import BelugaError, FlowNotFound, InvalidFlow
from beluga_airflow.execute import Resources, States, attempt, own_cancellation, undo
from beluga_airflow.execute.status import RunOf, StatusWriter, moment, status_key
from beluga_airflow.graph import Flow, FlowResult, Identity, Retry
from beluga_airflow.graph.locate import load_flow
from beluga_airflow.graph.shape import Place
from beluga_airflow.local import run_with
from beluga_airflow.resilience.retrying import judge
from beluga_airflow.state import StateStore
from beluga_airflow.temporal.batch import Batch
from beluga_airflow.temporal.batch_workflow import ITEM_RETRY
from beluga_airflow.temporal.messages import (
    ITEM_ACTIVITY,
    MERGE_ACTIVITY,
    PREPARE_ACTIVITY,
    STATUS_ACTIVITY,
    STEP_ACTIVITY,
    UNDO_ACTIVITY,
    ItemCall,
    RunCall,
    StatusCall,
    StepCall,
    run_name,
)

__all__ = ["Activities", "Backends", "failures", "heartbeat"]

log = logging.getLogger(__name__)


ITEM_BEGINS = 1.0
"""Seconds after which an item is told of first: of many short ones each write costs as much as the rest."""
ITEM_PACE = 10.0
"""Seconds between two writes of what the steps of an item do."""
ITEM_KEPT = 3 * 86_400.0
"""Seconds that the status of an item stays: there may be as many every night as of all other flows in years."""


class Backends(Protocol):
    """Who turns the names of connections into what steps need."""

    async def resources(self, *, llm_conn_id: str | None, state_conn_id: str | None) -> Resources:
        """The resources behind these connections, shared by all callers in this process.

        Raises:
            InvalidSetting: a connection cannot be used.
        """
        ...


class Activities:
    """The activities of one worker."""

    def __init__(self, backends: Backends, settings: Callable[[], Settings]) -> None:
        self._backends = backends
        self._settings = settings
        self._statuses: WeakValueDictionary[str, StatusWriter] = WeakValueDictionary()

    def all(self) -> list[Any]:
        """What to register with a worker."""
        return [self.step, self.undo, self.merge, self.prepare, self.item, self.status]

    @activity.defn(name=STEP_ACTIVITY)
    async def step(self, call: StepCall) -> dict[str, Any]:
        """One attempt of one step of a flow."""
        retry = Retry.from_json(call.retry)
        number = activity.info().attempt
        with failures(retry, number):
            place = Place.from_json(call.place)
            flow = _flow(call.path, place.step)
            async with heartbeat():
                resources = await self._resources(call)
                if not place.sources[place.step]:
                    await resources.ready_for(flow)
                status = self._status(call, call.of, resources.state)
                status.note({place.step: "running"})
                try:
                    outcome = await attempt(
                        flow,
                        place.step,
                        targets=place.targets,
                        states=States(flow, place.sources, call.inputs, call.outputs),
                        identity=_identity(call),
                        resources=resources,
                        timeout=call.timeout,
                        number=number,
                        last=number >= retry.maximum_attempts,
                    )
                except asyncio.CancelledError:
                    if activity.is_cancelled():
                        raise
                    raise own_cancellation(place.step) from None
                status.note({place.step: "failed" if outcome.fault else "completed"})
            return outcome.to_json()

    @activity.defn(name=UNDO_ACTIVITY)
    async def undo(self, call: StepCall) -> None:
        """One attempt to undo a finished step of a flow that failed."""
        number = activity.info().attempt
        with failures(Retry.from_json(call.retry), number):
            place = Place.from_json(call.place)
            flow = _flow(call.path, place.step)
            _check_undoing(flow, call.path, place.step)
            states = States(flow, place.sources, call.inputs, call.outputs)
            async with heartbeat():
                await undo(
                    flow, place.step, states=states, identity=_identity(call), timeout=call.timeout, number=number
                )

    @activity.defn(name=MERGE_ACTIVITY)
    async def merge(self, call: StepCall) -> dict[str, Any]:
        """The merged data before a finish point that was skipped."""
        with failures(Retry.from_json(call.retry), activity.info().attempt):
            place = Place.from_json(call.place)
            flow = _flow(call.path, place.step)
            return States(flow, place.sources, call.inputs, call.outputs).before(place.step)

    @activity.defn(name=PREPARE_ACTIVITY)
    async def prepare(self, call: ItemCall) -> None:
        """See, before a batch begins, that this worker has its flow, its items, and a way to the models it asks."""
        with failures(ITEM_RETRY, activity.info().attempt):
            flow = load_flow(call.path)
            resources = await self._resources(call)
            for client in await resources.ready_for(flow):
                await client.check()
            await Batch(resources.state, call.batch).item(call.index)

    @activity.defn(name=ITEM_ACTIVITY)
    async def item(self, call: ItemCall) -> str:
        """Run the whole flow for one item and store how it ended; returns the status."""
        with failures(ITEM_RETRY, activity.info().attempt):
            async with heartbeat():
                resources = await self._resources(call)
                batch = Batch(resources.state, call.batch)
                ended = await batch.ended(call.index)
                if ended is not None:
                    return ended
                item = await batch.item(call.index)
                flow = load_flow(call.path)
                of = RunOf(
                    key=status_key(flow.name, item.scope),
                    run=call.batch,
                    generation=call.generation,
                    runtime="batch",
                    owner={**_owner(), "batch": call.batch, "item": call.index},
                )
                result = await run_with(
                    flow,
                    item.data,
                    identity=Identity(
                        scope=item.scope, generation=call.generation, run=call.batch, task=_task(call.batch)
                    ),
                    resources=resources,
                    settings=self._settings(),
                    # of the code that runs here: outcomes of another shape would lead past its steps
                    checkpoint=batch.checkpoint(call.index, flow.check().fingerprint),
                    gives_up=_cancelled_by_user,
                    status=StatusWriter(
                        resources.state, of, begins=ITEM_BEGINS, pace=ITEM_PACE, beats=False, kept=ITEM_KEPT
                    ),
                )
                await batch.end(item, result)
                return result.status

    @activity.defn(name=STATUS_ACTIVITY)
    async def status(self, call: StatusCall) -> None:
        """Tell how a flow's run ended; a store that is away is warned of, no more."""
        resources = await self._backends.resources(llm_conn_id=None, state_conn_id=call.state_conn_id)
        result = FlowResult(status=call.status, error=call.error, steps=call.steps, undone=call.undone)
        await self._status(call, call.of, resources.state).end(result)

    def _status(self, call: StepCall | StatusCall, of: RunCall, store: StateStore) -> StatusWriter:
        """What tells of the run: one for all that this worker does of it."""
        owner = _owner()
        run = run_name(owner["workflow_id"], owner["run_id"])
        writer = self._statuses.get(run)
        if writer is None:
            writer = self._statuses[run] = StatusWriter(
                store,
                RunOf(
                    key=status_key(of.flow, call.scope),
                    run=run,
                    generation=call.generation,
                    runtime="temporal",
                    total=of.total,
                    started=moment(datetime.fromtimestamp(of.started, UTC)),
                    owner=owner,
                ),
                shared=True,
            )
        return writer

    async def _resources(self, call: StepCall | ItemCall) -> Resources:
        return await self._backends.resources(llm_conn_id=call.llm_conn_id, state_conn_id=call.state_conn_id)


def _owner() -> dict[str, Any]:
    info = activity.info()
    return {"namespace": info.namespace, "workflow_id": str(info.workflow_id), "run_id": str(info.workflow_run_id)}


def _identity(call: StepCall) -> Identity:
    return Identity(scope=call.scope, generation=call.generation, run=call.run, task=_task(call.run or call.scope))


def _task(name: str) -> tuple[str, ...]:
    """Dag, run and task, out of the name that our operators give a run: these and the map index."""
    parts = [unquote(part) for part in name.split("/")]
    if len(parts) < 4:
        return ()
    dag, *run, task, _ = parts
    return dag, "/".join(run), task


def _flow(path: str, step: str) -> Flow:
    flow = load_flow(path)
    if step not in flow.steps:
        raise FlowNotFound(
            f"flow {path!r} has no step {step!r} in this worker's code, but the run began with one; deploy the code "
            "that has it and start the run again"
        )
    return flow


def _check_undoing(flow: Flow, path: str, step: str) -> None:
    if flow.steps[step].compensate is None:
        raise InvalidFlow(
            f"step {step!r} of flow {path!r} has no compensate= in this worker's code, but the run began with one; "
            "undo it by hand, and keep the code that has it deployed until the runs that began with it have ended"
        )


@contextmanager
def failures(retry: Retry, number: int) -> Iterator[None]:
    """Errors leave an activity as Temporal wants them, with the judgement and the wait of the step's own ``Retry``."""
    try:
        yield
    except Exception as error:
        failure = judge(error, retry)
        # a traceback where the author's code may be at fault: it does not travel further
        log.warning("attempt %d failed: %s", number, failure.message, exc_info=not isinstance(error, BelugaError))
        raise ApplicationError(
            failure.message,
            type=failure.kind,
            non_retryable=number >= retry.maximum_attempts or not failure.retryable,
            next_retry_delay=timedelta(seconds=retry.delay(number, failure.retry_after)),
        ) from None


def _cancelled_by_user() -> bool:
    # a worker that stops cancels what it runs too, and another goes on with it
    details = activity.cancellation_details()
    return details is not None and details.cancel_requested


@asynccontextmanager
async def heartbeat() -> AsyncIterator[None]:
    """Tell the server, all the while, that this worker lives; that is also how a cancellation gets here."""
    timeout = activity.info().heartbeat_timeout
    if timeout is None:
        yield
        return

    async def beat(interval: float) -> None:
        while True:
            # a short step ends without one
            await asyncio.sleep(interval)
            activity.heartbeat()

    task = asyncio.create_task(beat(timeout.total_seconds() / 4))
    try:
        yield
    finally:
        task.cancel()
