"""A decision of a language model as an Airflow task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from airflow.sdk import BaseAsyncOperator, Context

from beluga_airflow.config import Settings
from beluga_airflow.errors import BelugaError, InvalidInput
from beluga_airflow.graph import Chain, Decision, Retry
from beluga_airflow.hooks.backends import AirflowBackends
from beluga_airflow.hooks.llm import LLMHook
from beluga_airflow.hooks.state import StateHook
from beluga_airflow.local import run_with
from beluga_airflow.operators.checkpoint import TaskCheckpoint
from beluga_airflow.operators.runs import ended, failing_for_good, identity_of, is_template

__all__ = ["LLMDecisionOperator"]

STEP = "decision"
OWN = frozenset({"question", "reads", "output_key", "llm_conn_id"})
"""Arguments of a ``Decision`` that the operator sets itself."""
TAKEN = frozenset(field.name for field in dataclasses.fields(Decision)) - OWN


class LLMDecisionOperator(BaseAsyncOperator):
    """Asks a language model one question and returns its answer, which is inside what is allowed, or fails.

    The answer is the task's return value; its record (who decided, why, tokens, cost) is pushed as XCom ``decision``.

    Args:
        question: the author's words; templated, and what is templated into it counts as the author's word too.
        data: what the model sees, a mapping; templated. It is shown to the model as data, never as instructions.
        retry: for a model that cannot be reached; a chain's default when left out.
        timeout: seconds for one attempt.
        key: the business key from which the idempotency key is made: the name of a field of ``data``, or a template.
        llm_conn_id: the model's connection.
        state_conn_id: where the record is kept.
        kwargs: ``choices``, ``output_type``, ``instructions``, ``rules``, ``fallback``, ``on_uncertain``, ``reason``,
            ``max_reprompts``, ``max_tokens`` and ``model`` as in ``Decision``; the rest as in every operator.
    """

    template_fields: Sequence[str] = ("question", "data", "key")
    template_fields_renderers: ClassVar[dict[str, str]] = {"data": "json"}
    ui_color = "#fff4e0"

    def __init__(
        self,
        *,
        question: str,
        data: Mapping[str, Any] | Any,
        retry: Retry | None = None,
        timeout: float = 60.0,
        key: str | None = None,
        llm_conn_id: str = LLMHook.default_conn_name,
        state_conn_id: str = StateHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        bounds = {name: kwargs.pop(name) for name in TAKEN & kwargs.keys()}
        super().__init__(**kwargs)
        self.question = question
        self.data = data
        self.retry = retry
        self.timeout = timeout
        self.key = key
        self.key_is_field = key is not None and not is_template(key)
        self.llm_conn_id = llm_conn_id
        self.state_conn_id = state_conn_id
        self.bounds = bounds
        # a decision that can never be sound is an import error of the DAG; its data is known only when it runs
        self._chain("?" if is_template(question) else question, ["data"]).check()

    def _chain(self, question: str, reads: Sequence[str]) -> Chain:
        decision = Decision(question, reads=tuple(reads), output_key="answer", **self.bounds)
        return Chain("decision", retry=self.retry).add_step(STEP, decision, timeout=self.timeout)

    async def aexecute(self, context: Context) -> Any:
        """Come to the answer."""
        try:
            if not isinstance(self.data, Mapping) or not self.data:
                raise InvalidInput(f"data is {type(self.data).__name__}, it must be a mapping that is not empty")
            chain = self._chain(self.question, sorted(map(str, self.data)))
            identity = identity_of(context, self.task_id, self.data, key=self.key, key_is_field=self.key_is_field)
            async with AirflowBackends() as backends:
                resources = await backends.resources(llm_conn_id=self.llm_conn_id, state_conn_id=self.state_conn_id)
                result = await run_with(
                    chain,
                    self.data,
                    identity=identity,
                    resources=resources,
                    settings=Settings(),
                    checkpoint=TaskCheckpoint(context, chain.check(), resources.state, backends.airflow),
                )
        except BelugaError as error:
            raise failing_for_good(error) from error
        answer = ended(context, result)["data"]["answer"]
        context["ti"].xcom_push(key="decision", value=result.decisions[STEP])
        return answer
