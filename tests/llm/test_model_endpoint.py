"""What the model server's endpoint can do or not, seen by OpenAI's library and on the wire."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from beluga_airflow.llm.model_server import ModelServer

CHOICES = {"ship": 0.5, "ship_late": 0.3, "halten": 0.15, "😀日本": 0.05}
TEXT_FORM = {"type": "text"}


def schema(answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"answer": answer, "reason": {"type": "string"}},
        "required": ["answer", "reason"],
        "additionalProperties": False,
    }


def form(answer: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "decision", "strict": True, "schema": schema(answer)}}


ONE_OF_THEM = form({"type": "string", "enum": list(CHOICES)})


def body(**options: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "messages": [{"role": "user", "content": "How?"}],
        "response_format": ONE_OF_THEM,
        **options,
    }


@asynccontextmanager
async def asking(rules: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        ModelServer(rules=rules) as server,
        openai.AsyncOpenAI(base_url=server.base_url, api_key="any", max_retries=0, timeout=20) as client,
    ):
        yield client


async def asked(rules: Any, **options: Any) -> ChatCompletion:
    async with asking(rules) as client:
        reply: ChatCompletion = await client.chat.completions.create(**body(**options))
        return reply


def content(reply: ChatCompletion) -> str:
    return reply.choices[0].message.content or ""


def weighed(answer: str | None = None, **endpoint: Any) -> dict[str, Any]:
    rule: dict[str, Any] = {"probabilities": CHOICES, "reason": "why"}
    return {"endpoint": endpoint, "rules": [rule if answer is None else {**rule, "answer": answer}]}


# log-probabilities


async def test_every_choice_is_as_probable_as_the_rule_says() -> None:
    recovered = {}
    for choice in CHOICES:
        reply = await asked(weighed(choice), logprobs=True, top_logprobs=5)
        told = reply.choices[0].logprobs
        assert told is not None
        assert told.content is not None
        text = b"".join(bytes(token.bytes or []) for token in told.content).decode()
        assert text == content(reply)
        assert json.loads(text) == {"answer": choice, "reason": "why"}
        recovered[choice] = math.exp(math.fsum(token.logprob for token in told.content))
    assert recovered == pytest.approx(CHOICES, abs=1e-9)


async def test_on_the_wire_they_are_as_openai_has_them() -> None:
    async with ModelServer(rules=weighed()) as server, httpx.AsyncClient() as http:
        reply = await http.post(
            f"{server.base_url}/chat/completions", json=body(logprobs=True, top_logprobs=2), timeout=20
        )
    (choice,) = reply.json()["choices"]
    assert choice["logprobs"]["refusal"] is None
    first, *_ = told = choice["logprobs"]["content"]
    assert first == {
        "token": '{"',
        "logprob": 0.0,
        "bytes": [123, 34],
        "top_logprobs": [{"token": '{"', "logprob": 0.0, "bytes": [123, 34]}],
    }
    assert [token["token"] for token in told][:7] == ['{"', "answe", "r", '":', ' "', "ship", '",']
    assert [(each["token"], round(math.exp(each["logprob"]), 9)) for each in told[5]["top_logprobs"]] == [
        # the fourth has left already: its first token holds the quotation mark
        ("ship", round(0.8 / 0.95, 9)),
        ("halte", round(0.15 / 0.95, 9)),
    ]
    assert [(each["token"], round(math.exp(each["logprob"]), 9)) for each in told[6]["top_logprobs"]] == [
        ('",', 0.625),
        ("_late", 0.375),
    ]


async def test_the_first_of_the_most_probable_is_answered_unless_the_rule_names_another() -> None:
    assert json.loads(content(await asked(weighed())))["answer"] == "ship"
    assert json.loads(content(await asked(weighed("halten"))))["answer"] == "halten"
    even = [{"probabilities": {"ship_late": 0.5, "ship": 0.5}}]
    assert json.loads(content(await asked(even)))["answer"] == "ship_late"


async def test_the_answered_token_may_be_missing_from_the_most_probable() -> None:
    reply = await asked(weighed("😀日本"), logprobs=True, top_logprobs=1)
    told = reply.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    branch = next(token for token in told.content if token.logprob < 0)
    assert [each.token for each in branch.top_logprobs] == [' "']
    assert bytes(branch.bytes or []) == b' "\xf0\x9f\x98'


async def test_without_probabilities_an_answer_was_sure() -> None:
    reply = await asked([{"answer": "ship"}], logprobs=True, top_logprobs=5)
    told = reply.choices[0].logprobs
    assert told is not None
    assert {(token.logprob, len(token.top_logprobs)) for token in told.content or []} == {(0.0, 1)}


@pytest.mark.parametrize(
    ("answer", "probabilities", "given"),
    [
        ({"type": "boolean"}, {True: 0.9, False: 0.1}, {True: 0.9, False: 0.1}),
        ({"type": "boolean"}, {"true": 0.2, "false": 0.8}, {False: 0.8, True: 0.2}),
        ({"type": "integer"}, {7: 0.6, 70: 0.4}, {7: 0.6, 70: 0.4}),
        ({"type": ["string", "null"]}, {None: 0.6, "none": 0.4}, {None: 0.6, "none": 0.4}),
    ],
)
async def test_probabilities_are_of_values_that_the_schema_has(
    answer: dict[str, Any], probabilities: dict[Any, float], given: dict[Any, float]
) -> None:
    for value, probability in given.items():
        key = next(key for key in probabilities if key in (value, json.dumps(value)))
        rules = [{"probabilities": probabilities, "answer": key}]
        reply = await asked(rules, logprobs=True, response_format=form(answer))
        assert (got := json.loads(content(reply))["answer"]) == value
        assert type(got) is type(value)
        told = reply.choices[0].logprobs
        assert told is not None
        sure = math.exp(math.fsum(token.logprob for token in told.content or []))
        assert sure == pytest.approx(probability, abs=1e-9)


async def test_probabilities_outside_the_schema_are_told_too() -> None:
    rules = [{"probabilities": {"ship": 0.7, "halten": 0.1}, "outside": {"burn": 0.2}}]
    reply = await asked(rules, logprobs=True, top_logprobs=3)
    told = reply.choices[0].logprobs
    assert told is not None
    branch = next(token for token in told.content or [] if token.logprob < 0)
    tops = {each.token: math.exp(each.logprob) for each in branch.top_logprobs}
    assert tops == pytest.approx({"ship": 0.7, "burn": 0.2, "halte": 0.1})


async def test_a_choice_that_the_schema_does_not_allow_is_told() -> None:
    with pytest.raises(openai.BadRequestError, match=r"rule 1 .*mend the rule"):
        await asked([{"probabilities": {"ship": 0.7, "shipp": 0.3}}])


async def test_a_refusal_has_log_probabilities_of_its_own() -> None:
    rules = {"troubles": [{"kind": "refusal", "text": "I won't.", "times": 1}]}
    reply = await asked(rules, logprobs=True, top_logprobs=1)
    told = reply.choices[0].logprobs
    assert told is not None
    assert told.content is None
    assert "".join(token.token for token in told.refusal or []) == "I won't."


@pytest.mark.parametrize(
    ("most", "asked_for", "reported"), [(1, 20, 1), (2, 20, 2), (0, 5, 0), (20, 2, 2), (5, None, 0)]
)
async def test_an_endpoint_may_report_few_alternatives(most: int, asked_for: int | None, reported: int) -> None:
    reply = await asked(weighed(top_logprobs=most), logprobs=True, top_logprobs=asked_for)
    told = reply.choices[0].logprobs
    assert told is not None
    assert max(len(token.top_logprobs) for token in told.content or []) == reported
    assert min(token.logprob for token in told.content or []) == pytest.approx(math.log(0.625))


async def test_an_endpoint_may_report_none() -> None:
    reply = await asked(weighed(logprobs="none"), logprobs=True, top_logprobs=5)
    assert reply.choices[0].logprobs is None
    assert (await asked(weighed())).choices[0].logprobs is None, "nobody asked for them"


async def test_an_endpoint_may_keep_the_bytes_back() -> None:
    reply = await asked(weighed(token_bytes=False), logprobs=True, top_logprobs=1)
    told = reply.choices[0].logprobs
    assert told is not None
    assert {token.bytes for token in told.content or []} == {None}


@pytest.mark.parametrize(
    ("endpoint", "options", "param"),
    [
        ({"logprobs": "refused"}, {"logprobs": True}, "logprobs"),
        ({"logprobs": "refused"}, {"logprobs": True, "top_logprobs": 3}, "logprobs"),
        ({"top_logprobs": 5, "above": "refused"}, {"logprobs": True, "top_logprobs": 6}, "top_logprobs"),
        ({"json_schema": "refused"}, {}, "response_format"),
        ({}, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({}, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({}, {"top_logprobs": 2}, "top_logprobs"),
        ({}, {"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
    ],
)
async def test_what_an_endpoint_cannot_do_it_refuses_by_name(
    endpoint: dict[str, Any], options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=param) as refused:
        await asked(weighed(**endpoint), **options)
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")


async def test_what_is_not_asked_for_is_not_refused() -> None:
    endpoint = {"logprobs": "refused", "json_schema": "refused"}
    for options in ({"response_format": TEXT_FORM}, {"response_format": None, "logprobs": False}):
        assert content(await asked(weighed(**endpoint), **options)) == "ship"


# answers that no schema holds

WHOLE = '{"answer": "ship", "reason": "why"}'


@pytest.mark.parametrize(
    ("wording", "text"),
    [
        ("answer", "ship"),
        ("json", WHOLE),
        ("block", f"Here is my decision:\n\n```json\n{WHOLE}\n```\n"),
        ("prose", "I would say: ship. why"),
    ],
)
async def test_without_a_schema_an_answer_is_worded_as_the_endpoint_does(wording: str, text: str) -> None:
    ignoring = weighed(json_schema="ignored", without_schema=wording)
    assert content(await asked(ignoring)) == text
    refusing = weighed(json_schema="refused", without_schema=wording)
    assert content(await asked(refusing, response_format=TEXT_FORM)) == text


async def test_its_probabilities_are_exact_as_well() -> None:
    for choice, probability in CHOICES.items():
        reply = await asked(weighed(choice, without_schema="block"), response_format=TEXT_FORM, logprobs=True)
        told = reply.choices[0].logprobs
        assert told is not None
        assert math.exp(math.fsum(token.logprob for token in told.content or [])) == pytest.approx(probability)


async def test_a_json_object_is_given_where_only_that_is_asked_for() -> None:
    reply = await asked(weighed(json_schema="refused"), response_format={"type": "json_object"})
    assert content(reply) == WHOLE


# models and connections

PER_MODEL = {
    "endpoint": {"top_logprobs": 3, "unknown_models": "refused"},
    "models": {"large": None, "tiny": {"json_schema": "refused", "logprobs": "none"}},
    "rules": [{"answer": "ship"}],
}


async def test_models_differ() -> None:
    async with asking(PER_MODEL) as client:
        assert [model.id async for model in client.models.list()] == ["large", "tiny"]
        reply = await client.chat.completions.create(**body(model="large", logprobs=True))
        assert reply.choices[0].logprobs is not None
        with pytest.raises(openai.BadRequestError, match="response_format"):
            await client.chat.completions.create(**body(model="tiny"))
        reply = await client.chat.completions.create(**body(model="tiny", logprobs=True, response_format=TEXT_FORM))
        assert reply.choices[0].logprobs is None
        with pytest.raises(openai.NotFoundError, match="'other' does not exist") as unknown:
            await client.chat.completions.create(**body(model="other"))
        assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")


async def test_calls_are_counted_by_model_and_by_connection() -> None:
    async with ModelServer(rules=[{"answer": "ship"}], api_key="sk-right") as server, httpx.AsyncClient() as http:

        async def call(url: str, model: str, key: str = "sk-right") -> int:
            reply = await http.post(
                f"{url}/chat/completions", json=body(model=model), headers={"Authorization": f"Bearer {key}"}
            )
            return reply.status_code

        server.fail("status", status=500, connection="primary")
        assert await call(server.url_of("primary"), "large") == 500
        assert await call(server.url_of("primary"), "large") == 200
        assert await call(server.url_of("backup"), "large") == 200
        assert await call(server.base_url, "tiny") == 200
        assert await call(server.url_of("backup"), "tiny", key="sk-wrong") == 401
        assert server.calls == 5
        assert server.calls_by("connection") == {"primary": 2, "backup": 2, "": 1}
        assert server.calls_by("model") == {"large": 3, "tiny": 1, "": 1}
        address = server.base_url.removesuffix("/v1")
        assert (await http.get(f"{address}/calls?by=connection")).json() == server.calls_by("connection")
        assert (await http.get(f"{address}/calls?by=model")).json() == server.calls_by("model")
        assert (await http.get(f"{address}/calls?by=day")).status_code == 400
        server.reset()
        assert server.calls_by("model") == {}


async def test_whatever_it_answers_it_says_that_it_is_a_simulation() -> None:
    for rules in (weighed(), PER_MODEL | {"endpoint": {"obedient": True}}):
        assert (await asked(rules)).system_fingerprint == "beluga-simulation"
