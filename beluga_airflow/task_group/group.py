"""A flow as a task group."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Any, cast

from airflow.sdk import TaskGroup, TriggerRule, XComArg

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.graph import Flow
from beluga_airflow.graph.retry import seconds
from beluga_airflow.graph.shape import RESULT, UNDO, Shape, StepShape
from beluga_airflow.hooks.settings import settings_in_force
from beluga_airflow.operators.runs import checked_flow
from beluga_airflow.task_group.lanes import ordering_edges
from beluga_airflow.task_group.siblings import Members
from beluga_airflow.task_group.step import StepOperator, StepRetryPolicy
from beluga_airflow.task_group.tasks import MemberOperator, ResultOperator, UndoOperator

__all__ = ["GraphTaskGroup"]

_OF_RETRY = ("retries", "retry_delay", "retry_exponential_backoff", "max_retry_delay", "retry_policy")
_OF_GROUP = (
    *("task_id", "task_group", "dag", "trigger_rule", "do_xcom_push", "multiple_outputs"),
    *("flow", "step", "members", "inputs", "key"),
)
REFUSED = {
    **dict.fromkeys(_OF_RETRY, "a step's attempts are its Retry"),
    "execution_timeout": "a step's time is its timeout",
    **dict.fromkeys(_OF_GROUP, "the group sets it"),
}
"""Operator arguments that ``step_args`` cannot have, and why."""


class GraphTaskGroup(TaskGroup):
    """Runs a flow, a ``Graph`` or a ``Chain``, as one task for each step.

    Task ids are ``<group_id>.<step>``; a nested flow is a group in the group. The last task, ``result``, is the flow's
    end: it returns ``{"status": ..., "data": ...}`` and pushes the records of decisions as XCom ``decisions``; each is
    XCom ``decision`` of its step, too. Where a step has a ``compensate=``, a task ``undo`` before ``result`` undoes the
    finished steps of a flow that failed. The step at which a flow failed is failed, with the reason in its log and its
    XCom ``failure``, and ``result`` is upstream_failed.

    A step's ``Retry`` becomes its task's retries. They serve lost workers too, each of which uses up an attempt;
    ``retries`` of ``default_args`` hold for ``undo`` and ``result`` only. A flow's timeout includes the time that its
    tasks wait to be scheduled.

    Of the configuration file, ``max_retries``, ``max_workers`` and ``parallel_execution`` become part of the DAG when
    Airflow parses it, so a file with a fault is an import error of a DAG with this group; timeouts and the rest are
    read when a task starts.

    At most ``max_workers`` tasks of the group run at once: where the flow is wider, edges are added that let some steps
    wait for others. With ``pool=`` no edges are added for it: the pool is the cap then, for all that runs in it. Inside
    a mapped ``@task_group`` the edges hold for each map index on its own.

    Clear a step with all that is downstream: where a step alone is cleared, ``result`` stays as it was. A step that is
    cleared keeps its idempotency key, and starts the clock of the flow's timeout again. After a failure clear what was
    skipped by it too, and what was undone: the flow does not go on behind a step that was undone. Nothing is undone
    where somebody marks the whole DAG run as failed; clear ``undo`` for that.

    To map a flow, make the group inside a ``@task_group``, return its ``output``, and ``.expand()`` that. A DAG with
    ``fail_fast=True`` cannot have this group: it allows no trigger rule but ``all_success``.

    Args:
        group_id: of the group.
        flow: the flow, or its import path ``"package.module:name"``.
        inputs: the flow's input, a mapping or its JSON text; templated. Each task renders it, so it must come out the
            same every time.
        key: the business key from which idempotency keys are made: the name of a field of the input, or a template.
            Without it they are made from dag, run, group and map index.
        step_args: arguments of operators by step: ``{"charge": {"pool": "bank", "queue": "safe"}}``. The last two tasks
            are ``undo`` and ``result``, which may have ``retries`` too; the end of a nested flow is ``ship.result``.
        pool: for all steps, and ``undo``.
        llm_conn_id: for decisions that name no connection.
        state_conn_id: where records of decisions are kept.
        **kwargs: of ``TaskGroup``.

    Raises:
        InvalidFlow: the flow cannot run.
        FlowNotFound: the import path leads nowhere.
        InvalidSetting: another argument, or the DAG, does not fit.
    """

    def __init__(
        self,
        group_id: str,
        *,
        flow: Flow | str,
        inputs: Mapping[str, Any] | Any = None,
        key: str | None = None,
        step_args: Mapping[str, Mapping[str, Any]] | None = None,
        pool: str | None = None,
        llm_conn_id: str | None = None,
        state_conn_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        checked = checked_flow(flow)
        # the edges and the retries of tasks are the DAG's: Airflow must know them before anything starts
        shape = settings_in_force().settle(checked.check())
        step_args = step_args or {}
        last = (UNDO, RESULT) if any(step.undo for step in shape.steps) else (RESULT,)
        _check_step_args(step_args, shape, last)
        super().__init__(group_id=group_id, **kwargs)
        if self.dag.fail_fast:
            raise InvalidSetting(
                f"DAG {self.dag.dag_id!r} has fail_fast=True, with which the steps of GraphTaskGroup {self.group_id!r} "
                "could not be skipped or undone; leave fail_fast out, or run the flow in one task by GraphOperator"
            )
        groups = self._nested_groups(shape)
        members = Members(
            group_id=str(self.group_id),
            shape=checked.check(),
            tasks={step: _task_id(groups, step) for step in shape.order},
            result=_task_id(groups, RESULT),
            undo=_task_id(groups, UNDO) if UNDO in last else None,
        )
        connections = {"llm_conn_id": llm_conn_id, "state_conn_id": state_conn_id}
        common: dict[str, Any] = {
            "dag": self.dag,
            "flow": checked,
            "members": members,
            "inputs": inputs,
            "key": key,
            "do_xcom_push": True,
            # where left out, those of default_args hold
            **{name: conn_id for name, conn_id in connections.items() if conn_id is not None},
        }
        pooled = common if pool is None else {**common, "pool": pool}
        arguments = {name: {**pooled, **step_args.get(name, {})} for name in (*shape.order, UNDO)}
        arguments[RESULT] = {**common, **step_args.get(RESULT, {})}
        steps = _steps(shape, groups, arguments, pool)
        before: list[MemberOperator] = [*steps.values()]
        if members.undo is not None:
            undo = UndoOperator(task_id=UNDO, task_group=self, trigger_rule=TriggerRule.ALL_DONE, **arguments[UNDO])
            undo.set_upstream(before)
            before.append(undo)
        # all of them: what somebody marks by hand must not hide what failed before it
        result = ResultOperator(
            task_id=RESULT, task_group=self, trigger_rule=TriggerRule.NONE_FAILED, **arguments[RESULT]
        )
        result.set_upstream(before)

    @property
    def result(self) -> ResultOperator:
        """The last task."""
        return cast("ResultOperator", self[RESULT])

    @property
    def output(self) -> XComArg:
        """What the last task returns: ``{"status": ..., "data": ...}``."""
        return self.result.output

    def _nested_groups(self, shape: Shape) -> dict[str, TaskGroup]:
        """The group of each nested flow, by its path, and this one."""
        groups: dict[str, TaskGroup] = {"": self}
        for group in shape.groups:
            outer, _, name = group.path.rpartition(".")
            groups[group.path] = TaskGroup(group_id=name, parent_group=groups[outer], dag=self.dag)
        return groups


def _steps(
    shape: Shape, groups: Mapping[str, TaskGroup], arguments: Mapping[str, Mapping[str, Any]], pool: str | None
) -> dict[str, StepOperator]:
    """The tasks of the steps, with the edges between them."""
    edges = [(edge.source, edge.target) for edge in shape.edges]
    edges += ordering_edges(shape, pooled=pool is not None)
    waiting = {target for _, target in edges}
    steps = {
        step.name: StepOperator(
            task_id=_label(step.name),
            task_group=groups[_path(step.name)],
            step=step.name,
            # a step that waits for others decides itself what it means that they were skipped
            trigger_rule=TriggerRule.NONE_FAILED if step.name in waiting else TriggerRule.ALL_SUCCESS,
            **_retrying(step),
            **arguments[step.name],
        )
        for step in shape.steps
    }
    for source, target in edges:
        steps[source].set_downstream(steps[target])
    return steps


def _retrying(step: StepShape) -> dict[str, Any]:
    return {
        "retries": step.retries.maximum_attempts - 1,
        "retry_policy": StepRetryPolicy(),
        # after a lost worker, which asks no policy
        "retry_delay": timedelta(seconds=seconds(step.retries.initial_interval)),
        "retry_exponential_backoff": 0,
    }


def _path(step: str) -> str:
    """Of the nested flow that a step is in; empty for the outermost flow."""
    return step.rpartition(".")[0]


def _label(step: str) -> str:
    return step.rpartition(".")[2]


def _task_id(groups: Mapping[str, TaskGroup], step: str) -> str:
    return str(groups[_path(step)].child_id(_label(step)))  # type: ignore[no-untyped-call]  # Airflow's


def _check_step_args(step_args: Mapping[str, Any], shape: Shape, last: Collection[str]) -> None:
    for name, arguments in step_args.items():
        if name not in (*shape.order, *last):
            raise InvalidSetting(
                f"step_args names {name!r}, which is no step of flow {shape.flow!r}; there are "
                f"{', '.join((*shape.order, *last))}"
            )
        if not isinstance(arguments, Mapping):
            raise InvalidSetting(
                f"step_args[{name!r}] is a {type(arguments).__name__}, it must be a mapping of operator arguments"
            )
        for argument in arguments:
            # the last tasks have no Retry and no timeout of a step
            if argument in (_OF_GROUP if name in last else REFUSED):
                raise InvalidSetting(f"step_args[{name!r}] sets {argument!r}: {REFUSED[argument]}")
