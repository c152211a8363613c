"""``@task.llm_decision`` and ``@task.llm_branch_decision``: the function returns the data that the model sees."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from airflow.sdk import Context
from airflow.sdk.bases.decorator import DecoratedOperator, TaskDecorator, task_decorator_factory

from beluga_airflow.operators.branch import LLMBranchDecisionOperator
from beluga_airflow.operators.decision import LLMDecisionOperator

__all__ = ["llm_branch_decision_task", "llm_decision_task"]


class _Decorated(DecoratedOperator, LLMDecisionOperator):
    """A decision about the data that a function returns, when the task runs."""

    # without `data`: what the function returns is no template, whatever it looks like
    template_fields: Sequence[str] = (*DecoratedOperator.template_fields, "question", "key")
    template_fields_renderers: ClassVar[dict[str, str]] = DecoratedOperator.template_fields_renderers

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(data=None, **kwargs)

    def execute(self, context: Context) -> Any:
        """Call the function, as a plain task would, and come to the answer."""
        arguments = self.determine_kwargs({**context, **self.op_kwargs})
        self.data = self.python_callable(*self.op_args, **arguments)
        return super().execute(context)

    async def work(self, context: Context) -> Any:
        """Come to the answer."""
        if inspect.isawaitable(self.data):
            self.data = await self.data
        return await super().work(context)


class _DecisionDecorated(_Decorated):
    custom_operator_name = "@task.llm_decision"


class _BranchDecorated(_Decorated, LLMBranchDecisionOperator):
    custom_operator_name = "@task.llm_branch_decision"


def llm_decision_task(
    python_callable: Callable[..., Any] | None = None, *, multiple_outputs: bool = False, **kwargs: Any
) -> TaskDecorator:
    """Make a function that returns data, a mapping, into an ``LLMDecisionOperator`` that decides about it.

    Args:
        python_callable: the function, sync or async.
        multiple_outputs: whether an answer that is a pydantic model is pushed field by field, too. The function's
            annotation says nothing about it.
        **kwargs: of the operator, but for ``data``: ``question``, ``choices``, ...
    """
    return task_decorator_factory(
        python_callable, multiple_outputs=multiple_outputs, decorated_operator_class=_DecisionDecorated, **kwargs
    )


def llm_branch_decision_task(python_callable: Callable[..., Any] | None = None, **kwargs: Any) -> TaskDecorator:
    """Make a function that returns data, a mapping, into an ``LLMBranchDecisionOperator`` that decides about it.

    Args:
        python_callable: the function, sync or async.
        **kwargs: of the operator, but for ``data``: ``question``, ``choices``, ...
    """
    return task_decorator_factory(
        python_callable, multiple_outputs=False, decorated_operator_class=_BranchDecorated, **kwargs
    )
