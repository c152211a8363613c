"""A model behind guards, asked over HTTP."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from beluga_airflow import CircuitBreaker, RateLimit, Retry
from beluga_airflow.errors import BreakerOpen, LimitReached, ModelRefused, ModelUnavailable
from beluga_airflow.llm.client import ModelClient, ModelRequest
from beluga_airflow.llm.estimate import estimated, tokens
from beluga_airflow.llm.guarded import GuardedModel
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.resilience.breaker import breakers
from beluga_airflow.resilience.limits import limits
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.testing import ScriptedModel
from beluga_airflow.testing.scripted_model import reply
from tests.llm.conftest import ClientFactory

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
BREAKER = CircuitBreaker("m", failure_threshold=2, recovery_timeout=3600)


def guarded(client: ModelClient, **guards: Any) -> tuple[GuardedModel, MemoryStore]:
    store = MemoryStore()
    return GuardedModel(client, store=store, **guards), store


async def test_an_endpoint_that_fails_is_left_alone(model_server: ModelServer, client_of: ClientFactory) -> None:
    model, store = guarded(client_of(model_server), breaker=BREAKER)
    model_server.fail("status", times=9, status=503)
    for _ in range(2):
        with pytest.raises(ModelUnavailable):
            await model.answer(ASK)
    for _ in range(3):
        with pytest.raises(BreakerOpen, match="breaker 'm' is open since"):
            await model.answer(ASK)
    assert model_server.calls == 2

    await store.delete("beluga/probes/m")
    model_server.reset()
    assert (await model.answer(ASK)).content
    assert [found.state for found in await breakers(store)] == ["closed"]


@pytest.mark.parametrize("failure", [{"kind": "status", "status": 401}, {"kind": "status", "status": 400}])
async def test_a_refused_request_opens_nothing(
    model_server: ModelServer, client_of: ClientFactory, failure: dict[str, Any]
) -> None:
    model, store = guarded(client_of(model_server), breaker=BREAKER)
    model_server.fail(**failure, times=3)
    for _ in range(3):
        with pytest.raises(ModelRefused):
            await model.answer(ASK)
    assert await breakers(store) == []
    assert model.refused is (failure["status"] == 401)


@pytest.mark.parametrize("kind", ["refusal", "content_filter", "empty"])
async def test_a_model_that_refuses_to_answer_has_not_failed(
    model_server: ModelServer, client_of: ClientFactory, kind: str
) -> None:
    model, store = guarded(client_of(model_server), breaker=BREAKER)
    model_server.fail(kind, times=3)
    for _ in range(3):
        assert (await model.answer(ASK)).trouble
    assert await breakers(store) == []


async def test_an_endpoint_that_hangs_is_left_alone_too(model_server: ModelServer, client_of: ClientFactory) -> None:
    model, store = guarded(client_of(model_server, timeout=0.1), breaker=BREAKER)
    model_server.fail("slow", times=2, delay=5.0)
    for _ in range(2):
        with pytest.raises(ModelUnavailable, match=r"did not answer within 0\.1 s"):
            await model.answer(ASK)
    assert [found.state for found in await breakers(store)] == ["open"]


async def test_it_asks_again_as_the_retry_says(model_server: ModelServer, client_of: ClientFactory) -> None:
    retry = Retry(maximum_attempts=3, initial_interval=0)
    model, _ = guarded(client_of(model_server), breaker=BREAKER, retry=retry)
    model_server.fail("status", status=503)
    assert (await model.answer(ASK)).content
    assert model_server.calls == 2


async def test_requests_are_limited(model_server: ModelServer, client_of: ClientFactory) -> None:
    model, store = guarded(client_of(model_server), limit=RateLimit("m", requests_per_minute=2, max_wait=0))
    answers = await asyncio.gather(*(model.answer(ASK) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(answer, LimitReached) for answer in answers) == 3
    assert model_server.calls == 2
    assert [found.requests for found in await limits(store)] == [2]


async def test_tokens_are_settled_as_the_reply_says(model_server: ModelServer, client_of: ClientFactory) -> None:
    model, store = guarded(client_of(model_server), limit=RateLimit("m", tokens_per_minute=10_000))
    asked = replace(ASK, max_tokens=5_000)
    assert estimated(asked).total > 5_000
    for _ in range(3):
        await model.answer(asked)
    used = [await client_of(model_server).answer(asked)] * 3
    (found,) = await limits(store)
    assert found.tokens == sum(reply.usage.input + reply.usage.output for reply in used) < 1_000


async def test_a_reply_that_tells_no_usage_cost_its_estimate() -> None:
    from beluga_airflow.llm.client import Usage

    model, store = guarded(
        ScriptedModel([reply('{"answer": true}', usage=Usage())]), limit=RateLimit("m", tokens_per_minute=10_000)
    )
    await model.answer(ASK)
    assert [found.tokens for found in await limits(store)] == [estimated(ASK).total]


def test_the_estimate_has_all_of_the_text_and_the_longest_answer() -> None:
    bare = estimated(ASK)
    assert bare.output == 5
    assert estimated(replace(ASK, max_tokens=105)).total == bare.total + 100
    for more in ("x" * 400, "\u00e9" * 200, "\ud800", "{}" * 50):
        longer = ({"role": "user", "content": "hello" + more},)
        assert estimated(replace(ASK, messages=longer)).input - bare.input in range(tokens(more) - 1, tokens(more) + 2)
    assert estimated(replace(ASK, schema={})).input < bare.input


async def test_the_rest_is_the_clients() -> None:
    inner, store = ScriptedModel([]), MemoryStore()
    model = GuardedModel(inner, breaker=BREAKER, store=store)
    await model.check()
    await model.close()
    assert inner.closed
    assert not model.refused


async def test_a_limit_takes_no_longer_than_the_caller_has() -> None:
    inner = ScriptedModel([True, True])
    model, _ = guarded(inner, limit=RateLimit("m", concurrent=1, max_wait=100))
    gate = asyncio.Event()

    async def hold() -> None:
        async with RateLimit("m", concurrent=1).guard(model._store):
            holding.set()
            await gate.wait()

    holding = asyncio.Event()
    other = asyncio.create_task(hold())
    await holding.wait()
    with pytest.raises(LimitReached, match="this call may wait 0 s"):
        await model.answer(replace(ASK, within=0.05))
    gate.set()
    await other
    assert (await model.answer(ASK)).content
