"""The one deterministic workflow that runs any flow: a short loop over ``Progress``."""

from __future__ import annotations

import asyncio
import builtins
from dataclasses import replace
from datetime import timedelta
from typing import Any

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
    from beluga_airflow.telemetry import FLOW_SPAN, finish_flow_span, flow_attributes
    from beluga_airflow.temporal.messages import FLOW_WORKFLOW, MERGE_ACTIVITY, STEP_ACTIVITY, FlowCall, StepCall

__all__ = ["FLOW_FAILED", "HEARTBEAT", "FlowWorkflow", "duration", "message_of", "policy"]

FLOW_FAILED = "FlowFailed"
"""Type of the error with which a flow's workflow fails; its details hold the ``FlowResult``."""
HEARTBEAT = timedelta(seconds=10)
"""How long a worker may be silent before its step is given to another."""
GRACE = 10.0
"""Seconds beyond a step's timeout, which the step's attempt keeps itself, before the server gives it up."""
LONGEST = 100 * 365 * 86_400.0
"""Seconds: what is longer does not fit into Temporal's fields, and a workflow that tried would try for ever."""
MOST_ATTEMPTS = 2**31 - 1


@workflow.defn(name=FLOW_WORKFLOW)
class FlowWorkflow:
    """Runs the flow that its input describes. A flow that fails, fails the workflow."""

    @workflow.init
    def __init__(self, call: FlowCall) -> None:
        self._call = call
        self._shape = Shape.from_json(call.shape)
        self._progress = Progress(self._shape)

    @workflow.query
    def progress(self) -> dict[str, Any]:
        """Which steps have ended, failed, and run now."""
        return {
            "finished": list(self._progress.outcomes),
            "failed": dict(self._progress.failures),
            "running": list(self._progress.running),
        }

    @workflow.run
    async def run(self, call: FlowCall) -> dict[str, Any]:  # noqa: ARG002  # @workflow.init has read it
        span = _started_span(self._shape)
        try:
            result = _carried(await self._result())
        except asyncio.CancelledError:
            _end(span, FlowResult(status="cancelled"))
            raise
        _end(span, result)
        if not result.ok:
            raise ApplicationError(
                result.error or result.status, result.to_json(), type=FLOW_FAILED, non_retryable=True
            )
        return result.to_json()

    async def _result(self) -> FlowResult:
        assert self._shape.timeout is not None, "a settled shape"
        try:
            return await asyncio.wait_for(self._to_end(), timeout=min(self._shape.timeout, LONGEST))
        except builtins.TimeoutError:
            return self._progress.timed_out()

    async def _to_end(self) -> FlowResult:
        tasks: dict[asyncio.Task[Outcome], str] = {}
        try:
            while True:
                for step in self._progress.start():
                    tasks[asyncio.create_task(self._step(step))] = step
                if not tasks:
                    break
                finished, _ = await workflow.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                self._progress.finish({tasks[task]: _ended(task) for task in finished})
                for task in finished:
                    del tasks[task]
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
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

    async def _step(self, step: str) -> Outcome:
        shape = self._shape.by_name[step]
        assert shape.timeout is not None, "a settled shape"
        assert shape.retry is not None, "a settled shape"
        outcome: dict[str, Any] = await workflow.execute_activity(
            STEP_ACTIVITY,
            self._call_of(step),
            result_type=dict[str, Any],
            start_to_close_timeout=duration(shape.timeout + GRACE),
            heartbeat_timeout=HEARTBEAT,
            retry_policy=policy(shape.retry),
            # a replay compares it: by their order alone one step would pass for another
            activity_id=step,
            summary=step,
        )
        return Outcome.from_json(outcome)

    async def _merged(self, step: str) -> dict[str, Any]:
        state: dict[str, Any] = await workflow.execute_activity(
            MERGE_ACTIVITY,
            self._call_of(step),
            result_type=dict[str, Any],
            start_to_close_timeout=timedelta(seconds=60),
            retry_policy=policy(self._shape.by_name[step].retry or Retry()),
            activity_id="result",  # no step may have this name
            summary="result",
        )
        return state

    def _call_of(self, step: str) -> StepCall:
        shape = self._shape.by_name[step]
        return StepCall(
            path=self._call.path,
            place=self._shape.places[step].to_json(),
            retry=(shape.retry or Retry()).to_json(),
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
