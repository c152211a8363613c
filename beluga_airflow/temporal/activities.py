"""What a worker runs for the workflows: one attempt of a step, or one item of a batch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any, Protocol

from temporalio import activity
from temporalio.exceptions import ApplicationError

from beluga_airflow.config import Settings
from beluga_airflow.errors import BelugaError, FlowNotFound, InvalidFlow
from beluga_airflow.execute import Resources, States, attempt, own_cancellation, undo
from beluga_airflow.graph import Flow, Identity, Retry
from beluga_airflow.graph.locate import load_flow
from beluga_airflow.graph.shape import Place
from beluga_airflow.local import run_with
from beluga_airflow.resilience.retrying import judge
from beluga_airflow.temporal.batch import Batch
from beluga_airflow.temporal.batch_workflow import ITEM_RETRY
from beluga_airflow.temporal.messages import (
    ITEM_ACTIVITY,
    MERGE_ACTIVITY,
    PREPARE_ACTIVITY,
    STEP_ACTIVITY,
    UNDO_ACTIVITY,
    ItemCall,
    StepCall,
)

__all__ = ["Activities", "Backends"]

log = logging.getLogger(__name__)


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

    def __init__(self, backends: Backends, settings: Settings) -> None:
        self._backends = backends
        self._settings = settings

    def all(self) -> list[Any]:
        """What to register with a worker."""
        return [self.step, self.undo, self.merge, self.prepare, self.item]

    @activity.defn(name=STEP_ACTIVITY)
    async def step(self, call: StepCall) -> dict[str, Any]:
        """One attempt of one step of a flow."""
        retry = Retry.from_json(call.retry)
        number = activity.info().attempt
        with _failures(retry, number):
            place = Place.from_json(call.place)
            flow = _flow(call.path, place.step)
            async with _heartbeat():
                resources = await self._resources(call)
                if not place.sources[place.step]:
                    await resources.ready_for(flow)
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
            return outcome.to_json()

    @activity.defn(name=UNDO_ACTIVITY)
    async def undo(self, call: StepCall) -> None:
        """One attempt to undo a finished step of a flow that failed."""
        number = activity.info().attempt
        with _failures(Retry.from_json(call.retry), number):
            place = Place.from_json(call.place)
            flow = _flow(call.path, place.step)
            _check_undoing(flow, call.path, place.step)
            states = States(flow, place.sources, call.inputs, call.outputs)
            async with _heartbeat():
                await undo(
                    flow, place.step, states=states, identity=_identity(call), timeout=call.timeout, number=number
                )

    @activity.defn(name=MERGE_ACTIVITY)
    async def merge(self, call: StepCall) -> dict[str, Any]:
        """The merged data before a finish point that was skipped."""
        with _failures(Retry.from_json(call.retry), activity.info().attempt):
            place = Place.from_json(call.place)
            flow = _flow(call.path, place.step)
            return States(flow, place.sources, call.inputs, call.outputs).before(place.step)

    @activity.defn(name=PREPARE_ACTIVITY)
    async def prepare(self, call: ItemCall) -> None:
        """See, before a batch begins, that this worker has its flow, its items, and a way to the models it asks."""
        with _failures(ITEM_RETRY, activity.info().attempt):
            flow = load_flow(call.path)
            resources = await self._resources(call)
            for client in await resources.ready_for(flow):
                await client.check()
            await Batch(resources.state, call.batch).item(call.index)

    @activity.defn(name=ITEM_ACTIVITY)
    async def item(self, call: ItemCall) -> str:
        """Run the whole flow for one item and store how it ended; returns the status."""
        with _failures(ITEM_RETRY, activity.info().attempt):
            async with _heartbeat():
                resources = await self._resources(call)
                batch = Batch(resources.state, call.batch)
                ended = await batch.ended(call.index)
                if ended is not None:
                    return ended
                item = await batch.item(call.index)
                flow = load_flow(call.path)
                result = await run_with(
                    flow,
                    item.data,
                    identity=Identity(scope=item.scope, generation=call.generation, run=call.batch),
                    resources=resources,
                    settings=self._settings,
                    # of the code that runs here: outcomes of another shape would lead past its steps
                    checkpoint=batch.checkpoint(call.index, flow.check().fingerprint),
                    gives_up=_cancelled_by_user,
                )
                await batch.end(item, result)
                return result.status

    async def _resources(self, call: StepCall | ItemCall) -> Resources:
        return await self._backends.resources(llm_conn_id=call.llm_conn_id, state_conn_id=call.state_conn_id)


def _identity(call: StepCall) -> Identity:
    return Identity(scope=call.scope, generation=call.generation, run=call.run)


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
def _failures(retry: Retry, number: int) -> Iterator[None]:
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
async def _heartbeat() -> AsyncIterator[None]:
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
