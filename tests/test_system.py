"""The whole stack as users have it, over Airflow's REST API: runs, a clear, a backfill, a file that is not there."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[1]
WITHIN = 240.0

pytestmark = pytest.mark.timeout(600)


def within(what: str, look: Callable[[], Any]) -> Any:
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + WITHIN
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.3)
    raise AssertionError(f"not within {WITHIN:g} s: {what}")


class Stack:
    """A running stack, and what a user asks of its Airflow."""

    def __init__(self, state: Path) -> None:
        self.state = state
        site = json.loads((state / "stack.json").read_text())["site"]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{site['airflow']}", timeout=30)
        token = self.http.get("/auth/token").json()["access_token"]
        self.http.headers["Authorization"] = f"Bearer {token}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self.http.request(method, f"/api/v2{path}", json=body)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text[:1000]}"
        found: dict[str, Any] = answer.json() if answer.content else {}
        return found

    def trigger(self, dag: str, conf: dict[str, Any]) -> str:
        self.call("PATCH", f"/dags/{dag}", {"is_paused": False})
        run = self.call("POST", f"/dags/{dag}/dagRuns", {"logical_date": None, "conf": conf})
        return str(run["dag_run_id"])

    def ended(self, dag: str, run: str, *, after: str = "") -> dict[str, Any]:
        """The run, once it has ended, later than an earlier end."""

        def look() -> dict[str, Any] | None:
            found = self.call("GET", f"/dags/{dag}/dagRuns/{run}")
            return found if found["state"] in ("success", "failed") and (found["end_date"] or "") > after else None

        found: dict[str, Any] = within(f"run {run} of {dag} ends", look)
        return found

    def returned(self, dag: str, run: str, task: str) -> Any:
        path = f"/dags/{dag}/dagRuns/{run}/taskInstances/{task}/xcomEntries/return_value"
        value = self.call("GET", path)["value"]
        return json.loads(value) if isinstance(value, str) else value

    def log(self, dag: str, run: str, task: str, try_number: int) -> str:
        return json.dumps(self.call("GET", f"/dags/{dag}/dagRuns/{run}/taskInstances/{task}/logs/{try_number}"))

    def charges(self) -> dict[str, tuple[int, int]]:
        """Of each order that was charged: how many keys, and how many calls."""
        with closing(sqlite3.connect(next(self.state.rglob("ledger.db")))) as db:
            rows = db.execute(
                "SELECT order_id, count(DISTINCT idempotency_key), count(*) FROM calls "
                "WHERE operation = 'charge' GROUP BY order_id"
            )
            return {order: (keys, calls) for order, keys, calls in rows}


def paid_orders(manifest: dict[str, Any]) -> list[str]:
    """The orders that a batch's results call paid."""
    lines = map(json.loads, Path(manifest["results"]).read_text().splitlines())
    return [line["key"] for line in lines if line["status"] == "completed"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    state = tmp_path_factory.mktemp("stack")
    command = [sys.executable, "-m", "beluga_airflow.cli.stack"]
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    log = state / "up.log"
    with log.open("w") as output:
        up = subprocess.Popen(
            [*command, "up", "--state-dir", state], cwd=ROOT, env=environment, stdout=output, stderr=output
        )
    try:
        within("the stack is up", lambda: "Everything is up" in log.read_text() or up.poll() is not None)
        assert up.poll() is None, log.read_text()
        running = Stack(state)
        with closing(running.http):
            yield running
    finally:
        subprocess.run([*command, "down", "--state-dir", state], cwd=ROOT, env=environment, check=True)
        assert up.wait(60) == 0, log.read_text()


@pytest.mark.parametrize("dag", ["order_chain", "order_graph", "order_durable"])
def test_an_order_from_the_form(stack: Stack, dag: str) -> None:
    run = stack.trigger(dag, {})
    assert stack.ended(dag, run)["state"] == "success"
    returned = stack.returned(dag, run, "process_order")
    assert returned["status"] == "completed"
    assert returned["data"]["order_id"] == "order-123"
    assert returned["data"]["payment_id"]


def test_a_durable_task_links_to_its_run_on_temporal(stack: Stack) -> None:
    run = stack.trigger("order_durable", {})
    stack.ended("order_durable", run)
    path = f"/dags/order_durable/dagRuns/{run}/taskInstances/process_order"
    run_id = stack.call("GET", f"{path}/xcomEntries/run_id")["value"]
    link = stack.call("GET", f"{path}/links")["extra_links"]["Temporal run"]
    assert link.endswith(run_id.strip('"'))
    assert httpx.get(link, timeout=30).is_success


def test_airflow_has_read_all_dags_and_knows_the_connections(stack: Stack) -> None:
    assert stack.call("GET", "/importErrors")["import_errors"] == []
    forms = {form["connection_type"]: form for form in stack.http.get("/ui/connections/hook_meta").json()}
    assert {"beluga_llm", "beluga_state", "temporal"} <= forms.keys()
    assert forms["beluga_llm"]["standard_fields"]["password"]["title"] == "API key"
    assert forms["beluga_state"]["extra_fields"]["url"]["schema"]["format"] == "password"


def test_a_cleared_day_runs_again_and_pays_with_the_same_keys(stack: Stack) -> None:
    run = stack.trigger("order_batch", {"day": "2025-12-02"})
    first_end = stack.ended("order_batch", run)
    first = stack.returned("order_batch", run, "process_orders")
    once = stack.charges()
    body = {"dry_run": False, "dag_run_id": run, "task_ids": ["process_orders"], "only_failed": False}
    stack.call("POST", "/dags/order_batch/clearTaskInstances", body)

    again_end = stack.ended("order_batch", run, after=first_end["end_date"])
    again = stack.returned("order_batch", run, "process_orders")

    assert first_end["state"] == again_end["state"] == "success"
    assert first["workflow_id"] != again["workflow_id"]
    assert first["statuses"] == again["statuses"]
    assert first["total"] == 30
    paid = paid_orders(again)
    twice = stack.charges()
    assert len(paid) == first["statuses"]["completed"]
    for order in paid:
        assert twice[order] == (1, once[order][1] + 1)


def test_a_backfill_takes_the_day_of_its_interval_and_pays_with_the_same_keys(stack: Stack) -> None:
    stack.call("PATCH", "/dags/order_batch", {"is_paused": False})
    body = {"dag_id": "order_batch", "from_date": "2025-11-30T00:00:00Z", "to_date": "2025-11-30T00:00:00Z"}
    stack.call("POST", "/backfills", body)

    def look() -> str | None:
        runs = stack.call("GET", "/dags/order_batch/dagRuns?run_type=backfill")["dag_runs"]
        return str(runs[0]["dag_run_id"]) if runs else None

    run = within("the backfill makes a run", look)
    assert stack.ended("order_batch", run)["state"] == "success"
    manifest = stack.returned("order_batch", run, "process_orders")
    assert manifest["total"] == 24
    assert manifest["simulated"] is True
    # somebody ran the day by hand too
    assert stack.ended("order_batch", stack.trigger("order_batch", {"day": "2025-11-30"}))["state"] == "success"
    paid = paid_orders(manifest)
    charges = stack.charges()
    assert len(paid) == manifest["statuses"]["completed"]
    assert [charges[order] for order in paid] == [(1, 2)] * len(paid)


def test_a_file_that_is_not_there_fails_at_once_and_says_which(stack: Stack) -> None:
    run = stack.trigger("order_batch", {"source": "no-such-file.csv", "day": "all"})
    assert stack.ended("order_batch", run)["state"] == "failed"
    (task,) = stack.call("GET", f"/dags/order_batch/dagRuns/{run}/taskInstances")["task_instances"]
    assert task["try_number"] == 1, "no retry can help"
    log = stack.log("order_batch", run, "process_orders", 1)
    assert "no-such-file.csv" in log
