"""Budgets and failover of decisions in tasks, in flows and on Temporal."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG

from beluga_airflow import Budget, InvalidFlow
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.operators.batch import TemporalBatchOperator
from beluga_airflow.operators.decision import LLMDecisionOperator
from beluga_airflow.operators.flow import ChainOperator
from beluga_airflow.operators.temporal import TemporalWorkflowOperator
from beluga_airflow.state import open_store
from beluga_airflow.testing import OperatorRunner
from tests.operators import budget_flows as flows
from tests.operators.conftest import Side, lines_of

TEXT = {"text": "hello"}


def operator(task_id: str = "decide", **arguments: Any) -> LLMDecisionOperator:
    given: dict[str, Any] = {"question": "Which?", "choices": ["a", "b"], "data": TEXT, "max_tokens": 20}
    return LLMDecisionOperator(task_id=task_id, **given | arguments)


def kept(file: Path) -> dict[str, int]:
    """The tokens that were spent, by budget; nothing is held."""

    async def read() -> dict[str, int]:
        store = open_store(f"sqlite:///{file}")
        entries = {name: await store.get(name) async for name in store.keys("beluga/budgets/")}
        await store.close()
        assert not any(entry["held"] for entry in entries.values())
        return {name.removeprefix("beluga/budgets/"): entry["spent"][0] for name, entry in entries.items()}

    return asyncio.run(read())


def paid(decisions: dict[str, Any]) -> int:
    return sum(sum(record["tokens"].values()) for record in decisions.values())


# budgets


def test_a_task_has_a_budget_for_all_its_map_indexes_and_clears(
    runner: OperatorRunner, model_server: ModelServer, state_file: Path
) -> None:
    runs = [runner.run(operator(budget=flows.PER_TASK), map_index=index) for index in range(6)]
    states = [run.state for run in runs]
    assert states == sorted(states, reverse=True), "those that came late"
    assert states.count("success") == model_server.calls in range(1, 6)
    assert "BudgetSpent: the budget of task 'decide' of run 'test-run' of DAG 'test-dag' has too little" in str(
        runs[-1].error
    )
    assert runs[-1].clear().state != "success"
    assert kept(state_file).keys() == {"task/test-dag/test-run/decide"}
    assert runner.run(operator(budget=flows.PER_TASK), run_id="next").state == "success"


def test_over_budget_a_task_takes_the_fallback(runner: OperatorRunner, model_server: ModelServer) -> None:
    run = runner.run(operator(budget=Budget(tokens=10, per="day"), fallback="b"))
    assert (run.state, run.return_value) == ("success", "b")
    assert run.xcoms["decision"]["decided_by"] == "fallback"
    assert " (UTC) of DAG 'test-dag' has too little left" in run.xcoms["decision"]["reason"]
    assert model_server.calls == 0


def test_tasks_of_a_run_share_a_budget_of_the_run(
    runner: OperatorRunner, model_server: ModelServer, state_file: Path
) -> None:
    one = runner.run(ChainOperator(task_id="one", flow=flows.frugal_run, inputs=TEXT))
    deciders = [record["decided_by"] for record in one.xcoms["decisions"].values()]
    assert deciders.count("model") == model_server.calls in range(1, 6)
    # with a business key it is the same run
    two = runner.run(ChainOperator(task_id="two", flow=flows.frugal_run, inputs=TEXT, key="text"))
    assert {record["decided_by"] for record in two.xcoms["decisions"].values()} == {"fallback"}
    assert kept(state_file) == {"dag_run/test-dag/test-run": paid(one.xcoms["decisions"])}


@pytest.mark.parametrize("key", [None, "text"])
async def test_a_workflow_has_the_budget_of_its_task(side: Side, state_file: Path, key: str | None) -> None:
    end = await side.run_to_end(TemporalWorkflowOperator(task_id="t", flow=flows.frugal, inputs=TEXT, key=key))
    assert end.state == "success"
    records = end.xcoms["decisions"]
    deciders = [record["decided_by"] for record in records.values()]
    assert 0 < deciders.count("model") < 6
    spent = await asyncio.to_thread(kept, state_file)
    assert spent == {f"task/test-dag/{side.run_id}/t": paid(records)}


@pytest.mark.parametrize("key", [None, "id"])
async def test_the_items_of_a_batch_share_the_budget_of_the_task(
    side: Side, model_server: ModelServer, state_file: Path, key: str | None
) -> None:
    items = [{"id": f"o-{number}", **TEXT} for number in range(8)]
    end = await side.run_to_end(TemporalBatchOperator(task_id="t", flow=flows.item, items=items, key=key))
    assert end.state == "success"
    lines = lines_of(Path(end.return_value["results"]))
    records = [line["decisions"]["one"] for line in lines]
    deciders = [record["decided_by"] for record in records]
    assert 0 < deciders.count("model") == model_server.calls < 8
    spent = await asyncio.to_thread(kept, state_file)
    assert spent == {f"task/test-dag/{side.run_id}/t": sum(sum(record["tokens"].values()) for record in records)}
    assert sum(spent.values()) <= 900


def test_a_connection_has_a_budget_of_a_day(
    runner: OperatorRunner, model_server: ModelServer, state_file: Path
) -> None:
    runner.connections["beluga_llm_default"]["extra"]["tokens_per_day"] = 10
    run = runner.run(operator(fallback="b"))
    assert run.xcoms["decision"]["decided_by"] == "fallback"
    assert "(UTC) of connection 'beluga_llm_default' has too little left" in run.xcoms["decision"]["reason"]
    runner.connections["beluga_llm_default"]["extra"]["tokens_per_day"] = 10_000
    assert runner.run(operator(), run_id="next").state == "success"
    ((name, tokens),) = kept(state_file).items()
    assert name.endswith("/connection/beluga_llm_default")
    assert tokens > 0
    assert model_server.calls == 1


def test_arguments_of_a_mapped_operator_and_faults() -> None:
    with DAG("d", schedule=None):
        LLMDecisionOperator.partial(
            task_id="m", question="?", choices=["a", "b"], budget=Budget(tokens=1), fallback_conn_ids=["x"]
        ).expand(data=[TEXT])
    with pytest.raises(InvalidFlow, match="budget: it bounds nothing"):
        operator(budget=Budget())
    with pytest.raises(InvalidFlow, match="fallback_conn_ids is 'x', it must be a list"):
        operator(fallback_conn_ids="x")


# failover


@pytest.fixture
def connected(runner: OperatorRunner, model_server: ModelServer) -> OperatorRunner:
    """Two connections; there is none of the name ``nowhere``."""
    for name in ("primary", "backup"):
        extra = {"provider": "simulated", "base_url": model_server.url_of(name), "model": f"model-of-{name}"}
        runner.connections[name] = {"conn_type": "beluga_llm", "password": "x", "extra": extra}
    return runner


def test_a_broken_fallback_never_fails_a_healthy_primary(connected: OperatorRunner, model_server: ModelServer) -> None:
    run = connected.run(ChainOperator(task_id="t", flow=flows.covered, inputs=TEXT))
    assert run.state == "success"
    assert run.xcoms["decisions"]["one"]["connection"] == "primary"
    assert model_server.calls_by("connection") == {"primary": 1}


def test_retry_then_failover_then_uncertain(connected: OperatorRunner, model_server: ModelServer) -> None:
    model_server.fail("overloaded", every=1, connection="primary")
    run = connected.run(ChainOperator(task_id="t", flow=flows.covered, inputs=TEXT))
    record = run.xcoms["decisions"]["one"]
    assert (record["connection"], record["model"], record["attempt"]) == ("backup", "model-of-backup", 3)
    assert model_server.calls_by("connection") == {"primary": 3, "backup": 1}
    model_server.fail("overloaded", every=1, connection="backup")
    run = connected.run(ChainOperator(task_id="t", flow=flows.covered, inputs=TEXT), run_id="next")
    record = run.xcoms["decisions"]["one"]
    assert (record["decided_by"], record["answer"], record["connection"]) == ("fallback", "b", None)
    assert "connection 'nowhere': there is no connection 'nowhere'" in record["reason"]
    assert model_server.calls_by("connection") == {"primary": 6, "backup": 2}


def test_a_decision_operator_fails_over_at_once_from_a_limit(
    connected: OperatorRunner, model_server: ModelServer
) -> None:
    connected.connections["primary"]["extra"] |= {"requests_per_minute": 1, "max_wait": 0.001}
    asking = operator(llm_conn_id="primary", fallback_conn_ids=["backup"])
    runs = [connected.run(asking, run_id=run_id) for run_id in ("r1", "r2")]
    records = [run.xcoms["decision"] for run in runs]
    assert [(record["connection"], record["attempt"]) for record in records] == [("primary", 1), ("backup", 1)]
    assert model_server.calls_by("connection") == {"primary": 1, "backup": 1}


async def test_on_temporal_a_decision_fails_over_too(
    side: Side, connected: OperatorRunner, model_server: ModelServer
) -> None:
    model_server.fail("status", status=503, every=1, connection="primary")
    end = await side.run_to_end(TemporalWorkflowOperator(task_id="t", flow=flows.covered, inputs=TEXT))
    record = end.xcoms["decisions"]["one"]
    assert (record["connection"], record["attempt"]) == ("backup", 3)
    assert model_server.calls_by("connection") == {"primary": 3, "backup": 1}, "no layer multiplies another's retries"
