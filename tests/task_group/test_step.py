"""One step as a task: whether it runs, how it is tried, how it fails."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException
from airflow.sdk.execution_time import comms

from beluga_airflow import Chain, Graph, Retry
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.task_group.step import AttemptFailed, StepRetryPolicy
from beluga_airflow.testing import OperatorRunner
from tests.task_group import sample_flows as flows

flaky = (
    Graph("flaky", retry=flows.QUICK)
    .add_node("try", flows.third_time)
    .add_node("other", flows.sets("other"))
    .add_node("stop", flows.stops)
    .add_node("after", flows.sets("after"))
    .add_edge("try", "after")
)


# whether it runs


@pytest.mark.parametrize("state", ["failed", "upstream_failed"])
def test_nothing_new_starts_after_a_failure(tasks_of: Any, state: str, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = tasks_of(flaky)
    tasks.states["other"] = state
    run = tasks.run("stop")
    assert (run.state, run.return_value) == ("skipped", None)
    assert "step 'other' failed: nothing new starts" in capsys.readouterr().out


def test_nothing_new_starts_after_a_stop(tasks_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks_of(flaky).run("stop", "other").state == "skipped"
    assert "step 'stop' stopped the flow: nothing new starts" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["running", "queued", "up_for_retry", "scheduled"])
def test_what_still_runs_holds_up_nobody(tasks_of: Any, state: str) -> None:
    tasks = tasks_of(flaky)
    tasks.states["try"] = state
    # from before somebody cleared it: it counts no more
    tasks.left("try", {"output": {}, "taken": [], "stop": "long_ago", "started": {}, "attempt": 1})
    assert tasks.run("other").state == "success"


@pytest.mark.parametrize("ended", ["failed", "stopped"])
def test_a_step_that_runs_is_tried_to_its_end(tasks_of: Any, ended: str) -> None:
    tasks = tasks_of(flaky)
    assert tasks.run("try").state == "up_for_retry"
    if ended == "failed":
        tasks.states["other"] = "failed"
    else:
        tasks.run("stop")
    assert tasks.retry("try").state == "up_for_retry"
    run = tasks.retry("try")
    assert (run.state, run.return_value["output"]) == ("success", {"attempts": 3})
    assert tasks.run("after").state == "skipped"


def test_what_follows_from_a_step_does_not_hold_it_up(tasks_of: Any) -> None:
    tasks = tasks_of(flows.linear)
    tasks.run("validate", "charge")
    tasks.states["charge"] = "failed"
    assert tasks.clear("validate").state == "success"


def test_a_step_whose_edges_are_not_taken_is_skipped(tasks_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks_of(flows.when_false).run("credit", "pay").state == "skipped"
    assert "the edges into step 'pay' are not taken" in capsys.readouterr().out


def test_each_map_index_sees_its_own(tasks_of: Any) -> None:
    # those of the others would be asked for by another map index, which the test refuses
    tasks = tasks_of(flows.keys, map_index=3)
    assert tasks.run("keyed").return_value["output"]["key"] == "orders/test-run/g/3/keyed"
    assert tasks.run("result").return_value["status"] == "completed"


# its attempts


def test_a_failed_attempt_says_which_and_waits_as_the_retry_says(
    tasks_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Chain("slow", retry=Retry(maximum_attempts=4, initial_interval=2, backoff_coefficient=3, maximum_interval=5))
    tasks = tasks_of(slow.add_step("pay", flows.raises("pay", ConnectionError("the bank is closed"))))
    waits = []
    for run in (tasks.run("pay"), tasks.retry("pay"), tasks.retry("pay")):
        assert isinstance(run.error, AttemptFailed)
        decision = StepRetryPolicy().evaluate(run.error, run.try_number, run.max_tries)
        assert decision.retry_delay is not None
        waits.append((decision.action.value, decision.retry_delay.total_seconds(), decision.reason))
    reason = "attempt {} of step 'pay' failed: ConnectionError: the bank is closed"
    assert waits == [("retry", wait, reason.format(number)) for number, wait in ((1, 2), (2, 5), (3, 5))]
    assert "attempt 3 of step 'pay' failed:\nTraceback (most recent call last)" in caplog.text
    last = tasks.retry("pay")
    assert (last.state, type(last.error)) == ("failed", AirflowFailException)
    assert str(last.error) == "flow failed: step 'pay' failed: ConnectionError: the bank is closed"
    assert last.xcoms == {
        "failure": {"status": "failed", "error": "step 'pay' failed: ConnectionError: the bank is closed"}
    }


def test_a_server_says_how_long_to_wait(tasks_of: Any) -> None:
    error = tasks_of(flows.retry_after, inputs={"case": "unit"}).run("ask").error
    assert StepRetryPolicy().evaluate(error, 1, 2).retry_delay.total_seconds() == flows.Busy.retry_after


@pytest.mark.parametrize(
    ("form", "asked", "waits"),
    [("seconds", 7, 7), ("ms", 1.5, 1.5), ("date", 20, 20), ("seconds", 3600, 60), ("none", 7, 0.5)],
)
def test_a_models_rate_limit_sets_the_retry_delay_of_airflows_task(
    tasks_of: Any,
    operator_runner: OperatorRunner,
    model_server: ModelServer,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    asked: float,
    waits: float,
) -> None:
    extra = {"provider": "simulated", "base_url": model_server.base_url}
    operator_runner.connections["beluga_llm_default"] = {"conn_type": "beluga_llm", "extra": extra}
    model_server.fail("rate_limit", retry_after=asked, form=form)
    retry = Retry(maximum_attempts=3, initial_interval=0.5)
    tasks = tasks_of(Chain("d", retry=retry).add_step("speed", flows.speed), inputs={"tier": "gold"})
    told: list[Any] = []
    send = operator_runner._supervisor.send
    monkeypatch.setattr(operator_runner._supervisor, "send", lambda msg: (told.append(msg), send(msg))[1])
    began = time.monotonic()
    run = tasks.run("speed")
    assert (run.state, model_server.calls) == ("up_for_retry", 1)
    assert time.monotonic() - began < 5, "no worker waits"
    (message,) = [msg for msg in told if isinstance(msg, comms.RetryTask)]
    # a date has whole seconds, and some of them have passed
    assert message.retry_delay_seconds == pytest.approx(waits, abs=5 if form == "date" else 0.001)
    assert "429" in str(message.retry_reason)
    assert (tasks.retry("speed").state, model_server.calls) == ("success", 2)


def test_what_else_fails_a_task_is_left_to_airflow() -> None:
    assert StepRetryPolicy().evaluate(OSError("no disk"), 1, 2).action.value == "default"


def test_a_lost_worker_uses_up_an_attempt(tasks_of: Any) -> None:
    tasks = tasks_of(flows.keys)
    outputs = [tasks.run("keyed").return_value["output"]]
    for _ in range(2):
        tasks.lose("keyed")
        outputs.append(tasks.retry("keyed").return_value["output"])
    assert [output["attempt"] for output in outputs] == [1, 2, 3]
    assert {output["key"] for output in outputs} == {"orders/test-run/g/-1/keyed"}
    assert tasks.lose("keyed").state == "failed"


def test_a_clear_tries_anew_with_the_same_key(tasks_of: Any) -> None:
    tasks = tasks_of(flows.keys)
    first, second = (run.return_value["output"] for run in (tasks.run("keyed"), tasks.clear("keyed")))
    assert (second["key"], second["attempt"]) == (first["key"], 1)
    assert second["generation"] > first["generation"] == 0
    assert tasks.runs["keyed"].return_value["attempt"] == 2


@pytest.mark.parametrize("key", ["order_id", "{{ params.order }}"])
def test_a_business_key_is_the_same_in_every_group(tasks_of: Any, key: str) -> None:
    tasks = tasks_of(flows.keys, inputs={"order_id": "o-7"}, key=key)
    tasks.group.dag.params["order"] = "o-7"
    assert tasks.run("keyed").return_value["output"]["key"] == "keys/o-7/keyed"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"inputs": "[1]"}, "InvalidInput: the input is a list; give a mapping or its JSON"),
        ({"inputs": {"x": {1}}}, "InvalidOutput: the input of flow 'linear'['x'] is a set"),
        ({"key": "number"}, "InvalidInput: key='number' names no field of the input"),
        ({"state_conn_id": "nowhere"}, "InvalidSetting: there is no connection 'nowhere'"),
    ],
)
def test_what_can_never_work_fails_for_good(tasks_of: Any, options: dict[str, Any], says: str) -> None:
    run = tasks_of(flows.linear, **options).run("validate")
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert says in str(run.error)


def test_a_model_that_cannot_be_asked_is_seen_before_anything_is_paid(
    tasks_of: Any, operator_runner: OperatorRunner
) -> None:
    operator_runner.connections["beluga_llm_default"] = {"conn_type": "beluga_llm", "extra": {"provider": "oracle"}}
    paid_first = Chain("paid-first").add_step("charge", flows.sets("charge")).add_step("speed", flows.speed)
    run = tasks_of(paid_first, inputs={"case": "paid first"}).run("charge")
    assert (run.state, flows.seen["paid first"]) == ("failed", [])
    assert "InvalidSetting: connection 'beluga_llm_default'" in str(run.error)


def test_a_decision_asks_the_model_once(
    tasks_of: Any, operator_runner: OperatorRunner, model_server: ModelServer
) -> None:
    extra = {"provider": "simulated", "base_url": model_server.base_url}
    operator_runner.connections["beluga_llm_default"] = {"conn_type": "beluga_llm", "extra": extra}
    tasks = tasks_of(Chain("d", retry=flows.QUICK).add_step("speed", flows.speed), inputs={"tier": "gold"})
    tasks.run("speed")
    tasks.lose("speed")
    run = tasks.retry("speed")
    assert (run.return_value["decision"]["decided_by"], model_server.calls) == ("model", 1)
    assert run.xcoms["decision"] == run.return_value["decision"]
    result = tasks.run("result")
    assert result.xcoms["decisions"]["speed"] == run.return_value["decision"]
    assert result.return_value["data"]["speed"] in ("expedite", "standard")
    tasks.clear("speed")
    assert model_server.calls == 2


def test_a_decision_falls_back_on_its_last_attempt(
    tasks_of: Any, operator_runner: OperatorRunner, model_server: ModelServer
) -> None:
    extra = {"provider": "simulated", "base_url": model_server.base_url}
    operator_runner.connections["beluga_llm_default"] = {"conn_type": "beluga_llm", "extra": extra}
    model_server.fail("status", status=503, times=9)
    careful = Chain("d", retry=flows.QUICK).add_step("speed", replace(flows.speed, fallback="standard"))
    tasks = tasks_of(careful, inputs={"tier": "gold"})
    states = [tasks.run("speed").state, tasks.retry("speed").state, tasks.retry("speed").state]
    assert states == ["up_for_retry", "up_for_retry", "success"]
    assert tasks.runs["speed"].return_value["decision"]["decided_by"] == "fallback"


EXITED = "step 'halt' raised Halt: out of order; raise an Exception instead"


def test_what_is_no_mere_error_fails_the_step_at_once(tasks_of: Any) -> None:
    run = tasks_of(flows.halts).run("halt")
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert str(run.error) == f"flow failed: step 'halt' failed: StepExited: {EXITED}"


def test_an_error_that_no_log_can_take_is_told_all_the_same(tasks_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = tasks_of(flows.odd_words).run("say")
    assert str(run.error) == "flow failed: step 'say' failed: RuntimeError: half \\ud800"
    assert "RuntimeError: half \\ud800" in caplog.text
    # Airflow logs what led to the error too
    assert (run.error.__cause__, run.error.__context__) == (None, None)


# time


def test_a_step_takes_the_clock_of_those_before_it(tasks_of: Any) -> None:
    tasks = tasks_of(flows.diamond)
    tasks.run("a", "b", "c", "d")
    clocks = [tasks.runs[step].return_value["started"] for step in "abcd"]
    assert clocks == [clocks[0]] * 4
    assert time.time() - clocks[0][""][1] < 60


def test_a_retry_of_the_first_step_keeps_the_clock(tasks_of: Any) -> None:
    tasks = tasks_of(flows.third)
    tasks.run("try")
    began = tasks.runs["try"].task_state["beluga/began@0"]
    tasks.retry("try")
    assert tasks.retry("try").return_value["started"] == {"": [0, began]}


def test_time_that_is_used_up_before_a_step_fails_it(tasks_of: Any) -> None:
    tasks = tasks_of(flows.late)
    tasks.run("first")
    tasks.left("first", {**tasks.runs["first"].return_value, "started": {"": [0, time.time() - 10]}})
    run = tasks.run("sleep")
    assert (run.state, type(run.error)) == ("failed", AirflowFailException)
    assert str(run.error) == "flow timed_out: flow 'late' used up its timeout of 2 s in step 'sleep'"
    assert run.xcoms["failure"]["status"] == "timed_out"


@pytest.mark.parametrize(("outer", "inner", "named"), [(0.3, 60, "outer"), (60, 0.3, "inner")])
def test_the_first_flow_to_run_out_of_time_is_named(tasks_of: Any, outer: float, inner: float, named: str) -> None:
    nested = Chain("inner", timeout=inner).add_step("sleep", flows.never)
    tasks = tasks_of(Chain("outer", timeout=outer, retry=flows.ONCE).add_step("in", nested))
    error = tasks.run("in.sleep").error
    assert str(error) == f"flow timed_out: flow {named!r} used up its timeout of 0.3 s in step 'in.sleep'"


def test_a_step_after_one_that_was_cleared_goes_by_its_clock(tasks_of: Any) -> None:
    tasks = tasks_of(flows.diamond)
    tasks.run("a", "b", "c")
    now = time.time()
    for step, started in (("a", [0, 1.0]), ("b", [2, now]), ("c", [2, now + 1])):
        tasks.left(step, {**tasks.runs[step].return_value, "started": {"": started}})
    assert tasks.run("d").return_value["started"] == {"": [2, now]}
