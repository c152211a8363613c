"""A flow in one task whose worker is lost: the retry goes on behind the finished steps, a clear begins anew."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG

from beluga_airflow import Chain, Graph
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.operators import checkpoint
from beluga_airflow.operators.flow import ChainOperator, GraphOperator
from beluga_airflow.testing import OperatorRunner, TaskRun
from tests.operators import sample_flows as flows
from tests.operators.conftest import GOLD


@pytest.fixture
def lost_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets the process end right after a step was kept."""
    save = checkpoint.TaskCheckpoint.save

    def arm(step: str | None) -> None:
        async def saved(self: Any, name: str, outcome: Any) -> None:
            await save(self, name, outcome)
            if name == step:
                raise asyncio.CancelledError

        monkeypatch.setattr(checkpoint.TaskCheckpoint, "save", saved)

    return arm


def kept_steps(run: TaskRun) -> list[str]:
    return [name.rpartition("/")[2] for name in run.task_state]


def test_a_lost_task_goes_on_at_the_first_unfinished_step(
    runner: OperatorRunner, token: str, model_server: ModelServer, lost_after: Any
) -> None:
    operator = ChainOperator(task_id="t", flow=flows.decided_then_broken, inputs={**GOLD, "token": token}, retries=2)
    lost_after("handling")
    first = runner.run(operator)
    assert first.state != "success"
    assert (kept_steps(first), model_server.calls, flows.seen[token]) == (["handling"], 1, [])
    lost_after(None)
    second = first.lose().retry()
    assert (second.state, second.try_number) == ("success", 2)
    assert (model_server.calls, flows.seen[token]) == (1, ["fragile"])
    assert second.xcoms["decisions"]["handling"]["answer"] == "expedite"


def test_a_task_that_was_lost_after_its_last_step_runs_none_again(runner: OperatorRunner, token: str) -> None:
    inputs = {"order_id": "o-1", "token": token}
    first = runner.run(ChainOperator(task_id="t", flow=flows.chain, inputs=inputs, retries=1))
    again = first.lose().retry()
    assert (again.state, again.return_value) == ("success", first.return_value)
    assert flows.seen[token] == ["validate", "charge"]


def test_a_graph_keeps_the_steps_of_both_branches(runner: OperatorRunner, token: str, lost_after: Any) -> None:
    operator = GraphOperator(task_id="t", flow=flows.graph, inputs={"order_id": "o", "token": token}, retries=1)
    first = runner.run(operator)
    assert sorted(kept_steps(first)) == ["charge", "left", "right", "validate"]
    again = first.lose().retry()
    assert again.return_value == first.return_value
    assert sorted(flows.seen[token]) == ["charge", "left", "right", "validate"]


def test_a_clear_begins_anew_with_the_same_keys(runner: OperatorRunner, token: str, model_server: ModelServer) -> None:
    operator = ChainOperator(task_id="t", flow=flows.decided, inputs={**GOLD, "token": token}, retries=1)
    first = runner.run(operator)
    cleared = first.clear()
    assert (cleared.generation, model_server.calls, flows.seen[token]) == (1, 2, ["charge", "charge"])
    data = [run.return_value["data"] for run in (first, cleared)]
    assert [each["generation"] for each in data] == [0, 1]
    assert data[0]["idempotency_key"] == data[1]["idempotency_key"]
    # the clear has a retry of its own, which goes on behind what the clear did
    again = cleared.lose().retry()
    assert (again.state, again.return_value) == ("success", cleared.return_value)
    assert (model_server.calls, len(flows.seen[token])) == (2, 2)


def test_a_changed_flow_begins_anew(runner: OperatorRunner, token: str) -> None:
    inputs = {"order_id": "o-1", "token": token}
    first = runner.run(ChainOperator(task_id="t", flow=flows.chain, inputs=inputs, retries=1))
    changed = Chain("order-chain").add_step("validate", flows.validate, timeout=7).add_step("charge", flows.charge)
    with DAG("test-dag", schedule=None):
        deployed = ChainOperator(task_id="t", flow=changed, inputs=inputs, retries=1)
    lost = first.lose()
    assert replace(lost, _attempt=replace(lost._attempt, operator=deployed)).retry().state == "success"
    assert flows.seen[token] == ["validate", "charge", "validate", "charge"]


def test_each_mapped_task_has_its_own(runner: OperatorRunner, token: str) -> None:
    with DAG("orders", schedule=None):
        mapped = ChainOperator.partial(task_id="t", flow=flows.chain, retries=1).expand(
            inputs=[{"order_id": "a", "token": token}, {"order_id": "b", "token": token}]
        )
    runs = [runner.run(mapped, map_index=index) for index in (0, 1)]
    again = [run.lose().retry().return_value["data"]["order_id"] for run in runs]
    assert again == ["a", "b"]
    assert len(flows.seen[token]) == 4


# what is too large for Airflow's task state


def test_what_is_large_goes_to_the_state_store(runner: OperatorRunner, token: str, state_file: Path) -> None:
    flows.broken.add(token)
    operator = ChainOperator(task_id="t", flow=flows.sizeable, inputs={"token": token}, retries=1)
    first = runner.run(operator)
    assert first.state == "failed"  # for good: but a lost worker shows the same task state
    assert len(json.dumps(first.task_state)) < checkpoint.TASK_STATE_LIMIT
    with sqlite3.connect(state_file) as db:
        ((key, value),) = db.execute("SELECT key, value FROM state")
    db.close()
    assert key.startswith("beluga/checkpoints/test-dag/test-run/t/-1/beluga/")
    assert key.endswith("/big")
    assert len(value) > flows.BIG
    flows.broken.discard(token)
    again = replace(first, state=first.lose().state).retry()
    assert (again.state, again.return_value["data"]["size"]) == ("success", flows.BIG)
    assert flows.seen[token] == ["big", "sized", "fragile", "fragile"]


def test_what_the_store_lost_runs_again(runner: OperatorRunner, token: str, state_file: Path) -> None:
    operator = ChainOperator(task_id="t", flow=flows.sizeable, inputs={"token": token}, retries=1)
    first = runner.run(operator)
    with sqlite3.connect(state_file) as db:
        db.execute("DELETE FROM state")
    db.close()
    again = first.lose().retry()
    assert again.state == "success"
    assert flows.seen[token] == ["big", "sized", "fragile", "big"]


# a worker that is really killed


def test_a_killed_process_loses_no_finished_step(tmp_path: Path, state_file: Path) -> None:
    """Two processes, as two attempts of one task; the first is killed between two steps."""
    program = tmp_path / "attempt.py"
    program.write_text("""
import json, os, signal, sys
from pathlib import Path
from beluga_airflow import Chain
from beluga_airflow.operators.flow import ChainOperator
from beluga_airflow.testing import OperatorRunner
from beluga_airflow.testing.supervisor import TaskKey

log, state, url, attempt = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def said(name):
    with log.open("a") as file:
        file.write(f"{attempt} {name}\\n")

def first(data):
    said("first")
    return {"blob": "x" * 100_000}

def second(data):
    said("second")
    if attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"blob": len(data["blob"])}

flow = Chain("flow").add_step("first", first).add_step("second", second)

runner = OperatorRunner(connections={"beluga_state_default": {"conn_type": "beluga_state", "extra": {"url": url}}})
# Airflow keeps the task state in its database: here a file stands for it
supervisor = runner._supervisor
kept = supervisor._task_states[TaskKey("test-dag", "test-run", "t", -1)]
kept.update(json.loads(state.read_text()) if state.exists() else {})
answer = supervisor._task_state

def answer_and_keep(msg):
    answered = answer(msg)
    state.write_text(json.dumps(kept))
    return answered

supervisor._task_state = answer_and_keep
with runner:
    run = runner.run(ChainOperator(task_id="t", flow=flow, retries=1), try_number=attempt)
    print("RESULT", json.dumps(run.return_value))
""")
    log, state = tmp_path / "log", tmp_path / "task_state.json"

    def attempt(number: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(program), str(log), str(state), f"sqlite:///{state_file}", str(number)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert attempt(1).returncode == -signal.SIGKILL
    done = attempt(2)
    assert 'RESULT {"status": "completed", "data": {"blob": 100000}}' in done.stdout, done.stderr
    assert log.read_text().splitlines() == ["1 first", "1 second", "2 second"]


def test_the_names_do_not_depend_on_the_order_of_definition(runner: OperatorRunner, token: str) -> None:
    inputs = {"order_id": "o-1", "token": token}
    names = []
    for run_id in ("r1", "r2"):
        own = Graph("own").add_node("validate", flows.validate).add_node("charge", flows.charge)
        own.add_edge("validate", "charge")
        names.append(sorted(runner.run(GraphOperator(task_id="t", flow=own, inputs=inputs), run_id=run_id).task_state))
    assert names[0] == names[1]
