from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.llm.model_rules import DEFAULT_REASON
from beluga_airflow.llm.model_server import MAX_BODY_BYTES, REQUESTS_KEPT, ModelServer, main

ROOT = Path(__file__).parents[2]
DEADLINE = 20
SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"type": "string", "enum": ["standard", "expedite"]},
        "reason": {"type": "string"},
    },
    "required": ["answer", "reason"],
    "additionalProperties": False,
}
RULES = [{"when": {"customer_tier": "gold"}, "answer": "expedite", "reason": "gold goes first"}]


def client_of(server: ModelServer, api_key: str = "any") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.base_url, api_key=api_key, max_retries=0, timeout=DEADLINE)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not holds():  # noqa: ASYNC110  # the server has no event for a count
            await asyncio.sleep(0.01)


def user_message(data: dict[str, Any]) -> str:
    return f"How?\n\n<<<DATA 3f2a9c>>>\n{json.dumps(data)}\n<<<END 3f2a9c>>>"


async def decide(client: openai.AsyncOpenAI, data: dict[str, Any] | None = None, **options: Any) -> Any:
    return await client.chat.completions.create(
        model="gpt-4o",
        messages=[
            {"role": "system", "content": "Answer in JSON."},
            {"role": "user", "content": user_message(data or {})},
        ],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "decision", "strict": True, "schema": SCHEMA},
        },
        **options,
    )


@pytest.fixture
async def server() -> AsyncIterator[ModelServer]:
    async with ModelServer(rules=RULES) as server:
        yield server


@pytest.fixture
async def client(server: ModelServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client_of(server) as client:
        yield client


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=DEADLINE)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield session


def control(server: ModelServer, path: str) -> str:
    return server.base_url.removesuffix("/v1") + path


async def test_a_rule_answers_as_openai_would(server: ModelServer, client: openai.AsyncOpenAI) -> None:
    reply = await decide(client, {"customer_tier": "gold"})
    assert isinstance(reply, ChatCompletion)
    content = '{"answer": "expedite", "reason": "gold goes first"}'
    prompt = len("Answer in JSON.") + len(user_message({"customer_tier": "gold"}))
    assert reply.id.startswith("chatcmpl-")
    assert reply.object == "chat.completion"
    assert reply.created > 1_700_000_000
    assert reply.model == "gpt-4o"
    assert reply.system_fingerprint == "beluga-simulation"
    (choice,) = reply.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "stop", "assistant")
    assert (choice.message.content, choice.message.refusal) == (content, None)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == -(-prompt // 4)
    assert reply.usage.completion_tokens == -(-len(content) // 4)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply._request_id is not None


async def test_a_reply_has_no_field_that_openai_does_not_know(client: openai.AsyncOpenAI) -> None:
    reply = await decide(client)
    parts = [reply, reply.choices[0], reply.choices[0].message, reply.usage]
    assert [part.model_extra for part in parts] == [{}] * len(parts)


async def test_no_rule_gives_a_default_that_says_so(client: openai.AsyncOpenAI) -> None:
    reply = await decide(client, {"customer_tier": "bronze"})
    assert json.loads(reply.choices[0].message.content) == {"answer": "standard", "reason": DEFAULT_REASON}


async def test_without_a_schema_the_answer_is_text(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}])
    assert reply.choices[0].message.content == DEFAULT_REASON


async def test_the_parse_helper_of_the_client_reads_the_answer(client: openai.AsyncOpenAI) -> None:
    class Verdict(BaseModel):
        answer: bool
        reason: str

    reply = await client.chat.completions.parse(
        model="m", messages=[{"role": "user", "content": "ok?"}], response_format=Verdict
    )
    assert reply.choices[0].message.parsed == Verdict(answer=False, reason=DEFAULT_REASON)


async def test_the_api_is_served_without_its_prefix_too(server: ModelServer) -> None:
    bare = server.base_url.removesuffix("/v1")
    async with openai.AsyncOpenAI(base_url=bare, api_key="any", max_retries=0) as client:
        assert (await decide(client)).model == "gpt-4o"
        assert [model.owned_by async for model in client.models.list()] == ["beluga-simulation"]


async def test_calls_are_counted_and_kept(
    server: ModelServer, client: openai.AsyncOpenAI, http: aiohttp.ClientSession
) -> None:
    server.fail("status", status=503)
    server.fail("reset")
    for _ in range(2):
        with pytest.raises(openai.APIError):
            await decide(client)
    await decide(client, {"customer_tier": "gold"})
    counts = {"total": 3, "answered": 1, "failed": 2, "by_status": {"503": 1, "cut": 1, "200": 1}}
    assert server.calls == 3
    assert server.counts == counts
    assert await (await http.get(control(server, "/calls"))).json() == counts
    assert [request["messages"][1]["content"] for request in server.requests] == [
        user_message({}),
        user_message({}),
        user_message({"customer_tier": "gold"}),
    ]


async def test_reset_forgets_everything(
    server: ModelServer, client: openai.AsyncOpenAI, http: aiohttp.ClientSession
) -> None:
    await decide(client)
    server.fail("status", status=500, times=5)
    reply = await (await http.post(control(server, "/reset"))).json()
    assert reply == server.counts == {"total": 0, "answered": 0, "failed": 0, "by_status": {}}
    assert server.requests == []
    assert (await decide(client)).choices[0].finish_reason == "stop"


async def test_the_requests_kept_are_bounded(server: ModelServer, http: aiohttp.ClientSession) -> None:
    for number in range(REQUESTS_KEPT + 2):
        await http.post(f"{server.base_url}/chat/completions", json={"number": number})
    assert server.calls == REQUESTS_KEPT + 2
    assert [request["number"] for request in server.requests] == list(range(2, REQUESTS_KEPT + 2))


async def test_health_says_that_it_is_a_simulation(server: ModelServer, http: aiohttp.ClientSession) -> None:
    reply = await http.get(control(server, "/health"))
    assert (reply.status, await reply.json()) == (200, {"status": "ok", "simulation": True})


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
async def test_a_status_is_the_clients_error(
    server: ModelServer, client: openai.AsyncOpenAI, status: int, error: type[openai.APIStatusError]
) -> None:
    server.fail("status", status=status, message="on purpose")
    with pytest.raises(error, match="on purpose") as failed:
        await decide(client)
    assert failed.value.status_code == status
    assert (await decide(client)).model == "gpt-4o"


async def test_a_status_carries_its_headers_and_code(server: ModelServer, client: openai.AsyncOpenAI) -> None:
    server.fail("status", status=429, headers={"retry-after-ms": "1500", "x-should-retry": "false"})
    server.fail("status", status=429, code="insufficient_quota")
    with pytest.raises(openai.RateLimitError) as limited:
        await decide(client)
    assert limited.value.response.headers["retry-after-ms"] == "1500"
    assert limited.value.response.headers["x-should-retry"] == "false"
    assert (limited.value.code, limited.value.type) == ("rate_limit_exceeded", "requests")
    with pytest.raises(openai.RateLimitError) as broke:
        await decide(client)
    assert (broke.value.code, broke.value.type) == ("insufficient_quota", "insufficient_quota")


async def test_the_clients_own_retries_get_through(server: ModelServer) -> None:
    server.fail("status", status=429, times=2, headers={"retry-after-ms": "1"})
    async with client_of(server) as client:
        assert (await decide(client.with_options(max_retries=2))).model == "gpt-4o"
    assert server.calls == 3


@pytest.mark.parametrize("kind", ["reset", "half_body"])
async def test_a_broken_connection_is_a_connection_error(
    server: ModelServer, client: openai.AsyncOpenAI, kind: str
) -> None:
    server.fail(kind)
    with pytest.raises(openai.APIConnectionError):
        await decide(client)
    assert server.counts == {"total": 1, "answered": 0, "failed": 1, "by_status": {"cut": 1}}
    assert (await decide(client)).model == "gpt-4o"


async def raw_reply(server: ModelServer) -> bytes:
    """What a call gets on the wire until its connection ends."""
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]})
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write((head + body).encode())
        return await asyncio.wait_for(reader.read(), DEADLINE)
    finally:
        writer.close()


async def test_a_reset_is_a_reset_on_the_wire(server: ModelServer) -> None:
    server.fail("reset")
    with pytest.raises(ConnectionResetError):
        await raw_reply(server)


async def test_half_a_body_is_half_of_what_was_announced(server: ModelServer) -> None:
    server.fail("half_body")
    head, _, half = (await raw_reply(server)).partition(b"\r\n\r\n")
    announced = next(line for line in head.splitlines() if line.lower().startswith(b"content-length"))
    assert len(half) == int(announced.split(b":")[1]) // 2
    assert half.startswith(b'{"id": "chatcmpl-')


async def test_what_is_not_json_arrives_as_text_or_fails_to_parse(
    server: ModelServer, client: openai.AsyncOpenAI
) -> None:
    server.fail("not_json", text="<html>")
    server.fail("not_json", text="<html>", content_type="application/json")
    assert await decide(client) == "<html>"
    with pytest.raises(json.JSONDecodeError):
        await decide(client)
    assert server.counts == {"total": 2, "answered": 0, "failed": 2, "by_status": {"200": 2}}


async def test_odd_answers_are_whole_replies(server: ModelServer, client: openai.AsyncOpenAI) -> None:
    server.fail("bad_answer")
    server.fail("bad_answer", text="expedite, I think")
    server.fail("refusal", text="I won't.")
    server.fail("content_filter")
    server.fail("empty")
    replies = [(await decide(client)).choices[0] for _ in range(5)]
    assert [(reply.message.content, reply.message.refusal, reply.finish_reason) for reply in replies] == [
        ('{"answer": {"not": "asked for"}}', None, "stop"),
        ("expedite, I think", None, "stop"),
        (None, "I won't.", "stop"),
        (None, None, "content_filter"),
        ("", None, "stop"),
    ]
    assert server.counts == {"total": 5, "answered": 5, "failed": 0, "by_status": {"200": 5}}


async def test_a_slow_answer_outlasts_the_clients_timeout(server: ModelServer, client: openai.AsyncOpenAI) -> None:
    server.fail("slow", delay=DEADLINE)
    with pytest.raises(openai.APITimeoutError):
        await decide(client, timeout=0.2)
    assert (await decide(client)).model == "gpt-4o"
    await until(lambda: server.counts["by_status"] == {"cut": 1, "200": 1})


async def test_latency_and_slowness_add_up() -> None:
    loop = asyncio.get_running_loop()
    async with ModelServer(latency=0.1) as server, client_of(server) as client:
        server.fail("slow", delay=0.1)
        for least in (0.2, 0.1):
            started = loop.time()
            await decide(client)
            # the loop's timers may be a tick early
            assert loop.time() - started >= least - 0.01


async def test_a_server_stops_without_waiting_for_slow_answers() -> None:
    async with ModelServer(latency=3600) as server, client_of(server) as client:
        call = asyncio.create_task(decide(client))
        await until(lambda: server.calls == 1)
        async with asyncio.timeout(DEADLINE):
            await server.__aexit__(None, None, None)
            with pytest.raises(openai.APIConnectionError):
                await call


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("explode", {}, "kind"),
        ("reset", {"status": 500}, "reset.status"),
        ("status", {"status": 200}, "status.status"),
        ("status", {"headers": {"retry-after": "1\r\nx: y"}}, "status.headers"),
        ("slow", {"delay": -1}, "slow.delay"),
        ("empty", {"times": 0}, "empty.times"),
    ],
)
async def test_a_failure_that_means_nothing_is_refused(
    server: ModelServer, http: aiohttp.ClientSession, kind: str, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidSetting, match=named):
        server.fail(kind, **options)
    reply = await http.post(control(server, "/failures"), json=[{"kind": "reset"}, {"kind": kind, **options}])
    assert reply.status == 400
    assert (await reply.json())["error"]["type"] == "invalid_request_error"
    plain = await http.post(f"{server.base_url}/chat/completions", json={})
    assert plain.status == 400, "nothing of the refused list may be queued"


async def test_failures_are_queued_over_http_and_last_as_told(
    server: ModelServer, client: openai.AsyncOpenAI, http: aiohttp.ClientSession
) -> None:
    failures = [{"kind": "status", "status": 500, "times": 2}, {"kind": "empty"}]
    reply = await http.post(control(server, "/failures"), json=failures)
    assert await reply.json() == {"queued": 3}
    for _ in range(2):
        with pytest.raises(openai.InternalServerError):
            await decide(client)
    assert (await decide(client)).choices[0].message.content == ""
    assert (await decide(client)).choices[0].message.content != ""


async def test_a_malformed_request_uses_up_no_failure(server: ModelServer, client: openai.AsyncOpenAI) -> None:
    server.fail("empty")
    with pytest.raises(openai.BadRequestError):
        await decide(client, n=2)
    assert (await decide(client)).choices[0].message.content == ""


async def test_another_key_is_refused_as_openai_does(http: aiohttp.ClientSession) -> None:
    async with ModelServer(api_key="sk-right") as server:
        async with client_of(server, "sk-right") as client:
            assert (await decide(client)).model == "gpt-4o"
            assert [model.id async for model in client.models.list()] == ["gpt-4o"]
        async with client_of(server, "sk-wrong") as client:
            with pytest.raises(openai.AuthenticationError, match="Incorrect API key") as refused:
                await decide(client)
            assert (refused.value.code, refused.value.type) == ("invalid_api_key", "invalid_request_error")
            assert "sk-" not in str(refused.value)
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        for headers in ({}, {"Authorization": "Basic sk-right"}, {"Authorization": "Bearer "}):
            reply = await http.post(f"{server.base_url}/chat/completions", json={}, headers=headers)
            assert reply.status == 401
        assert (await http.get(control(server, "/health"))).status == 200
        assert server.counts["by_status"] == {"200": 1, "401": 4}


async def test_a_malformed_request_gets_openais_error(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="gives one answer") as refused:
        await decide(client, n=2)
    error = refused.value
    assert (error.param, error.code, error.type) == ("n", "invalid_value", "invalid_request_error")


async def test_a_rule_that_cannot_answer_is_told_to_the_client() -> None:
    async with ModelServer(rules=[{"answer": "explode"}]) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match=r"rule 1 .* mend the rule"):
            await decide(client)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"7", b"[" * 100_000, b'{"model": "\\ud800", "messages": [{"role": "user"}]}'],
)
async def test_a_body_that_cannot_be_read_is_refused(
    server: ModelServer, http: aiohttp.ClientSession, body: bytes
) -> None:
    reply = await http.post(f"{server.base_url}/chat/completions", data=body)
    assert reply.status == 400
    assert set((await reply.json())["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("depth", [51, 200, 400, 800, 900, 950, 980, 2000])
async def test_a_schema_nested_too_deeply_is_refused(
    server: ModelServer, http: aiohttp.ClientSession, depth: int
) -> None:
    form = '{"type": "json_schema", "json_schema": {"name": "x", "schema": %s}}'
    schema = '{"items":' * depth + "{}" + "}" * depth
    body = '{"model": "m", "messages": [{"role": "user", "content": "x"}], "response_format": %s}'
    reply = await http.post(f"{server.base_url}/chat/completions", data=body % (form % schema))
    assert reply.status == 400
    assert (await reply.json())["error"]["type"] == "invalid_request_error"


async def test_a_schema_of_many_levels_is_taken(server: ModelServer, http: aiohttp.ClientSession) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(49):
        schema = {"items": schema}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "response_format": form}
    reply = await http.post(f"{server.base_url}/chat/completions", json=body)
    assert reply.status == 200


async def test_the_body_is_bounded(server: ModelServer, http: aiohttp.ClientSession) -> None:
    reply = await http.post(f"{server.base_url}/chat/completions", data=io.BytesIO(b" " * (MAX_BODY_BYTES + 1)))
    assert reply.status == 413
    assert (await reply.json())["error"]["type"] == "invalid_request_error"
    assert server.counts == {"total": 1, "answered": 0, "failed": 1, "by_status": {"413": 1}}


async def test_a_path_that_is_not_served_gets_openais_error(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Not Found: POST /v1/embeddings") as missing:
        await client.embeddings.create(model="m", input="x")
    assert missing.value.type == "invalid_request_error"


async def test_many_calls_at_once_are_all_answered(server: ModelServer, client: openai.AsyncOpenAI) -> None:
    tiers = ["gold", "bronze"] * 50
    replies = await asyncio.gather(*(decide(client, {"customer_tier": tier}) for tier in tiers))
    answers = [json.loads(reply.choices[0].message.content)["answer"] for reply in replies]
    assert answers == ["expedite", "standard"] * 50
    assert server.counts == {"total": 100, "answered": 100, "failed": 0, "by_status": {"200": 100}}
    assert len({reply.id for reply in replies}) == 100


async def test_a_server_can_be_entered_again_and_frees_its_port() -> None:
    server = ModelServer()
    async with server:
        port = server.port
        with pytest.raises(OSError, match="in use"):
            await ModelServer(port=port).__aenter__()
    async with server, client_of(server) as client:
        assert server.port == port
        assert (await decide(client)).model == "gpt-4o"


async def test_an_ipv6_address_is_bracketed() -> None:
    assert ModelServer(host="::1", port=1).base_url == "http://[::1]:1/v1"


@pytest.mark.parametrize("latency", [-1, float("nan"), float("inf")])
def test_a_latency_that_is_no_time_is_refused(latency: float) -> None:
    with pytest.raises(InvalidSetting, match="latency"):
        ModelServer(latency=latency)


# the process


@asynccontextmanager
async def running(*options: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "beluga_airflow.llm.model_server", *options),
        cwd=ROOT,
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def ready_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), DEADLINE)).decode().rstrip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_process_says_where_it_listens_and_stops_on_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {when: {customer_tier: gold}, answer: expedite}\n")
    options = ("--port", "0", "--rules", str(rules), "--latency", "0.01", "--api-key-env", "BELUGA_TEST_KEY")
    async with running(*options, BELUGA_TEST_KEY="sk-process") as process:
        words = (await ready_line(process)).split()
        assert words[:-1] == ["model", "server", "(SIMULATION)", "listening", "on"]
        assert words[-1].startswith("http://127.0.0.1:")
        assert words[-1].endswith("/v1")
        async with openai.AsyncOpenAI(base_url=words[-1], api_key="sk-process", max_retries=0) as client:
            reply = await decide(client, {"customer_tier": "gold"})
            assert json.loads(reply.choices[0].message.content)["answer"] == "expedite"
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(api_key="sk-other").models.list()
            # stops although the client still holds its connection
            process.send_signal(number)
            out, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert (process.returncode, out, err) == (0, b"", b"")


async def test_the_process_names_a_bad_rule(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {wen: {}, answer: expedite}\n")
    async with running("--rules", str(rules)) as process:
        out, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert (process.returncode, out) == (2, b"")
    assert "rules.yaml, rule 1, wen: Extra inputs are not permitted" in err.decode()


def test_main_says_that_a_port_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["--port", str(taken.getsockname()[1])]) == 1
    assert "address already in use" in capsys.readouterr().err


def test_main_wants_the_variable_of_the_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BELUGA_TEST_KEY", raising=False)
    assert main(["--api-key-env", "BELUGA_TEST_KEY"]) == 2
    assert "BELUGA_TEST_KEY is not set" in capsys.readouterr().err
