"""The troubles that the model server plays, seen by OpenAI's library and on the wire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import httpx
import openai
import pytest

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.llm.model_server import ModelServer
from tests.llm.test_model_server import DEADLINE, client_of, decide, until


@pytest.fixture
async def server() -> AsyncIterator[ModelServer]:
    async with ModelServer() as server:
        yield server


@pytest.fixture
async def client(server: ModelServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(server) as client:
        yield client


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=DEADLINE) as http:
        yield http


async def ask(http: httpx.AsyncClient, url: str, model: str = "m") -> httpx.Response:
    return await http.post(
        f"{url}/chat/completions", json={"model": model, "messages": [{"role": "user", "content": "hello"}]}
    )


async def statuses(http: httpx.AsyncClient, url: str, count: int, model: str = "m") -> list[int]:
    return [(await ask(http, url, model)).status_code for _ in range(count)]


# each kind


@pytest.mark.parametrize(
    ("form", "headers"),
    [
        ("seconds", {"retry-after": "2.5"}),
        ("ms", {"retry-after-ms": "2500"}),
        ("none", {}),
        ("nonsense", {"retry-after": "when the moon is full"}),
    ],
)
async def test_a_rate_limit_says_when_to_come_back_in_each_form(
    server: ModelServer, http: httpx.AsyncClient, form: str, headers: dict[str, str]
) -> None:
    server.fail("rate_limit", retry_after=2.5, form=form)
    reply = await ask(http, server.base_url)
    assert reply.status_code == 429
    assert {name: text for name, text in reply.headers.items() if name.startswith("retry")} == headers
    assert reply.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }


async def test_a_rate_limit_may_name_a_date(server: ModelServer, http: httpx.AsyncClient) -> None:
    server.fail("rate_limit", retry_after=60, form="date")
    before = datetime.now(UTC)
    reply = await ask(http, server.base_url)
    assert reply.headers["retry-after"].endswith(" GMT")
    moment = parsedate_to_datetime(reply.headers["retry-after"])
    assert timedelta(seconds=60) <= moment - before <= timedelta(seconds=62)


@pytest.mark.parametrize("form", ["seconds", "ms", "date", "none", "nonsense"])
async def test_the_library_waits_as_it_understands(server: ModelServer, form: str) -> None:
    server.fail("rate_limit", retry_after=0.01, form=form)
    async with client_of(server) as client:
        await decide(client.with_options(max_retries=1))
    assert server.counts["by_status"] == {"429": 1, "200": 1}


@pytest.mark.parametrize(
    ("kind", "error", "status", "code", "type_"),
    [
        ("insufficient_quota", openai.RateLimitError, 429, "insufficient_quota", "insufficient_quota"),
        ("wrong_key", openai.AuthenticationError, 401, "invalid_api_key", "invalid_request_error"),
        ("unknown_model", openai.NotFoundError, 404, "model_not_found", "invalid_request_error"),
        ("overloaded", openai.InternalServerError, 529, None, "overloaded_error"),
    ],
)
async def test_errors_that_have_a_name(
    server: ModelServer,
    client: openai.AsyncOpenAI,
    kind: str,
    error: type[openai.APIStatusError],
    status: int,
    code: str | None,
    type_: str,
) -> None:
    server.fail(kind)
    with pytest.raises(error) as failed:
        await decide(client)
    assert (failed.value.status_code, failed.value.code, failed.value.type) == (status, code, type_)


@pytest.mark.parametrize("status", [500, 502, 503, 529])
async def test_servers_errors(server: ModelServer, http: httpx.AsyncClient, status: int) -> None:
    server.fail("status", status=status, param="model", type="api_error", code="odd", message="no")
    reply = await ask(http, server.base_url)
    assert reply.status_code == status
    assert reply.json() == {"error": {"message": "no", "type": "api_error", "param": "model", "code": "odd"}}


async def test_a_reset_after_the_headers_cuts_the_body(server: ModelServer, client: openai.AsyncOpenAI) -> None:
    server.fail("reset", after="headers", times=2)
    with pytest.raises(openai.APIConnectionError):
        await decide(client)
    body = b'{"model": "m", "messages": [{"role": "user", "content": "hello"}]}'
    reader, writer = await asyncio.open_connection(server.host, server.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    async with asyncio.timeout(DEADLINE):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        with pytest.raises(ConnectionResetError):
            await reader.read()
    writer.close()
    assert server.counts == {"total": 2, "answered": 0, "failed": 2, "by_status": {"cut": 2}}


async def test_json_that_is_no_completion(server: ModelServer, http: httpx.AsyncClient) -> None:
    server.fail("no_completion")
    server.fail("no_completion", body=[])
    replies = [await ask(http, server.base_url) for _ in range(2)]
    assert [(reply.status_code, reply.json()) for reply in replies] == [(200, {"status": "ok"}), (200, [])]
    assert server.counts["answered"] == 0


async def test_an_answer_cut_off_at_its_length(server: ModelServer, client: openai.AsyncOpenAI) -> None:
    server.fail("length", tokens=6)
    reply = await decide(client, logprobs=True)
    (choice,) = reply.choices
    assert (choice.finish_reason, choice.message.content) == ("length", '{"answer": "stand')
    assert choice.logprobs is not None
    assert len(choice.logprobs.content) == 6
    assert server.counts["answered"] == 1


async def test_an_answer_that_drips(server: ModelServer, client: openai.AsyncOpenAI) -> None:
    server.fail("drip", delay=0)
    assert (await decide(client)).choices[0].finish_reason == "stop"
    server.fail("drip", delay=0.05)
    # each byte is in time, the whole is not: a limit for the time between bytes does not end it
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await decide(client, timeout=0.3)
    await until(lambda: server.counts["by_status"] == {"200": 1, "cut": 1})


async def test_a_drip_is_a_byte_at_a_time(server: ModelServer) -> None:
    server.fail("drip", delay=0.001)
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession() as http:
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
        started = loop.time()
        async with http.post(f"{server.base_url}/chat/completions", json=body) as reply:
            text = await reply.read()
    assert loop.time() - started >= len(text) * 0.001
    assert json.loads(text)["system_fingerprint"] == "beluga-simulation"


async def test_every_kind_is_played_as_it_is(server: ModelServer) -> None:
    """No kind answers as if nothing were."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("status", {}),
        ("rate_limit", {}),
        *((kind, {}) for kind in ("insufficient_quota", "wrong_key", "unknown_model", "overloaded")),
        *((kind, {}) for kind in ("half_body", "not_json", "no_completion", "bad_answer")),
        *((kind, {}) for kind in ("refusal", "content_filter", "empty", "length")),
    ]
    async with httpx.AsyncClient(timeout=DEADLINE) as http:
        plain = (await ask(http, server.base_url)).json()["choices"]
        for kind, options in kinds:
            server.fail(kind, **options)
            try:
                reply = await ask(http, server.base_url)
                told = reply.json()["choices"] if reply.status_code == 200 else None
            except (httpx.HTTPError, ValueError, KeyError):
                told = None
            assert told != plain, kind


# when, and whose


async def test_troubles_come_at_the_calls_that_they_name(server: ModelServer, http: httpx.AsyncClient) -> None:
    server.fail("status", status=500, calls=[2, 4])
    server.fail("status", status=503, every=3)
    assert await statuses(http, server.base_url, 7) == [200, 500, 503, 500, 200, 503, 200]


async def test_always_lasts_until_a_reset(server: ModelServer, http: httpx.AsyncClient) -> None:
    server.fail("overloaded", every=1)
    assert await statuses(http, server.base_url, 3) == [529] * 3
    server.reset()
    assert await statuses(http, server.base_url, 1) == [200]


async def test_times_limits_a_trouble_that_comes_again(server: ModelServer, http: httpx.AsyncClient) -> None:
    server.fail("status", status=500, every=2, times=2)
    assert await statuses(http, server.base_url, 7) == [200, 500, 200, 500, 200, 200, 200]


async def test_troubles_concern_a_model_or_a_connection(server: ModelServer, http: httpx.AsyncClient) -> None:
    server.fail("status", status=500, model="large", calls=[2])
    server.fail("status", status=503, connection="primary", times=2)
    server.fail("status", status=502, model="large", connection="backup", every=1)
    assert await statuses(http, server.base_url, 1, "small") == [200]
    assert await statuses(http, server.base_url, 3, "large") == [200, 500, 200]
    assert await statuses(http, server.url_of("primary"), 3, "small") == [503, 503, 200]
    assert await statuses(http, server.url_of("backup"), 2, "large") == [502, 502]
    assert await statuses(http, server.url_of("backup"), 1, "small") == [200]


async def test_troubles_of_a_rules_file_start_anew_with_a_reset(http: httpx.AsyncClient) -> None:
    rules = {"troubles": [{"kind": "rate_limit", "calls": [1]}, {"kind": "overloaded", "every": 3}]}
    async with ModelServer(rules=rules) as server:
        for _ in range(2):
            assert await statuses(http, server.base_url, 4) == [429, 200, 529, 200]
            server.reset()


async def test_troubles_over_http(server: ModelServer, http: httpx.AsyncClient) -> None:
    address = server.base_url.removesuffix("/v1")
    troubles = [{"kind": "rate_limit", "calls": [1, 3]}, {"kind": "overloaded", "connection": "backup", "times": 2}]
    assert (await http.post(f"{address}/failures", json=troubles)).json() == {"queued": 3}
    assert await statuses(http, server.base_url, 3) == [429, 200, 429]
    assert await statuses(http, server.url_of("backup"), 3) == [529, 529, 200]


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("slow", {"calls": [0]}, "slow.calls"),
        ("slow", {"calls": [1], "every": 2}, "not both"),
        ("slow", {"every": 0}, "slow.every"),
        ("slow", {"delay": float("nan")}, "slow.delay"),
        ("rate_limit", {"form": "weeks"}, "rate_limit.form"),
        ("rate_limit", {"retry_after": -1}, "rate_limit.retry_after"),
        ("reset", {"after": "lunch"}, "reset.after"),
        ("length", {"tokens": -1}, "length.tokens"),
        ("overloaded", {"status": 500}, "overloaded.status"),
    ],
)
def test_a_trouble_that_means_nothing_is_refused(kind: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidSetting, match=named):
        ModelServer().fail(kind, **options)
