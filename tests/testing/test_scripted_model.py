from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from beluga_airflow import Decision
from beluga_airflow.errors import ModelRefused, ModelUnavailable
from beluga_airflow.llm.answers import parsed, schema_of
from beluga_airflow.llm.client import ModelClient, ModelRequest, Usage
from beluga_airflow.llm.prompt import messages_of
from beluga_airflow.testing import ScriptedModel, prompt_of, reply

DECISION = Decision("How?", choices=["expedite", "standard"], reads=("tier",))


def ask(data: Mapping[str, object] | None = None) -> ModelRequest:
    messages = messages_of(DECISION, data or {"tier": "gold"})
    return ModelRequest(messages=tuple(messages), schema=schema_of(DECISION), max_tokens=100)


async def test_it_answers_in_order_and_remembers() -> None:
    model = ScriptedModel(["expedite", "standard"])
    client: ModelClient = model
    requests = [ask(), ask()]
    answers = [parsed(DECISION, await client.answer(request))[0] for request in requests]
    assert answers == ["expedite", "standard"]
    assert (model.calls, model.requests) == (2, requests)
    await client.close()
    assert model.closed


async def test_it_owns_up_and_bills() -> None:
    answer = await ScriptedModel([True]).answer(ask())
    assert (answer.simulated, answer.usage) == (True, Usage(input=100, output=10))
    assert json.loads(answer.content) == {"answer": True, "reason": "scripted"}


async def test_it_raises_what_the_script_says() -> None:
    model = ScriptedModel([ModelUnavailable("overloaded", retry_after=2), ModelRefused("no key"), "standard"])
    with pytest.raises(ModelUnavailable, match="overloaded"):
        await model.answer(ask())
    with pytest.raises(ModelRefused):
        await model.answer(ask())
    assert (await model.answer(ask())).trouble is None
    assert model.calls == 3


async def test_whole_replies_are_given_as_they_are() -> None:
    replies = [reply("{cut"), reply(trouble="the model refused to answer")]
    model = ScriptedModel(replies)
    assert [await model.answer(ask()) for _ in replies] == replies


async def test_a_callable_sees_question_and_data() -> None:
    model = ScriptedModel(lambda request: "expedite" if prompt_of(request).data["tier"] == "gold" else "standard")
    answers = [parsed(DECISION, await model.answer(ask({"tier": tier})))[0] for tier in ("gold", "basic")]
    assert answers == ["expedite", "standard"]
    assert prompt_of(model.requests[0]).question.startswith("How?")


async def test_a_script_that_ran_out_says_so() -> None:
    model = ScriptedModel([])
    with pytest.raises(AssertionError, match="asked 1 times and the script has 0 answers"):
        await model.answer(ask())
