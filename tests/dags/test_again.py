"""Running an order again by the forms of the example DAGs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from airflow.dag_processing.dagbag import DagBag

from beluga_airflow import Chain, Graph
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.testing import OperatorRunner, TaskRun
from orders import ledger
from orders.forms import again_params

DAGS = Path(__file__).resolve().parents[2] / "dags"


def test_the_form_offers_all_steps_and_the_flows_inside() -> None:
    ship = Chain("ship").add_step("pack", len).add_step("label", len)
    flow = Graph("shop").add_node("pay", len).add_node("ship", ship).add_edge("pay", "ship")
    offered = again_params(flow)["again_from"].schema["enum"]
    assert offered == [None, "pay", "ship.pack", "ship.label", "ship.result", "ship"]
    assert all(flow.check().rerun_from(name) for name in offered[1:])


@pytest.mark.parametrize(
    ("name", "step", "calls"),
    [
        ("order_chain", "payment", ["charge", "charge"]),
        ("order_graph", "fulfill", ["charge", "ship", "notify", "ship", "notify"]),
    ],
)
async def test_the_order_is_that_of_the_earlier_run_whatever_the_form_says(
    operator_runner: OperatorRunner, tmp_path: Path, name: str, step: str, calls: list[str]
) -> None:
    task = DagBag(DAGS / f"{name}.py", collect_dags=True).dags[name].get_task("process_order")

    async def run(run_id: str, **form: str) -> TaskRun:
        return await asyncio.to_thread(operator_runner.run, task, run_id=run_id, conf=form)

    url = f"sqlite:///{tmp_path / 'state.db'}"
    operator_runner.connections["beluga_state_default"] = {"conn_type": "beluga_state", "extra": {"url": url}}
    async with ModelServer(rules=DAGS / "data" / "model_rules.yaml") as server:
        extra = {"provider": "simulated", "base_url": server.base_url}
        operator_runner.connections["beluga_llm_default"] = {"conn_type": "beluga_llm", "extra": extra}
        first = await run("first", order_id="order-7")
        # the form's own order is another one
        second = await run("second", again_from=step, again_run="first")

    assert (first.state, second.state) == ("success", "success")
    assert second.return_value == first.return_value
    made = ledger.calls()
    assert {call.order_id for call in made} == {"order-7"}
    assert [call.operation for call in made] == calls
    assert len({call.idempotency_key for call in made}) == len(set(calls)), "what runs again, runs under the same key"
