"""The DAGs that route an order: the task that the decision names runs, and no other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow.llm.model_server import ModelServer
from tests.task_group.running import runs_of

DAGS = Path(__file__).resolve().parents[2] / "dags"
CASES: dict[str, dict[str, Any]] = {
    "expedite": {},
    "standard": {"customer_tier": "bronze"},
    "hold": {"quantity": 250},
}
SMALL = {"order_value": 49.0}
FORMS = {"order_routing": "route", "order_routing_taskflow": "route_order"}


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    from anyio.from_thread import start_blocking_portal

    server = ModelServer(rules=DAGS / "data" / "model_rules.yaml")
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server):
        yield server


@pytest.fixture(scope="module")
def ended(model: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """The tasks of each run, by form and case."""
    llm = {"provider": "simulated", "base_url": model.base_url}
    cases = {**CASES, "small": SMALL}
    runs = runs_of(
        DAGS,
        [[form, conf, None] for form in FORMS for conf in cases.values()],
        home=tmp_path_factory.mktemp("airflow"),
        environment={"AIRFLOW_CONN_BELUGA_LLM_DEFAULT": json.dumps({"conn_type": "beluga_llm", "extra": llm})},
    )
    tasks = [{task["task_id"]: task for task in run["tasks"]} for run in runs]
    return dict(zip([(form, case) for form in FORMS for case in cases], tasks, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", CASES)
def test_the_order_goes_one_way(ended: dict[tuple[str, str], Any], form: str, way: str) -> None:
    tasks = ended[form, way]
    assert {name: task["state"] for name, task in tasks.items()} == {
        FORMS[form]: "success",
        **dict.fromkeys(CASES, "skipped"),
        way: "success",
        "tell": "success",
    }
    assert tasks[FORMS[form]]["xcoms"]["return_value"] == way
    assert tasks["tell"]["xcoms"]["return_value"] == tasks[way]["xcoms"]["return_value"]


@pytest.mark.parametrize("form", FORMS)
def test_a_small_order_costs_no_model(ended: dict[tuple[str, str], Any], model: ModelServer, form: str) -> None:
    assert ended[form, "small"]["standard"]["state"] == "success"
    assert model.calls == len(CASES) * len(FORMS)
