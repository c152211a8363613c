"""Talking to a Temporal server, and the one place where its errors become ours."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import (
    Client,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowHistoryEventFilterType,
)
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import (
    ApplicationError,
    CancelledError,
    TerminatedError,
    TimeoutError,
    WorkflowAlreadyStartedError,
)
from temporalio.service import RPCError, RPCStatusCode

from beluga_airflow.config import TemporalSettings
from beluga_airflow.errors import InvalidInput, InvalidSetting, TemporalError, TemporalUnavailable
from beluga_airflow.graph import FlowResult
from beluga_airflow.temporal.ending import terminated, timed_out, with_undoing
from beluga_airflow.temporal.flow_workflow import FLOW_FAILED, duration
from beluga_airflow.temporal.messages import DATA_CONVERTER

__all__ = [
    "Run",
    "Target",
    "cancel",
    "check",
    "closed",
    "closed_as",
    "connect",
    "open_run",
    "result_of",
    "start",
    "translated",
    "was_cut_off",
]

log = logging.getLogger(__name__)

AWAY = frozenset(
    {
        RPCStatusCode.UNAVAILABLE,
        RPCStatusCode.RESOURCE_EXHAUSTED,
        RPCStatusCode.UNKNOWN,
        RPCStatusCode.CANCELLED,
        RPCStatusCode.DEADLINE_EXCEEDED,
    }
)
"""What a server answers, or is answered in its place, when asking again may help."""
RETRY_SECONDS = (1.0, 30.0)
"""The first and the longest wait between two tries to reach a server that is away."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a Temporal server is, and how to be let in."""

    address: str = TemporalSettings.address
    namespace: str = TemporalSettings.namespace
    task_queue: str = TemporalSettings.task_queue
    api_key: str | None = field(default=None, repr=False)
    tls: bool = False
    ui_url: str | None = None

    def link(self, run: Run) -> str | None:
        """The page of a run in Temporal's web UI, where the UI's address is known."""
        if not self.ui_url:
            return None
        from urllib.parse import quote

        path = f"namespaces/{quote(self.namespace, safe='')}/workflows/{quote(run.workflow_id, safe='')}/{run.run_id}"
        return f"{self.ui_url.rstrip('/')}/{path}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a workflow.

    Args:
        workflow_id, run_id: its names.
        closed: whether it is known to have ended; an open one may have ended since.
    """

    workflow_id: str
    run_id: str
    closed: bool = field(default=False, compare=False)


async def connect(target: Target, plugins: Sequence[Any] = ()) -> Client:
    """A client for ``target``.

    Raises:
        TemporalUnavailable: no server answers there.
        TemporalError: it answers, and refuses.
        InvalidSetting: the target is no address.
    """
    if "://" in target.address:
        raise InvalidSetting(
            f"{target.address!r} is no address of a Temporal server: write the host alone, without what is before '://'"
        )
    with translated(target):
        return await Client.connect(
            target.address,
            namespace=target.namespace,
            api_key=target.api_key,
            tls=target.tls,
            data_converter=DATA_CONVERTER,
            plugins=list(plugins),
        )


async def start(
    client: Client,
    target: Target,
    workflow: str,
    call: Any,
    *,
    workflow_id: str,
    task_queue: str,
    summary: str,
    timeout: float | None = None,
    once: bool = False,
) -> Run:
    """Start a workflow, or find the one that was started under this id before.

    A running one is attached to, a completed one is taken as it is; after one that ended otherwise a new one starts,
    unless it is to run ``once``. So a caller that was lost may call this again.

    Args:
        client, target: connected, and to where.
        workflow: the workflow's type.
        call: its input.
        workflow_id: names it, the same for every caller that means the same run.
        task_queue: whose workers run it.
        summary: one line for a reader of the web UI.
        timeout: seconds after which the server ends it, whether any worker has looked at it or not.
        once: whether one that ended, however it did, is taken as it is.

    Raises:
        InvalidInput: the call is too large for Temporal.
        TemporalUnavailable: no server answers.
        TemporalError: the server refuses.
    """
    reuse = WorkflowIDReusePolicy.REJECT_DUPLICATE if once else WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY
    with translated(target):
        try:
            handle = await client.start_workflow(
                workflow,
                call,
                id=workflow_id,
                task_queue=task_queue,
                id_reuse_policy=reuse,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                static_summary=summary,
                execution_timeout=None if timeout is None else duration(timeout),
            )
        except WorkflowAlreadyStartedError as error:
            return Run(workflow_id=workflow_id, run_id=str(error.run_id), closed=True)
        except ApplicationError as error:
            # our own converter's: nothing was sent
            raise InvalidInput(f"workflow {workflow_id!r} cannot be started: {error.message}") from error
    return Run(workflow_id=workflow_id, run_id=str(handle.first_execution_run_id))


async def closed(target: Target, run: Run) -> None:
    """Wait until a run is closed, however it ends; a server that goes away is waited for.

    All who wait in one event loop share one client.

    Raises:
        TemporalError: the server does not know the run, or refuses.
    """
    wait, longest = RETRY_SECONDS
    while True:
        try:
            client = await _shared_client(target)
            with translated(target):
                await _handle(client, run).result()
        except WorkflowFailureError:
            return
        except TemporalUnavailable as error:
            log.warning("waiting for workflow %r: %s; trying again in %g s", run.workflow_id, error, wait)
            await asyncio.sleep(wait)
            wait = min(wait * 2, longest)
            continue
        return


_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Target, asyncio.Task[Client]]] = WeakKeyDictionary()


async def _shared_client(target: Target) -> Client:
    clients = _shared.setdefault(asyncio.get_running_loop(), {})
    task = clients.get(target)
    if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
        task = clients[target] = asyncio.create_task(connect(target))
    # shielded: one waiter that is cancelled must not take the client from the others
    return await asyncio.shield(task)


async def result_of(client: Client, target: Target, run: Run) -> Any:
    """What a closed run returned: JSON, or the ``FlowResult`` of a flow that failed, as JSON.

    Raises:
        TemporalUnavailable: no server answers.
        TemporalError: the workflow failed of something else than its flow.
    """
    with translated(target):
        try:
            return await _handle(client, run).result()
        except WorkflowFailureError as error:
            return await _failed(client, run, error)


async def open_run(client: Client, target: Target, workflow_id: str) -> Run | None:
    """The run of this id that has not ended; None where there is none.

    Raises:
        TemporalUnavailable: no server answers.
        TemporalError: the server refuses.
    """
    with translated(target):
        try:
            described = await client.get_workflow_handle(workflow_id).describe()
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                return None
            raise
    is_open = described.status == WorkflowExecutionStatus.RUNNING
    return Run(workflow_id=workflow_id, run_id=described.run_id) if is_open else None


async def closed_as(client: Client, target: Target, run: Run) -> str | None:
    """In which way a run has ended, in the server's word; None: it has not, or the server does not know it (any more).

    Raises:
        TemporalUnavailable: no server answers.
        TemporalError: the server refuses.
    """
    with translated(target):
        try:
            described = await _handle(client, run).describe()
        except RPCError as error:
            if error.status == RPCStatusCode.NOT_FOUND:
                return None
            raise
    status = described.status
    return None if status is None or status == WorkflowExecutionStatus.RUNNING else status.name


async def was_cut_off(client: Client, target: Target, run: Run) -> bool:
    """Whether a run was ended from outside, by a person or by the server, before it could say its own end.

    Raises:
        TemporalUnavailable: no server answers.
        TemporalError: the server does not know the run, or refuses.
    """
    with translated(target):
        described = await _handle(client, run).describe()
    return described.status in (WorkflowExecutionStatus.TERMINATED, WorkflowExecutionStatus.TIMED_OUT)


async def cancel(client: Client, target: Target, run: Run) -> None:
    """Ask a run to end; one that is closed already is left as it is.

    Raises:
        TemporalUnavailable: no server answers.
    """
    try:
        with translated(target):
            described = await _handle(client, run).describe()
            # not by its run id: a batch may have gone on under another since
            first = described.raw_description.workflow_execution_info.first_run_id
            await client.get_workflow_handle(run.workflow_id, first_execution_run_id=first).cancel()
    except TemporalUnavailable:
        raise
    except TemporalError as error:
        cause = error.__cause__
        if not (isinstance(cause, RPCError) and cause.status == RPCStatusCode.NOT_FOUND):
            raise


async def check(client: Client, target: Target) -> str:
    """See that the server knows the namespace; says so in words.

    Raises:
        TemporalUnavailable: no server answers.
        TemporalError: the server refuses, or has no such namespace.
    """
    with translated(target):
        await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=target.namespace))
    return f"the Temporal server at {target.address} answers and has the namespace {target.namespace!r}"


def _handle(client: Client, run: Run) -> WorkflowHandle[Any, Any]:
    # pinned by its run id: the latest run of this id may be another one; runs that continue it are followed
    return client.get_workflow_handle(run.workflow_id, run_id=run.run_id)


async def _failed(client: Client, run: Run, failure: WorkflowFailureError) -> dict[str, Any]:
    cause: BaseException | None = failure.cause
    if isinstance(cause, ApplicationError) and cause.type == FLOW_FAILED and cause.details:
        details: dict[str, Any] = cause.details[0]
        return details
    if not isinstance(cause, CancelledError | TerminatedError | TimeoutError):
        while cause is not None and cause.__cause__ is not None:
            cause = cause.__cause__
        message = getattr(cause, "message", None) or str(cause)
        raise TemporalError(f"{message} (workflow {run.workflow_id!r}, run {run.run_id})") from failure
    events = await _history(client, run)
    if isinstance(cause, CancelledError):
        result = FlowResult(status="cancelled", error="the workflow was cancelled")
    else:
        result = terminated(events) if isinstance(cause, TerminatedError) else timed_out(events)
    return with_undoing(result, events).to_json()


async def _history(client: Client, run: Run) -> list[HistoryEvent]:
    """The events of a closed run, or of the last one that continued it."""
    latest, run_id = run.run_id, run.run_id
    while run_id:
        latest = run_id
        closing = _handle(client, Run(workflow_id=run.workflow_id, run_id=latest)).fetch_history_events(
            event_filter_type=WorkflowHistoryEventFilterType.CLOSE_EVENT
        )
        async for event in closing:
            run_id = event.workflow_execution_continued_as_new_event_attributes.new_execution_run_id
    handle = _handle(client, Run(workflow_id=run.workflow_id, run_id=latest))
    return [event async for event in handle.fetch_history_events()]


@contextmanager
def translated(target: Target) -> Iterator[None]:
    where = f"the Temporal server at {target.address}, namespace {target.namespace!r}"
    try:
        yield
    except RPCError as error:
        if error.status in AWAY:
            raise TemporalUnavailable(
                f"{where} does not answer ({error.status.name}); see that it runs and that the temporal connection "
                "names it"
            ) from error
        if error.status in (RPCStatusCode.UNAUTHENTICATED, RPCStatusCode.PERMISSION_DENIED):
            raise TemporalError(
                f"{where} refuses the key ({error.status.name}); mend the temporal connection"
            ) from error
        raise TemporalError(f"{where} refused: {error.message} ({error.status.name})") from error
    except RuntimeError as error:
        # a refused connection has no class of its own
        raise TemporalUnavailable(
            f"{where} cannot be reached; see that it runs and that the temporal connection names it"
        ) from error
    except ValueError as error:
        raise InvalidSetting(f"{target.address!r} is no address of a Temporal server: {error}") from error
