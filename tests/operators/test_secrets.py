"""Secrets are planted wherever people keep them; then everything that a run leaves behind is searched for them."""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal

from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.operators.batch import TemporalBatchOperator
from beluga_airflow.operators.decision import LLMDecisionOperator
from beluga_airflow.operators.flow import ChainOperator
from beluga_airflow.operators.temporal import TemporalWorkflowOperator
from beluga_airflow.testing import TaskRun
from tests.operators import sample_flows as flows
from tests.operators.conftest import GOLD, Side

CONNECTION = "sk-plantedConnection1"
ENVIRONMENT = "sk-plantedEnvironment2"
TEMPORAL = "tk-plantedTemporal3"
STATE = "pw-plantedState4"
ADDRESS = "pw-plantedAddress5"
WRONG = "sk-plantedWrong6"
ALL = [CONNECTION, ENVIRONMENT, TEMPORAL, STATE, ADDRESS, WRONG]


def serving(api_key: str) -> Iterator[ModelServer]:
    server = ModelServer(api_key=api_key)
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server):
        yield server


@pytest.fixture
def guarded() -> Iterator[ModelServer]:
    """Lets in the connection's key only."""
    yield from serving(CONNECTION)


@pytest.fixture
def other_guarded() -> Iterator[ModelServer]:
    """Lets in the environment's key only."""
    yield from serving(ENVIRONMENT)


def llm(server: ModelServer, **changes: Any) -> dict[str, Any]:
    extra = {"provider": "openai", "base_url": server.base_url, "note": ADDRESS, **changes.pop("extra", {})}
    return {"conn_type": "beluga_llm", "password": CONNECTION, "extra": extra, **changes}


@pytest.fixture
def planted(
    side: Side, guarded: ModelServer, other_guarded: ModelServer, state_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Side:
    """The Temporal side, with a secret in every connection."""
    monkeypatch.setenv("OPENAI_API_KEY", ENVIRONMENT)
    connections = side.runner.connections
    temporal: Any = connections["temporal_default"]
    connections["temporal_default"] = {
        **temporal,
        "login": STATE,
        "password": TEMPORAL,
        "extra": {**temporal["extra"], "tls": False},
    }
    connections["beluga_state_default"] = {
        "conn_type": "beluga_state",
        "login": STATE,
        "password": STATE,
        "extra": {"url": f"sqlite:///{state_file}", "token": STATE},
    }
    connections["beluga_llm_default"] = llm(guarded)
    connections["by_environment"] = llm(other_guarded, password=None)
    connections["wrong_key"] = llm(guarded, password=WRONG)
    connections["bad_address"] = llm(guarded, extra={"base_url": f"https://u:{ADDRESS}@h/v1?key={ADDRESS}"})
    connections["bad_extra"] = {**llm(guarded), "extra": "{" + ADDRESS}
    connections["bad_state"] = {"conn_type": "beluga_state", "extra": {"url": f"mysql://u:{STATE}@h/db"}}
    connections["away"] = {"conn_type": "temporal", "host": "127.0.0.1", "port": 9, "password": TEMPORAL}
    return side


def left_by(run: TaskRun) -> list[str]:
    """Everything that Airflow keeps of a task, and shows to people."""
    kept = [run.xcoms, run.links, run.task_state, run.rendered_fields, run.deferral, run.operator.__dict__]
    errors = [*traceback.format_exception(run.error), repr(run.error)] if run.error else []
    return [*map(repr, kept), *errors]


async def histories_of(side: Side, run: TaskRun) -> list[str]:
    """The workflow's events with their payloads as they are."""
    history = await side.handle(run).fetch_history()
    return [str(event) for event in history.events] + [history.to_json()]


def assert_clean(told: list[str], where: str) -> None:
    assert told, where
    for secret in ALL:
        found = [text for text in told if secret in text]
        assert not found, f"{where} tells {secret}: {found[0][:500]}"


async def test_nothing_that_a_run_leaves_behind_holds_a_secret(
    planted: Side,
    token: str,
    guarded: ModelServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    side, order = planted, {**GOLD, "token": token}
    good, failing = [], []
    histories: list[str] = []
    with caplog.at_level("DEBUG"):
        async with side.worker():
            good += [
                await side.run(ChainOperator(task_id="chain", flow=flows.decided, inputs=order)),
                await side.run(decision("decision")),
                await side.run(decision("by_environment", llm_conn_id="by_environment")),
                await (await side.run(durable("durable", inputs=order))).run_to_end(),
                await (await side.run(batch("batch", [order, {**order, "tier": "x"}]))).run_to_end(),
            ]
            # an endpoint that repeats what it was sent
            guarded.fail("status", status=400, message=f"your key {CONNECTION}", code=CONNECTION, times=2)
            guarded.fail("not_json", text=CONNECTION, times=1)
            guarded.fail("bad_answer", text=CONNECTION, times=2)
            failing += [
                await side.run(decision("refused")),
                await (await side.run(durable("refused_durably", inputs=order))).run_to_end(),
                await side.run(decision("unreadable", fallback="standard")),
                await side.run(decision("misfit")),
                await side.run(decision("wrong", llm_conn_id="wrong_key")),
                await (await side.run(durable("wrong_durably", inputs=order, llm_conn_id="wrong_key"))).run_to_end(),
                await side.run(decision("bad_address", llm_conn_id="bad_address")),
                await (await side.run(durable("bad_durably", inputs=order, llm_conn_id="bad_address"))).run_to_end(),
                await side.run(decision("bad_extra", llm_conn_id="bad_extra")),
                await side.run(decision("bad_state", state_conn_id="bad_state")),
                await side.run(durable("away", inputs=order, temporal_conn_id="away")),
                await side.run(decision("mistaken", llm_conn_id="temporal_default")),
                await (await side.run(batch("bad_batch", [order], llm_conn_id="wrong_key"))).run_to_end(),
            ]
            for run in [*good, *failing]:
                if "workflow_id" in run.xcoms:
                    histories += await histories_of(side, run)
    assert [run.state for run in good] == ["success"] * len(good)
    in_spite = [run.operator.task_id for run in failing if run.state == "success"]
    assert in_spite == ["unreadable"], "the one with a fallback"
    assert_clean([text for run in [*good, *failing] for text in left_by(run)], "what Airflow keeps")
    assert len(histories) > 20
    assert_clean(histories, "a workflow's history")
    output = capfd.readouterr()
    assert output.out.count("Task failed with exception") > 5
    assert "connection 'bad_address': the base_url" in output.out
    assert_clean([caplog.text, output.out, output.err], "a log")
    files = await asyncio.to_thread(files_under, tmp_path)
    assert any(name.endswith(".jsonl") for name in files)
    assert any(name.endswith("state.db") for name in files)
    assert_clean(list(files.values()), "a file")


def files_under(folder: Path) -> dict[str, str]:
    return {str(file): file.read_bytes().decode(errors="replace") for file in folder.rglob("*") if file.is_file()}


def decision(task_id: str, **arguments: Any) -> LLMDecisionOperator:
    return LLMDecisionOperator(
        task_id=task_id,
        question="How?",
        data={"tier": "gold", "task": task_id},
        choices=["expedite", "standard"],
        retry=flows.ONCE,
        **arguments,
    )


def durable(task_id: str, **arguments: Any) -> TemporalWorkflowOperator:
    return TemporalWorkflowOperator(task_id=task_id, flow=flows.decided, **arguments)


def batch(task_id: str, items: list[Any], **arguments: Any) -> TemporalBatchOperator:
    return TemporalBatchOperator(task_id=task_id, flow=flows.judged, items=items, **arguments)


def test_what_is_planted_would_be_found(planted: Side) -> None:
    """The search itself: a step that gives a secret away is caught."""
    leaky = LLMDecisionOperator(
        task_id="leaky", question="How?", data={"a": CONNECTION}, choices=["a", "b"], rules=[(lambda _: True, "a")]
    )
    run = planted.runner.run(leaky)
    with pytest.raises(AssertionError, match="what Airflow keeps tells"):
        assert_clean(left_by(run), "what Airflow keeps")
    assert json.dumps(run.xcoms)
