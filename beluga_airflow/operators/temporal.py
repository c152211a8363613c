"""Flows on Temporal, started and awaited from Airflow."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import BaseAsyncOperator, BaseOperator, BaseOperatorLink, Context
from airflow.sdk.exceptions import AirflowFailException

from beluga_airflow.config import Settings
from beluga_airflow.errors import BelugaError
from beluga_airflow.execute.values import to_json
from beluga_airflow.graph import Flow, FlowResult
from beluga_airflow.graph.locate import path_of
from beluga_airflow.hooks.llm import LLMHook
from beluga_airflow.hooks.state import StateHook
from beluga_airflow.hooks.temporal import TemporalHook
from beluga_airflow.operators.runs import (
    checked_flow,
    ended,
    failing_for_good,
    generation_of,
    identity_of,
    is_template,
    mapping_of,
    push_decisions,
    run_name,
)
from beluga_airflow.triggers.temporal import TemporalRunTrigger

if TYPE_CHECKING:
    from airflow.sdk.types import TaskInstanceKey

    from beluga_airflow.temporal.client import Run, Target

__all__ = ["TemporalRunLink", "TemporalWorkflowOperator"]


GRACE = 60.0
"""Seconds that the server gives a workflow beyond its flow's timeout, to say itself where the time went."""


class TemporalRunLink(BaseOperatorLink):
    """A link to the run in Temporal's web UI."""

    name = "Temporal run"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:  # noqa: ARG002  # Airflow's signature
        return getattr(operator, "run_link", None) or ""


class TemporalOperator(BaseAsyncOperator):
    """What operators that start a workflow share: start it once, wait without a worker, read how it ended."""

    operator_extra_links = (TemporalRunLink(),)
    ui_color = "#e6f4ea"

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

    async def start_and_defer(
        self, context: Context, workflow: str, call: Any, *, workflow_id: str, timeout: float | None = None
    ) -> None:
        """Start the workflow, or find it started, and wait for it in the triggerer.

        Raises:
            TaskDeferred: always, when nothing else went wrong.
        """
        from beluga_airflow.temporal.client import start

        client, target = await TemporalHook(self.temporal_conn_id).client()
        run = await start(
            client,
            target,
            workflow,
            call,
            workflow_id=workflow_id,
            task_queue=self.task_queue or target.task_queue,
            summary=f"{self.flow.name}: {context['ti'].dag_id}.{self.task_id}",
            timeout=timeout,
        )
        del client
        self._tell(context, target, run)
        self.defer(
            trigger=TemporalRunTrigger(
                temporal_conn_id=self.temporal_conn_id, workflow_id=run.workflow_id, run_id=run.run_id
            ),
            method_name="execute_complete",
            timeout=self.wait_timeout,
        )

    def _tell(self, context: Context, target: Target, run: Run) -> None:
        self.run_link = target.link(run)
        ti = context["ti"]
        ti.xcom_push(key="workflow_id", value=run.workflow_id)
        ti.xcom_push(key="run_id", value=run.run_id)
        self.log.info("workflow %s, run %s: %s", run.workflow_id, run.run_id, self.run_link or "(no web UI known)")

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        """Go on after the wait: read how the run ended."""
        if event.get("error"):
            raise AirflowFailException(event["error"])
        try:
            return asyncio.run(self._complete(context, event))
        except BelugaError as error:
            raise failing_for_good(error) from error

    async def _complete(self, context: Context, event: dict[str, Any]) -> Any:
        from beluga_airflow.temporal.client import Run, result_of

        run = Run(workflow_id=event["workflow_id"], run_id=event["run_id"])
        client, target = await TemporalHook(self.temporal_conn_id).client()
        self.run_link = target.link(run)
        returned = await result_of(client, target, run)
        return await self.completed(context, run, returned)

    @abstractmethod
    async def completed(self, context: Context, run: Run, returned: Any) -> Any:
        """What the task returns, from what the workflow returned."""


class TemporalWorkflowOperator(TemporalOperator):
    """Runs a flow on Temporal, where it survives the loss of any worker, of Airflow and of the server.

    The task starts the workflow and waits in the triggerer, without a worker. An Airflow retry attaches to a workflow
    that runs, and takes the result of one that completed. A user's clear runs the flow again. Clearing the waiting
    task, or marking it failed, cancels the workflow. Returns ``{"status": ..., "data": ...}``, as ``GraphOperator``.

    Args:
        flow: the flow, at the top level of a module that the worker can import, or its import path.
        inputs: the flow's input, a mapping or its JSON text; templated.
        key: the business key from which idempotency keys are made: the name of a field of the input, or a template.
        workflow_id: instead of an id from dag, run, task and map index; templated. A clear adds its number to it.
            It must name one run: a task that finds it taken attaches to that run, whatever its own input is.
        task_queue: instead of the connection's.
        wait_timeout: how long the task waits; the workflow itself is bounded by its flow's timeout, or 3600 s.
        temporal_conn_id: the server's connection.
        llm_conn_id, state_conn_id: names of the connections that the worker's steps use.
    """

    template_fields: Sequence[str] = ("inputs", "key", "workflow_id", "task_queue")
    template_fields_renderers: ClassVar[dict[str, str]] = {"inputs": "json"}

    def __init__(
        self,
        *,
        inputs: Mapping[str, Any] | Any = None,
        key: str | None = None,
        workflow_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.inputs = inputs
        self.key = key
        self.key_is_field = key is not None and not is_template(key)
        self.workflow_id = workflow_id

    async def aexecute(self, context: Context) -> None:
        """Start the workflow and wait for it in the triggerer."""
        from beluga_airflow.temporal.messages import FLOW_WORKFLOW, FlowCall

        try:
            inputs = to_json(mapping_of(self.inputs), f"the input of flow {self.flow.name!r}")
            identity = identity_of(context, self.flow.name, inputs, key=self.key, key_is_field=self.key_is_field)
            shape = Settings().settle(self.flow.check(), durable=True)
            assert shape.timeout is not None, "settled"
            call = FlowCall(
                path=self.flow_path,
                shape=shape.to_json(),
                inputs=inputs,
                scope=identity.scope,
                generation=identity.generation,
                run=identity.run,
                llm_conn_id=self.llm_conn_id,
                state_conn_id=self.state_conn_id,
            )
            await self.start_and_defer(
                context,
                FLOW_WORKFLOW,
                call,
                workflow_id=self._workflow_id(context),
                # a little more than the workflow gives itself: for when no worker runs it at all
                timeout=shape.timeout + GRACE,
            )
        except BelugaError as error:
            raise failing_for_good(error) from error

    def _workflow_id(self, context: Context) -> str:
        generation = generation_of(context)
        if self.workflow_id and not generation:
            return self.workflow_id
        name = self.workflow_id or run_name(context)
        return f"{name}@{generation}"

    async def completed(self, context: Context, run: Run, returned: Any) -> dict[str, Any]:  # noqa: ARG002  # for batches
        result = FlowResult.from_json(returned)
        push_decisions(context, result)
        return ended(result)
