"""A flow in one Airflow task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from airflow.sdk import Context

from beluga_airflow.errors import BelugaError
from beluga_airflow.graph import Chain, Flow, FlowResult, Graph, Outcome
from beluga_airflow.graph.earlier import EarlierRun
from beluga_airflow.hooks.llm import LLMHook
from beluga_airflow.hooks.settings import settings_in_force
from beluga_airflow.hooks.state import StateHook
from beluga_airflow.operators.again import Again, identity_behind, leave
from beluga_airflow.operators.attempts import AttemptFailed, TriedAgain
from beluga_airflow.operators.endable import Endable
from beluga_airflow.operators.generation import generation
from beluga_airflow.operators.runs import (
    checked_flow,
    ended,
    failing_for_good,
    identity_of,
    is_template,
    mapping_of,
    owner_of,
    push_decisions,
    run_name,
)

__all__ = ["ChainOperator", "GraphOperator", "InTaskOperator"]


class InTaskOperator(Endable):
    """What operators share that run a flow in their own task.

    Args:
        key: the business key from which idempotency keys are made: the name of a field of the input, or a template.
            Without it they are made from dag, run, task and map index.
        llm_conn_id: for decisions that name no connection.
        state_conn_id: where records of decisions are kept.
    """

    left = "its finished steps are not undone; a retry, where the task has one left, goes on behind them"

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

    async def run_flow(
        self,
        context: Context,
        flow: Flow,
        inputs: Mapping[str, Any],
        *,
        owner: str,
        stands: EarlierRun | None = None,
        again: Callable[[Exception], BaseException | None] | None = None,
    ) -> tuple[FlowResult, EarlierRun]:
        """Run ``flow`` here; an earlier attempt's finished steps are not run again.

        Args:
            context: of this task.
            flow: a checked flow.
            inputs: its input.
            owner: whose business keys these are, in idempotency keys.
            stands: of an earlier run, where this is a run again.
            again: as in ``Resources``, where Airflow's retries are the attempts of the steps.

        Returns:
            how it ended, and what it leaves for a later run.

        Raises:
            AttemptFailed: what ``again`` raised.
        """
        # the runtime, which no DAG file needs when it is parsed
        from beluga_airflow.execute.status import RunOf, StatusWriter, status_key
        from beluga_airflow.execute.values import to_json
        from beluga_airflow.hooks.backends import AirflowBackends
        from beluga_airflow.local import run_with
        from beluga_airflow.operators.checkpoint import TaskCheckpoint

        settings, shape = settings_in_force(), flow.check()
        data = to_json(inputs, f"the input of flow {flow.name!r}")
        async with generation(context) as number, AirflowBackends(lambda: settings) as backends:
            identity = identity_of(
                context, owner, data, key=self.key, key_is_field=self.key_is_field, generation=number
            )
            if stands is not None:
                identity = identity_behind(stands, identity, context)
            resources = await backends.resources(llm_conn_id=self.llm_conn_id, state_conn_id=self.state_conn_id)
            await resources.ready_for(flow)
            checkpoint = TaskCheckpoint(context, shape, number, resources.state, backends.airflow)
            of = RunOf(
                key=status_key(flow.name, identity.scope),
                run=run_name(context),
                generation=identity.generation,
                runtime="task",
                owner=owner_of(context),
            )
            try:
                result = await run_with(
                    flow,
                    data,
                    identity=identity,
                    resources=replace(resources, again=again),
                    settings=settings,
                    checkpoint=checkpoint,
                    kept=stands.outcomes if stands else None,
                    # a task that is told to end may have been lost with its machine: a retry goes on
                    gives_up=lambda: False,
                    status=StatusWriter(resources.state, of),
                )
            except TriedAgain as later:
                raise AttemptFailed(str(later), later.wait) from None
        finished = {step: entry for step, entry in checkpoint.entries.items() if step in shape.order}
        return result, EarlierRun(
            fingerprint=shape.fingerprint,
            inputs=data,
            scope=identity.scope,
            outcomes={
                **(stands.outcomes if stands else {}),
                **{step: Outcome.from_json(entry) for step, entry in finished.items()},
            },
            undone=result.undone,
        )


class FlowOperator(InTaskOperator):
    """Runs a flow in this task.

    The task returns ``{"status": ..., "data": ...}``; records of decisions are pushed as XCom ``decisions``, by step.
    The steps' own ``Retry`` retries them; when it is used up the task fails for good. Airflow's retries serve lost
    workers, and go on behind the finished steps.

    Args:
        flow: the flow, or its import path ``"package.module:name"``.
        inputs: the flow's input, a mapping or its JSON text; templated.
        again_from, again_run: run again from this step (or nested flow's node), with the input that this task had in
            that DAG run (its id), and take what the steps that do not follow from it did there; templated, nothing:
            run whole.
        key, llm_conn_id, state_conn_id: see ``InTaskOperator``; ``key`` is templated.
    """

    template_fields: Sequence[str] = ("inputs", "key", "again_from", "again_run")
    template_fields_renderers: ClassVar[dict[str, str]] = {"inputs": "json"}
    ui_color = "#e8f0fe"
    flow_kind: ClassVar[type[Flow]] = Flow

    def __init__(
        self,
        *,
        flow: Flow | str,
        inputs: Mapping[str, Any] | Any = None,
        again_from: str | None = None,
        again_run: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.flow = checked_flow(flow, kind=self.flow_kind)
        self.inputs = inputs
        self.again_from = again_from
        self.again_run = again_run

    async def work(self, context: Context) -> dict[str, Any]:
        """Run the flow."""
        try:
            again, inputs = Again(self.again_from, self.again_run), mapping_of(self.inputs)
            stands = await self._stands(context, again, inputs) if again else None
            inputs = stands.inputs if stands else inputs
            result, run = await self.run_flow(context, self.flow, inputs, owner=self.flow.name, stands=stands)
        except BelugaError as error:
            raise failing_for_good(error) from error
        leave(context, run)
        push_decisions(context, result)
        return ended(result)

    async def _stands(self, context: Context, again: Again, given: Mapping[str, Any]) -> EarlierRun:
        """What stands of the run that is to be run again."""
        from beluga_airflow.execute.values import to_json

        given = to_json(given, f"the input of flow {self.flow.name!r}")
        earlier = await asyncio.to_thread(again.left, context)
        return again.begun(
            context, self.flow.check(), earlier, given=given, key=self.key, key_is_field=self.key_is_field
        )


class ChainOperator(FlowOperator):
    """Runs a ``Chain`` in this task. See ``FlowOperator`` for the arguments."""

    flow_kind = Chain


class GraphOperator(FlowOperator):
    """Runs a ``Graph`` in this task, independent steps side by side. See ``FlowOperator`` for the arguments."""

    flow_kind = Graph
