"""A decision of a language model about which way a DAG run goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from airflow.sdk import BranchMixIn, Context
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.sdk.exceptions import DownstreamTasksSkipped

from beluga_airflow.errors import BelugaError, InvalidSetting
from beluga_airflow.graph.decision import UNSET
from beluga_airflow.operators.decision import LLMDecisionOperator
from beluga_airflow.operators.runs import failing_for_good

__all__ = ["LLMBranchDecisionOperator"]


class LLMBranchDecisionOperator(LLMDecisionOperator, BranchMixIn):
    """Asks a language model which of the tasks behind it is to run; all others directly behind it are skipped.

    The task's return value is the id of the task, or task group, that it chose; the record of the decision is pushed
    as XCom ``decision`` before anything is skipped. What skipping means is Airflow's: a task that follows from the
    chosen one, too, is not skipped.

    That each choice is there, and can be skipped, is seen before the model is asked. In a mapped task group it can be
    only where the group is mapped over values in the DAG file: over what another task returns, Airflow makes the tasks
    behind a branch after the branch has run, and would run all of them.

    Args:
        choices: the tasks or task groups directly behind this one among which to choose, with or without a description
            each; by their ids, or as they are called inside the group of this task. When left out all of them, and
            ``rules`` and ``fallback`` are checked when the task runs.
        **kwargs: as of ``LLMDecisionOperator``, but for ``output_type``.
    """

    ui_color = "#ffe8c2"
    # and not `inherits_from_skipmixin`: the mapped form of a decorated task looks at this one only
    _can_skip_downstream = True

    def __init__(self, *, choices: Mapping[str, str] | Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(choices=choices, **kwargs)

    def _check(self, bounds: Mapping[str, Any]) -> None:
        if bounds["choices"] is None:
            # the edges are drawn later, and with them the choices: here are two that nobody means
            unknown = {"rules": (), "fallback": UNSET, "on_uncertain": None}
            bounds = {**bounds, **unknown, "choices": ["this", "that"]}
        super()._check(bounds)

    async def work(self, context: Context) -> str:
        """Come to the answer, and skip what it leaves out."""
        try:
            branches = self._branches()
            await asyncio.to_thread(self._see_that_skips_arrive, context["ti"])
        except BelugaError as error:
            raise failing_for_good(error) from error
        if self.bounds["choices"] is None:
            self.bounds = {**self.bounds, "choices": list(branches)}
        branch = branches[await super().work(context)]
        if self.do_xcom_push:
            # Airflow pushes no return value of a task that skips others
            context["ti"].xcom_push(key="return_value", value=branch)
        self.do_branch(context, branch)
        return branch

    def _branches(self) -> dict[str, str]:
        """The ids of the tasks and groups among which to choose, by the choices' names.

        Raises:
            InvalidSetting: a choice is none.
        """
        behind = set(self.downstream_task_ids)
        groups = [group for group in self.dag.task_group_dict.values() if self.task_id in group.upstream_task_ids]
        ids = behind | {str(group.group_id) for group in groups}
        if self.bounds["choices"] is None:
            ids -= {root.task_id for group in groups for root in group.roots}
            return {name: name for name in sorted(ids)}
        return {label: self._branch(label, ids) for label in self.bounds["choices"]}

    def _branch(self, label: str, ids: Collection[str]) -> str:
        inside = self.task_group.child_id(label) if self.task_group else label  # type: ignore[no-untyped-call]  # Airflow's
        for name in (label, inside):
            if name in ids:
                return str(name)
        raise InvalidSetting(
            f"choice {label!r} of task {self.task_id!r} is no task or task group directly behind it; there "
            f"{'are ' + ', '.join(sorted(ids)) if ids else 'is none'}"
        )

    def _see_that_skips_arrive(self, ti: Any) -> None:
        """See that Airflow can skip for this map index alone what is behind this task.

        Raises:
            InvalidSetting: it cannot, and would run all of it.
        """
        if ti.map_index is None or ti.map_index < 0:
            return
        behind = {name: self.dag.get_task(name) for name in sorted(self.downstream_task_ids)}
        group = self.get_closest_mapped_task_group()
        if group is None:
            lost = [name for name, task in behind.items() if not isinstance(task, MappedOperator)]
        else:
            states = ti.get_task_states(
                dag_id=ti.dag_id, map_index=ti.map_index, task_ids=[*behind], run_ids=[ti.run_id]
            ).get(ti.run_id, {})
            lost = [
                name
                for name, task in behind.items()
                if task.get_closest_mapped_task_group() is not group or f"{name}_{ti.map_index}" not in states
            ]
        if lost:
            raise InvalidSetting(
                f"Airflow cannot skip {', '.join(lost)} behind the mapped task {self.task_id!r}, and would run every "
                "branch; map a task group around both over values in the DAG file, or take a flow with conditions "
                "(when=) in a GraphTaskGroup"
            )

    @staticmethod
    def _set_state_to_skipped(tasks: Sequence[str | tuple[str, int]], map_index: int | None) -> None:  # noqa: ARG004  # Airflow's signature
        # Airflow's own does nothing in a mapped task group, and all branches run
        if tasks:
            raise DownstreamTasksSkipped(tasks=tasks)  # type: ignore[no-untyped-call]  # Airflow's
