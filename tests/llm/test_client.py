"""The client over real HTTP: what each failure of an endpoint becomes."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from beluga_airflow.errors import InvalidSetting, ModelError, ModelRefused, ModelUnavailable
from beluga_airflow.llm.client import Endpoint, ModelRequest, OpenAIClient, Usage
from beluga_airflow.llm.model_server import ModelServer
from tests.llm.conftest import DATUM, KEY, QUESTION, SERVER_WORDS, ClientFactory, assert_tells_nothing

REQUEST = ModelRequest(
    messages=({"role": "system", "content": "Decide."}, {"role": "user", "content": f"{QUESTION} {DATUM}"}),
    schema={
        "type": "object",
        "properties": {"answer": {"type": "boolean"}},
        "required": ["answer"],
        "additionalProperties": False,
    },
    max_tokens=50,
)
COMPLETION: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-4o",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": '{"answer": true}'}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
}


async def error_of(client: OpenAIClient) -> ModelError:
    with pytest.raises(ModelError) as caught:
        await client.answer(REQUEST)
    assert_tells_nothing(caught.value)
    return caught.value


@asynccontextmanager
async def endpoint_that(answers: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[str]:
    """A server that reads a request and answers by bytes, as no sound endpoint would; its base URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
            await reader.readexactly(int(length.split(b":")[1]))
            await answers(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client gave up
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


def body(content: bytes, headers: str = "Content-Type: application/json") -> Callable[..., Awaitable[None]]:
    async def answer(writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 200 OK\r\n{headers}\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await writer.drain()

    return answer


async def test_an_answer_comes_back_with_what_it_cost(model_server: ModelServer, client_of: ClientFactory) -> None:
    reply = await client_of(model_server).answer(REQUEST)
    assert json.loads(reply.content) == {"answer": False}
    assert (reply.trouble, reply.model, reply.provider, reply.simulated) == (None, "gpt-4o", "simulated", True)
    assert reply.usage.input > 0
    assert reply.usage.output > 0
    assert 0 <= reply.seconds < 10
    assert Usage(input=1, output=2) + Usage(input=3, output=4) == Usage(input=4, output=6)


async def test_what_is_sent(model_server: ModelServer, client_of: ClientFactory) -> None:
    client = client_of(model_server, model="gpt-4.1")
    await client.answer(REQUEST)
    await client.answer(ModelRequest(messages=REQUEST.messages, schema=REQUEST.schema, max_tokens=9, model="o3"))
    first, second = model_server.requests
    assert first == {
        "model": "gpt-4.1",
        "messages": list(REQUEST.messages),
        "max_completion_tokens": 50,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "decision", "strict": True, "schema": REQUEST.schema},
        },
    }
    assert (second["model"], second["max_completion_tokens"]) == ("o3", 9)


@pytest.mark.parametrize(
    ("provider", "limit"),
    [("openai", "max_completion_tokens"), ("vllm", "max_completion_tokens"), ("mistral", "max_tokens")],
)
async def test_an_answer_is_bounded_by_the_name_that_the_provider_knows(
    model_server: ModelServer, client_of: ClientFactory, provider: str, limit: str
) -> None:
    await client_of(model_server, provider=provider).answer(REQUEST)
    (request,) = model_server.requests
    assert [(name, value) for name, value in request.items() if "tokens" in name] == [(limit, 50)]


@pytest.mark.parametrize(
    ("status", "options", "kind", "says"),
    [
        (400, {}, ModelRefused, "answered 400: it refuses the request"),
        (401, {"code": "invalid_api_key"}, ModelRefused, r"401 \(invalid_api_key\): it refuses the API key; mend the"),
        (403, {}, ModelRefused, "403: it refuses the API key"),
        (404, {"code": "model_not_found"}, ModelRefused, r"404 \(model_not_found\): it refuses the request"),
        (408, {}, ModelUnavailable, "408; it may work later"),
        (409, {}, ModelUnavailable, "409"),
        (422, {}, ModelRefused, "422"),
        (429, {}, ModelUnavailable, r"429 \(rate_limit_exceeded\); it may work later"),
        (429, {"code": "insufficient_quota"}, ModelRefused, "no quota left; top it up"),
        (500, {}, ModelUnavailable, "500; it may work later"),
        (503, {}, ModelUnavailable, "503"),
        (500, {"headers": {"x-should-retry": "false"}}, ModelRefused, "500"),
        (400, {"headers": {"x-should-retry": "true"}}, ModelUnavailable, "400"),
        (401, {"headers": {"x-should-retry": "true"}}, ModelRefused, "401"),
        # a code that is no code is not repeated
        (400, {"code": KEY}, ModelRefused, "answered 400: it refuses"),
        (400, {"code": DATUM}, ModelRefused, "answered 400: it refuses"),
    ],
)
async def test_a_status_becomes_an_error(
    model_server: ModelServer,
    client_of: ClientFactory,
    status: int,
    options: dict[str, Any],
    kind: type[ModelError],
    says: str,
) -> None:
    model_server.fail("status", status=status, message=SERVER_WORDS, **options)
    error = await error_of(client_of(model_server))
    assert type(error) is kind
    assert error.retryable is (kind is ModelUnavailable)
    assert str(error).startswith(f"the model endpoint {model_server.base_url} (provider 'simulated') answered {status}")
    assert re.search(says, str(error))
    assert model_server.calls == 1, "the step's Retry is the one layer that retries"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 +9999999"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": ""}, None),
        ({}, None),
    ],
)
async def test_how_long_to_wait_is_read_in_every_form(
    model_server: ModelServer, client_of: ClientFactory, headers: dict[str, Any], seconds: float | None
) -> None:
    model_server.fail("status", status=429, headers=headers)
    error = await error_of(client_of(model_server))
    assert isinstance(error, ModelUnavailable)
    assert error.retry_after == seconds


async def test_a_date_says_how_long_to_wait(model_server: ModelServer, client_of: ClientFactory) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    model_server.fail("status", status=503, headers={"retry-after": later})
    error = await error_of(client_of(model_server))
    assert isinstance(error, ModelUnavailable)
    assert error.retry_after is not None
    assert 20 < error.retry_after <= 30


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        ({"kind": "reset"}, "cannot be reached or broke off; check base_url and that it is up"),
        ({"kind": "half_body"}, "cannot be reached or broke off"),
        ({"kind": "not_json", "text": SERVER_WORDS}, "no chat completion"),
        ({"kind": "not_json", "text": SERVER_WORDS, "content_type": "application/json"}, "no chat completion"),
        ({"kind": "not_json", "text": SERVER_WORDS, "content_type": "text/plain"}, "no chat completion"),
        *(
            ({"kind": "not_json", "text": text, "content_type": "application/json"}, "no chat completion")
            for text in ("null", "[]", "{}", '{"choices": []}', '{"choices": [{}]}', '"SERVERWORDS"', "[" * 100_000)
        ),
    ],
)
async def test_what_is_no_answer_may_be_asked_for_again(
    model_server: ModelServer, client_of: ClientFactory, failure: dict[str, Any], says: str
) -> None:
    client = client_of(model_server)
    model_server.fail(**failure)
    error = await error_of(client)
    assert type(error) is ModelUnavailable
    assert says in str(error)
    assert model_server.calls == 1
    # the client is as good as before
    assert (await client.answer(REQUEST)).trouble is None


@pytest.mark.parametrize(
    ("kind", "trouble"),
    [
        ("refusal", "the model refused to answer"),
        ("empty", "the answer is empty"),
        ("content_filter", "a content filter stopped the answer"),
    ],
)
async def test_no_answer_from_the_model_is_no_error_and_is_paid(
    model_server: ModelServer, client_of: ClientFactory, kind: str, trouble: str
) -> None:
    model_server.fail(kind)
    reply = await client_of(model_server).answer(REQUEST)
    assert (reply.content, reply.trouble) == ("", trouble)
    assert reply.usage.input > 0


async def test_an_answer_that_was_cut_off_is_none(client_of: ClientFactory) -> None:
    choice = {**COMPLETION["choices"][0], "finish_reason": "length"}
    async with endpoint_that(body(json.dumps({**COMPLETION, "choices": [choice]}).encode())) as url:
        reply = await client_of(url).answer(REQUEST)
    assert (reply.content, reply.trouble) == ("", "the answer was cut off at max_tokens")
    assert not reply.simulated


@pytest.mark.parametrize(
    ("odd", "usage"),
    [
        ({"usage": None}, Usage()),
        ({"usage": {}}, Usage()),
        ({"usage": {"prompt_tokens": None, "completion_tokens": "many", "total_tokens": 0}}, Usage()),
        ({"usage": {"prompt_tokens": -5, "completion_tokens": 3, "total_tokens": 0}}, Usage(output=3)),
        ({"model": None, "system_fingerprint": 12}, Usage(input=7, output=3)),
    ],
)
async def test_odd_endpoints_cost_no_answer(client_of: ClientFactory, odd: dict[str, Any], usage: Usage) -> None:
    async with endpoint_that(body(json.dumps({**COMPLETION, **odd}).encode())) as url:
        reply = await client_of(url).answer(REQUEST)
    assert (reply.content, reply.usage) == ('{"answer": true}', usage)
    assert reply.model in ("gpt-4o", "unknown")
    assert not reply.simulated


async def test_a_body_that_cannot_be_unpacked_may_be_asked_for_again(client_of: ClientFactory) -> None:
    spoiled = gzip.compress(b"{}")[:-6] + b"SERVERWORDS"
    async with endpoint_that(body(spoiled, "Content-Encoding: gzip\r\nContent-Type: application/json")) as url:
        assert isinstance(await error_of(client_of(url)), ModelUnavailable)


async def test_a_slow_endpoint_is_given_up(model_server: ModelServer, client_of: ClientFactory) -> None:
    model_server.fail("slow", delay=30)
    error = await error_of(client_of(model_server, timeout=0.2))
    assert type(error) is ModelUnavailable
    assert str(error).endswith("did not answer within 0.2 s")


async def test_an_endpoint_that_trickles_is_given_up(client_of: ClientFactory) -> None:
    async def trickle(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with endpoint_that(trickle) as url:
        error = await error_of(client_of(url, timeout=0.3))
    assert str(error).endswith("did not answer within 0.3 s")


async def test_nobody_at_the_address(unused_tcp_port: int, client_of: ClientFactory) -> None:
    error = await error_of(client_of(f"http://127.0.0.1:{unused_tcp_port}/v1"))
    assert type(error) is ModelUnavailable
    assert "cannot be reached" in str(error)


async def test_a_wrong_key_is_refused() -> None:
    async with ModelServer(api_key="sk-the-right-one") as server:
        wrong = OpenAIClient(Endpoint(provider="simulated", api_key=KEY, base_url=server.base_url))
        right = OpenAIClient(Endpoint(provider="simulated", api_key=" sk-the-right-one\n", base_url=server.base_url))
        error = await error_of(wrong)
        assert type(error) is ModelRefused
        assert (await right.answer(REQUEST)).trouble is None
        await wrong.close()
        await right.close()


async def test_a_closed_client_opens_again(model_server: ModelServer, client_of: ClientFactory) -> None:
    client = client_of(model_server)
    await client.close()
    await client.answer(REQUEST)
    await client.close()
    await client.answer(REQUEST)
    assert model_server.calls == 2


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
async def test_logs_tell_nothing(
    model_server: ModelServer, client_of: ClientFactory, caplog: pytest.LogCaptureFixture, level: int
) -> None:
    with caplog.at_level(level):
        client = client_of(model_server)
        await client.answer(REQUEST)
        model_server.fail("status", status=500, message=SERVER_WORDS)
        await error_of(client)
    for word in (KEY, "QUESTIONMARK", "DATUM", "SERVERWORDS"):
        assert word not in caplog.text


# endpoints


def test_what_holds_when_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint = Endpoint()
    assert (endpoint.provider, endpoint.model, endpoint.timeout) == ("openai", "gpt-4o", 30.0)
    assert (endpoint.address, endpoint.key) == ("https://api.openai.com/v1", KEY)
    assert KEY not in repr(endpoint)
    assert KEY not in repr(Endpoint(api_key=KEY))


def test_a_missing_key_says_where_to_put_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GROQ_API_KEY", raising=False)
    with pytest.raises(InvalidSetting, match=r"'groq'.*password of the connection.*GROQ_API_KEY"):
        OpenAIClient(Endpoint(provider="groq"))


def test_a_provider_may_want_no_key() -> None:
    assert Endpoint(provider="ollama").key == "none"
    assert Endpoint(provider="ollama", api_key="own").key == "own"


@pytest.mark.parametrize("key", ["sk-kéy", "sk-one\nsk-two", "sk\x00", "\N{KEY}"])
def test_a_key_that_cannot_be_one_is_refused(key: str) -> None:
    with pytest.raises(InvalidSetting, match="holds characters that no key has") as caught:
        OpenAIClient(Endpoint(api_key=key))
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "base_url",
    [
        "localhost:8000/v1",
        "ftp://h/v1",
        "http://",
        "http://[",
        "http://h:99999/v1",
        f"http://user:{KEY}@h/v1",
        f"http://{KEY}@h/v1",
        f"http://h/v1?key={KEY}",
        f"http://h/v1#{KEY}",
        "no address",
    ],
)
def test_an_address_that_cannot_be_one_is_refused(base_url: str) -> None:
    with pytest.raises(InvalidSetting, match=r"base_url .*'vllm' cannot be used: write http\(s\)://") as caught:
        Endpoint(provider="vllm", base_url=base_url)
    assert_tells_nothing(caught.value)


def test_azure_needs_an_address() -> None:
    with pytest.raises(InvalidSetting, match="'azure' needs a base_url"):
        OpenAIClient(Endpoint(provider="azure", api_key="k"))


async def test_a_check_finds_a_key_that_is_refused_and_asks_nothing() -> None:
    async with ModelServer(api_key="right") as server:
        endpoint = Endpoint(provider="simulated", base_url=server.base_url, api_key="wrong")
        wrong, right = OpenAIClient(endpoint), OpenAIClient(dataclasses.replace(endpoint, api_key="right"))
        with pytest.raises(ModelRefused, match="it refuses the API key"):
            await wrong.check()
        await right.check()
        assert (wrong.refused, right.refused) == (True, False)
        assert server.calls == 0
        await wrong.close()
        await right.close()


async def test_a_check_of_an_endpoint_that_cannot_tell_refuses_nothing(unused_tcp_port: int) -> None:
    client = OpenAIClient(Endpoint(provider="simulated", base_url=f"http://127.0.0.1:{unused_tcp_port}/v1", timeout=5))
    await client.check()
    assert not client.refused
    await client.close()
