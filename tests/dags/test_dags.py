"""The example DAGs, as Airflow runs them: parsed from their folder, and by `dag.test()`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.testing import TemporalServer

DAGS = Path(__file__).resolve().parents[2] / "dags"
PROGRAM = Path(__file__).with_name("run_dags.py")
ORDER = {"order_id": "order-7", "order_value": 250.0, "customer_tier": "gold", "product_id": "40117", "quantity": 2}
RUNS = [
    ["order_chain", {}, None],
    ["order_graph", {}, None],
    ["order_durable", {}, None],
    ["order_durable", ORDER | {"quantity": 900}, None],
    ["order_batch", {"day": "2025-12-02"}, None],
    ["order_batch", {"day": "all"}, None],
]


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    from anyio.from_thread import start_blocking_portal

    server = ModelServer(rules=DAGS / "data" / "model_rules.yaml")
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server):
        yield server


@pytest.fixture(scope="module")
def environment(
    temporal_server: TemporalServer, model: ModelServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    home = tmp_path_factory.mktemp("airflow")
    llm = {"provider": "simulated", "base_url": model.base_url}
    return os.environ | {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW_CONN_TEMPORAL_DEFAULT": json.dumps(temporal_server.connection),
        "AIRFLOW_CONN_BELUGA_LLM_DEFAULT": json.dumps({"conn_type": "beluga_llm", "extra": llm}),
        "BELUGA_LEDGER": str(home / "ledger.db"),
    }


@pytest.fixture(scope="module")
def worker(environment: dict[str, str]) -> Iterator[None]:
    command = [sys.executable, "-m", "airflow", "beluga", "worker", "--import", "orders.flows"]
    log = Path(environment["AIRFLOW_HOME"]) / "worker.log"
    with log.open("w") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process:
        yield
        process.terminate()
    assert process.returncode == 0, log.read_text()[-3000:]


@pytest.fixture(scope="module")
def ended(environment: dict[str, str], worker: None) -> list[dict[str, Any]]:
    """What came of each of RUNS."""
    result = Path(environment["AIRFLOW_HOME"]) / "result.json"
    done = subprocess.run(
        [sys.executable, PROGRAM, DAGS, result, json.dumps(RUNS)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.exists(), (done.stdout + done.stderr)[-4000:]
    tasks: list[dict[str, Any]] = json.loads(result.read_text())
    # shown by pytest where a test that uses this fails
    print(done.stdout[-20000:])
    return tasks


def test_all_runs_succeed(ended: list[dict[str, Any]]) -> None:
    assert [(run["dag"], run["state"], run["task"]) for run in ended] == [
        (dag, "success", "success") for dag, *_ in RUNS
    ]


def test_the_chain_decides_and_pays(ended: list[dict[str, Any]]) -> None:
    chain = ended[0]
    assert chain["return_value"]["status"] == "completed"
    assert chain["return_value"]["data"]["order_id"] == "order-123"
    assert chain["return_value"]["data"]["handling"] in ("expedite", "standard")
    assert chain["return_value"]["data"]["payment_id"]
    assert chain["decisions"]["decide"]["simulated"] is True
    assert chain["decisions"]["decide"]["decided_by"] == "model"


def test_the_graph_fulfils(ended: list[dict[str, Any]]) -> None:
    data = ended[1]["return_value"]["data"]
    assert {"payment_id", "fulfillment_id"} <= data.keys()


def test_the_durable_order_has_status_payment_and_fulfilment(ended: list[dict[str, Any]]) -> None:
    durable = ended[2]
    assert durable["return_value"]["status"] == "completed"
    assert {"payment_id", "fulfillment_id"} <= durable["return_value"]["data"].keys()
    assert durable["workflow_id"].startswith("order_durable/")


def test_out_of_stock_is_a_success_with_that_status(ended: list[dict[str, Any]]) -> None:
    assert ended[3]["return_value"]["status"] == "out_of_stock"


def test_the_batch_takes_the_day_that_is_asked_for(ended: list[dict[str, Any]]) -> None:
    manifest = ended[4]["return_value"]
    assert manifest["total"] == 30
    assert manifest["statuses"]["completed"] == 23
    lines = [json.loads(line) for line in Path(manifest["results"]).read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(30))


def test_the_batch_takes_the_whole_file(ended: list[dict[str, Any]]) -> None:
    assert ended[5]["return_value"]["total"] == 266


def test_the_demo_orders_are_paid_once(ended: list[dict[str, Any]], environment: dict[str, str]) -> None:
    import sqlite3

    with sqlite3.connect(environment["BELUGA_LEDGER"]) as db:
        keys, orders = db.execute(
            "SELECT count(DISTINCT idempotency_key), count(DISTINCT order_id) FROM calls WHERE operation = 'charge'"
        ).fetchone()
    db.close()
    # order-123 was paid by three flows, each with its own key
    assert keys == orders + 2


def test_parsing_the_dags_loads_nothing_heavy() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import airflow.sdk;"
        "import order_chain, order_graph, order_durable, order_batch, order_watch, order_routing;"
        "print([name for name in ('openai', 'temporalio', 'redis', 'psycopg') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, DAGS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
