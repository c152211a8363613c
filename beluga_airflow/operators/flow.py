"""A flow in one Airflow task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from airflow.sdk import BaseAsyncOperator, Context

from beluga_airflow.config import Settings
from beluga_airflow.errors import BelugaError
from beluga_airflow.graph import Chain, Flow, Graph
from beluga_airflow.hooks.backends import AirflowBackends
from beluga_airflow.hooks.llm import LLMHook
from beluga_airflow.hooks.state import StateHook
from beluga_airflow.local import run_with
from beluga_airflow.operators.checkpoint import TaskCheckpoint
from beluga_airflow.operators.runs import checked_flow, ended, failing_for_good, identity_of, is_template, mapping_of

__all__ = ["ChainOperator", "GraphOperator"]


class FlowOperator(BaseAsyncOperator):
    """Runs a flow in this task.

    The task returns ``{"status": ..., "data": ...}``; records of decisions are pushed as XCom ``decisions``, by step.
    The steps' own ``Retry`` retries them; when it is used up the task fails for good. Airflow's retries serve lost workers,
    and go on behind the finished steps.

    Args:
        flow: the flow, or its import path ``"package.module:name"``.
        inputs: the flow's input, a mapping or its JSON text; templated.
        key: the business key from which idempotency keys are made: the name of a field of the input, or a template.
            Without it they are made from dag, run, task and map index.
        llm_conn_id: for decisions that name no connection.
        state_conn_id: where records of decisions are kept.
    """

    template_fields: Sequence[str] = ("inputs", "key")
    template_fields_renderers: ClassVar[dict[str, str]] = {"inputs": "json"}
    ui_color = "#e8f0fe"
    flow_kind: ClassVar[type[Flow]] = Flow

    def __init__(
        self,
        *,
        flow: Flow | str,
        inputs: Mapping[str, Any] | Any = None,
        key: str | None = None,
        llm_conn_id: str = LLMHook.default_conn_name,
        state_conn_id: str = StateHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.flow = checked_flow(flow, kind=self.flow_kind)
        self.inputs = inputs
        self.key = key
        self.key_is_field = key is not None and not is_template(key)
        self.llm_conn_id = llm_conn_id
        self.state_conn_id = state_conn_id

    async def aexecute(self, context: Context) -> dict[str, Any]:
        """Run the flow."""
        try:
            inputs = mapping_of(self.inputs)
            identity = identity_of(context, self.flow.name, inputs, key=self.key, key_is_field=self.key_is_field)
            async with AirflowBackends() as backends:
                resources = await backends.resources(llm_conn_id=self.llm_conn_id, state_conn_id=self.state_conn_id)
                result = await run_with(
                    self.flow,
                    inputs,
                    identity=identity,
                    resources=resources,
                    settings=Settings(),
                    checkpoint=TaskCheckpoint(context, self.flow.check(), resources.state, backends.airflow),
                )
        except BelugaError as error:
            raise failing_for_good(error) from error
        return ended(context, result)


class ChainOperator(FlowOperator):
    """Runs a ``Chain`` in this task. See ``FlowOperator`` for the arguments."""

    flow_kind = Chain


class GraphOperator(FlowOperator):
    """Runs a ``Graph`` in this task, independent steps side by side. See ``FlowOperator`` for the arguments."""

    flow_kind = Graph
