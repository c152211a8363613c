"""What operators that start a workflow on Temporal share: start it once, wait without a worker, read how it ended."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator, BaseOperatorLink, Context
from airflow.sdk.exceptions import AirflowFailException

from beluga_airflow.errors import BelugaError
from beluga_airflow.graph import Flow
from beluga_airflow.graph.locate import path_of
from beluga_airflow.hooks.llm import LLMHook
from beluga_airflow.hooks.state import StateHook
from beluga_airflow.hooks.temporal import TemporalHook
from beluga_airflow.operators.endable import Endable
from beluga_airflow.operators.generation import generation
from beluga_airflow.operators.runs import checked_flow, failing_for_good
from beluga_airflow.triggers.temporal import TemporalRunTrigger

if TYPE_CHECKING:
    from airflow.sdk.types import TaskInstanceKey

    from beluga_airflow.temporal.client import Run, Target

__all__ = ["OnTemporal", "TemporalRunLink"]

STARTED = "beluga/workflow"
"""Under which the task state holds which workflow the task set out to start last, and in which generation."""


class TemporalRunLink(BaseOperatorLink):
    """A link to the run in Temporal's web UI."""

    name = "Temporal run"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:  # noqa: ARG002  # Airflow's signature
        return getattr(operator, "run_link", None) or ""


class OnTemporal(Endable):
    """What operators that start a workflow share: start it once, wait without a worker, read how it ended."""

    operator_extra_links = (TemporalRunLink(),)
    ui_color = "#e6f4ea"
    left = (
        "what it had not started is not started; a workflow that runs goes on, a retry attaches to it, a clear ends it"
    )

    def __init__(
        self,
        *,
        flow: Flow | str,
        task_queue: str | None = None,
        wait_timeout: timedelta | None = None,
        temporal_conn_id: str = TemporalHook.default_conn_name,
        llm_conn_id: str = LLMHook.default_conn_name,
        state_conn_id: str = StateHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.flow = checked_flow(flow)
        # a worker elsewhere must find the flow: refused when the DAG is parsed, not at night
        self.flow_path = flow if isinstance(flow, str) else path_of(self.flow)
        self.task_queue = task_queue
        self.wait_timeout = wait_timeout
        self.temporal_conn_id = temporal_conn_id
        self.llm_conn_id = llm_conn_id
        self.state_conn_id = state_conn_id
        self.run_link: str | None = None

    async def work(self, context: Context) -> Any:
        """Start the workflow, or find it started, and wait for it in the triggerer."""
        try:
            return await self.started(context)
        except BelugaError as error:
            raise failing_for_good(error) from error

    @abstractmethod
    async def started(self, context: Context) -> Any:
        """Start what this operator runs, and ``wait`` for it."""

    async def end_earlier(self, context: Context, number: int, names: Iterable[str]) -> None:
        """See that nothing runs any more that this task started before a user cleared it, its undoing included.

        Both would use the same idempotency keys. The triggerer may have asked it to end, or may not have known of it.

        Args:
            context: of this task.
            number: its generation.
            names: the workflow ids of earlier generations, for where the task state does not know the last one.

        Raises:
            TaskDeferred: one runs: it is asked to end, and the task waits for that.
        """
        from beluga_airflow.temporal.client import cancel, open_run

        last: Any = await asyncio.to_thread(context["task_state_store"].get, STARTED)
        if last is not None:
            names = [last["workflow_id"]] if last["generation"] < number else []
        if not (names := list(names)):
            return
        client, target = await TemporalHook(self.temporal_conn_id).client()
        for name in names:
            run = await open_run(client, target, name)
            if run is None:
                continue
            await cancel(client, target, run)
            self.run_link = target.link(run)
            self.log.info(
                "this task was cleared while its workflow %s, run %s, was open: it is asked to end, and the task goes "
                "on when it has undone what is to be undone (a worker must be up for that): %s",
                run.workflow_id,
                run.run_id,
                self.run_link or "(no web UI known)",
            )
            self._defer(run, "execute_after")

    async def start(
        self,
        context: Context,
        number: int,
        workflow: str,
        call: Any,
        *,
        workflow_id: str,
        timeout: float | None = None,
        once: bool = False,
    ) -> Run:
        """Start the workflow, or find it started.

        Args:
            context: of this task.
            number: its generation.
            workflow, call, workflow_id, timeout, once: as ``beluga_airflow.temporal.client.start`` takes them.
        """
        from beluga_airflow.temporal.client import start

        client, target = await TemporalHook(self.temporal_conn_id).client()
        # before it is: an attempt that is lost on the way must not hide it from the next generation
        await asyncio.to_thread(
            context["task_state_store"].set, STARTED, {"generation": number, "workflow_id": workflow_id}
        )
        return await start(
            client,
            target,
            workflow,
            call,
            workflow_id=workflow_id,
            task_queue=self.task_queue or target.task_queue,
            summary=f"{self.flow.name}: {context['ti'].dag_id}.{self.task_id}",
            timeout=timeout,
            once=once,
        )

    async def wait(self, context: Context, run: Run) -> Any:
        """Wait for a run in the triggerer; one that has ended is taken at once.

        Raises:
            TaskDeferred: it has not ended.
        """
        self._tell(context, await TemporalHook(self.temporal_conn_id).target(), run)
        if run.closed:
            return await self._complete(context, run)
        self._defer(run, "execute_complete")
        return None

    def _defer(self, run: Run, method: str) -> None:
        self.defer(
            trigger=TemporalRunTrigger(
                temporal_conn_id=self.temporal_conn_id, workflow_id=run.workflow_id, run_id=run.run_id
            ),
            method_name=method,
            timeout=self.wait_timeout,
        )

    def _tell(self, context: Context, target: Target, run: Run) -> None:
        self.run_link = target.link(run)
        ti = context["ti"]
        ti.xcom_push(key="workflow_id", value=run.workflow_id)
        ti.xcom_push(key="run_id", value=run.run_id)
        self.log.info("workflow %s, run %s: %s", run.workflow_id, run.run_id, self.run_link or "(no web UI known)")

    def execute_after(self, context: Context, event: dict[str, Any]) -> Any:
        """Go on when what an earlier generation had started has ended."""
        if event.get("error"):
            raise AirflowFailException(event["error"])
        return asyncio.run(self.aexecute(context))

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        """Go on after the wait: read how the run ended."""
        from beluga_airflow.temporal.client import Run

        if event.get("error"):
            raise AirflowFailException(event["error"])
        run = Run(workflow_id=event["workflow_id"], run_id=event["run_id"])

        async def complete() -> Any:
            async with generation(context):
                return await self._complete(context, run)

        try:
            return asyncio.run(complete())
        except BelugaError as error:
            raise failing_for_good(error) from error

    async def _complete(self, context: Context, run: Run) -> Any:
        from beluga_airflow.temporal.client import result_of

        client, target = await TemporalHook(self.temporal_conn_id).client()
        self.run_link = target.link(run)
        returned = await result_of(client, target, run)
        return await self.completed(context, run, returned)

    @abstractmethod
    async def completed(self, context: Context, run: Run, returned: Any) -> Any:
        """What the task returns, from what the workflow returned."""
