"""Decisions as decorated functions: @task.llm_decision and @task.llm_branch_decision."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from airflow.sdk import DAG, BaseOperator, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
from pydantic import BaseModel

from beluga_airflow import InvalidFlow
from beluga_airflow.llm.model_requests import Prompt
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.operators.branch import LLMBranchDecisionOperator
from beluga_airflow.operators.decision import LLMDecisionOperator
from beluga_airflow.testing import OperatorRunner

QUESTION = "How should this order be handled?"
CHOICES = {"expedite": "ship today", "standard": "the normal queue"}


class Verdict(BaseModel):
    level: str


def decided(
    function: Callable[..., Any], *args: Any, how: dict[str, Any] | None = None, **options: Any
) -> BaseOperator:
    """The task that becomes of a function."""
    with DAG("orders", schedule=None):
        decorated = task.llm_decision(**{"question": QUESTION, "choices": CHOICES} | options)(function)
        called: Any = decorated(*args, **(how or {}))
    operator: BaseOperator = called.operator
    return operator


def asked(server: ModelServer) -> Prompt:
    return Prompt.read([message["content"] for message in server.requests[-1]["messages"][1:]])


def order(tier: str) -> dict[str, Any]:
    return {"tier": tier}


def test_what_the_function_returns_is_decided_on(runner: OperatorRunner, model_server: ModelServer) -> None:
    operator = decided(order, "gold", retries=2)
    assert isinstance(operator, LLMDecisionOperator)
    assert (operator.task_id, operator.task_type, operator.operator_name, operator.retries) == (
        *("order", "_DecisionDecorated", "@task.llm_decision"),
        2,
    )
    run = runner.run(operator)
    # its annotation says that it returns a mapping; the task returns the answer
    assert (run.state, run.return_value) == ("success", "expedite")
    assert run.xcoms["decision"]["decided_by"] == "model"
    assert (asked(model_server).data, asked(model_server).question.splitlines()[0]) == ({"tier": "gold"}, QUESTION)


def test_the_function_gets_context_and_templates_and_what_it_returns_is_none(
    runner: OperatorRunner, model_server: ModelServer
) -> None:
    def hostile(tier: str, params: Any = None, **context: Any) -> dict[str, Any]:
        return {"tier": tier, "note": params["note"], "run": context["run_id"]}

    note = "{{ 7 * 7 }} {% raw %}"
    runner.run(
        decided(hostile, how={"tier": "{{ params.tier }}"}, question="Is {{ params.what }} good?"),
        conf={"tier": "gold", "note": note, "what": "it"},
    )
    assert asked(model_server).data == {"tier": "gold", "note": note, "run": "test-run"}
    assert asked(model_server).question.startswith("Is it good?")


def test_it_takes_what_another_task_returned(runner: OperatorRunner, model_server: ModelServer) -> None:
    with DAG("orders", schedule=None):

        @task
        def source() -> dict[str, Any]:
            return {}

        @task.llm_decision(question=QUESTION, choices=CHOICES)
        def judge(order: dict[str, Any]) -> dict[str, Any]:
            return {"tier": order["tier"]}

        judged: Any = judge(source())
    assert judged.operator.upstream_task_ids == {"source"}
    run = runner.run(judged.operator, xcoms={"source": {"tier": "gold", "secret": "s3cr3t"}})
    assert run.return_value == "expedite"
    assert "s3cr3t" not in json.dumps(model_server.requests)


def test_an_async_function(runner: OperatorRunner) -> None:
    async def judge() -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"tier": "gold"}

    assert runner.run(decided(judge)).return_value == "expedite"


def test_it_maps_partly_and_overrides(runner: OperatorRunner, model_server: ModelServer) -> None:
    def judge(tier: str, size: int) -> dict[str, Any]:
        return {"tier": tier, "size": size}

    with DAG("orders", schedule=None):
        decorated = task.llm_decision(
            question=QUESTION, choices=CHOICES, rules=[(lambda it: it["size"] < 2, "standard")]
        )
        mapped: Any = decorated(judge).partial(size=5).expand(tier=["gold", "bronze"])
        other: Any = decorated(judge).override(task_id="other", fallback="standard", model="gpt-4.1")("gold", 3)
    answers = [runner.run(mapped.operator, map_index=index).xcoms["decision"]["reason"] for index in (0, 1)]
    assert answers == ["gold goes first", "a default of the simulation: no rule matched"]
    assert asked(model_server).data == {"tier": "bronze", "size": 5}
    assert (other.operator.task_id, runner.run(other.operator).return_value) == ("other", "expedite")
    assert model_server.requests[-1]["model"] == "gpt-4.1"


def test_a_models_fields_may_be_pushed_one_by_one(runner: OperatorRunner) -> None:
    arguments = {"choices": None, "output_type": Verdict, "rules": [(lambda _: True, {"level": "low"})]}
    run = runner.run(decided(order, "gold", multiple_outputs=True, **arguments))
    assert (run.return_value, run.xcoms["level"]) == ({"level": "low"}, "low")


def test_a_retry_and_a_clear_are_those_of_the_operator(runner: OperatorRunner, model_server: ModelServer) -> None:
    first = runner.run(decided(order, "gold", retries=1))
    again = first.lose().retry()
    assert (again.return_value, model_server.calls) == ("expedite", 1)
    assert (again.clear().return_value, model_server.calls) == ("expedite", 2)


def test_a_function_that_skips_or_fails_asks_nobody(runner: OperatorRunner, model_server: ModelServer) -> None:
    def skips() -> dict[str, Any]:
        raise AirflowSkipException("no order today")

    def fails() -> dict[str, Any]:
        raise ConnectionError("no database")

    assert runner.run(decided(skips)).state == "skipped"
    assert runner.run(decided(fails, retries=1)).state == "up_for_retry"
    assert model_server.calls == 0


@pytest.mark.parametrize("value", [["gold"], 5, "gold"])
def test_what_is_no_mapping_fails_for_good(runner: OperatorRunner, model_server: ModelServer, value: Any) -> None:
    run = runner.run(decided(lambda: value, task_id="judge", retries=3))
    assert (run.state, type(run.error), model_server.calls) == ("failed", AirflowFailException, 0)


def test_what_can_never_be_sound_is_an_import_error_of_the_dag() -> None:
    with pytest.raises(InvalidFlow, match="choices must be two or more"):
        decided(order, "gold", choices=["one"])
    with pytest.raises(TypeError, match="data"):
        decided(order, "gold", data={})


def test_a_branch(runner: OperatorRunner, model_server: ModelServer) -> None:
    with DAG("orders", schedule=None):

        @task.llm_branch_decision(question=QUESTION)
        def route(tier: str) -> dict[str, Any]:
            return {"tier": tier}

        routed: Any = route("gold")
        routed >> [BaseOperator(task_id=name) for name in ("standard", "expedite")]
    assert isinstance(routed.operator, LLMBranchDecisionOperator)
    assert routed.operator.inherits_from_skipmixin
    assert routed.operator.operator_name == "@task.llm_branch_decision"
    run = runner.run(routed.operator)
    assert (run.return_value, run.xcoms["skipmixin_key"]) == ("expedite", {"followed": ["expedite"]})
    assert run.xcoms["decision"]["answer"] == "expedite"
    with DAG("others", schedule=None):
        assert route.expand(tier=["gold"]).operator.inherits_from_skipmixin
