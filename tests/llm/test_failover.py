"""Failing over to another connection, over real HTTP: when, to which, and within which time."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from beluga_airflow import CircuitBreaker, Decision, InvalidFlow, RateLimit
from beluga_airflow.errors import (
    BelugaError,
    BreakerOpen,
    InvalidSetting,
    LimitReached,
    ModelRefused,
    ModelUnavailable,
    Undecided,
)
from beluga_airflow.graph import Chain
from beluga_airflow.llm.client import ModelClient
from beluga_airflow.llm.decide import DecisionRecord, decide
from beluga_airflow.llm.guarded import GuardedModel
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.resilience.breaker import breakers
from beluga_airflow.state.memory import MemoryStore
from tests.llm.conftest import DATUM, SERVER_WORDS, ClientFactory, assert_tells_nothing

DATA = {"tier": "gold", "note": DATUM}
CHOICES = ("expedite", "standard")


def handling(*fallbacks: str, **changes: Any) -> Decision:
    given = {"choices": CHOICES, "reads": ("tier", "note"), "llm_conn_id": "primary", "fallback_conn_ids": fallbacks}
    return Decision("Which QUESTIONMARK queue?", **{**given, **changes})


@pytest.fixture
def model_rules() -> Any:
    return [{"when": {"tier": "gold"}, "answer": "expedite"}]


class Office:
    """Where one test decides: a server of several connections, and what is wrong with some of them."""

    def __init__(self, server: ModelServer, client_of: ClientFactory) -> None:
        self.server, self.client_of = server, client_of
        self.state = MemoryStore()
        self.wrong: dict[str, Exception] = {}
        self.guards: dict[str, dict[str, Any]] = {}
        self.clients: dict[str, ModelClient] = {}
        self.opened: list[str | None] = []

    async def model(self, conn_id: str | None) -> ModelClient:
        self.opened.append(conn_id)
        name = str(conn_id)
        if name in self.wrong:
            raise self.wrong[name]
        if name not in self.clients:
            self.clients[name] = self.client_of(self.server.url_of(name), conn_id=conn_id, model=f"model-of-{name}")
        return GuardedModel(self.clients[name], store=self.state, **self.guards.get(name, {}))

    async def warmed(self, *names: str) -> None:
        """The first call of a client takes long: it imports the library."""
        for name in names:
            await decide(handling(llm_conn_id=name), DATA, key=name, state=self.state, model=self.model)
        self.server.reset()

    async def decide(self, decision: Decision, **options: Any) -> DecisionRecord:
        assert decision.faults() == []
        return await decide(decision, DATA, key="k", state=self.state, model=self.model, **options)

    async def error(self, decision: Decision, **options: Any) -> BelugaError:
        with pytest.raises(BelugaError) as caught:
            await self.decide(decision, **options)
        assert_tells_nothing(caught.value)
        return caught.value

    def calls(self, *names: str) -> list[int]:
        counted = self.server.calls_by("connection")
        return [counted.get(name, 0) for name in names]


@pytest.fixture
def office(model_server: ModelServer, client_of: ClientFactory) -> Office:
    return Office(model_server, client_of)


TROUBLES: list[tuple[str, dict[str, Any]]] = [
    ("rate_limit", {"retry_after": 1, "form": "seconds"}),
    ("overloaded", {}),
    ("status", {"status": 500}),
    ("status", {"status": 503, "message": SERVER_WORDS}),
    ("status", {"status": 408}),
    ("reset", {}),
    ("reset", {"after": "headers"}),
    ("half_body", {}),
    ("not_json", {"text": SERVER_WORDS}),
    ("no_completion", {}),
]


@pytest.mark.parametrize(("kind", "options"), TROUBLES)
async def test_on_the_last_attempt_another_connection_answers(
    office: Office, kind: str, options: dict[str, Any]
) -> None:
    office.server.fail(kind, every=1, connection="primary", **options)
    record = await office.decide(handling("backup", "third", fallback="standard"), attempt=3, last=True)
    assert (record.answer, record.decided_by, record.attempt) == ("expedite", "model", 3)
    assert (record.connection, record.model, record.provider) == ("backup", "model-of-backup", "simulated")
    assert office.calls("primary", "backup", "third") == [1, 1, 0]
    assert office.opened == ["primary", "backup"]
    assert await office.state.get("beluga/decisions/k") == record.to_json()


@pytest.mark.parametrize(("kind", "options"), TROUBLES)
async def test_before_the_last_attempt_the_same_connection_is_asked_again(
    office: Office, kind: str, options: dict[str, Any]
) -> None:
    office.server.fail(kind, connection="primary", **options)
    error = await office.error(handling("backup", fallback="standard"), attempt=1, last=False)
    assert type(error) is ModelUnavailable
    record = await office.decide(handling("backup", fallback="standard"), attempt=2, last=False)
    assert (record.connection, record.attempt) == ("primary", 2)
    assert office.calls("primary", "backup") == [2, 0]


async def test_a_connection_that_cannot_be_reached_fails_over(office: Office) -> None:
    async def model(conn_id: str | None) -> ModelClient:
        if conn_id == "primary":
            return office.client_of("http://127.0.0.1:9/v1", conn_id=conn_id)
        return await office.model(conn_id)

    record = await decide(handling("backup"), DATA, key="k", state=office.state, model=model)
    assert record.connection == "backup"


@pytest.mark.parametrize("last", [True, False])
async def test_an_open_breaker_fails_over_at_once(office: Office, last: bool) -> None:
    breaker = CircuitBreaker("b", failure_threshold=1, recovery_timeout=3600)
    office.guards["primary"] = {"breaker": breaker}
    with suppress(OSError):
        async with breaker.guard(office.state):
            raise OSError
    record = await office.decide(handling("backup"), last=last)
    assert (record.connection, record.calls) == ("backup", 1)
    assert office.calls("primary", "backup") == [0, 1]


@pytest.mark.parametrize("last", [True, False])
async def test_a_limit_that_is_reached_fails_over_at_once(office: Office, last: bool) -> None:
    limit = RateLimit("l", requests_per_minute=1, max_wait=0)
    office.guards["primary"] = {"limit": limit}
    async with limit.guard(office.state):
        pass
    record = await office.decide(handling("backup"), last=last)
    assert record.connection == "backup"
    assert office.calls("primary", "backup") == [0, 1]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("wrong_key", {}),
        ("insufficient_quota", {}),
        ("unknown_model", {}),
        ("status", {"status": 400, "message": SERVER_WORDS}),
        ("status", {"status": 403}),
    ],
)
async def test_a_refused_key_or_request_never_fails_over(office: Office, kind: str, options: dict[str, Any]) -> None:
    office.server.fail(kind, every=1, connection="primary", **options)
    error = await office.error(handling("backup", fallback="standard"), last=True)
    assert type(error) is ModelRefused
    assert office.calls("primary", "backup") == [1, 0]


@pytest.mark.parametrize("kind", ["refusal", "content_filter", "empty", "bad_answer"])
async def test_what_a_model_does_not_answer_never_fails_over(office: Office, kind: str) -> None:
    office.server.fail(kind, every=1, connection="primary")
    error = await office.error(handling("backup", max_reprompts=1), last=True)
    assert type(error) is Undecided
    record = await office.decide(handling("backup", fallback="standard"), last=True)
    assert (record.decided_by, record.connection, record.calls) == ("fallback", "primary", 2)
    assert office.calls("primary", "backup") == [4, 0]


async def test_an_unusable_connection_of_its_own_is_told(office: Office) -> None:
    office.wrong["primary"] = InvalidSetting("there is no connection 'primary'")
    assert str(await office.error(handling("backup"), last=True)) == "there is no connection 'primary'"
    assert office.opened == ["primary"]


# fallbacks that are broken themselves


async def test_a_broken_fallback_never_fails_a_healthy_primary(office: Office) -> None:
    for name in ("backup", "third"):
        office.wrong[name] = InvalidSetting(f"there is no connection {name!r}")
    record = await office.decide(handling("backup", "third"), last=True)
    assert (record.connection, record.calls, office.opened) == ("primary", 1, ["primary"])


@pytest.mark.parametrize("wrong", [InvalidSetting("no such connection"), RuntimeError(SERVER_WORDS)])
async def test_a_fallback_that_cannot_be_opened_is_passed_over(
    office: Office, wrong: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    office.server.fail("overloaded", every=1, connection="primary")
    office.wrong["backup"] = wrong
    with caplog.at_level(logging.WARNING):
        record = await office.decide(handling("backup", "third"), last=True)
    assert record.connection == "third"
    assert "connection 'backup': " in caplog.text
    assert "SERVERWORDS" not in caplog.text


@pytest.mark.parametrize("kind", ["wrong_key", "overloaded", "insufficient_quota", "reset"])
async def test_a_fallback_that_fails_is_passed_over(office: Office, kind: str) -> None:
    office.server.fail("overloaded", every=1, connection="primary")
    office.server.fail(kind, every=1, connection="backup")
    record = await office.decide(handling("backup", "third"), last=True)
    assert (record.connection, record.calls) == ("third", 1)
    assert office.calls("primary", "backup", "third") == [1, 1, 1]


async def test_where_none_answers_the_decision_is_uncertain(office: Office) -> None:
    office.server.fail("rate_limit", retry_after=3, form="seconds", every=1, connection="primary")
    office.server.fail("wrong_key", every=1, connection="backup")
    office.server.fail("rate_limit", retry_after=2, form="seconds", every=1, connection="third")
    error = await office.error(handling("backup", "third"), last=True)
    assert type(error) is ModelUnavailable
    assert error.retry_after == 2
    told = str(error)
    assert told.index("/primary/v1") < told.index("connection 'backup': ") < told.index("connection 'third': ")
    record = await office.decide(handling("backup", "third", fallback="standard"), last=True)
    assert (record.answer, record.decided_by, record.reason) == ("standard", "fallback", told)
    assert (record.connection, record.model, record.calls) == (None, None, 0)


async def test_before_the_last_attempt_a_guarded_primary_and_a_failing_fallback_are_tried_again(office: Office) -> None:
    limit = RateLimit("l", requests_per_minute=1, max_wait=0)
    office.guards["primary"] = {"limit": limit}
    async with limit.guard(office.state):
        pass
    office.server.fail("overloaded", every=1, connection="backup")
    error = await office.error(handling("backup", fallback="standard"), last=False)
    assert type(error) is LimitReached
    assert error.retryable
    assert error.retry_after is None, "the fallback may be well sooner than the limit has room"


# the bill


async def test_the_record_has_the_tokens_and_calls_of_all(office: Office) -> None:
    office.server.fail("bad_answer", connection="primary", calls=[1])
    office.server.fail("status", status=500, connection="primary", calls=[2])
    record = await office.decide(handling("backup"), last=True)
    assert (record.connection, record.calls, record.answer) == ("backup", 2, "expedite")
    assert office.calls("primary", "backup") == [2, 1]
    alone = await Office(office.server, office.client_of).decide(handling(llm_conn_id="third"))
    assert alone.connection == "third"
    assert record.tokens["input"] >= 2 * alone.tokens["input"] > 0
    first, _, over = [request["messages"] for request in office.server.requests][:3]
    assert over == first, "another model is asked from the beginning"


async def test_each_connection_is_asked_for_its_own_model(office: Office) -> None:
    office.server.fail("overloaded", every=1, connection="primary")
    record = await office.decide(handling("backup", model="gpt-4.1"), last=True)
    assert [request["model"] for request in office.server.requests] == ["gpt-4.1", "model-of-backup"]
    assert record.model == "model-of-backup"


async def test_a_record_of_earlier_says_no_connection(office: Office) -> None:
    kept = (await office.decide(handling())).to_json()
    del kept["connection"]
    assert DecisionRecord(**kept).connection is None


# time


async def test_a_primary_that_hangs_leaves_the_fallback_its_share(office: Office) -> None:
    await office.warmed("primary", "backup")
    office.server.fail("slow", delay=30, every=1, connection="primary")
    office.guards["primary"] = {"breaker": CircuitBreaker("b", failure_threshold=1, recovery_timeout=3600)}
    began = time.monotonic()
    record = await office.decide(handling("backup"), last=True, timeout=1.0)
    assert record.connection == "backup"
    assert time.monotonic() - began < 0.9
    assert [found.state for found in await breakers(office.state)] == ["open"], "its breaker has heard of it"


async def test_all_that_hang_end_within_the_steps_timeout(office: Office) -> None:
    await office.warmed("primary", "backup", "third")
    for name in ("primary", "backup", "third"):
        office.server.fail("slow", delay=30, every=1, connection=name)
    began = time.monotonic()
    record = await office.decide(handling("backup", "third", fallback="standard"), last=True, timeout=0.9)
    assert 0.6 < time.monotonic() - began < 1.5
    assert record.decided_by == "fallback"
    assert office.calls("primary", "backup", "third") == [1, 1, 1]


async def test_before_the_last_attempt_the_primary_has_all_the_time(office: Office) -> None:
    await office.warmed("primary")
    office.server.fail("slow", delay=0.8, every=1, connection="primary")
    record = await office.decide(handling("backup"), last=False, timeout=1.5)
    assert record.connection == "primary"


async def test_a_client_that_knows_no_share_is_cut_off_too(office: Office) -> None:
    class Deaf:
        def __init__(self, client: ModelClient) -> None:
            self.client = client

        def __getattr__(self, name: str) -> Any:
            return getattr(self.client, name)

        async def answer(self, request: Any) -> Any:
            return await self.client.answer(replace(request, timeout=None))

    async def model(conn_id: str | None) -> Any:
        return Deaf(await office.model(conn_id))

    await office.warmed("primary", "backup")
    office.server.fail("slow", delay=30, every=1, connection="primary")
    record = await decide(handling("backup"), DATA, key="k", state=office.state, model=model, timeout=1.0)
    assert record.connection == "backup"


# the definition


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"fallback_conn_ids": "backup"}, "fallback_conn_ids is 'backup', it must be a list of connection ids"),
        ({"fallback_conn_ids": None}, "fallback_conn_ids is None"),
        ({"fallback_conn_ids": [7]}, "fallback_conn_ids names 7, it must name connections"),
        ({"fallback_conn_ids": [""]}, "fallback_conn_ids names ''"),
        ({"fallback_conn_ids": ["a", "a"]}, "names a connection twice, or the decision's own"),
        ({"fallback_conn_ids": ["primary"]}, "names a connection twice, or the decision's own"),
    ],
)
def test_what_cannot_mean_anything_is_told_when_it_is_checked(given: dict[str, Any], fault: str) -> None:
    with pytest.raises(InvalidFlow) as caught:
        Chain("c").add_step("s", handling(**given)).check()
    assert fault in str(caught.value)


async def test_an_error_of_a_guard_stays_what_it_is(office: Office) -> None:
    breaker = CircuitBreaker("b", failure_threshold=1, recovery_timeout=3600)
    office.guards["primary"] = office.guards["backup"] = {"breaker": breaker}
    with suppress(OSError):
        async with breaker.guard(office.state):
            raise OSError
    error = await office.error(handling("backup"))
    assert type(error) is BreakerOpen
    assert 0 < (error.retry_after or 0) <= 3600
