"""Endpoints that cannot do all that is asked of them: found out by asking, once, over real HTTP."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from beluga_airflow.errors import InvalidSetting, ModelRefused, ModelUnavailable
from beluga_airflow.llm.client import Endpoint, ModelRequest
from beluga_airflow.llm.model_server import ModelServer
from tests.llm.conftest import DATUM, QUESTION, SERVER_WORDS, ClientFactory, assert_tells_nothing

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "enum": ["A: a", "B: b"]}, "reason": {"type": "string"}},
    "required": ["answer", "reason"],
    "additionalProperties": False,
}
REQUEST = ModelRequest(
    messages=({"role": "system", "content": "Decide."}, {"role": "user", "content": f"{QUESTION} {DATUM}"}),
    schema=SCHEMA,
    max_tokens=50,
    logprobs="wanted",
)


def asked(server: ModelServer) -> list[tuple[bool, Any]]:
    """Of each call: whether it asked for a schema, and for how many alternatives."""
    return [("response_format" in request, request.get("top_logprobs")) for request in server.requests]


def endpoint_that(**traits: Any) -> ModelServer:
    return ModelServer(rules={"endpoint": traits, "rules": [{"answer": "a"}]})


async def test_what_is_asked_of_one_that_can_do_everything(client_of: ClientFactory) -> None:
    async with endpoint_that() as server:
        reply = await client_of(server).answer(REQUEST)
        bare = await client_of(server).answer(replace(REQUEST, logprobs="no"))
    assert asked(server) == [(True, 20), (True, None)]
    assert server.requests[0]["logprobs"] is True
    assert "logprobs" not in server.requests[1]
    assert reply.tokens is not None
    assert b"".join(token.text for token in reply.tokens).decode() == reply.content
    assert "Token" not in repr(reply)
    assert bare.tokens is None


@pytest.mark.parametrize(
    ("traits", "first", "then"),
    [
        ({"json_schema": "refused"}, [(True, 20), (False, 20)], (False, 20)),
        ({"logprobs": "refused"}, [(True, 20), (True, None)], (True, None)),
        ({"top_logprobs": 5, "above": "refused"}, [(True, 20), (True, 5)], (True, 5)),
        ({"top_logprobs": 4, "above": "refused"}, [(True, 20), (True, 5), (True, None)], (True, None)),
        (
            {"json_schema": "refused", "logprobs": "refused"},
            [(True, 20), (False, 20), (False, None)],
            (False, None),
        ),
        ({"json_schema": "ignored", "logprobs": "none"}, [(True, 20)], (True, 20)),
    ],
)
async def test_what_is_refused_is_left_out_and_asked_again_at_once(
    client_of: ClientFactory, traits: dict[str, Any], first: list[tuple[bool, Any]], then: tuple[bool, Any]
) -> None:
    async with endpoint_that(**traits) as server:
        assert (await client_of(server).answer(REQUEST)).content
        assert asked(server) == first
        # another client of the same process knows it
        assert (await client_of(server).answer(REQUEST)).content
        assert asked(server) == [*first, then]
        # of another model it says nothing
        await client_of(server, model="another").answer(REQUEST)
        assert asked(server) == [*first, then, *first]


async def test_without_a_schema_the_answer_is_asked_for_in_words(client_of: ClientFactory) -> None:
    async with endpoint_that() as server:
        client = client_of(server, structured_output="text")
        await client.answer(REQUEST)
        await client.answer(replace(REQUEST, messages=REQUEST.messages[1:]))
    first, second = (request["messages"] for request in server.requests)
    words = (
        'Write {"answer": ..., "reason": ...} and nothing before or after it. This is its JSON schema:\n'
        f"{json.dumps(SCHEMA)}"
    )
    assert first == [{"role": "system", "content": f"Decide.\n\n{words}"}, REQUEST.messages[1]]
    assert second == [{"role": "system", "content": words}, REQUEST.messages[1]]
    assert REQUEST.messages[0]["content"] == "Decide."


REFUSALS: list[dict[str, Any]] = [
    {"param": "response_format", "code": None},
    {"param": "response_format.type", "status": 422},
    {"message": "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model."},
    {"message": "This response_format type is unavailable now"},
    {"message": "This model does not support response format `json_schema`.", "param": ""},
]


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_how_endpoints_refuse_a_schema(
    model_server: ModelServer, client_of: ClientFactory, refusal: dict[str, Any]
) -> None:
    model_server.fail("status", **{"status": 400, **refusal})
    await client_of(model_server).answer(REQUEST)
    assert asked(model_server) == [(True, 20), (False, 20)]


@pytest.mark.parametrize(
    ("refusal", "then"),
    [
        ({"param": "logprobs"}, None),
        ({"param": "body.top_logprobs"}, 5),
        ({"message": "Logprobs is not enabled for models/x"}, None),
        ({"message": "Unrecognized request argument supplied: logprobs"}, None),
        ({"message": "top_logprobs must be at most 8"}, 5),
        ({"status": 403, "message": "You are not allowed to request logprobs from this model"}, None),
    ],
)
async def test_how_endpoints_refuse_log_probabilities(
    model_server: ModelServer, client_of: ClientFactory, refusal: dict[str, Any], then: int | None
) -> None:
    client = client_of(model_server)
    model_server.fail("status", **{"status": 400, **refusal})
    await client.answer(REQUEST)
    assert asked(model_server) == [(True, 20), (True, then)]
    assert not client.refused


@pytest.mark.parametrize(
    "refusal",
    [
        {"status": 400},
        {"status": 400, "param": "messages", "message": "'logprobs and response_format' is too long"},
        {"status": 400, "param": "response_format", "message": "Invalid schema for response_format 'decision': no."},
        {"status": 400, "param": "response_format", "code": "invalid_json_schema"},
        {"status": 400, "param": "response_format", "code": "simulation_cannot_answer"},
        {"status": 401, "param": "logprobs"},
        {"status": 404, "param": "response_format"},
        {"status": 403},
    ],
)
async def test_other_refusals_are_refusals(
    model_server: ModelServer, client_of: ClientFactory, refusal: dict[str, Any]
) -> None:
    model_server.fail("status", **refusal)
    with pytest.raises(ModelRefused):
        await client_of(model_server).answer(REQUEST)
    assert model_server.calls == 1
    await client_of(model_server).answer(REQUEST)
    assert asked(model_server)[-1] == (True, 20)


async def test_what_was_never_asked_for_cannot_be_left_out(model_server: ModelServer, client_of: ClientFactory) -> None:
    model_server.fail("status", status=400, param="logprobs")
    with pytest.raises(ModelRefused):
        await client_of(model_server).answer(replace(REQUEST, logprobs="no"))
    model_server.fail("status", status=400, param="response_format")
    with pytest.raises(ModelRefused):
        await client_of(model_server, structured_output="text").answer(REQUEST)
    assert model_server.calls == 2


async def test_only_an_answer_shows_what_it_was(model_server: ModelServer, client_of: ClientFactory) -> None:
    # a message that repeats hostile data must not switch anything off for good
    hostile = f"too long: 'please mind logprobs and response_format' {SERVER_WORDS}"
    model_server.fail("status", times=3, status=400, message=hostile)
    with pytest.raises(ModelRefused) as caught:
        await client_of(model_server).answer(REQUEST)
    assert_tells_nothing(caught.value)
    assert asked(model_server) == [(True, 20), (True, None), (False, None)]
    await client_of(model_server).answer(REQUEST)
    assert asked(model_server)[-1] == (True, 20)
    model_server.fail("status", status=400, param="logprobs")
    model_server.fail("status", status=503)
    with pytest.raises(ModelUnavailable):
        await client_of(model_server).answer(REQUEST)


@pytest.mark.parametrize(
    ("setting", "traits", "refused"),
    [
        ({"structured_output": "schema"}, {"json_schema": "refused"}, "response_format"),
        ({"logprobs": "on"}, {"logprobs": "refused"}, "logprobs"),
    ],
)
async def test_what_is_set_is_not_left_out(
    client_of: ClientFactory, setting: dict[str, str], traits: dict[str, Any], refused: str
) -> None:
    async with endpoint_that(**traits) as server:
        with pytest.raises(ModelRefused, match=f"it refuses the request over {refused}"):
            await client_of(server, **setting).answer(REQUEST)
        assert server.calls == 1


async def test_what_is_switched_off_is_not_asked_for(model_server: ModelServer, client_of: ClientFactory) -> None:
    client = client_of(model_server, structured_output="text", logprobs="off", conn_id="own")
    assert (await client.answer(REQUEST)).tokens is None
    assert asked(model_server) == [(False, None)]
    with pytest.raises(InvalidSetting, match="connection 'own' has logprobs switched off"):
        await client.answer(replace(REQUEST, logprobs="needed"))
    assert model_server.calls == 1


async def test_what_a_provider_tells_that_it_does_not_do(model_server: ModelServer, client_of: ClientFactory) -> None:
    client = client_of(model_server, provider="anthropic", conn_id="own")
    assert (await client.answer(REQUEST)).tokens is None
    with pytest.raises(InvalidSetting, match="connection 'own' has logprobs none from provider 'anthropic', and a dec"):
        await client.answer(replace(REQUEST, logprobs="needed"))
    told = client_of(model_server, provider="anthropic", structured_output="schema", logprobs="on")
    assert (await told.answer(replace(REQUEST, logprobs="needed"))).tokens
    assert asked(model_server) == [(False, None), (True, 20)]


async def test_many_at_once_learn_the_same(client_of: ClientFactory) -> None:
    async with endpoint_that(json_schema="refused", logprobs="refused") as server:
        client = client_of(server)
        several = [REQUEST, replace(REQUEST, logprobs="no")] * 10
        assert all(reply.content for reply in await asyncio.gather(*map(client.answer, several)))
        before = server.calls
        assert before <= 3 * 10 + 2 * 10
        await client.answer(REQUEST)
        assert server.calls == before + 1


@pytest.mark.parametrize("given", [{"structured_output": "json"}, {"logprobs": ""}, {"logprobs": ["on"]}])
def test_another_word_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match=r"it must be auto, "):
        Endpoint(**given)
