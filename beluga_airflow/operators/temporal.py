"""Flows on Temporal, started and awaited from Airflow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import Context

from beluga_airflow.errors import BelugaError, TemporalError
from beluga_airflow.graph import FlowResult, Shape
from beluga_airflow.hooks.settings import settings_in_force
from beluga_airflow.hooks.temporal import TemporalHook
from beluga_airflow.operators.again import Again, identity_behind
from beluga_airflow.operators.generation import generation
from beluga_airflow.operators.runs import ended, identity_of, is_template, mapping_of, push_decisions, run_name
from beluga_airflow.operators.waiting import OnTemporal, TemporalRunLink

if TYPE_CHECKING:
    from beluga_airflow.graph.earlier import EarlierRun
    from beluga_airflow.temporal.client import Run
    from beluga_airflow.temporal.messages import FlowCall

__all__ = ["TemporalRunLink", "TemporalWorkflowOperator"]


GRACE = 60.0
"""Seconds that the server gives a workflow beyond its flow's timeout, to say itself where the time went."""


class TemporalWorkflowOperator(OnTemporal):
    """Runs a flow on Temporal, where it survives the loss of any worker, of Airflow and of the server.

    The task starts the workflow and waits in the triggerer, without a worker. An Airflow retry attaches to a workflow
    that runs, and takes the end of one that ended, whichever it was; one that was terminated or ran out of the server's
    time goes on behind its finished steps. Clearing the waiting task, or marking it failed, cancels the workflow;
    marking it as success lets it run on. A user's clear runs the flow again, once what ran before has ended and undone
    its steps. Returns ``{"status": ..., "data": ...}``, as ``GraphOperator``.

    Args:
        flow: the flow, at the top level of a module that the worker can import, or its import path.
        inputs: the flow's input, a mapping or its JSON text; templated.
        key: the business key from which idempotency keys are made: the name of a field of the input, or a template.
        workflow_id: instead of an id from dag, run, task and map index; templated. A clear adds its number to it, a run
            again the DAG run's id too. It must name one run: a task that finds it taken attaches to that run, whatever
            its own input is.
        again_from, again_run: run again from this step (or nested flow's node), with the input that this task had in
            that DAG run (its id), and take what the steps that do not follow from it did there, from the history of
            its workflow; templated, nothing: run whole.
        task_queue: instead of the connection's.
        wait_timeout: how long the task waits; the workflow itself is bounded by its flow's timeout, or
            ``orchestration.workflow.timeout`` of the configuration file (3600 s).
        temporal_conn_id: the server's connection.
        llm_conn_id, state_conn_id: names of the connections that the worker's steps use.
    """

    template_fields: Sequence[str] = ("inputs", "key", "workflow_id", "task_queue", "again_from", "again_run")
    template_fields_renderers: ClassVar[dict[str, str]] = {"inputs": "json"}

    def __init__(
        self,
        *,
        inputs: Mapping[str, Any] | Any = None,
        key: str | None = None,
        workflow_id: str | None = None,
        again_from: str | None = None,
        again_run: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.inputs = inputs
        self.again_from = again_from
        self.again_run = again_run
        self.key = key
        self.key_is_field = key is not None and not is_template(key)
        self.workflow_id = workflow_id

    async def started(self, context: Context) -> Any:
        from beluga_airflow.execute.values import to_json
        from beluga_airflow.temporal.messages import FLOW_WORKFLOW, FlowCall

        inputs = to_json(mapping_of(self.inputs), f"the input of flow {self.flow.name!r}")
        shape = settings_in_force().settle(self.flow.check(), durable=True)
        again = Again(self.again_from, self.again_run)
        stands = await self._stands(context, again, shape, inputs) if again else None
        inputs = stands.inputs if stands else inputs
        async with generation(context) as number:
            earlier = (self._workflow_id(context, cleared, again) for cleared in reversed(range(number)))
            await self.end_earlier(context, number, earlier)
            identity = identity_of(
                context, self.flow.name, inputs, key=self.key, key_is_field=self.key_is_field, generation=number
            )
            if stands is not None:
                identity = identity_behind(stands, identity, context)
            call = FlowCall(
                path=self.flow_path,
                shape=shape.to_json(),
                inputs=inputs,
                scope=identity.scope,
                generation=identity.generation,
                run=identity.run,
                llm_conn_id=self.llm_conn_id,
                state_conn_id=self.state_conn_id,
                kept={step: outcome.to_json() for step, outcome in stands.outcomes.items()} if stands else {},
            )
            begin = partial(
                self.start,
                context,
                number,
                FLOW_WORKFLOW,
                workflow_id=self._workflow_id(context, number, again),
                # a little more than the workflow gives itself: for when no worker runs it at all
                timeout=shape.time + shape.longest_undoing + GRACE,
            )
            with again.carrying():
                run = await begin(call, once=True)
                if run.closed and (rest := await self._rest(run, call, shape)) is not None:
                    run = await begin(rest)
            return await self.wait(context, run)

    async def _rest(self, run: Run, call: FlowCall, shape: Shape) -> FlowCall | None:
        """What goes on where a run was cut off; None: it ended by itself, and that is how the flow ended.

        Raises:
            TemporalError: it had begun to undo, or the flow is another one by now.
        """
        from beluga_airflow.temporal.client import was_cut_off
        from beluga_airflow.temporal.history import earlier_run

        client, target = await TemporalHook(self.temporal_conn_id).client()
        if not await was_cut_off(client, target, run):
            return None
        earlier = await earlier_run(client, target, run)
        if earlier is None:
            raise TemporalError(f"workflow {run.workflow_id!r} is none of a flow: give workflow_id= another name")
        where = f"workflow {run.workflow_id!r}, run {run.run_id}, was ended from outside"
        finished = ", ".join(map(repr, earlier.outcomes)) or "none"
        if earlier.undone:
            told = ", ".join(f"{step!r} ({how})" for step, how in earlier.undone.items())
            raise TemporalError(
                f"{where} while it undid its steps, so that the flow can neither go on nor begin anew: finished were "
                f"{finished}, of which: {told}; undo the rest by hand, then clear the task to run the flow again"
            )
        if earlier.fingerprint != shape.fingerprint:
            raise TemporalError(
                f"{where}, and flow {shape.flow!r} has changed since, so that it cannot go on behind the finished "
                f"steps ({finished}); see to these, then clear the task to run the flow whole"
            )
        self.log.warning("%s: the flow goes on in a new run behind the finished steps: %s", where, finished)
        # all of it, as what finds a workflow of this id attaches to it
        kept = {step: outcome.to_json() for step, outcome in earlier.outcomes.items()}
        return replace(call, inputs=earlier.inputs, scope=earlier.scope, kept=kept)

    def _workflow_id(self, context: Context, number: int, again: Again) -> str:
        name = self.workflow_id or run_name(context)
        if self.workflow_id and again:
            # the run whose steps stand has the name itself
            name = f"{name}/{context['ti'].run_id}"
        elif self.workflow_id and not number:
            return name
        return f"{name}@{number}"

    async def _stands(self, context: Context, again: Again, shape: Shape, given: Mapping[str, Any]) -> EarlierRun:
        """What stands of the run that is to be run again."""
        from beluga_airflow.temporal.client import Run
        from beluga_airflow.temporal.history import earlier_run

        ids = [await asyncio.to_thread(again.pulled, context, key) for key in ("workflow_id", "run_id")]
        earlier = None
        if all(ids):
            client, target = await TemporalHook(self.temporal_conn_id).client()
            earlier = await earlier_run(client, target, Run(workflow_id=ids[0], run_id=ids[1]))
            del client
        return again.begun(context, shape, earlier, given=given, key=self.key, key_is_field=self.key_is_field)

    async def completed(self, context: Context, run: Run, returned: Any) -> dict[str, Any]:
        result = FlowResult.from_json(returned)
        if not result.ok:
            await self._settle(run, result)
        push_decisions(context, result)
        undone = ", ".join(repr(step) for step, how in result.undone.items() if how == "undone")
        if undone and not result.ok:
            result = replace(result, error=f"{result.error}; undone: {undone}")
        return ended(result)

    async def _settle(self, run: Run, result: FlowResult) -> None:
        """Tell the end of a flow whose workflow was ended from outside, so that it could not tell itself."""
        from beluga_airflow.execute.status import StatusWriter
        from beluga_airflow.hooks.backends import AirflowBackends
        from beluga_airflow.temporal.client import was_cut_off
        from beluga_airflow.temporal.history import told_of

        try:
            client, target = await TemporalHook(self.temporal_conn_id).client()
            of = await told_of(client, target, run) if await was_cut_off(client, target, run) else None
            if of is not None:
                async with AirflowBackends() as backends:
                    await StatusWriter(await backends.store(self.state_conn_id), of, shared=True).end(result)
        except BelugaError as error:
            self.log.warning("the status of the flow's run is not settled: %s", error)
