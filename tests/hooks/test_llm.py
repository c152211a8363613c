from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import BaseHook

from beluga_airflow import CircuitBreaker, RateLimit, Retry
from beluga_airflow.config import LLMSettings, Settings
from beluga_airflow.errors import BreakerOpen, InvalidSetting, LimitReached, ModelUnavailable
from beluga_airflow.hooks.llm import LLMHook
from beluga_airflow.hooks.state import StateHook
from beluga_airflow.llm.client import Endpoint, ModelRequest
from beluga_airflow.llm.guarded import GuardedModel
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.resilience.breaker import breakers
from beluga_airflow.resilience.limits import limits
from beluga_airflow.state.memory import MemoryStore
from tests.hooks.conftest import SECRET

Connections = dict[str, Any]
Hush = Callable[..., None]
ASK = ModelRequest(
    messages=({"role": "user", "content": "hello"},),
    schema={
        "type": "object",
        "properties": {"answer": {"type": "boolean"}},
        "required": ["answer"],
        "additionalProperties": False,
    },
    max_tokens=5,
)


def llm(server: ModelServer | None = None, **fields: Any) -> dict[str, Any]:
    extra = {"provider": "simulated", **({"base_url": server.base_url} if server else {}), **fields}
    return {"conn_type": "beluga_llm", "password": SECRET, "extra": extra}


async def test_without_a_connection_the_defaults_serve(
    connections: Connections, monkeypatch: pytest.MonkeyPatch, hush: Hush
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    endpoint = await LLMHook().endpoint()
    assert endpoint == Endpoint(provider="openai", model="gpt-4o", timeout=30.0, conn_id="beluga_llm_default")
    assert (endpoint.address, endpoint.key) == ("https://api.openai.com/v1", SECRET)
    hush(endpoint, await LLMHook().client())


async def test_without_a_connection_and_a_key_it_says_where_keys_go(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InvalidSetting, match=r"no API key for model provider 'openai': .* OPENAI_API_KEY"):
        await LLMHook().client()


async def test_settings_are_the_defaults(connections: Connections) -> None:
    settings = Settings(llm=LLMSettings(provider="ollama", model="llama3", timeout=5.0))
    endpoint = await LLMHook(settings=settings).endpoint()
    assert endpoint == Endpoint(provider="ollama", model="llama3", timeout=5.0, conn_id="beluga_llm_default")
    connections["beluga_llm_default"] = llm(model="m")
    endpoint = await LLMHook(settings=settings).endpoint()
    assert (endpoint.provider, endpoint.model, endpoint.timeout) == ("simulated", "m", 5.0)


async def test_a_connection_says_it_all(connections: Connections, hush: Hush) -> None:
    connections["own"] = llm(provider="groq", model="m", base_url="http://localhost:1/v1", timeout=2.5)
    endpoint = await LLMHook("own").endpoint()
    assert endpoint == Endpoint(
        conn_id="own", provider="groq", model="m", base_url="http://localhost:1/v1", api_key=SECRET, timeout=2.5
    )
    hush(endpoint, LLMHook("own"))


async def test_an_empty_password_is_no_key(connections: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROQ_API_KEY", "from-the-environment")
    connections["own"] = {**llm(provider="groq"), "password": ""}
    assert (await LLMHook("own").endpoint()).key == "from-the-environment"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"provider": "opnai"}, "connection 'own': unknown model provider 'opnai': did you mean 'openai'?"),
        ({"provider": "azure"}, "model provider 'azure' needs a base_url in connection 'own'"),
        ({"timeout": "soon"}, "timeout of connection 'own' is 'soon', it must be a number above 0"),
        ({"timeout": 0}, "timeout of connection 'own' is '0'"),
        (
            {"structured_output": "json"},
            "connection 'own': structured_output is 'json', it must be auto, schema, text",
        ),
        ({"logprobs": True}, "connection 'own': logprobs is 'True', it must be auto, on, off"),
        (
            {"base_url": f"https://u:{SECRET}@h/v1"},
            "connection 'own': the base_url for model provider 'simulated' cannot be used",
        ),
        ({"base_url": f"h/v1?key={SECRET}"}, "cannot be used"),
    ],
)
async def test_what_cannot_be_used_is_refused(
    connections: Connections, fields: dict[str, Any], says: str, hush: Hush
) -> None:
    connections["own"] = llm(**fields)
    with pytest.raises(InvalidSetting) as caught:
        await LLMHook("own").client()
    assert says in str(caught.value)
    hush(caught.value)
    worked, told = await asyncio.to_thread(LLMHook("own").test_connection)
    assert (worked, told) == (False, str(caught.value))


async def test_missing_wrong_and_broken_connections_are_refused(connections: Connections, hush: Hush) -> None:
    connections["http"] = {"conn_type": "http", "password": SECRET}
    connections["broken"] = {**llm(), "extra": "{" + SECRET}
    for conn_id, says in [("none", "no connection 'none'"), ("http", "is of type 'http'"), ("broken", "not a JSON")]:
        with pytest.raises(InvalidSetting, match=says) as caught:
            await LLMHook(conn_id).endpoint()
        hush(caught.value)


async def test_the_client_asks_where_the_connection_leads(
    connections: Connections, model_server: ModelServer, hush: Hush
) -> None:
    connections["beluga_llm_default"] = llm(model_server, model="gpt-4.1")
    client = await LLMHook().client()
    reply = await client.answer(ASK)
    await client.close()
    assert (reply.model, reply.simulated, model_server.calls) == ("gpt-4.1", True, 1)
    hush(client, reply)


async def test_a_connection_says_what_its_endpoint_can_do(connections: Connections, model_server: ModelServer) -> None:
    connections["own"] = llm(model_server, structured_output="text", logprobs="off")
    endpoint = await LLMHook("own").endpoint()
    assert (endpoint.structured_output, endpoint.logprobs) == ("text", "off")
    client = await LLMHook("own").client()
    await client.answer(replace(ASK, logprobs="wanted"))
    with pytest.raises(
        InvalidSetting, match="connection 'own' has logprobs switched off, and a decision with min_conf"
    ):
        await client.answer(replace(ASK, logprobs="needed"))
    await client.close()
    (request,) = model_server.requests
    assert not {"response_format", "logprobs", "top_logprobs"} & request.keys()
    worked, _ = await asyncio.to_thread(LLMHook("own").test_connection)
    assert worked
    connections["own"] = llm(model_server)
    endpoint = await LLMHook("own").endpoint()
    assert (endpoint.structured_output, endpoint.logprobs) == ("auto", "auto")


# guards that all who use the connection share


async def test_a_connection_with_a_breaker(
    connections: Connections, model_server: ModelServer, home: Path, tmp_path: Path
) -> None:
    connections["own"] = llm(model_server, failure_threshold="2", recovery_timeout=3600)
    model_server.fail("status", times=9, status=503)
    for number in range(4):
        client = await LLMHook("own").client()
        with pytest.raises(ModelUnavailable if number < 2 else BreakerOpen):
            await client.answer(ASK)
        await client.close()
    assert model_server.calls == 2
    # where no store is given, it is the default one of Airflow's
    store = await StateHook().store()
    assert [(found.name, found.state) for found in await breakers(store)] == [("llm:own", "open")]
    await store.close()


async def test_a_connection_with_a_limit(connections: Connections, model_server: ModelServer) -> None:
    connections["own: it"] = llm(model_server, requests_per_minute=3, tokens_per_minute="100000", concurrent_calls=2)
    store = MemoryStore()
    client = await LLMHook("own: it", state=store).client()
    for _ in range(3):
        await client.answer(ASK)
    await client.close()
    (found,) = await limits(store)
    assert (found.name, found.requests, found.holders) == ("llm:own:_it", 3, 0)
    assert 0 < found.tokens < 1_000


async def test_a_connection_says_how_long_its_limit_may_take(
    connections: Connections, model_server: ModelServer
) -> None:
    connections["own"] = llm(model_server, requests_per_minute=1, max_wait=5)
    client = await LLMHook("own", state=MemoryStore()).client()
    await client.answer(ASK)
    with pytest.raises(LimitReached, match="this call may wait 5 s"):
        await client.answer(ASK)
    await client.close()
    # by itself it makes no limit
    connections["own"] = llm(model_server, max_wait=5)
    client = await LLMHook("own", state=MemoryStore()).client()
    assert not isinstance(client, GuardedModel)
    await client.close()


async def test_arguments_go_before_the_connection(connections: Connections, model_server: ModelServer) -> None:
    connections["own"] = llm(model_server, failure_threshold=1, requests_per_minute=1)
    store = MemoryStore()
    own = {"breaker": CircuitBreaker("b"), "limit": RateLimit("l", concurrent=9), "state": store}
    client = await LLMHook("own", **own, retry=Retry(maximum_attempts=2, initial_interval=0)).client()
    model_server.fail("status", status=503)
    assert (await client.answer(ASK)).content
    assert model_server.calls == 2, "asked again, since it was told to"
    await client.close()
    assert [found.name for found in await breakers(store)] == ["b"]
    assert [found.name for found in await limits(store)] == ["l"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"failure_threshold": 0}, "failure_threshold of connection 'own' is '0', it must be a number above 0"),
        ({"failure_threshold": 2.5}, "failure_threshold of connection 'own' is 2.5, it must be a whole number"),
        ({"recovery_timeout": "soon"}, "recovery_timeout of connection 'own' is 'soon'"),
        ({"requests_per_minute": -1}, "requests_per_minute of connection 'own' is '-1'"),
        ({"tokens_per_minute": "many"}, "tokens_per_minute of connection 'own' is 'many'"),
        ({"concurrent_calls": 1, "max_wait": "long"}, "max_wait of connection 'own' is 'long', it must be a number"),
        ({"concurrent_calls": 1.5}, "concurrent_calls of connection 'own' is 1.5, it must be a whole number"),
    ],
)
async def test_guards_that_cannot_be_are_refused(connections: Connections, fields: dict[str, Any], says: str) -> None:
    connections["own"] = llm(base_url="http://127.0.0.1:9/v1", **fields)
    with pytest.raises(InvalidSetting, match=says):
        await LLMHook("own").client()
    worked, told = await asyncio.to_thread(LLMHook("own").test_connection)
    assert (worked, says in told) == (False, True)


def test_what_is_no_guard_is_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"LLMHook\('x'\): breaker is 5, it must be a CircuitBreaker; retry is 3"):
        LLMHook("x", breaker=5, retry=3)  # type: ignore[arg-type]  # that is what is tested


# the button in Airflow's form


def test_the_connection_is_tested(connections: Connections, model_server: ModelServer, hush: Hush) -> None:
    connections["own"] = llm(model_server)
    hook = BaseHook.get_hook("own")
    assert isinstance(hook, LLMHook), "Airflow finds the hook by the connection's type"
    worked, told = hook.test_connection()
    assert worked
    assert told.startswith(f"model 'gpt-4o' of {model_server.base_url} (a SIMULATION) answered in ")
    assert model_server.calls == 1
    hush(told)


def test_a_test_that_fails_says_why(
    connections: Connections, model_server: ModelServer, unused_tcp_port: int, hush: Hush
) -> None:
    connections["down"] = llm(base_url=f"http://127.0.0.1:{unused_tcp_port}/v1")
    connections["own"] = llm(model_server)
    worked, told = LLMHook("down").test_connection()
    assert (worked, "cannot be reached" in told) == (False, True)
    hush(told)
    for failure, says in [
        ({"kind": "status", "status": 500, "message": SECRET}, "answered 500"),
        ({"kind": "not_json", "text": SECRET}, "check that its base_url is that of an OpenAI-compatible API"),
    ]:
        model_server.fail(**failure)  # type: ignore[arg-type]  # of several kinds
        worked, told = LLMHook("own").test_connection()
        assert (worked, says in told) == (False, True)
        hush(told)


async def test_a_wrong_key_fails_the_test(connections: Connections, hush: Hush) -> None:
    async with ModelServer(api_key="the-right-key") as server:
        connections["own"] = llm(server)
        worked, told = await asyncio.to_thread(LLMHook("own").test_connection)
    assert not worked
    assert "401 (invalid_api_key): it refuses the API key; mend the password of connection " in told
    hush(told)
