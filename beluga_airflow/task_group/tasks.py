"""What the tasks of a group share, and the last two: the one that undoes, and the flow's end."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from beluga_airflow.errors import BelugaError
from beluga_airflow.graph import Flow, FlowResult, Identity, Outcome
from beluga_airflow.graph.shape import Shape
from beluga_airflow.hooks.backends import INTERRUPTS
from beluga_airflow.hooks.settings import settings_in_force
from beluga_airflow.operators.flow import InTaskOperator
from beluga_airflow.operators.generation import generation
from beluga_airflow.operators.runs import (
    ended,
    failing_for_good,
    identity_of,
    mapping_of,
    owner_of,
    push_decisions,
    run_parts,
)
from beluga_airflow.task_group.siblings import UNDONE, Members, Siblings, read

if TYPE_CHECKING:
    from beluga_airflow.execute import States
    from beluga_airflow.execute.status import StatusWriter
    from beluga_airflow.graph.progress import Progress

__all__ = ["MemberOperator", "ResultOperator", "UndoOperator"]

log = logging.getLogger(__name__)

UNDOING = "beluga/undoing"
"""Under which the task state of the task that undoes holds what it has ever left as ``UNDONE``."""


class MemberOperator(InTaskOperator):
    """What the tasks of a group share.

    Args:
        flow: the checked flow.
        members: the group.
        inputs: the flow's input, a mapping or its JSON text; templated.
        key, llm_conn_id, state_conn_id: see ``InTaskOperator``; ``key`` is templated.
    """

    template_fields: Sequence[str] = ("inputs", "key")
    template_fields_renderers: ClassVar[dict[str, str]] = {"inputs": "json"}

    def __init__(self, *, flow: Flow, members: Members, inputs: Mapping[str, Any] | Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.flow = flow
        self.members = members
        self.inputs = inputs
        self._settled: Shape | None = None

    async def work(self, context: Context) -> dict[str, Any]:
        """Do this task's part, seeing how the others stand."""
        try:
            self._settled = _uncapped(settings_in_force().settle(self.members.shape))
            siblings = await asyncio.to_thread(read, context, self.members, self.looks_at())
            return await self.proceed(context, siblings)
        except BelugaError as error:
            raise failing_for_good(error) from error

    def looks_at(self) -> Iterable[str]:
        """The steps whose tasks matter to this one."""
        return self.shape.order

    @abstractmethod
    async def proceed(self, context: Context, siblings: Siblings) -> dict[str, Any]:
        """This task's part."""

    @property
    def shape(self) -> Shape:
        """Of the flow, settled when this task started. It has no caps: the edges between the tasks keep them."""
        assert self._settled is not None, "the task has started"
        return self._settled

    def states(self, outcomes: Mapping[str, Outcome]) -> States:
        """The data of the run, with what these steps returned.

        Raises:
            InvalidInput: the flow's input is no mapping.
            InvalidOutput: it is not JSON.
        """
        from beluga_airflow.execute import States

        outputs = {step: outcome.output for step, outcome in outcomes.items()}
        return States(self.flow, self.shape.sources, self._data(), outputs)

    def identity(self, context: Context, number: int) -> Identity:
        """The identity of the run, the same for all tasks of the group; ``number``: the generation of this one.

        Raises:
            InvalidInput: the business key is empty or missing.
        """
        own = identity_of(
            context, self.flow.name, self._data(), key=self.key, key_is_field=self.key_is_field, generation=number
        )
        dag_id, run_id, _, index = run_parts(context)
        of_group = Identity.of(dag_id, run_id, self.members.group_id, index)
        own = replace(own, task=(dag_id, run_id, self.members.group_id))
        return own if self.key is not None else replace(own, scope=of_group.scope)

    @asynccontextmanager
    async def status(self, context: Context) -> AsyncIterator[StatusWriter]:
        """What tells of the run; each task of the group tells its part."""
        from beluga_airflow.execute.status import RunOf, StatusWriter, moment, status_key
        from beluga_airflow.hooks.backends import AirflowBackends

        dag_id, run_id, _, index = run_parts(context)
        undo = {} if self.members.undo is None else {"undo": self.members.undo}
        of = RunOf(
            key=status_key(self.flow.name, self.identity(context, 0).scope),
            run=Identity.of(dag_id, run_id, self.members.group_id, index).scope,
            # of all tasks: each has a generation of its own
            generation=int(getattr(context["dag_run"], "clear_number", None) or 0),
            runtime="tasks",
            total=self.shape.count,
            # of all tasks, too: else two DAG runs with one business key would take the entry from each other
            started=moment(context["dag_run"].start_date),
            owner=owner_of(context, self.members.result) | undo,
        )
        async with AirflowBackends() as backends:
            status = StatusWriter(await backends.store(self.state_conn_id), of, shared=True)
            try:
                yield status
            finally:
                await status.flush()

    def check_not_undone(self, siblings: Siblings, steps: Iterable[str]) -> None:
        """See that none of these steps was undone after it had finished.

        Raises:
            AirflowFailException: one was.
        """
        for step in steps:
            if step in siblings.left and siblings.undone.get(step) == siblings.left[step].attempt:
                raise AirflowFailException(
                    f"step {step!r} was undone when the flow had failed, so the flow cannot go on behind it; clear its "
                    f"task {self.members.tasks[step]!r} with all that is downstream"
                )

    def _data(self) -> dict[str, Any]:
        from beluga_airflow.execute import to_json

        data: dict[str, Any] = to_json(mapping_of(self.inputs), f"the input of flow {self.flow.name!r}")
        return data


class UndoOperator(MemberOperator):
    """Undoes the finished steps of a flow that failed, the last one first. Made by ``GraphTaskGroup``.

    Returns ``{"undone": {step: "undone" | why not}}``; fails where one could not be undone. Skipped where no step
    failed. An attempt after a lost worker, and a clear, go on with what is not undone yet.
    """

    ui_color = "#fde7e0"
    left = "a retry, where the task has one left, or a clear, undoes what is not undone yet"

    async def proceed(self, context: Context, siblings: Siblings) -> dict[str, Any]:
        """Undo."""
        from beluga_airflow.graph.progress import Progress

        undone = await self._still_undone(context)
        progress = Progress(self.shape, siblings.outcomes)
        steps = progress.to_undo
        for failure in siblings.failures.values():
            progress.undone |= failure.undone  # of what was in flight
        if not siblings.failures or not (steps or progress.undone):
            if siblings.failures:
                await self._tell(context, siblings, progress)
            why = "no step failed" if not siblings.failures else "no step that can be undone had finished"
            raise AirflowSkipException(f"{why}: there is nothing to undo")
        attempts = {step: siblings.left[step].attempt for step in steps}
        # first: a flow that begins to undo must never go forward again
        await self._set_out_to_undo(context, {**undone, **attempts})
        states = self.states(progress.outcomes)
        async with generation(context) as number:
            identity = self.identity(context, number)
            for step in steps:
                progress.undone[step] = await self._undone(context, step, attempts[step], states, identity)
        result = await self._tell(context, siblings, progress)
        left = {"undone": result.undone}
        if any(progress.undone.values()):
            context["ti"].xcom_push(key="return_value", value=left)
            ended(result)
        return left

    async def _tell(self, context: Context, siblings: Siblings, progress: Progress) -> FlowResult:
        """Tell how the flow ended."""
        steps = {**progress.ends, **dict.fromkeys(siblings.failures, "failed")}
        result = replace(progress.after_undoing(_first(siblings.failures)), steps=steps)
        async with self.status(context) as status:
            await status.end(result)
        return result

    async def _still_undone(self, context: Context) -> dict[str, Any]:
        """What earlier attempts set out to undo; told anew, as Airflow wipes a task's XComs when it runs again."""
        undone: Any = await asyncio.to_thread(context["task_state_store"].get, UNDOING)
        if undone is None:
            return {}
        context["ti"].xcom_push(key=UNDONE, value=undone)
        return dict(undone)

    async def _set_out_to_undo(self, context: Context, attempts: dict[str, Any]) -> None:
        await asyncio.to_thread(context["task_state_store"].set, UNDOING, attempts)
        context["ti"].xcom_push(key=UNDONE, value=attempts)

    async def _undone(
        self, context: Context, step: str, attempt: int, states: States, identity: Identity
    ) -> str | None:
        """Undo a step, unless that was done before; returns why it could not be."""
        from beluga_airflow.execute import undo_with_retries

        state, name = context["task_state_store"], f"beluga/undone/{step}@{attempt}"
        if await asyncio.to_thread(state.get, name):
            return None
        error = await undo_with_retries(
            self.flow, self.shape.by_name[step], states=states, identity=identity, interrupts=INTERRUPTS
        )
        if error is None:
            await asyncio.to_thread(state.set, name, True)
        return error


class ResultOperator(MemberOperator):
    """The end of a flow. Made by ``GraphTaskGroup``.

    Returns ``{"status": ..., "data": ...}``; records of decisions are pushed as XCom ``decisions``, by step.
    """

    ui_color = "#e3f4e1"

    async def proceed(self, context: Context, siblings: Siblings) -> dict[str, Any]:
        """Put the flow's result together."""
        try:
            result = self._result(siblings)
        except AirflowFailException as error:
            async with self.status(context) as status:
                await status.end(FlowResult(status="failed", error=str(error)))
            raise
        async with self.status(context) as status:
            await status.end(result)
        push_decisions(context, result)
        return ended(result)

    def _result(self, siblings: Siblings) -> FlowResult:
        from beluga_airflow.graph.progress import Progress

        self.check_not_undone(siblings, self.shape.order)
        outcomes = siblings.outcomes
        states = self.states(outcomes)
        for step in self.shape.finish:
            if step in outcomes and outcomes[step].state is None:  # somebody marked it as success
                outcomes[step] = replace(outcomes[step], state=states.after(step))
        progress = Progress(self.shape, outcomes)
        self._check_complete(progress)
        skipped = progress.skipped_end
        return progress.result(states.before(skipped) if skipped else None)

    def _check_complete(self, progress: Progress) -> None:
        # nothing starts where a step stopped the flow
        missing = progress.start()
        if not missing:
            return
        if not progress.outcomes:
            raise AirflowSkipException(f"flow {self.flow.name!r} did not run")
        raise AirflowFailException(
            f"flow {self.flow.name!r} is not at its end: {', '.join(map(repr, missing))} did not run when it could not "
            "go on; clear what failed and what was skipped then, with all that is downstream"
        )


def _uncapped(shape: Shape) -> Shape:
    """The shape as each task sees it: whether another one may start is not its matter."""
    groups = tuple(replace(group, max_workers=None) for group in shape.groups)
    return replace(shape, max_workers=len(shape.steps), groups=groups)


def _first(failures: Mapping[str, FlowResult]) -> FlowResult:
    """The failure that is the flow's: as in one task, running out of time comes before all."""
    return min(failures.values(), key=lambda result: result.status != "timed_out")
