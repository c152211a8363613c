from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from beluga_airflow.llm.client import Endpoint, ModelRequest, OpenAIClient
from beluga_airflow.llm.model_server import ModelServer

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "enum": ["a", "b"]}, "reason": {"type": "string"}},
    "required": ["answer", "reason"],
    "additionalProperties": False,
}


def test_a_blocking_test_is_served(model_server: ModelServer) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    answer = httpx.post(
        f"{model_server.base_url}/chat/completions", json=body, headers={"authorization": "Bearer key"}, timeout=10
    )
    assert answer.json()["system_fingerprint"] == "beluga-simulation"
    assert model_server.calls == 1


@pytest.mark.parametrize("model_rules", [[{"answer": "b"}]])
async def test_an_async_test_is_served_by_its_rules(model_server: ModelServer, model_rules: Any) -> None:
    client = OpenAIClient(Endpoint(provider="simulated", base_url=model_server.base_url))
    request = ModelRequest(messages=({"role": "user", "content": "?"},), schema=SCHEMA, max_tokens=50)
    reply = await client.answer(request)
    await client.close()
    assert json.loads(reply.content)["answer"] == model_rules[0]["answer"]
    assert reply.simulated
