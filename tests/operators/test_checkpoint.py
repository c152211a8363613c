"""A flow in one task whose worker is lost: the retry goes on behind the finished steps, a clear begins anew."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG

from beluga_airflow import Chain, Graph, Retry
from beluga_airflow.execute.checkpoints import KEPT
from beluga_airflow.graph import Flow
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
    return [name.rpartition("/")[2] for name in run.task_state if name.count("/") > 1]


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


def deployed(lost: TaskRun, flow: Flow, inputs: dict[str, Any]) -> TaskRun:
    """A task whose next attempt finds other code."""
    with DAG("test-dag", schedule=None):
        operator = ChainOperator(task_id="t", flow=flow, inputs=inputs, retries=1)
    return replace(lost, _attempt=replace(lost._attempt, operator=operator))


def test_a_changed_flow_begins_anew(runner: OperatorRunner, token: str, caplog: pytest.LogCaptureFixture) -> None:
    inputs = {"order_id": "o-1", "token": token}
    first = runner.run(ChainOperator(task_id="t", flow=flows.chain, inputs=inputs, retries=1))
    changed = Chain("order-chain").add_step("validate", flows.validate).add_step("more", flows.idle)
    again = deployed(first.lose(), changed.add_step("charge", flows.charge), inputs).retry()
    assert (again.state, flows.seen[token]) == ("success", ["validate", "charge", "validate", "charge"])
    told = caplog.text
    assert "flow 'order-chain' has changed since the last attempt" in told
    assert "it runs from its beginning, with the same idempotency keys" in told


def test_a_flow_that_is_changed_back_begins_anew_too(runner: OperatorRunner, token: str, lost_after: Any) -> None:
    inputs = {"order_id": "o-1", "token": token}
    first = runner.run(ChainOperator(task_id="t", flow=flows.chain, inputs=inputs, retries=3))
    changed = Chain("order-chain").add_step("validate", flows.validate).add_step("more", flows.idle)
    lost_after("validate")
    second = deployed(first.lose(), changed.add_step("charge", flows.charge), inputs).retry()
    third = deployed(second.lose(), flows.chain, inputs).retry()
    lost_after(None)
    fourth = third.lose().retry()
    # what the first attempt kept of "charge" is not taken for the third's
    assert (fourth.state, flows.seen[token]) == ("success", ["validate", "charge", "validate", "validate", "charge"])


def test_a_flow_that_is_changed_while_it_is_undone_never_goes_forward(
    runner: OperatorRunner, token: str, lost_after: Any
) -> None:
    inputs = {"order_id": "o-1", "token": token}
    undos: list[str] = []

    def fails(data: dict[str, Any]) -> None:
        raise ConnectionError("no courier")

    def made(*more: str) -> Chain:
        flow = Chain("order-chain", retry=Retry(maximum_attempts=1))
        for name in ("reserve", "charge"):
            flow.add_step(name, flows.idle, compensate=lambda data, name=name: undos.append(name))
        for name in more:
            flow.add_step(name, flows.idle)
        return flow.add_step("ship", fails)

    lost_after("charge.undo")
    first = runner.run(ChainOperator(task_id="t", flow=made(), inputs=inputs, retries=1))
    assert undos == ["charge"]
    lost_after(None)
    second = deployed(first.lose(), made("wrap"), inputs).retry()
    assert (second.state, undos) == ("failed", ["charge"])
    assert "was changed" in str(second.error)
    assert "while it was being undone. Finished or in flight, and not undone: reserve; undo by" in str(second.error)
    assert "a clear of this task runs the flow from its beginning" in str(second.error)
    assert "It was being undone after: step 'ship' failed" in str(second.error)


def test_a_changed_flow_names_what_could_not_be_undone_and_what_a_condition_failed_behind(
    runner: OperatorRunner, token: str, lost_after: Any
) -> None:
    def closed(data: dict[str, Any]) -> None:
        raise ConnectionError("the bank is closed")

    def made(*more: str) -> Graph:
        flow = Graph("order-graph", retry=Retry(maximum_attempts=1))
        for name in ("reserve", "charge", "pack"):
            flow.add_node(name, flows.idle, compensate=closed if name == "charge" else flows.idle)
        for name in ("ship", *more):
            flow.add_node(name, flows.idle)
        flow.add_edge("reserve", "charge").add_edge("charge", "pack")
        return flow.add_edge("pack", "ship", when=lambda output: output["no such key"])

    def operator(flow: Graph) -> GraphOperator:
        with DAG("test-dag", schedule=None):
            return GraphOperator(task_id="t", flow=flow, inputs={"order_id": "o-1", "token": token}, retries=1)

    lost_after("charge.undo")  # "pack" was undone before it, "reserve" was not yet
    first = runner.run(operator(made()))
    lost_after("undo")
    before = runner.run(operator(made()), run_id="before-any")
    lost_after(None)
    for run, left in ((first, "reserve, charge;"), (before, "reserve, charge, pack;")):
        lost = run.lose()
        again = replace(lost, _attempt=replace(lost._attempt, operator=operator(made("wrap")))).retry()
        assert again.state == "failed"
        assert f"not undone: {left} undo by hand" in str(again.error)


def test_a_task_that_is_told_to_end_leaves_its_step_at_once(runner: OperatorRunner, token: str) -> None:
    calls: list[int] = []
    undone: list[str] = []

    def first(data: dict[str, Any]) -> None:
        flows.seen[token].append("first")

    def hangs(data: dict[str, Any]) -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            # as Airflow's supervisor does where a pod ends; Airflow has its own handler in place
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    flow = Chain("patient").add_step("first", first, compensate=lambda data: undone.append("first"))
    began = time.monotonic()
    ended = runner.run(ChainOperator(task_id="t", flow=flow.add_step("hangs", hangs), inputs={}, retries=1))
    assert time.monotonic() - began < 20
    assert (ended.state, type(ended.error).__name__) == ("up_for_retry", "AirflowException")
    assert "a retry, where the task has one left, goes on behind them" in str(ended.error)
    again = ended.retry()
    assert (again.state, flows.seen[token], len(calls), undone) == ("success", ["first"], 2, [])


def test_what_outcomes_do_not_depend_on_may_change(runner: OperatorRunner, token: str) -> None:
    inputs = {"order_id": "o-1", "token": token}
    first = runner.run(ChainOperator(task_id="t", flow=flows.chain, inputs=inputs, retries=1))
    patient = Chain("order-chain", timeout=7).add_step("validate", flows.validate, timeout=7)
    again = deployed(first.lose(), patient.add_step("charge", flows.charge, retry=Retry()), inputs).retry()
    assert (again.state, flows.seen[token]) == ("success", ["validate", "charge"])


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
        ((key, value, ends),) = db.execute("SELECT key, value, ends FROM entry WHERE key NOT LIKE 'beluga/flows/%'")
    db.close()
    assert key.startswith("beluga/checkpoints/test-dag/test-run/t/-1/beluga/")
    assert key.endswith("/big")
    assert len(value) > flows.BIG
    assert ends == pytest.approx(time.time() + KEPT, abs=60)
    flows.broken.discard(token)
    again = replace(first, state=first.lose().state).retry()
    assert (again.state, again.return_value["data"]["size"]) == ("success", flows.BIG)
    assert flows.seen[token] == ["big", "sized", "fragile", "fragile"]


def test_what_the_store_lost_runs_again(runner: OperatorRunner, token: str, state_file: Path) -> None:
    operator = ChainOperator(task_id="t", flow=flows.sizeable, inputs={"token": token}, retries=1)
    first = runner.run(operator)
    with sqlite3.connect(state_file) as db:
        db.execute("DELETE FROM entry")
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
