from __future__ import annotations

import json
from typing import Any

import pytest

from beluga_airflow.llm.model_requests import ChatRequest, Prompt, RefusedRequest

STRICT = {
    "type": "object",
    "properties": {"answer": {"type": "boolean"}, "reason": {"type": "string"}},
    "required": ["answer", "reason"],
    "additionalProperties": False,
}


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": [{"role": "user", "content": "How?"}]} | changes


def asking_for(schema: Any, *, strict: bool = True) -> dict[str, Any]:
    form = {"name": "decision", "strict": strict, "schema": schema}
    return body(response_format={"type": "json_schema", "json_schema": form})


def block(data: str, boundary: str = "3f2a9c") -> str:
    return f"Ship it?\n\n<<<DATA {boundary}>>>\n{data}\n<<<END {boundary}>>>\nThanks"


def test_a_prompt_is_the_data_and_the_text_around_it() -> None:
    prompt = Prompt.read([block('{"value": 250.0}')])
    assert prompt.data == {"value": 250.0}
    assert prompt.question == "Ship it?\n\n\nThanks"


def test_a_block_inside_the_data_is_data() -> None:
    data = {"note": '<<<DATA aa>>>{"tier": "gold"}<<<END aa>>>', "tier": "bronze"}
    assert Prompt.read([block(json.dumps(data))]).data == data


def test_a_reprompt_without_data_leaves_the_prompt_as_it_was() -> None:
    first = block('{"value": 1}')
    assert Prompt.read([first, "That does not fit, answer again"]) == Prompt.read([first])
    assert Prompt.read([first, block('{"value": 2}')]).data == {"value": 2}


@pytest.mark.parametrize("data", ["[1]", "7", "{", "[" * 100_000, "9" * 5_000, ""])
def test_data_that_is_no_object_is_empty(data: str) -> None:
    assert Prompt.read([block(data)]).data == {}


def test_a_message_without_a_whole_block_is_all_question() -> None:
    text = "How? <<<DATA aa>>> {} <<<END bb>>>"
    assert Prompt.read([text]) == Prompt(question=text, data={})
    assert Prompt.read([]) == Prompt(question="", data={})


def test_the_last_users_parts_are_the_prompt() -> None:
    messages = [
        {"role": "system", "content": "The data begins with <<<DATA 3f2a9c>>>."},
        {"role": "user", "content": [{"type": "text", "text": block('{"a": 1}')}]},
        {"role": "assistant", "content": None},
    ]
    request = ChatRequest.read(body(messages=messages))
    assert request.prompt.data == {"a": 1}
    assert request.length == len("The data begins with <<<DATA 3f2a9c>>>.") + len(block('{"a": 1}'))


def test_what_a_request_asks_for() -> None:
    assert ChatRequest.read(body()).schema_asked is None
    assert ChatRequest.read(body(response_format={"type": "text"})).schema_asked is None
    assert ChatRequest.read(body(response_format={"type": "json_object"})).schema_asked == {"type": "object"}
    assert ChatRequest.read(asking_for(STRICT)).schema_asked == STRICT
    assert ChatRequest.read(body(n=1, stream=False, temperature=0, seed=7)).model == "gpt-4o"


@pytest.mark.parametrize(
    ("request_body", "param", "code"),
    [
        ([], None, "invalid_value"),
        ({"messages": [{"role": "user", "content": "x"}]}, "model", "missing_required_parameter"),
        ({"model": "gpt-4o"}, "messages", "missing_required_parameter"),
        (body(messages=[]), "messages", "invalid_value"),
        (body(messages="hello"), "messages", "invalid_value"),
        (body(messages=[{"role": "wizard", "content": "x"}]), "messages.0.role", "invalid_value"),
        (body(model=""), "model", "invalid_value"),
        (body(stream=True), "stream", "invalid_value"),
        (body(n=2), "n", "invalid_value"),
        (body(response_format={"type": "xml"}), "response_format", "invalid_value"),
        (
            body(response_format={"type": "json_schema"}),
            "response_format.json_schema.json_schema",
            "missing_required_parameter",
        ),
        (asking_for({"type": "wizard"}), "response_format", "invalid_json_schema"),
        (asking_for({"type": "object", "properties": 7}), "response_format", "invalid_json_schema"),
    ],
)
def test_a_malformed_request_is_refused(request_body: Any, param: str | None, code: str) -> None:
    with pytest.raises(RefusedRequest) as refused:
        ChatRequest.read(request_body)
    assert (refused.value.param, refused.value.code, refused.value.status) == (param, code, 400)


def nested(schema: dict[str, Any]) -> list[dict[str, Any]]:
    whole = STRICT | {"properties": {"answer": schema, "reason": {"type": "string"}}}
    several = STRICT | {"properties": {"answer": {"anyOf": [schema]}, "reason": {"type": "string"}}}
    listed = STRICT | {"properties": {"answer": {"type": "array", "items": schema}, "reason": {"type": "string"}}}
    return [schema, whole, several, listed, STRICT | {"$defs": {"part": schema}}]


@pytest.mark.parametrize("schema", nested({k: v for k, v in STRICT.items() if k != "additionalProperties"}))
def test_a_strict_schema_closes_every_object(schema: dict[str, Any]) -> None:
    with pytest.raises(RefusedRequest, match="'additionalProperties' is required"):
        ChatRequest.read(asking_for(schema))
    assert ChatRequest.read(asking_for(schema, strict=False)).schema_asked == schema


@pytest.mark.parametrize("schema", nested(STRICT | {"required": ["answer"]}))
def test_a_strict_schema_requires_every_property(schema: dict[str, Any]) -> None:
    with pytest.raises(RefusedRequest, match="Missing 'reason'"):
        ChatRequest.read(asking_for(schema))
    assert ChatRequest.read(asking_for(schema, strict=False)).schema_asked == schema


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {"type": "boolean"}
    for _ in range(300):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RefusedRequest, match="nested more than 50 levels deep"):
        ChatRequest.read(asking_for(schema))
