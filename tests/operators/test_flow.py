"""Flows in one task: ChainOperator and GraphOperator."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG, Param
from airflow.sdk.exceptions import AirflowFailException

from beluga_airflow import Chain, InvalidFlow
from beluga_airflow.errors import FlowNotFound, InvalidSetting, StateUnavailable
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.operators.decision import LLMDecisionOperator
from beluga_airflow.operators.flow import ChainOperator, GraphOperator
from beluga_airflow.operators.temporal import TemporalWorkflowOperator
from beluga_airflow.testing import OperatorRunner
from tests.operators import sample_flows as flows
from tests.operators.conftest import GOLD

PATH = "tests.operators.sample_flows"


def test_a_chain_runs_in_the_task(runner: OperatorRunner, token: str) -> None:
    inputs = {"order_id": "o-1", "token": token}
    run = runner.run(ChainOperator(task_id="t", flow=flows.chain, inputs=inputs))
    assert run.state == "success"
    assert run.return_value == {
        "status": "completed",
        "data": {
            **inputs,
            "valid": True,
            "idempotency_key": "test-dag/test-run/t/-1/charge",
            "attempt": 1,
            "generation": 0,
        },
    }
    assert run.xcoms.keys() == {"return_value", "steps"}
    assert flows.seen[token] == ["validate", "charge"]


def test_a_graph_runs_side_by_side_in_the_task(runner: OperatorRunner, token: str) -> None:
    run = runner.run(GraphOperator(task_id="t", flow=f"{PATH}:graph", inputs={"order_id": "o-1", "token": token}))
    assert run.state == "success"
    assert run.return_value["data"]["left"] is run.return_value["data"]["right"] is True
    assert sorted(flows.seen[token]) == ["charge", "left", "right", "validate"]


def test_a_stop_is_a_success_with_its_status(runner: OperatorRunner, token: str) -> None:
    run = runner.run(ChainOperator(task_id="t", flow=flows.stopped, inputs={"token": token}))
    assert run.state == "success"
    assert run.return_value == {"status": "out_of_stock", "data": {"token": token, "product_id": "p-1"}}
    assert flows.seen[token] == ["stock"]


# what a flow may be


@pytest.mark.parametrize(
    ("operator", "flow", "error", "says"),
    [
        (ChainOperator, flows.graph, InvalidSetting, "flow= is a Graph, it must be a Chain, or the import path of one"),
        (GraphOperator, f"{PATH}:chain", InvalidSetting, "flow= is a Chain, it must be a Graph"),
        (ChainOperator, None, InvalidSetting, "flow= is a NoneType"),
        (ChainOperator, flows.unfinished, InvalidFlow, "flow 'unfinished' cannot run: it has no steps"),
        (ChainOperator, "nowhere:chain", FlowNotFound, "flow 'nowhere:chain' cannot be imported in this process"),
        (ChainOperator, f"{PATH}:nothing", FlowNotFound, "has nothing of that name where a Chain or Graph is wanted"),
        (ChainOperator, f"{PATH}:not_a_flow", FlowNotFound, "has a dict where"),
        (ChainOperator, "chain", FlowNotFound, "write it as 'package.module:name'"),
    ],
)
def test_a_flow_that_cannot_run_is_an_import_error_of_the_dag(
    operator: Any, flow: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as caught:
        operator(task_id="t", flow=flow)
    assert says in str(caught.value)


def test_a_flow_in_use_is_frozen() -> None:
    own = Chain("own").add_step("validate", flows.validate)
    ChainOperator(task_id="t", flow=own)
    with pytest.raises(InvalidFlow, match="is in use and cannot be changed any more"):
        own.add_step("charge", flows.charge)


# what an input may be


def test_inputs_are_templated(runner: OperatorRunner) -> None:
    inputs = {"order_id": "{{ params.order }}", "of": "{{ ds }}", "deep": [{"run": "{{ run_id }}"}], "n": 1}
    run = runner.run(ChainOperator(task_id="t", flow=flows.chain, inputs=inputs), conf={"order": "o-7"})
    assert (
        run.return_value["data"] | {"order_id": "o-7", "of": "2026-01-01", "deep": [{"run": "test-run"}]}
        == (run.return_value["data"])
    )
    assert run.operator.inputs["order_id"] == "o-7"


def test_inputs_may_be_json_text(runner: OperatorRunner) -> None:
    with DAG("orders", schedule=None, params={"order_id": Param("o-<1>&'\""), "value": Param(2.5)}):
        operator = ChainOperator(task_id="t", flow=flows.chain, inputs="{{ params | tojson }}")
    data = runner.run(operator).return_value["data"]
    assert (data["order_id"], data["value"]) == ("o-<1>&'\"", 2.5)


def test_inputs_may_come_from_another_task(runner: OperatorRunner) -> None:
    with DAG("orders", schedule=None):
        up = ChainOperator(task_id="up", flow=flows.chain)
        direct = ChainOperator(task_id="direct", flow=flows.chain, inputs=up.output)
        text = ChainOperator(task_id="text", flow=flows.chain, inputs="{{ ti.xcom_pull('up') | tojson }}")
    # a text from elsewhere is not rendered again
    xcoms: dict[Any, Any] = {"up": {"order_id": "{{ 7 * 7 }}", "lines": [1]}}
    for operator in (direct, text):
        data = runner.run(operator, xcoms=xcoms).return_value["data"]
        assert (data["order_id"], data["lines"]) == ("{{ 7 * 7 }}", [1])


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ("no json", "InvalidInput: the input is a text that is not JSON"),
        ("[1]", "InvalidInput: the input is a list; give a mapping or its JSON"),
        ("null", None),
        ("", "not JSON"),
        (5, "the input is a int"),
        ({"order_id": float("nan")}, "InvalidOutput: the input of flow 'order-chain'['order_id'] is nan"),
        ({"order_id": "o", 5: 1}, "InvalidOutput"),
        ({"order_id": {1, 2}}, "is a set, which is not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_an_input_that_is_none_fails_for_good(runner: OperatorRunner, inputs: Any, says: str | None) -> None:
    run = runner.run(ChainOperator(task_id="t", flow=flows.chain, inputs=inputs, retries=2))
    assert run.state == "failed"
    assert isinstance(run.error, AirflowFailException)
    assert says is None or says in str(run.error)


# identity


@pytest.mark.parametrize("key", ["order_id", "{{ params.order }}"])
def test_a_business_key_is_the_same_everywhere(runner: OperatorRunner, key: str) -> None:
    keys = set()
    for dag_id in ("one", "two"):
        with DAG(dag_id, schedule=None, params={"order": "o-7"}):
            operator = ChainOperator(task_id=f"task_of_{dag_id}", flow=flows.chain, inputs={"order_id": "o-7"}, key=key)
        run = runner.run(operator, run_id=f"run-of-{dag_id}")
        keys |= {each.return_value["data"]["idempotency_key"] for each in (run, run.clear())}
    assert keys == {"order-chain/o-7/charge"}


def test_without_one_the_key_names_the_run(runner: OperatorRunner) -> None:
    with DAG("orders", schedule=None):
        mapped = ChainOperator.partial(task_id="t", flow=flows.chain, llm_conn_id="x").expand(
            inputs=[{"order_id": "o-1"}, {"order_id": "o-2"}]
        )
    for run_id in ("r1", "r 2/3"):
        for index in (0, 1):
            run = runner.run(mapped, map_index=index, run_id=run_id)
            data = run.return_value["data"]
            assert data["order_id"] == f"o-{index + 1}"
            assert data["idempotency_key"] == f"orders/{run_id.replace('/', '%2F')}/t/{index}/charge"
            again = run.clear().return_value["data"]
            assert (again["idempotency_key"], again["generation"]) == (data["idempotency_key"], 1)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("number", "key='number' names no field of the input; there is: order_id, token"),
        ("token", "the business key of flow 'order-chain' is empty"),
        ("{{ params.nothing or '' }}", "the business key of flow 'order-chain' is empty"),
    ],
)
def test_a_business_key_that_names_nothing_fails_for_good(runner: OperatorRunner, key: str, says: str) -> None:
    inputs = {"order_id": "o-1", "token": " "}
    with DAG("orders", schedule=None, params={"nothing": None}):
        operator = ChainOperator(task_id="t", flow=flows.chain, inputs=inputs, key=key, retries=1)
    run = runner.run(operator)
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert says in str(run.error)


# how it fails


def test_the_steps_own_retry_retries(runner: OperatorRunner, token: str) -> None:
    run = runner.run(ChainOperator(task_id="t", flow=flows.retried, inputs={"token": token}))
    assert (run.state, run.return_value["data"]["attempts"], run.try_number) == ("success", 3, 1)


@pytest.mark.parametrize(
    ("flow", "error", "calls"),
    [
        (flows.used_up, "flow failed: step 'pay' failed: ConnectionError: the bank is closed", ["fragile"] * 3),
        (flows.chain, "flow failed: step 'validate' failed: InvalidInput: order_id is empty", ["validate"]),
        (flows.late, "flow timed_out: flow 'late' used up its timeout of 0.2 s in step 'never'", []),
    ],
)
def test_a_flow_that_failed_is_not_retried_by_airflow(
    runner: OperatorRunner, token: str, flow: Chain, error: str, calls: list[str]
) -> None:
    flows.broken.add(token)
    run = runner.run(ChainOperator(task_id="t", flow=flow, inputs={"token": token}, retries=3))
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert str(run.error) == error
    assert run.return_value is None
    assert flows.seen[token] == calls


def test_a_store_that_is_away_is_retried_by_airflow(runner: OperatorRunner, token: str) -> None:
    # what is too large for the task state needs the store
    with tempfile.TemporaryDirectory() as folder:
        runner.connections["beluga_state_default"] = {
            "conn_type": "beluga_state",
            "extra": {"url": f"sqlite:///{folder}"},
        }
        run = runner.run(ChainOperator(task_id="t", flow=flows.sizeable, inputs={"token": token}, retries=1))
    assert run.state == "up_for_retry"
    assert isinstance(run.error, StateUnavailable)
    assert flows.seen[token] == ["big"]


@pytest.mark.parametrize(
    ("connections", "says"),
    [
        (
            {"state_conn_id": "nowhere"},
            "InvalidSetting: there is no connection 'nowhere'; make one of type 'beluga_state'",
        ),
        ({"llm_conn_id": "nowhere"}, "InvalidSetting: there is no connection 'nowhere'; make one of type 'beluga_llm'"),
    ],
)
def test_a_connection_that_is_not_there_fails_for_good(
    runner: OperatorRunner, connections: dict[str, str], says: str
) -> None:
    run = runner.run(ChainOperator(task_id="t", flow=flows.decided, inputs=GOLD, retries=2, **connections))
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert says in str(run.error)


def test_a_flow_without_decisions_needs_no_model(operator_runner: OperatorRunner, token: str) -> None:
    operator_runner.connections["own"] = {"conn_type": "beluga_state", "extra": {"url": "memory://"}}
    operator = ChainOperator(
        task_id="t", flow=flows.chain, inputs={"order_id": "o"}, llm_conn_id="nowhere", state_conn_id="own"
    )
    assert operator_runner.run(operator).state == "success"


def test_without_any_connection_the_defaults_serve(
    operator_runner: OperatorRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-never-used")
    tiny = ChainOperator(task_id="tiny", flow=flows.decided, inputs={"tier": "tiny"})
    run = operator_runner.run(tiny)
    assert (run.state, run.xcoms["decisions"]["handling"]["decided_by"]) == ("success", "rule")
    assert (tmp_path / "beluga" / "state.db").exists()
    monkeypatch.delenv("OPENAI_API_KEY")
    run = operator_runner.run(ChainOperator(task_id="gold", flow=flows.decided, inputs=GOLD, retries=2))
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert "no API key for model provider 'openai'" in str(run.error)
    assert "OPENAI_API_KEY" in str(run.error)


# decisions


def test_decisions_are_pushed_by_step(runner: OperatorRunner, model_server: ModelServer) -> None:
    run = runner.run(ChainOperator(task_id="t", flow=flows.decided, inputs=GOLD))
    assert run.return_value["data"]["handling"] == "expedite"
    assert run.xcoms.keys() == {"return_value", "decisions", "steps"}
    record = run.xcoms["decisions"]["handling"]
    assert (record["answer"], record["decided_by"], record["reason"]) == ("expedite", "model", "gold goes first")
    assert (record["model"], record["simulated"], record["calls"]) == ("gpt-4o", True, 1)
    assert model_server.calls == 1


def test_decisions_of_a_flow_that_failed_are_pushed_too(runner: OperatorRunner, token: str) -> None:
    flows.broken.add(token)
    run = runner.run(ChainOperator(task_id="t", flow=flows.decided_then_broken, inputs={**GOLD, "token": token}))
    assert run.state == "failed"
    assert run.xcoms.keys() == {"decisions", "steps"}
    assert run.xcoms["decisions"]["handling"]["answer"] == "expedite"


def test_a_model_that_is_away_is_asked_by_the_steps_retry(runner: OperatorRunner, model_server: ModelServer) -> None:
    model_server.fail("status", status=503, times=2)
    run = runner.run(ChainOperator(task_id="t", flow=flows.decided, inputs=GOLD, retries=2))
    assert (run.state, run.try_number, model_server.calls) == ("success", 1, 3)
    assert run.xcoms["decisions"]["handling"]["attempt"] == 3
    model_server.fail("status", status=503, times=9)
    run = runner.run(ChainOperator(task_id="t", flow=flows.decided, inputs=GOLD, retries=2), run_id="r2")
    assert (run.state, type(run.error), model_server.calls) == ("failed", AirflowFailException, 6)
    assert "step 'handling' failed: ModelUnavailable: the model endpoint" in str(run.error)


def test_a_refused_key_is_asked_once_and_named(runner: OperatorRunner, model_server: ModelServer) -> None:
    model_server.fail("status", status=401, times=9)
    run = runner.run(ChainOperator(task_id="t", flow=flows.decided, inputs=GOLD, retries=2))
    assert (run.state, type(run.error), model_server.calls) == ("failed", AirflowFailException, 1)
    assert "it refuses the API key; mend the password of connection 'beluga_llm_default'" in str(run.error)


# Airflow's own needs


def test_a_dag_with_them_is_stored_as_any_other() -> None:
    from airflow.serialization.serialized_objects import DagSerialization

    with DAG("orders", schedule=None, default_args={"state_conn_id": "own"}) as dag:
        operator = ChainOperator(task_id="t", flow=flows.chain, inputs={"order_id": "{{ ds }}"}, key="order_id")
        GraphOperator.partial(task_id="m", flow=f"{PATH}:graph").expand(inputs=operator.output)
        LLMDecisionOperator(
            task_id="d",
            question="?",
            data={"x": 1},
            output_type=bool,
            rules=[(lambda _: True, False)],
            retry=flows.ONCE,
        )
        TemporalWorkflowOperator(task_id="w", flow=flows.chain)
    assert operator.state_conn_id == "own"
    stored = json.loads(json.dumps(DagSerialization.to_dict(dag)))
    again = DagSerialization.from_dict(stored)
    assert set(again.task_dict) == {"t", "m", "d", "w"}
    assert [link.name for link in again.task_dict["w"].operator_extra_links] == ["Temporal run"]
    assert again.task_dict["t"].template_fields == ["inputs", "key", "again_from", "again_run"]


@pytest.mark.parametrize("extra", [{"provider": "oracle-at-delphi"}, {"provider": "openai"}])
def test_a_model_that_cannot_be_asked_is_seen_before_anything_is_paid(
    runner: OperatorRunner, token: str, extra: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    runner.connections["beluga_llm_default"] = {"conn_type": "beluga_llm", "extra": extra}
    inputs = {"order_id": "o-1", "tier": "gold", "token": token}
    run = runner.run(ChainOperator(task_id="t", flow=flows.paid_then_decided, inputs=inputs))
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert "InvalidSetting: " in str(run.error)
    assert flows.seen[token] == []
