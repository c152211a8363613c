"""One attempt of a task, what came of it, and what may happen to the task next."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from tempfile import gettempdir
from traceback import format_exception
from typing import Any
from uuid import UUID, uuid4

import structlog
from airflow.dag_processing.bundles.local import LocalDagBundle
from airflow.sdk import BaseOperator
from airflow.sdk.api.datamodels._generated import DagRun, TaskInstance, TaskInstanceState, TIRunContext
from airflow.sdk.bases.operator import TRIGGER_FAIL_REPR, TriggerFailureReason
from airflow.sdk.configuration import conf
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.sdk.execution_time import task_runner
from airflow.sdk.execution_time.xcom import XCom
from airflow.sdk.serde import serialize
from airflow.triggers.base import BaseTaskEndEvent, TriggerEvent
from pydantic import JsonValue

from beluga_airflow.testing.deferral import Deferral, DeferralTimeoutError, first_event, through_json
from beluga_airflow.testing.supervisor import InMemorySupervisor, TaskKey, in_trigger

__all__ = ["Attempt", "TaskRun", "run_attempt"]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt of a task as the scheduler would queue it. A resumed attempt keeps its id and number."""

    id: UUID
    task: TaskKey
    operator: BaseOperator | MappedOperator
    dag_run: DagRun
    try_number: int
    max_tries: int
    next_method: str | None = None
    next_kwargs: dict[str, Any] | None = None

    @property
    def may_retry(self) -> bool:
        """Whether Airflow tries the task again should this attempt fail."""
        return self.max_tries != 0 and self.try_number <= self.max_tries

    @property
    def failed(self) -> TaskInstanceState:
        """The state that Airflow gives the task when this attempt fails outside the task runner."""
        retried = self.operator.retries and self.may_retry
        return TaskInstanceState.UP_FOR_RETRY if retried else TaskInstanceState.FAILED


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """A task after an attempt, or after a part of one where it deferred or was resumed.

    Attributes:
        state: ``success``, ``failed``, ``up_for_retry``, ``skipped``, ``deferred``, ``awaiting_input`` or
            ``up_for_reschedule``; compares with text.
        error: what the operator raised, or None.
        operator: the operator as it ran, its template fields rendered.
        xcoms: what the task's XComs hold now, by key, in the form in which Airflow stores them: JSON.
        links: the addresses of its extra links, by the links' names.
        task_state: what its task state store holds now.
        rendered_fields: the template fields as Airflow's UI shows them.
        deferral: where it goes on, if it is deferred or awaits input.
        try_number: the attempt, from 1.
        max_tries: what the scheduler keeps as the last attempt that may be retried.
    """

    state: TaskInstanceState
    error: BaseException | None
    operator: Any
    xcoms: dict[str, Any]
    links: dict[str, str]
    task_state: dict[str, JsonValue]
    rendered_fields: dict[str, JsonValue]
    deferral: Deferral | None
    try_number: int
    max_tries: int
    _attempt: Attempt = field(repr=False)
    _supervisor: InMemorySupervisor = field(repr=False)

    @property
    def return_value(self) -> Any:
        """What the task returned, as it is stored: JSON. None where it returned nothing."""
        return self.xcoms.get(XCom.XCOM_RETURN_KEY)

    @property
    def generation(self) -> int:
        """0 until a user clears the task; a clear raises it, a retry keeps it."""
        return self.max_tries - (self._attempt.operator.retries or 0)

    def retry(self) -> TaskRun:
        """The next attempt, as Airflow's retry: XComs are wiped, the task state is kept.

        Raises:
            RuntimeError: the state is not ``up_for_retry``.
        """
        if self.state != TaskInstanceState.UP_FOR_RETRY:
            raise RuntimeError(
                f"attempt {self.try_number} is {self.state.value}: Airflow retries only what is up_for_retry. "
                "clear() is what a user may do"
            )
        return run_attempt(self._supervisor, self._next_attempt())

    def clear(self) -> TaskRun:
        """The next attempt after a user cleared the task: its retries begin anew, the task state is kept.

        A trigger that waits is not told; ``await run.deferral.trigger().on_kill()`` is what the triggerer does.
        """
        retries = self._attempt.operator.retries or 0
        return run_attempt(self._supervisor, self._next_attempt(max_tries=self.try_number + retries))

    def lose(self) -> TaskRun:
        """The task after Airflow lost this attempt: its process died before it could report, or the scheduler took its
        state for a mismatch. What it had stored by then stays.
        """
        return _outcome(self._supervisor, self._attempt, self._attempt.failed, operator=self.operator)

    def resume(self, event: TriggerEvent | JsonValue) -> TaskRun:
        """Go on with the event of a trigger, or with its payload alone, or with a person's answer.

        Raises:
            RuntimeError: the task is not deferred.
        """
        deferral = self._deferral()
        if isinstance(event, BaseTaskEndEvent):
            return self._end(event)
        payload = event.payload if isinstance(event, TriggerEvent) else event
        return self._go_on(deferral.method, deferral.next_kwargs | {"event": payload})

    def time_out(self) -> TaskRun:
        """Go on as when the deferral's timeout has passed: the attempt fails.

        Raises:
            RuntimeError: the task is not deferred.
        """
        self._deferral()
        return self._go_on(TRIGGER_FAIL_REPR, {"error": TriggerFailureReason.TRIGGER_TIMEOUT.value})

    async def run_trigger(self) -> TriggerEvent:
        """Run the trigger as the triggerer would, until its first event.

        Raises:
            DeferralTimeoutError: there was no event within the deferral's timeout.
            RuntimeError: the task has no trigger, or it ended without an event.
            Exception: whatever the trigger raises.
        """
        deferral = self._deferral()
        trigger = deferral.trigger()
        # the triggerer gives it the data model too, not the ORM's class
        trigger.task_instance = _task_instance(self._attempt)  # type: ignore[assignment]
        seconds = None if deferral.timeout is None else deferral.timeout.total_seconds()
        token = in_trigger.set(True)
        try:
            async with asyncio.timeout(seconds) as limit:
                return await first_event(trigger)
        except TimeoutError as error:
            if limit.expired():
                raise DeferralTimeoutError(f"{trigger!r} sent no event within {deferral.timeout}") from error
            raise
        finally:
            in_trigger.reset(token)

    async def run_to_end(self) -> TaskRun:
        """Run trigger and operator in turns until the task is not deferred any more.

        A trigger that raises, ends without an event or is late fails the attempt, as in Airflow. Operators run in a
        thread, triggers on this event loop.
        """
        run = self
        while run.state == TaskInstanceState.DEFERRED:
            try:
                event = await run.run_trigger()
            except DeferralTimeoutError:
                run = await asyncio.to_thread(run.time_out)
            except Exception as error:  # the triggerer fails the task for whatever its trigger raises
                run = await asyncio.to_thread(run._fail, error)
            else:
                run = await asyncio.to_thread(run.resume, event)
        return run

    def _fail(self, error: Exception) -> TaskRun:
        reason = {"error": TriggerFailureReason.TRIGGER_FAILURE.value, "traceback": format_exception(error)}
        return self._go_on(TRIGGER_FAIL_REPR, reason)

    def _deferral(self) -> Deferral:
        if self.deferral is None:
            raise RuntimeError(f"the task is {self.state.value}, not deferred: there is nothing to resume")
        return self.deferral

    def _next_attempt(self, **changes: Any) -> Attempt:
        return replace(
            self._attempt,
            id=uuid4(),
            try_number=self.try_number + 1,
            next_method=None,
            next_kwargs=None,
            **changes,
        )

    def _go_on(self, method: str, kwargs: dict[str, Any]) -> TaskRun:
        next_kwargs = through_json(serialize(kwargs))
        return run_attempt(self._supervisor, replace(self._attempt, next_method=method, next_kwargs=next_kwargs))

    def _end(self, event: BaseTaskEndEvent) -> TaskRun:
        """End the task from its trigger, with no worker: no callback, link or `error` comes of it."""
        state = TaskInstanceState(event.task_instance_state.value)
        if state == TaskInstanceState.FAILED:
            state = self._attempt.failed
        if state != TaskInstanceState.UP_FOR_RETRY:
            for key, value in (event.xcoms or {}).items():
                self._supervisor.put_xcom(self._attempt.task, key, value)
        return _outcome(self._supervisor, self._attempt, state, operator=self.operator)


def run_attempt(supervisor: InMemorySupervisor, attempt: Attempt) -> TaskRun:
    """Run an attempt, or resume one, in this thread.

    Raises:
        RuntimeError: on an event loop, or `supervisor` is not installed.
    """
    _refuse_to_block_an_event_loop()
    if getattr(task_runner, "SUPERVISOR_COMMS", None) is not supervisor:
        raise RuntimeError("the runner is not entered: write `with OperatorRunner() as runner:`")
    supervisor.register(attempt.id, attempt.task)
    now = datetime.now(UTC)
    ti = task_runner.RuntimeTaskInstance.model_construct(
        **_task_instance(attempt).model_dump(exclude_unset=True),
        task=attempt.operator,  # type: ignore[arg-type]  # a mapped one is unmapped when it is rendered
        bundle_instance=LocalDagBundle(name="operator-runner", path=gettempdir()),
        _ti_context_from_server=_run_context(supervisor, attempt),
        max_tries=attempt.max_tries,
        start_date=now,
        state=TaskInstanceState.RUNNING,
    )
    log = structlog.get_logger(logger_name="task")
    with _as_in_a_process_of_its_own():
        try:
            context = ti.get_template_context()
        except Exception as fault:  # a worker's process ends here, and its supervisor decides
            return _outcome(supervisor, attempt, attempt.failed, operator=attempt.operator, error=fault)
        state, message, error = task_runner.run(ti, context, log)
        if isinstance(error, KeyboardInterrupt):  # it is for the tests, not for the task
            raise error
        context["exception"] = error
        task_runner.finalize(ti, state, context, log, error)
    if state == TaskInstanceState.SUCCESS and conf.getboolean("state_store", "clear_on_success"):
        supervisor.clear_task_state(attempt.task)
    return _outcome(supervisor, attempt, state, operator=ti.task, error=error, deferral=Deferral.asked_by(message))


def _outcome(
    supervisor: InMemorySupervisor,
    attempt: Attempt,
    state: TaskInstanceState,
    *,
    operator: BaseOperator | MappedOperator,
    error: BaseException | None = None,
    deferral: Deferral | None = None,
) -> TaskRun:
    xcoms = supervisor.xcoms_of(attempt.task)
    return TaskRun(
        state=state,
        error=error,
        operator=operator,
        links={link.name: xcoms.pop(link.xcom_key) for link in operator.operator_extra_links if link.xcom_key in xcoms},
        xcoms=xcoms,
        task_state=supervisor.task_state_of(attempt.task),
        rendered_fields=supervisor.take_rendered_fields(),
        deferral=deferral,
        try_number=attempt.try_number,
        max_tries=attempt.max_tries,
        _attempt=attempt,
        _supervisor=supervisor,
    )


def _task_instance(attempt: Attempt) -> TaskInstance:
    return TaskInstance(
        id=attempt.id,
        dag_version_id=attempt.id,
        try_number=attempt.try_number,
        **attempt.task._asdict(),
    )


def _run_context(supervisor: InMemorySupervisor, attempt: Attempt) -> TIRunContext:
    """What the API server answers when a worker starts a task instance."""
    context = TIRunContext(
        dag_run=attempt.dag_run,
        max_tries=attempt.max_tries,
        variables=[],
        connections=[],
        # a resumed attempt keeps what it pushed
        xcom_keys_to_clear=[] if attempt.next_method else [*supervisor.xcoms_of(attempt.task)],
        should_retry=attempt.may_retry,
    )
    if attempt.next_method:
        context.next_method = attempt.next_method
        context.next_kwargs = attempt.next_kwargs
    return context


def _refuse_to_block_an_event_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(
        "an operator would block the running event loop: write `await asyncio.to_thread(operator_runner.run, ...)`, "
        "and the same for retry(), clear(), resume() and time_out()"
    )


@contextmanager
def _as_in_a_process_of_its_own() -> Iterator[None]:
    """A task usually has a process to itself and leaves it untidy: give it what it expects, and tidy up."""
    variables = set(os.environ)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with asyncio.Runner() as runner:
            runner.get_loop()  # where Airflow's async operators run
            yield
    finally:
        if on_sigterm is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
        for name in set(os.environ) - variables:
            if name.startswith("AIRFLOW_CTX_"):
                del os.environ[name]
