"""A flow in one Airflow task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from airflow.sdk import BaseAsyncOperator, Context

from beluga_airflow.config import Settings
from beluga_airflow.errors import BelugaError
from beluga_airflow.graph import Chain, Flow, FlowResult, Graph
from beluga_airflow.hooks.backends import AirflowBackends
from beluga_airflow.hooks.llm import LLMHook
from beluga_airflow.hooks.state import StateHook
from beluga_airflow.local import run_with
from beluga_airflow.operators.checkpoint import TaskCheckpoint
from beluga_airflow.operators.runs import (
    checked_flow,
    ended,
    failing_for_good,
    identity_of,
    is_template,
    mapping_of,
    push_decisions,
)

__all__ = ["ChainOperator", "GraphOperator", "InTaskOperator"]


class InTaskOperator(BaseAsyncOperator):
    """What operators share that run a flow in their own task.

    Args:
        key: the business key from which idempotency keys are made: the name of a field of the input, or a template.
            Without it they are made from dag, run, task and map index.
        llm_conn_id: for decisions that name no connection.
        state_conn_id: where records of decisions are kept.
    """

    def __init__(
        self,
        *,
        key: str | None = None,
        llm_conn_id: str = LLMHook.default_conn_name,
        state_conn_id: str = StateHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.key = key
        self.key_is_field = key is not None and not is_template(key)
        self.llm_conn_id = llm_conn_id
        self.state_conn_id = state_conn_id

    async def run_flow(self, context: Context, flow: Flow, inputs: Mapping[str, Any], *, owner: str) -> FlowResult:
        """Run ``flow`` here; an earlier attempt's finished steps are not run again.

        Args:
            context: of this task.
            flow: a checked flow.
            inputs: its input.
            owner: whose business keys these are, in idempotency keys.
        """
        identity = identity_of(context, owner, inputs, key=self.key, key_is_field=self.key_is_field)
        async with AirflowBackends() as backends:
            resources = await backends.resources(llm_conn_id=self.llm_conn_id, state_conn_id=self.state_conn_id)
            await resources.ready_for(flow)
            return await run_with(
                flow,
                inputs,
                identity=identity,
                resources=resources,
                settings=Settings(),
                checkpoint=TaskCheckpoint(context, flow.check(), resources.state, backends.airflow),
            )


class FlowOperator(InTaskOperator):
    """Runs a flow in this task.

    The task returns ``{"status": ..., "data": ...}``; records of decisions are pushed as XCom ``decisions``, by step.
    The steps' own ``Retry`` retries them; when it is used up the task fails for good. Airflow's retries serve lost
    workers, and go on behind the finished steps.

    Args:
        flow: the flow, or its import path ``"package.module:name"``.
        inputs: the flow's input, a mapping or its JSON text; templated.
        key, llm_conn_id, state_conn_id: see ``InTaskOperator``; ``key`` is templated.
    """

    template_fields: Sequence[str] = ("inputs", "key")
    template_fields_renderers: ClassVar[dict[str, str]] = {"inputs": "json"}
    ui_color = "#e8f0fe"
    flow_kind: ClassVar[type[Flow]] = Flow

    def __init__(self, *, flow: Flow | str, inputs: Mapping[str, Any] | Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.flow = checked_flow(flow, kind=self.flow_kind)
        self.inputs = inputs

    async def aexecute(self, context: Context) -> dict[str, Any]:
        """Run the flow."""
        try:
            result = await self.run_flow(context, self.flow, mapping_of(self.inputs), owner=self.flow.name)
        except BelugaError as error:
            raise failing_for_good(error) from error
        push_decisions(context, result)
        return ended(result)


class ChainOperator(FlowOperator):
    """Runs a ``Chain`` in this task. See ``FlowOperator`` for the arguments."""

    flow_kind = Chain


class GraphOperator(FlowOperator):
    """Runs a ``Graph`` in this task, independent steps side by side. See ``FlowOperator`` for the arguments."""

    flow_kind = Graph
