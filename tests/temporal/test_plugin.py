"""Decisions in a user's own worker: a real server, a model over HTTP, and no Airflow."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.client import Client, WorkflowFailureError
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import DataConverter, PayloadCodec
from temporalio.exceptions import ActivityError, ApplicationError
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from beluga_airflow import Budget, Decision, InvalidFlow, Memory
from beluga_airflow.config import Settings, StateSettings
from beluga_airflow.errors import InvalidSetting
from beluga_airflow.llm.client import Endpoint
from beluga_airflow.llm.decide import DecisionRecord
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.temporal import BelugaPlugin
from beluga_airflow.testing import ScriptedModel, TemporalServer
from tests.temporal.conftest import OwnBackends
from tests.temporal.deciding_workflows import (
    EASY,
    STRICT,
    UNSOUND,
    Ask,
    AskByType,
    AskMany,
    AskWithDefaults,
    Question,
)

HERE = "tests.temporal.deciding_workflows"
KEY = "sk-live-4f9aKEYc1"
GOLD = {"value": 50, "tier": "gold"}
WORKFLOWS = [Ask, AskByType, AskMany, AskWithDefaults]


@pytest.fixture
def model_rules() -> Any:
    return [{"when": {"tier": "gold"}, "answer": "expedite", "reason": "REASONMARK"}]


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def queue() -> str:
    return f"shop-{uuid4().hex}"


@pytest.fixture
async def client(temporal_server: TemporalServer) -> Client:
    return await temporal_server.client()


@pytest.fixture
def plugin(model_server: ModelServer, store: MemoryStore) -> BelugaPlugin:
    endpoint = Endpoint(provider="simulated", base_url=model_server.base_url, api_key=KEY, timeout=10)
    return BelugaPlugin({"strict": STRICT, "easy": EASY}, endpoint=endpoint, state=store)


@asynccontextmanager
async def working(client: Client, queue: str, *plugins: BelugaPlugin, **options: Any) -> AsyncIterator[None]:
    async with Worker(client, task_queue=queue, workflows=WORKFLOWS, plugins=plugins, **options):
        yield


async def ask(client: Client, queue: str, *question: Any, id: str | None = None, **more: Any) -> DecisionRecord:
    record = await client.execute_workflow(Ask.run, Question(*question, **more), id=id or uuid4().hex, task_queue=queue)
    assert isinstance(record, DecisionRecord)
    return record


async def refused(client: Client, queue: str, *question: Any, **more: Any) -> ApplicationError:
    with pytest.raises(WorkflowFailureError) as caught:
        await ask(client, queue, *question, **more)
    failed = caught.value.cause
    assert isinstance(failed, ActivityError)
    assert isinstance(failed.cause, ApplicationError)
    return failed.cause


async def test_a_workflow_gets_its_record_typed(
    client: Client, queue: str, plugin: BelugaPlugin, model_server: ModelServer
) -> None:
    async with working(client, queue, plugin):
        record = await ask(client, queue, "strict", {**GOLD, "name": "not to be seen"})
        assert (record.answer, record.decided_by, record.attempt) == ("expedite", "model", 1)
        assert record.tokens["input"] > 0
        by_rule = await ask(client, queue, "strict", {**GOLD, "value": 5})
        assert (by_rule.answer, by_rule.decided_by) == ("standard", "rule")
    assert model_server.calls == 1
    assert "not to be seen" not in str(model_server.requests)


async def test_options_may_be_left_out_and_data_may_be_a_dataclass(
    client: Client, queue: str, plugin: BelugaPlugin
) -> None:
    async with working(client, queue, plugin):
        answer = await client.execute_workflow(AskWithDefaults.run, id=uuid4().hex, task_queue=queue)
    assert answer == "expedite"


async def test_a_workflow_of_another_language_gives_and_takes_objects(
    client: Client, queue: str, plugin: BelugaPlugin
) -> None:
    async with working(client, queue, plugin):
        record = await client.execute_workflow(AskByType.run, id=uuid4().hex, task_queue=queue)
    assert (record["answer"], record["reason"]) == ("expedite", "REASONMARK")


async def test_several_at_once(client: Client, queue: str, plugin: BelugaPlugin, store: MemoryStore) -> None:
    async with working(client, queue, plugin):
        answers = await client.execute_workflow(AskMany.run, [5, 50, 60], id="many", task_queue=queue)
    assert answers == ["standard by rule", "expedite by model", "expedite by model"] * 2
    assert len([key async for key in store.keys("beluga/decisions/temporal/default/many/")]) == 6


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("lenient", "InvalidSetting", "its BelugaPlugin has: strict, easy. Add it there, or give its import path"),
        ("nowhere.of.ours:THING", "FlowNotFound", "cannot be imported in this process"),
        (f"{HERE}:NO_DECISION", "FlowNotFound", "has a str where a Decision is wanted"),
        (f"{HERE}:UNSOUND", "InvalidFlow", "choices must be two or more different answers"),
    ],
)
async def test_a_decision_that_is_not_there_ends_at_once(
    client: Client, queue: str, plugin: BelugaPlugin, name: str, kind: str, words: str
) -> None:
    async with working(client, queue, plugin):
        error = await refused(client, queue, name, GOLD)
    assert (error.type, error.non_retryable) == (kind, True)
    assert words in error.message


async def test_a_decision_is_found_by_its_import_path(
    client: Client, queue: str, plugin: BelugaPlugin, model_server: ModelServer
) -> None:
    async with working(client, queue, plugin):
        assert (await ask(client, queue, f"{HERE}:STRICT", GOLD)).answer == "expedite"


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [({"value": 50}, "MissingKey", "'tier'"), ([50], "InvalidInput", "was given a list, its data must be an object")],
)
async def test_wrong_data_ends_at_once(
    client: Client, queue: str, plugin: BelugaPlugin, model_server: ModelServer, data: Any, kind: str, words: str
) -> None:
    async with working(client, queue, plugin):
        error = await refused(client, queue, "easy", data)
    assert (error.type, error.non_retryable) == (kind, True)
    assert words in error.message
    assert model_server.calls == 0


PASSING: dict[str, dict[str, Any]] = {
    "status": {"status": 500},
    "overloaded": {},
    "reset": {},
    "half_body": {},
    "not_json": {},
    "rate_limit": {"retry_after": 0.01, "form": "ms"},
}
FINAL: dict[str, dict[str, Any]] = {"wrong_key": {}, "insufficient_quota": {}, "unknown_model": {}}


@pytest.fixture
def in_trouble(model_server: ModelServer, store: MemoryStore) -> BelugaPlugin:
    """A connection a kind of trouble, which it always has."""
    endpoints = {}
    for kind, options in (PASSING | FINAL).items():
        model_server.fail(kind, every=1, connection=kind, **options)
        endpoints[kind] = Endpoint(provider="simulated", base_url=model_server.url_of(kind), api_key=KEY)
    decisions = {f"easy-{kind}": replace(EASY, llm_conn_id=kind) for kind in endpoints}
    decisions |= {f"strict-{kind}": replace(STRICT, llm_conn_id=kind) for kind in endpoints}
    return BelugaPlugin(decisions, endpoints=endpoints, state=store)


async def test_retries_never_multiply_and_the_last_attempt_falls_back(
    client: Client, queue: str, in_trouble: BelugaPlugin, model_server: ModelServer
) -> None:
    async with working(client, queue, in_trouble):
        records = await asyncio.gather(*(ask(client, queue, f"easy-{kind}", GOLD, attempts=3) for kind in PASSING))
        assert model_server.calls_by("connection") == dict.fromkeys(PASSING, 3)
        errors = await asyncio.gather(*(refused(client, queue, f"strict-{kind}", GOLD, attempts=2) for kind in PASSING))
    assert {(record.answer, record.decided_by, record.attempt) for record in records} == {("standard", "fallback", 3)}
    assert {error.type for error in errors} == {"ModelUnavailable"}
    assert model_server.calls_by("connection") == dict.fromkeys(PASSING, 5)


async def test_a_refusal_is_final(
    client: Client, queue: str, in_trouble: BelugaPlugin, model_server: ModelServer
) -> None:
    async with working(client, queue, in_trouble):
        errors = await asyncio.gather(*(refused(client, queue, f"easy-{kind}", GOLD) for kind in FINAL))
    assert {(error.type, error.non_retryable) for error in errors} == {("ModelRefused", True)}
    assert model_server.calls_by("connection") == dict.fromkeys(FINAL, 1)


@pytest.mark.parametrize("form", ["seconds", "ms", "date"])
async def test_the_server_says_when_to_come_back(
    client: Client, queue: str, plugin: BelugaPlugin, model_server: ModelServer, form: str
) -> None:
    model_server.fail("rate_limit", retry_after=1, form=form)
    async with working(client, queue, plugin):
        started = time.monotonic()
        record = await ask(client, queue, "strict", GOLD)
    assert (record.attempt, model_server.calls) == (2, 2)
    assert time.monotonic() - started >= 0.9


async def test_a_model_that_is_too_slow_leaves_time_to_fall_back(
    client: Client, queue: str, plugin: BelugaPlugin, model_server: ModelServer
) -> None:
    model_server.fail("slow", every=1, delay=30)
    async with working(client, queue, plugin):
        record = await ask(client, queue, "easy", GOLD, attempts=1, seconds=5)
    assert (record.decided_by, record.attempt, model_server.calls) == ("fallback", 1, 1)


async def test_another_run_of_the_workflow_does_not_pay_again(
    client: Client, queue: str, plugin: BelugaPlugin, model_server: ModelServer
) -> None:
    async with working(client, queue, plugin):
        first = await ask(client, queue, "strict", GOLD, "order-1", id="paid-once")
        assert await ask(client, queue, "strict", GOLD, "order-1", id="paid-once") == first
        assert model_server.calls == 1
        await ask(client, queue, "strict", {**GOLD, "value": 51}, "order-1", id="paid-once")  # another question
        await ask(client, queue, "strict", GOLD, "order-1", id="another")
        await ask(client, queue, "strict", GOLD, "order-2", id="paid-once")
    assert model_server.calls == 4


class Scrambled(PayloadCodec):
    """Stands for encryption."""

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [Payload(metadata={"encoding": b"xor"}, data=_xor(payload.SerializeToString())) for payload in payloads]

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [Payload.FromString(_xor(payload.data)) for payload in payloads]


def _xor(data: bytes) -> bytes:
    return bytes(byte ^ 0x5A for byte in data)


@pytest.mark.parametrize(
    "converter", [pydantic_data_converter, replace(DataConverter.default, payload_codec=Scrambled())]
)
async def test_the_users_own_data_converter_stays(
    temporal_server: TemporalServer, queue: str, plugin: BelugaPlugin, converter: DataConverter
) -> None:
    client = await temporal_server.client(data_converter=converter, plugins=[plugin])
    assert client.data_converter is converter
    async with working(client, queue):
        record = await ask(client, queue, "strict", GOLD, id="converted")
    assert (record.answer, record.tokens["output"] > 0) == ("expedite", True)
    if converter.payload_codec is not None:
        history = (await client.get_workflow_handle("converted").fetch_history()).to_json()
        assert "expedite" not in history


async def test_neither_keys_nor_prompts_get_into_the_history(
    client: Client, queue: str, plugin: BelugaPlugin, model_server: ModelServer, caplog: pytest.LogCaptureFixture
) -> None:
    model_server.fail("status", status=500, message=f"SERVERWORDS {KEY}")
    model_server.fail("wrong_key", calls=[3])
    async with working(client, queue, plugin):
        await ask(client, queue, "strict", GOLD, id="told-nothing")
        await refused(client, queue, "strict", GOLD, id="told-no-more")
    for name in ("told-nothing", "told-no-more"):
        events = [event async for event in client.get_workflow_handle(name).fetch_history_events()]
        told = "".join(event.SerializeToString().decode("utf-8", "replace") for event in events)
        assert "strict" in told
        assert [word for word in (KEY, "QUESTIONMARK", "SERVERWORDS") if word in told] == []
    assert KEY not in caplog.text
    assert "SERVERWORDS" not in caplog.text


async def test_a_worker_without_a_sandbox_takes_it_too(client: Client, queue: str, plugin: BelugaPlugin) -> None:
    async with working(client, queue, plugin, workflow_runner=UnsandboxedWorkflowRunner()):
        assert (await ask(client, queue, "strict", GOLD)).answer == "expedite"


async def test_two_workers_share_it_and_the_last_closes_what_it_opened(
    client: Client, queue: str, model_server: ModelServer, tmp_path: Any
) -> None:
    endpoint = Endpoint(provider="simulated", base_url=model_server.base_url)
    plugin = BelugaPlugin({"strict": STRICT}, endpoint=endpoint, state=f"sqlite:///{tmp_path}/state.db")
    async with working(client, queue, plugin):
        async with working(client, f"{queue}-2", plugin):
            assert (await ask(client, f"{queue}-2", "strict", GOLD)).answer == "expedite"
        assert (await ask(client, queue, "strict", GOLD)).answer == "expedite"
    async with working(client, queue, plugin):
        assert (await ask(client, queue, "strict", {**GOLD, "value": 70})).answer == "expedite"


async def test_connections_are_endpoints_by_name(
    client: Client, queue: str, model_server: ModelServer, store: MemoryStore
) -> None:
    def at(name: str) -> Endpoint:
        return Endpoint(provider="simulated", base_url=model_server.url_of(name))

    decisions = {name: replace(STRICT, llm_conn_id=name) for name in ("first", "second", "third")}
    plugin = BelugaPlugin(decisions, endpoints={"first": at("first"), "second": at("second")}, state=store)
    async with working(client, queue, plugin):
        for name in ("first", "second"):
            await ask(client, queue, name, GOLD)
        error = await refused(client, queue, "third", GOLD)
    assert model_server.calls_by("connection") == {"first": 1, "second": 1}
    assert "names connection 'third'" in error.message
    assert "endpoints are: first, second" in error.message


async def test_another_endpoint_answers_where_the_own_cannot(
    client: Client, queue: str, in_trouble: BelugaPlugin, model_server: ModelServer, store: MemoryStore
) -> None:
    """The connection ``status`` always has its trouble."""
    endpoints = {
        name: Endpoint(provider="simulated", base_url=model_server.url_of(name)) for name in ("status", "backup")
    }
    decision = replace(STRICT, llm_conn_id="status", fallback_conn_ids=("backup",))
    async with working(client, queue, BelugaPlugin({"d": decision}, endpoints=endpoints, state=store)):
        record = await ask(client, queue, "d", GOLD)
    assert (record.answer, record.connection) == ("expedite", "backup")
    assert model_server.calls_by("connection")["backup"] == 1


async def test_the_decisions_of_a_workflow_spend_from_one_purse(
    client: Client, queue: str, model_server: ModelServer, store: MemoryStore
) -> None:
    endpoint = Endpoint(provider="simulated", base_url=model_server.base_url)
    short = replace(EASY, max_tokens=100, budget=Budget(tokens=1_000))
    async with working(client, queue, BelugaPlugin({"d": short}, endpoint=endpoint, state=store)):
        spent = 0
        for number in range(20):
            record = await ask(client, queue, "d", {**GOLD, "value": 50 + number}, str(number), id="one", attempts=1)
            spent += sum(record.tokens.values())
        assert record.decided_by == "fallback"
        assert 0 < spent <= 1_000
        assert (await ask(client, queue, "d", GOLD, "1", id="other", attempts=1)).decided_by == "model"


async def test_backends_give_model_and_state(client: Client, queue: str) -> None:
    backends = OwnBackends(model=ScriptedModel(["expedite"]))
    async with working(client, queue, BelugaPlugin({"strict": STRICT}, backends=backends)):
        assert (await ask(client, queue, "strict", GOLD)).answer == "expedite"
    assert backends.asked == [(None, None)]


async def test_a_decision_remembers_its_conversation(client: Client, queue: str, store: MemoryStore) -> None:
    model = ScriptedModel(["expedite", "standard"])
    talk = Decision("And now?", choices=["expedite", "standard"], reads=("customer",), memory=Memory(key="customer"))
    async with working(client, queue, BelugaPlugin({"talk": talk}, model=model, state=store)):
        for key in ("1", "2"):
            await ask(client, queue, "talk", {"customer": "c-1"}, key)
    assert "expedite" in str(model.requests[1].messages)


def test_what_cannot_work_is_refused_when_the_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    model = ScriptedModel([])
    with pytest.raises(InvalidSetting, match=r"needs a state store.*state='postgresql://\.\.\.', or settings with"):
        BelugaPlugin({}, model=model)
    with pytest.raises(InvalidSetting, match="no API key for model provider 'openai'"):
        BelugaPlugin({}, state="memory://")
    with pytest.raises(InvalidSetting, match="leave out what else would say so"):
        BelugaPlugin({}, backends=OwnBackends(), state="memory://")
    with pytest.raises(InvalidFlow, match="choices must be two or more different answers"):
        BelugaPlugin({"unsound": UNSOUND}, model=model, state="memory://")
    with pytest.raises(InvalidFlow, match="'a_text' is a str, it must be a Decision"):
        BelugaPlugin({"a_text": "text"}, model=model, state="memory://")  # type: ignore[dict-item]
    with pytest.raises(InvalidFlow, match="'a name' must be 1 to 100 letters"):
        BelugaPlugin({"a name": STRICT}, model=model, state="memory://")
    BelugaPlugin({}, model=model, settings=Settings(state=StateSettings(url="memory://")))


def test_naming_it_loads_no_temporalio() -> None:
    """A DAG file may import what is beside it."""
    code = (
        "import sys, beluga_airflow.temporal as ours\n"
        "assert ours.__all__ == ['BelugaPlugin', 'DecisionRecord', 'decide']\n"
        "assert not {'temporalio', 'openai', 'airflow'} & set(sys.modules)\n"
        "assert ours.decide.__module__ == 'beluga_airflow.temporal.deciding'\n"
        "assert ours.BelugaPlugin and ours.DecisionRecord\n"
        "assert not {'openai', 'airflow'} & set(sys.modules)\n"
        "assert not hasattr(ours, 'nothing')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
