"""A decision of a language model as an Airflow task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from airflow.sdk import Context

from beluga_airflow.errors import BelugaError
from beluga_airflow.graph import Budget, Chain, Decision, Memory, Retry
from beluga_airflow.graph.decision import UNSET
from beluga_airflow.operators.attempts import StepRetryPolicy, tried_by_airflow
from beluga_airflow.operators.flow import InTaskOperator
from beluga_airflow.operators.runs import ended, failing_for_good, is_template, mapping_of

__all__ = ["LLMDecisionOperator"]

STEP = "decision"


class LLMDecisionOperator(InTaskOperator):
    """Asks a language model one question and returns its answer, which is inside what is allowed, or fails.

    The answer is the task's return value; its record (who decided, why, tokens, cost) is pushed as XCom ``decision``.

    Args:
        question: the author's words; templated, and what is templated into it counts as the author's word too.
        data: what the model sees, a mapping or its JSON text; templated. It is shown to the model as data, never as
            instructions.
        choices, output_type, instructions, rules, min_confidence, fallback, on_uncertain, reason, max_reprompts,
            max_tokens, model, fallback_conn_ids, budget: as in ``Decision``.
        memory: the conversation it belongs to, found by a field of ``data``, which the model sees like the rest;
            without a name, of this task.
        retry: for a model that cannot be reached; up to 3 retries when left out, for which the task waits. With
            ``Retry(maximum_attempts=1)`` Airflow's ``retries`` are the attempts, and a server's ``Retry-After`` is
            their delay (up to 60 s), so that no worker waits.
        key, llm_conn_id, state_conn_id: see ``InTaskOperator``; ``key`` is templated, and may name a field of ``data``.
    """

    template_fields: Sequence[str] = ("question", "data", "key")
    template_fields_renderers: ClassVar[dict[str, str]] = {"data": "json"}
    ui_color = "#fff4e0"

    # one argument for each of a decision's: .partial() and default_args look for names in the signature
    def __init__(
        self,
        *,
        question: str,
        data: Mapping[str, Any] | Any,
        choices: Mapping[str, str] | Sequence[str] | None = None,
        output_type: Any = None,
        instructions: str | None = None,
        rules: Sequence[tuple[Callable[[dict[str, Any]], bool], Any]] = (),
        min_confidence: float | None = None,
        fallback: Any = UNSET,
        on_uncertain: Literal["fallback", "fail"] | None = None,
        reason: bool = True,
        max_reprompts: int = 1,
        max_tokens: int = 500,
        model: str | None = None,
        fallback_conn_ids: Sequence[str] = (),
        budget: Budget | Sequence[Budget] | None = None,
        memory: Memory | None = None,
        retry: Retry | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.retry_policy is None:
            self.retry_policy = StepRetryPolicy()
        self.question = question
        self.data = data
        self.memory = memory
        self.retry = retry
        self.bounds = {
            "choices": choices,
            "output_type": output_type,
            "instructions": instructions,
            "rules": rules,
            "min_confidence": min_confidence,
            "fallback": fallback,
            "on_uncertain": on_uncertain,
            "reason": reason,
            "max_reprompts": max_reprompts,
            "max_tokens": max_tokens,
            "model": model,
            "fallback_conn_ids": fallback_conn_ids,
            "budget": budget,
        }
        # a decision that can never be sound is an import error of the DAG; its data is known only when it runs
        self._check(self.bounds)

    def _check(self, bounds: Mapping[str, Any]) -> None:
        question = "?" if is_template(self.question) else self.question
        self._chain(question, ["data"], self.memory, bounds).check()

    def _chain(self, question: str, reads: Sequence[str], memory: Memory | None, bounds: Mapping[str, Any]) -> Chain:
        decision = Decision(question, reads=reads, output_key="answer", memory=memory, **bounds)
        return Chain("decision", retry=self.retry).add_step(STEP, decision)

    def _memory(self, context: Context) -> Memory | None:
        if self.memory is None or self.memory.name is not None:
            return self.memory
        # the flow in here has the same name in every task
        return replace(self.memory, name=f"{context['ti'].dag_id}/{context['ti'].task_id}")

    async def work(self, context: Context) -> Any:
        """Come to the answer."""
        try:
            data = mapping_of(self.data)
            chain = self._chain(self.question, sorted(data), self._memory(context), self.bounds)
            again = tried_by_airflow(context, self.retry)
            result, _ = await self.run_flow(context, chain, data, owner=self.task_id, again=again)
        except BelugaError as error:
            raise failing_for_good(error) from error
        answer = ended(result)["data"]["answer"]
        context["ti"].xcom_push(key="decision", value=result.decisions[STEP])
        return answer
