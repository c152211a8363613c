"""The scheduled job for real: its task, a Temporal server, worker processes, a simulated model, and things that die."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag

from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.operators.batch import TemporalBatchOperator
from beluga_airflow.testing import OperatorRunner, TaskRun, TemporalServer
from orders import ledger
from orders.source import orders_of
from tests.dags.conftest import ROOT
from tests.dags.independent_count import expected
from tests.temporal.worker_process import WorkerProcess, environment_of

DAYS = {"2025-12-01": 212, "2025-12-02": 30}


@pytest.fixture
def model_rules() -> Path:
    return ROOT / "dags" / "data" / "model_rules.yaml"


@pytest.fixture
def environment(
    temporal_server: TemporalServer,
    model_server: ModelServer,
    ledger_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, str]:
    """What the task and its workers find; the task runs in this process."""
    temporal = {**temporal_server.connection}
    temporal["extra"] = {**temporal["extra"], "task_queue": tmp_path.name}
    llm = {"conn_type": "beluga_llm", "extra": {"provider": "simulated", "base_url": model_server.base_url}}
    given = environment_of(
        tmp_path,
        {"temporal_default": temporal, "beluga_llm_default": llm},
        BELUGA_LEDGER=str(ledger_file),
        AIRFLOW__CORE__DAGS_FOLDER=str(ROOT / "dags"),
        TESTS_HALT=str(tmp_path / "halt"),
    )
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return given


@pytest.fixture
def worker(environment: dict[str, str], tmp_path: Path) -> Callable[[], WorkerProcess]:
    """Starts a worker; each is gone at the end of its ``with``."""
    return lambda: WorkerProcess(tmp_path, environment, "--import", "orders.flows")


def process_orders() -> TemporalBatchOperator:
    """The task of the DAG."""
    bag = DagBag(ROOT / "dags" / "order_batch.py", collect_dags=True)
    task = bag.dags["order_batch"].get_task("process_orders")
    assert isinstance(task, TemporalBatchOperator)
    return task


def day_of(flow: str, source: Path, day: str) -> TemporalBatchOperator:
    """The task of the DAG for a day, with another flow."""
    return TemporalBatchOperator(
        task_id="process_orders",
        retries=2,
        flow=flow,
        items="orders.source:orders_of_run",
        items_args={"source": str(source), "day": day},
        key="InvoiceNo",
    )


async def start(runner: OperatorRunner, task: TemporalBatchOperator, run_id: str, **conf: str) -> TaskRun:
    """Run the task until it waits for the batch."""
    run = await asyncio.to_thread(runner.run, task, run_id=run_id, conf=conf)
    assert run.state == "deferred", run.error
    return run


def wait_for_charges(count: int) -> None:
    """Until so many orders were charged."""
    deadline = time.monotonic() + 90
    while len(ledger.calls("charge")) < count:
        assert time.monotonic() < deadline, "nobody charges"
        time.sleep(0.05)


def lines_of(run: TaskRun) -> list[dict[str, Any]]:
    """The results that a task wrote."""
    return [json.loads(line) for line in Path(run.return_value["results"]).read_text().splitlines()]


def assert_as_the_rules_say(run: TaskRun, source: Path, day: str | None = None) -> None:
    """Each order has come to one end, the one that the independent count gives it."""
    assert run.state == "success", run.error
    lines = lines_of(run)
    assert [line["key"] for line in lines] == [order["InvoiceNo"] for order in orders_of(source, day)]
    assert Counter(line["status"] for line in lines) == expected(source, day)
    assert run.return_value["statuses"] == dict(expected(source, day))
    assert run.return_value["total"] == len(lines)


def assert_paid_once(run: TaskRun) -> None:
    """Whoever called how often: each paid order was paid, sent and told under one key, with its own amount."""
    paid = {line["key"]: line["data"] for line in lines_of(run) if line["status"] == "completed"}
    for operation, reference in (("charge", "payment_id"), ("ship", "fulfillment_id"), ("notify", "message_id")):
        made = ledger.calls(operation)
        assert {call.order_id: call.reference for call in made} == {
            number: data[reference] for number, data in paid.items()
        }
        assert len({call.idempotency_key for call in made}) == len(paid)
    assert {call.order_id: call.amount for call in ledger.calls("charge")} == {
        number: data["order_total"] for number, data in paid.items()
    }


async def test_a_real_month_ends_as_the_rules_say(
    real_file: Path, operator_runner: OperatorRunner, worker: Callable[[], WorkerProcess]
) -> None:
    with worker():
        run = await start(operator_runner, process_orders(), "manual__1", source=str(real_file), day="all")
        run = await run.run_to_end()
    assert_as_the_rules_say(run, real_file)
    assert run.return_value["total"] == 2_025
    assert_paid_once(run)
    assert len(ledger.calls("charge")) == expected(real_file)["completed"]
    assert run.return_value["simulated"] is True


async def test_a_worker_that_is_killed_between_charge_and_return_charges_nobody_twice(
    demo_file: Path, operator_runner: OperatorRunner, worker: Callable[[], WorkerProcess], tmp_path: Path
) -> None:
    """And Airflow loses the task meanwhile: its retry finds the batch that runs."""
    halt = tmp_path / "halt"
    halt.touch()
    task = day_of("tests.dags.halting_flows:invoice_flow", demo_file, "2025-12-01")
    with worker() as first:
        run = await start(operator_runner, task, "scheduled__1")
        await asyncio.to_thread(wait_for_charges, 20)
        first.process.kill()
        first.process.wait()
    halt.unlink()
    charged = {call.order_id for call in ledger.calls("charge")}
    with worker():
        again = await asyncio.to_thread((await asyncio.to_thread(run.lose)).retry)
        assert again.xcoms["workflow_id"] == run.xcoms["workflow_id"]
        assert again.xcoms["run_id"] == run.xcoms["run_id"]
        again = await again.run_to_end()
    assert_as_the_rules_say(again, demo_file, "2025-12-01")
    assert_paid_once(again)
    # those that were charged when the worker died were asked for the money twice, under one key
    asked = Counter(call.order_id for call in ledger.calls("charge"))
    assert {order for order, times in asked.items() if times > 1} == charged
    assert set(asked.values()) == {1, 2}


async def test_a_day_that_is_cleared_or_backfilled_is_run_again_and_paid_once(
    demo_file: Path, operator_runner: OperatorRunner, worker: Callable[[], WorkerProcess], model_server: ModelServer
) -> None:
    day = "2025-12-02"
    with worker():
        first = await (await start(operator_runner, process_orders(), "scheduled__1", day=day)).run_to_end()
        assert_as_the_rules_say(first, demo_file, day)
        questions = model_server.calls
        assert questions > 0

        cleared = await (await asyncio.to_thread(first.clear)).run_to_end()
        assert_as_the_rules_say(cleared, demo_file, day)
        assert cleared.generation == 1
        # a clear asks the model again
        assert model_server.calls == 2 * questions

        backfilled = await (await start(operator_runner, process_orders(), "backfill__1", day=day)).run_to_end()
        assert_as_the_rules_say(backfilled, demo_file, day)
    workflows = {run.xcoms["workflow_id"] for run in (first, cleared, backfilled)}
    assert len(workflows) == 3
    assert_paid_once(backfilled)
    assert [line["data"] for line in lines_of(first)] == [line["data"] for line in lines_of(backfilled)]
    assert ledger.summary()["charge"]["calls"] == 3 * ledger.summary()["charge"]["keys"]
