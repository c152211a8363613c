"""The one deterministic workflow that runs any flow: a short loop over ``Progress``."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    FailureError,
    TimeoutError,
    is_cancelled_exception,
)

with workflow.unsafe.imports_passed_through():
    from opentelemetry import context, trace
    from opentelemetry.trace import Span
    from temporalio.contrib.opentelemetry import ReplaySafeTracerProvider

    from beluga_airflow.graph import FlowResult, Outcome, Retry, Shape
    from beluga_airflow.graph.progress import Progress
    from beluga_airflow.graph.retry import seconds
    from beluga_airflow.graph.shape import RESULT, UNDO, GroupShape
    from beluga_airflow.telemetry import FLOW_SPAN, finish_flow_span, flow_attributes
    from beluga_airflow.temporal.messages import (
        FLOW_WORKFLOW,
        MERGE_ACTIVITY,
        STATUS_ACTIVITY,
        STEP_ACTIVITY,
        UNDO_ACTIVITY,
        FlowCall,
        RunCall,
        StatusCall,
        StepCall,
    )

__all__ = ["FLOW_FAILED", "HEARTBEAT", "FlowWorkflow", "duration", "message_of", "policy"]

FLOW_FAILED = "FlowFailed"
"""Type of the error with which a flow's workflow fails; its details hold the ``FlowResult``."""
HEARTBEAT = timedelta(seconds=10)
"""How long a worker may be silent before its step is given to another."""
LEAVING = 15.0
"""Seconds that cancelled steps have to come to an end: they hear of it with a heartbeat."""
GRACE = 10.0
"""Seconds beyond a step's timeout, which the step's attempt keeps itself, before the server gives it up."""
LONGEST = 100 * 365 * 86_400.0
"""Seconds: what is longer does not fit into Temporal's fields, and a workflow that tried would try for ever."""
MOST_ATTEMPTS = 2**31 - 1
WAITS = workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED
GOES_ON = workflow.ActivityCancellationType.TRY_CANCEL
STATUS = "status"
TELLING = timedelta(seconds=12)
"""How long a flow waits until its terminal status is written."""
LONGEST_TOLD = 500
"""Characters of an error that it is given."""
TURNS = 10
"""Of the loop, in which what a step's activity returned comes to the step's task: more than it takes."""

T = TypeVar("T")


@workflow.defn(name=FLOW_WORKFLOW)
class FlowWorkflow:
    """Runs the flow that its input describes. A flow that fails, fails the workflow."""

    @workflow.init
    def __init__(self, call: FlowCall) -> None:
        self._call = call
        self._shape = Shape.from_json(call.shape)
        kept = {step: Outcome.from_json(outcome) for step, outcome in call.kept.items()}
        self._progress = Progress(self._shape, kept)

    @workflow.query
    def progress(self) -> dict[str, Any]:
        """Which steps have ended, failed, run now, and were undone: with why where one could not be."""
        return {
            "finished": list(self._progress.outcomes),
            "failed": dict(self._progress.failures),
            "running": list(self._progress.running),
            "undone": dict(self._progress.undone),
        }

    @workflow.run
    async def run(self, call: FlowCall) -> dict[str, Any]:  # noqa: ARG002  # @workflow.init has read it
        span = _started_span(self._shape)
        try:
            result = await self._result()
        except asyncio.CancelledError:
            cancelled = FlowResult(status="cancelled", error="the workflow was cancelled", steps=self._progress.ends)
            await _through_cancellations(self._tell(self._progress.after_undoing(cancelled)))
            _end(span, FlowResult(status="cancelled"))
            raise
        await _through_cancellations(self._tell(result))
        _end(span, result)
        if not result.ok:
            raise ApplicationError(
                result.error or result.status, result.to_json(), type=FLOW_FAILED, non_retryable=True
            )
        return result.to_json()

    async def _result(self) -> FlowResult:
        try:
            # before anything is undone: a flow that cannot hand over its result has failed
            result = _carried(await self._in_time())
        except asyncio.CancelledError:
            await self._undone(FlowResult(status="cancelled"))
            raise
        return result if result.ok else _carried(await self._undone(result))

    async def _in_time(self) -> FlowResult:
        tasks: dict[asyncio.Task[Any], str | GroupShape] = {}
        late: GroupShape | None = None
        try:
            async with asyncio.timeout(min(self._shape.time, LONGEST)):
                late = await self._advance(tasks)
                if late is None:
                    return await self._end_of(tasks)
        except builtins.TimeoutError:
            late = None  # the whole flow is, whatever part of it may be too
        except asyncio.CancelledError:  # no `finally`: a run that this worker forgets is closed, and must not wait
            await _through_cancellations(self._abandon(tasks))
            raise
        # the flow is over: whoever cancels it from here on changes nothing about how it ended
        return self._progress.timed_out(late, running=await _through_cancellations(self._abandon(tasks)))

    async def _end_of(self, timers: Mapping[asyncio.Task[Any], str | GroupShape]) -> FlowResult:
        """The result when nothing runs any more but the timers of nested flows."""
        for timer in timers:
            timer.cancel()
        end = self._progress.skipped_end
        if end is None:
            return self._progress.result()
        try:
            return self._progress.result(await self._merged(end))
        except FailureError as error:
            if is_cancelled_exception(error):
                raise asyncio.CancelledError from error
            self._progress.failures[end] = message_of(error)
            return self._progress.result()

    async def _advance(self, tasks: dict[asyncio.Task[Any], str | GroupShape]) -> GroupShape | None:
        """Run until nothing runs any more; returns a nested flow that used up its time, if one did."""
        while True:
            for step in self._progress.start():
                tasks[asyncio.create_task(self._step(step))] = step
            for group in self._progress.begun():
                tasks[asyncio.create_task(asyncio.sleep(min(group.timeout or 0, LONGEST)))] = group
            if not self._progress.running:
                return None
            finished, _ = await workflow.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            ended: dict[str, Outcome | str] = {}
            groups: list[GroupShape] = []
            for task in finished:
                which = tasks.pop(task)
                if isinstance(which, str):
                    ended[which] = _ended(task)
                else:
                    groups.append(which)
            self._progress.finish(ended)
            for group in groups:
                if not self._progress.closed(group):
                    return group

    async def _abandon(self, tasks: Mapping[asyncio.Task[Any], str | GroupShape]) -> list[str]:
        """Cancel what still runs: those steps. What is done all the same counts: it is among what is to be undone."""
        for _ in range(TURNS):
            await asyncio.sleep(0)
        ran = [*self._progress.running]
        steps = {step: task for task, step in tasks.items() if isinstance(step, str)}
        cut_off = {step: task for step, task in steps.items() if not task.done()}
        for task in tasks:
            task.cancel()
        if cut_off:
            await workflow.wait(cut_off.values(), timeout=LEAVING)
        self._progress.finish({step: task.result() for step, task in steps.items() if _is_good(task)})
        self._progress.cut_off([step for step, task in cut_off.items() if _was_begun(task)])
        for step, why in self._progress.undone.items():
            workflow.logger.error("step %r could not be undone: %s", step, why)
        return ran

    async def _step(self, step: str) -> Outcome:
        shape = self._shape.by_name[step]
        assert shape.timeout is not None, "a settled shape"
        outcome: dict[str, Any] = await workflow.execute_activity(
            STEP_ACTIVITY,
            self._call_of(step),
            result_type=dict[str, Any],
            start_to_close_timeout=duration(shape.time + GRACE),
            heartbeat_timeout=HEARTBEAT,
            retry_policy=policy(shape.retries),
            # a replay compares it: by their order alone one step would pass for another
            activity_id=step,
            summary=step,
            # one that may be done all the same when it is cancelled is among what is to be undone
            cancellation_type=WAITS if shape.undo else GOES_ON,
        )
        return Outcome.from_json(outcome)

    async def _merged(self, step: str) -> dict[str, Any]:
        state: dict[str, Any] = await workflow.execute_activity(
            MERGE_ACTIVITY,
            self._call_of(step),
            result_type=dict[str, Any],
            start_to_close_timeout=timedelta(seconds=60),
            retry_policy=policy(self._shape.by_name[step].retries),
            activity_id="result",  # no step may have this name
            summary="result",
        )
        return state

    async def _undone(self, result: FlowResult) -> FlowResult:
        await _through_cancellations(self._undo_all())
        return self._progress.after_undoing(result)

    async def _undo_all(self) -> None:
        for step in self._progress.to_undo:
            try:
                await self._undo(step)
                self._progress.undone[step] = None
            except FailureError as error:
                self._progress.undone[step] = message_of(error)
                workflow.logger.error("step %r could not be undone: %s", step, message_of(error))

    async def _undo(self, step: str) -> None:
        shape = self._shape.by_name[step]
        assert shape.timeout is not None, "a settled shape"
        call = self._call_of(step)
        await workflow.execute_activity(
            UNDO_ACTIVITY,
            replace(call, outputs={**call.outputs, step: self._progress.outputs[step]}),
            start_to_close_timeout=duration(shape.time + GRACE),
            heartbeat_timeout=HEARTBEAT,
            retry_policy=policy(shape.retries),
            activity_id=f"{step}.{UNDO}",
            summary=f"{step}.{UNDO}",
        )

    async def _tell(self, result: FlowResult) -> None:
        """Have the terminal status written, which must not change how the flow ends."""
        call = StatusCall(
            of=self._of,
            scope=self._call.scope,
            generation=self._call.generation,
            state_conn_id=self._call.state_conn_id,
            status=result.status,
            error=result.error and result.error[:LONGEST_TOLD],
            steps=result.steps,
            undone={step: how[:LONGEST_TOLD] for step, how in result.undone.items()},
        )
        try:
            # not a local one: a worker that forgets this run meanwhile would warn of its cancellation
            await workflow.execute_activity(
                STATUS_ACTIVITY,
                call,
                start_to_close_timeout=TELLING / 2,
                # it tries by itself, and workers that have no room for it must not hold up the end
                schedule_to_close_timeout=TELLING,
                retry_policy=RetryPolicy(maximum_attempts=2),
                activity_id=f"{RESULT}.{STATUS}",  # no step may have this name
                summary=STATUS,
            )
        except FailureError as error:
            workflow.logger.warning("the status of the flow's run is not written: %s", message_of(error))

    @property
    def _of(self) -> RunCall:
        return RunCall(
            flow=self._shape.flow, total=self._shape.count, started=workflow.info().workflow_start_time.timestamp()
        )

    def _call_of(self, step: str) -> StepCall:
        shape = self._shape.by_name[step]
        return StepCall(
            of=self._of,
            path=self._call.path,
            place=self._shape.place(step).to_json(),
            retry=shape.retries.to_json(),
            timeout=shape.timeout,
            inputs=self._call.inputs,
            outputs=self._progress.outputs_before(step),
            scope=self._call.scope,
            generation=self._call.generation,
            run=self._call.run,
            llm_conn_id=self._call.llm_conn_id,
            state_conn_id=self._call.state_conn_id,
        )


def duration(length: float) -> timedelta:
    """Seconds as Temporal takes them."""
    return timedelta(seconds=min(length, LONGEST))


LOST_WORKERS = 5
"""How many workers a step may lose, beyond its attempts, before it is held to be what kills them."""


def policy(retry: Retry) -> RetryPolicy:
    """A retry as the server takes it, with room for workers that are lost."""
    # the server refuses a first wait of nothing, and one above the longest
    longest = max(seconds(retry.maximum_interval), 0.001)
    first = min(max(seconds(retry.initial_interval), 0.001), longest)
    return RetryPolicy(
        initial_interval=duration(first),
        backoff_coefficient=retry.backoff_coefficient,
        maximum_interval=duration(longest),
        # the attempt itself says when the step's own are used up: a worker that is lost costs none of the last
        maximum_attempts=min(retry.maximum_attempts + LOST_WORKERS, MOST_ATTEMPTS),
        # without this a result over the server's limit is tried for ever
        non_retryable_error_types=["PayloadsTooLarge"],
    )


def _carried(result: FlowResult) -> FlowResult:
    """The result, or, where it is too large to leave the workflow, that failure."""
    try:
        workflow.payload_converter().to_payload(result.to_json())
    except ApplicationError as error:
        return replace(result, status="failed", data={}, error=f"the flow's result cannot be returned: {error.message}")
    return result


async def _through_cancellations(work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns: a task of its own, since whoever cancels the run by now must not leave it half done."""
    task = asyncio.create_task(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await workflow.wait([task])
    return task.result()


def _is_good(task: asyncio.Task[Outcome]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _was_begun(task: asyncio.Task[Outcome]) -> bool:
    """Whether a worker had begun a step that was cancelled: one that waits for a worker or its next attempt has not."""
    if not task.done():
        return True
    error = None if task.cancelled() else task.exception()
    return isinstance(error, ActivityError) and error.started_event_id > 0


def _ended(task: asyncio.Task[Outcome]) -> Outcome | str:
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, FailureError):
        return message_of(error)
    raise error


def message_of(error: FailureError) -> str:
    """What an activity failed of, or why it could not be asked for, in the words that every runtime uses."""
    cause = error.cause if isinstance(error, ActivityError) else error
    if isinstance(cause, TimeoutError):
        kind = cause.type.name if cause.type else "unknown"
        return f"WorkerLost: no worker finished it ({kind} timeout); see whether workers are up and have memory"
    return cause.message if isinstance(cause, ApplicationError) else str(cause or error)


def _started_span(shape: Shape) -> Span | None:
    # only under a provider that is replay-safe: another would tell of the run again at every replay
    if not isinstance(trace.get_tracer_provider(), ReplaySafeTracerProvider):
        return None
    span = trace.get_tracer("beluga_airflow").start_span(FLOW_SPAN, attributes=flow_attributes(shape, "temporal"))
    # no `with`: a run that this worker forgets must not end its span, which the next worker tells of
    context.attach(trace.set_span_in_context(span))
    return span


def _end(span: Span | None, result: FlowResult) -> None:
    if span is not None:
        finish_flow_span(span, result)
        span.end()
