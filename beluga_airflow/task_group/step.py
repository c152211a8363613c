"""One step of a flow as an Airflow task."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from traceback import format_exception
from typing import TYPE_CHECKING, Any

from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowSkipException

from beluga_airflow.graph import FlowResult, Identity, Outcome
from beluga_airflow.operators.attempts import AttemptFailed, StepRetryPolicy, is_last
from beluga_airflow.operators.generation import generation
from beluga_airflow.operators.runs import ended
from beluga_airflow.task_group.clock import OutOfTime, TimeLeft, clocks
from beluga_airflow.task_group.siblings import ATTEMPT, FAILURE, Clock, Left, Siblings
from beluga_airflow.task_group.tasks import MemberOperator

if TYPE_CHECKING:
    from beluga_airflow.execute import States
    from beluga_airflow.execute.status import StatusWriter
    from beluga_airflow.graph.progress import Progress

__all__ = ["AttemptFailed", "StepOperator", "StepRetryPolicy"]

log = logging.getLogger(__name__)


class StepOperator(MemberOperator):
    """One step of a flow. Made by ``GraphTaskGroup``; returns what it leaves for the other tasks of the group.

    The record of a decision is pushed as XCom ``decision``.

    Args:
        step: its path.
    """

    ui_color = "#e8f0fe"
    left = "its step may have done its work; a retry, where the task has one left, runs it again under the same key"

    def __init__(self, *, step: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.step = step

    def looks_at(self) -> Iterable[str]:
        """All steps but this one and those that follow from it, which ran before where this one was cleared."""
        after = self.shape.rerun_from(self.step)
        return [step for step in self.shape.order if step not in after]

    async def proceed(self, context: Context, siblings: Siblings) -> dict[str, Any]:
        """Run one attempt of the step, if it is to run."""
        from beluga_airflow.graph.progress import Progress

        if self.shape.by_name[self.step].undo:
            # whatever becomes of this attempt: somebody may mark it as success, and what is undone then is this one
            context["ti"].xcom_push(key=ATTEMPT, value=context["ti"].try_number)
        if _attempt_number(context) == 1 and self.shape.by_name[self.step].kind != "flow":
            # one that runs already goes on to its end, retries included; the end of a nested flow is nothing new
            self._check_nothing_ended(siblings)
        before = self.shape.ancestors[self.step]
        self.check_not_undone(siblings, before)
        outcomes = {step: siblings.left[step].outcome for step in before if step in siblings.left}
        progress, states = Progress(self.shape, outcomes), self.states(outcomes)
        if self.step not in progress.start():
            return await self._passed_over(context, progress, states)
        progress.running = [self.step]  # the others that may start are tasks of their own
        async with generation(context) as cleared:
            identity = self.identity(context, cleared)
            started = await clocks(context, self.shape, self.step, known=siblings.started(), generation=cleared)
            async with self.status(context) as status:
                status.note({self.step: "running"})
                ended = await self._ended(context, progress, states, identity, started)
                failed = ended if isinstance(ended, FlowResult) else None
                if isinstance(ended, Outcome) and ended.fault is not None:
                    # done, so it is among what is to be undone
                    progress.end(self.step, ended)
                    failed = progress.result()
                status.note({self.step: "failed" if failed else "completed"})
                if failed is not None:
                    await self._tell(status, failed)
        if isinstance(ended, FlowResult):
            return _failed(context, ended)
        if ended.decision is not None:
            context["ti"].xcom_push(key="decision", value=ended.decision)
        left = Left(outcome=ended, started=started, attempt=context["ti"].try_number)
        if failed is not None:
            return _failed(context, failed, left)
        return left.to_json()

    def _check_nothing_ended(self, siblings: Siblings) -> None:
        failed = siblings.in_state("failed", "upstream_failed")
        if failed:
            raise AirflowSkipException(f"step {failed[0]!r} failed: nothing new starts")
        if siblings.stopped is not None:
            raise AirflowSkipException(f"step {siblings.stopped!r} stopped the flow: nothing new starts")
        sources = self.shape.sources
        entries = [] if sources[self.step] else [step for step in siblings.in_state("skipped") if not sources[step]]
        if entries:
            # it waited for others, so that it was not skipped with what is before the group
            raise AirflowSkipException(f"step {entries[0]!r} was skipped, so that the flow does not run")

    async def _tell(self, status: StatusWriter, failed: FlowResult) -> None:
        """Tell that the flow has failed, where no task after this one does."""
        if self.members.undo is None:
            await status.end(failed)

    async def _passed_over(self, context: Context, progress: Progress, states: States) -> dict[str, Any]:
        if progress.skipped_end == self.step:
            from beluga_airflow.resilience.retrying import judge

            # the flow ends here: what cannot be merged must show while there is a task after this one that undoes
            try:
                states.before(self.step)
            except Exception as error:  # a conflict, or the code of a reducer
                progress.failures[self.step] = judge(error, self.shape.by_name[self.step].retries).message
            if progress.failures:
                async with self.status(context) as status:
                    await self._tell(status, progress.result())
                return _failed(context, progress.result())
        raise AirflowSkipException(f"the edges into step {self.step!r} are not taken")

    async def _ended(
        self, context: Context, progress: Progress, states: States, identity: Identity, started: Mapping[str, Clock]
    ) -> Outcome | FlowResult:
        """How the attempt ended, or how the flow did by that.

        Raises:
            AttemptFailed: another attempt follows.
        """
        from beluga_airflow.execute import attempt, in_own_task
        from beluga_airflow.hooks.backends import AirflowBackends
        from beluga_airflow.resilience.bounded import bounded
        from beluga_airflow.resilience.retrying import judge

        number, retry = _attempt_number(context), self.shape.by_name[self.step].retries
        async with AirflowBackends() as backends:
            resources = await backends.resources(llm_conn_id=self.llm_conn_id, state_conn_id=self.state_conn_id)
            if not self.shape.sources[self.step]:
                # what is wrong with a model's connection shows before anything runs
                await resources.ready_for(self.flow)
            try:
                left = TimeLeft.of(self.shape, self.step, started)
            except OutOfTime as late:
                return progress.timed_out(late.group)
            try:
                with bounded(left.seconds, lambda: OutOfTime(left.group)):
                    work = attempt(
                        self.flow,
                        self.step,
                        targets=self.shape.conditions[self.step],
                        states=states,
                        identity=identity,
                        resources=resources,
                        timeout=self.shape.by_name[self.step].timeout,
                        number=number,
                        last=is_last(context),
                    )
                    return await in_own_task(work, self.step)
            except OutOfTime as late:
                progress.cut_off([self.step])
                # that it was in flight is told by the task that undoes, with all the rest
                return replace(
                    progress.timed_out(late.group), undone={step: why for step, why in progress.undone.items() if why}
                )
            except Exception as error:
                failure = judge(error, retry)
                log.error("attempt %d of step %r failed:\n%s", number, self.step, _told(error))
                again = failure.retryable and not is_last(context)
        # no context: Airflow logs it, and the step's own error may be one that cannot be logged
        if again:
            raise AttemptFailed(
                f"attempt {number} of step {self.step!r} failed: {failure.message}",
                wait=retry.delay(number, failure.retry_after),
            )
        progress.end(self.step, failure.message)
        return progress.result()


def _failed(context: Context, result: FlowResult, left: Left | None = None) -> dict[str, Any]:
    """End the task for good, and leave how the flow ends by that; ``left``: of a step that is done all the same."""
    failure: dict[str, Any] = {"status": result.status, "error": result.error}
    if result.undone:
        failure["undone"] = result.undone
    if left is not None:
        failure["left"] = left.to_json()
    context["ti"].xcom_push(key=FAILURE, value=failure)
    return ended(result)


def _told(error: BaseException) -> str:
    """The traceback; halves of characters, which no log can take, as they are written."""
    return "".join(format_exception(error)).encode("utf-8", "backslashreplace").decode()


def _attempt_number(context: Context) -> int:
    """Which attempt this is since the task was cleared last, from 1."""
    ti = context["ti"]
    return max(1, ti.try_number - (int(ti.max_tries) - int(ti.task.retries or 0)))
