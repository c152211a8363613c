"""The whole stack as users have it, over Airflow's REST API: runs, clears, marks, killed processes, a backfill."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system_dags.system_flows import CAPS
from tests.system_stack import Run, Stack, at_once, bodies_of, is_gone, kill, started, within

pytestmark = pytest.mark.timeout(600)

AT_ONCE = 8
ONCE = {"stock": 1, "credit": 1, "charge": 1, "fulfil": 1}
IN_ORDER = list(CAPS["in_order"][0].check().order)
TWICE = {"stock": 2, "credit": 2, "charge": 2, "fulfil": 2}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with started(tmp_path_factory.mktemp("stack")) as running:
        yield running


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, stack: Stack) -> Iterator[dict[Callable[[Stack], None], Future[None]]]:
    """What comes of each body."""
    pool = ThreadPoolExecutor(AT_ONCE)
    functions = [getattr(item, "function", None) for item in request.session.items]
    yield {body: pool.submit(body, stack) for body in bodies_of(functions)}
    pool.shutdown(cancel_futures=True)


# the example shop


@at_once
def test_an_order_from_the_form(stack: Stack) -> None:
    ends = {
        "order_chain": "process_order",
        "order_graph": "process_order",
        "order_graph_tasks": "process_order.result",
        "order_durable": "process_order",
    }
    for run in [stack.trigger(dag) for dag in ends]:
        assert run.ended() == "success", run.states()
        returned = run.returned(ends[run.dag])
        assert returned["status"] == "completed"
        assert returned["data"]["order_id"] == "order-123"
        assert returned["data"]["payment_id"]


@at_once
def test_a_durable_task_links_to_its_run_on_temporal(stack: Stack) -> None:
    run = stack.trigger("order_durable")
    run.ended()
    link = stack.call("GET", f"{run.path}/taskInstances/process_order/links")["extra_links"]["Temporal run"]
    assert link.endswith(run.left("process_order", "run_id"))
    assert httpx.get(link, timeout=30).is_success


@at_once
def test_airflow_has_read_all_dags_and_knows_the_connections(stack: Stack) -> None:
    assert stack.call("GET", "/importErrors")["import_errors"] == []
    forms = {form["connection_type"]: form for form in stack.http.get("/ui/connections/hook_meta").json()}
    assert {"beluga_llm", "beluga_state", "temporal"} <= forms.keys()
    assert forms["beluga_llm"]["standard_fields"]["password"]["title"] == "API key"
    assert forms["beluga_state"]["extra_fields"]["url"]["schema"]["format"] == "password"


@at_once
def test_an_order_runs_again_from_one_step_and_what_was_before_it_stands(stack: Stack) -> None:
    steps = {"order_graph": "fulfill", "order_durable": "fulfil"}
    first = {dag: stack.trigger(dag, {"order_id": f"again.{dag}"}) for dag in steps}
    for run in first.values():
        assert run.ended() == "success"
    again = {
        dag: stack.trigger(dag, {"order_id": f"again.{dag}", "again_from": step, "again_run": first[dag].id})
        for dag, step in steps.items()
    }
    for dag, run in again.items():
        assert run.ended() == "success"
        assert run.returned("process_order") == first[dag].returned("process_order")

    calls = [(order, operation) for operation, order, _ in stack.ledger()]
    assert [operation for order, operation in calls if order == "again.order_graph"] == [
        *("charge", "ship", "notify"),
        *("ship", "notify"),
    ]
    assert [operation for order, operation in calls if order == "again.order_durable"] == [
        *("reserve", "charge", "ship"),
        "ship",
    ]


@at_once
def test_a_flow_as_tasks_pays_once_and_with_the_key_that_it_has_in_one_task(stack: Stack) -> None:
    for dag in ("order_graph", "order_graph_tasks"):
        assert stack.trigger(dag, {"order_id": "both-forms"}).ended() == "success"
    assert stack.charges()["both-forms"] == (1, 2)


@at_once
def test_a_change_of_state_schedules_a_dag_and_a_sensor_hears_of_its_change(stack: Stack) -> None:
    (asset,) = stack.call("GET", "/assets", name_pattern="desk")["assets"]

    def events() -> list[dict[str, Any]]:
        return list(stack.call("GET", "/assets/events", asset_id=asset["id"], order_by="timestamp")["asset_events"])

    def has_begun() -> bool:
        kept = stack.call("GET", f"/assets/{asset['id']}/state-store")
        return "beluga/watcher" in json.dumps(kept)

    within("the desk is watched", has_begun)
    run = stack.trigger("order_desk", {"order_id": "watched"})
    assert run.ended() == "success", run.states()
    assert run.returned("is_seen") == {"state": "seen"}
    within("the events are stored", lambda: len(events()) == 2)
    told = [event["extra"]["payload"] for event in events()]
    assert [(one["key"], one["value"]) for one in told] == [
        ("desk/watched", {"state": "waits"}),
        ("desk/watched", {"state": "seen"}),
    ]


# the batch of the example shop


def paid_orders(manifest: dict[str, Any]) -> list[str]:
    """The orders that a batch's results call paid."""
    lines = map(json.loads, Path(manifest["results"]).read_text().splitlines())
    return [line["key"] for line in lines if line["status"] == "completed"]


@at_once
def test_a_cleared_day_runs_again_and_pays_with_the_same_keys(stack: Stack) -> None:
    run = stack.trigger("order_batch", {"day": "2025-12-02"})
    assert run.ended() == "success"
    first = run.returned("process_orders")
    once = stack.charges()

    run.clear("process_orders")
    assert run.ended() == "success"
    again = run.returned("process_orders")

    assert first["workflow_id"] != again["workflow_id"]
    assert first["statuses"] == again["statuses"]
    assert first["total"] == 30
    paid = paid_orders(again)
    twice = stack.charges()
    assert len(paid) == first["statuses"]["completed"]
    for order in paid:
        assert twice[order] == (1, once[order][1] + 1)


@at_once
def test_a_backfill_takes_the_day_of_its_interval_and_pays_with_the_same_keys(stack: Stack) -> None:
    body = {"dag_id": "order_batch", "from_date": "2025-11-30T00:00:00Z", "to_date": "2025-11-30T00:00:00Z"}
    # on SQLite Airflow answers 503 when something else is written at that moment, and leaves nothing behind
    within("Airflow makes a backfill", lambda: stack.accepted("POST", "/backfills", body, but=503))

    def look() -> str | None:
        runs = stack.call("GET", "/dags/order_batch/dagRuns", run_type="backfill")["dag_runs"]
        return str(runs[0]["dag_run_id"]) if runs else None

    run = Run(stack, "order_batch", within("the backfill makes a run", look))
    assert run.ended() == "success"
    manifest = run.returned("process_orders")
    assert manifest["total"] == 24
    assert manifest["simulated"] is True
    # somebody ran the day by hand too
    assert stack.trigger("order_batch", {"day": "2025-11-30"}).ended() == "success"
    paid = paid_orders(manifest)
    charges = stack.charges()
    assert len(paid) == manifest["statuses"]["completed"]
    assert [charges[order] for order in paid] == [(1, 2)] * len(paid)


@at_once
def test_a_file_that_is_not_there_fails_at_once_and_says_which(stack: Stack) -> None:
    run = stack.trigger("order_batch", {"source": "no-such-file.csv", "day": "all"})
    assert run.ended() == "failed"
    assert run.tasks()["process_orders"]["try_number"] == 1, "no retry can help"
    assert "no-such-file.csv" in run.log("process_orders")


# caps and timeouts: what dag.test() cannot show


@at_once
def test_independent_steps_run_at_once(stack: Stack) -> None:
    with stack.room:
        run, folder = stack.shop("barrier")
        assert run.ended() == "success", run.states()
    # each of the three waited for the other two
    assert [(folder / form).peak for form in ("one_task", "tasks")] == [3, 3]


@at_once
def test_no_more_steps_run_at_once_than_max_workers(stack: Stack) -> None:
    with stack.room:
        run, folder = stack.shop("capped")
        assert run.ended() == "success", run.states()
    for form in ("one_task", "tasks"):
        assert (folder / form).counts("ends") == dict.fromkeys("abcde", 1)
        assert (folder / form).peak == 2


@at_once
def test_steps_that_may_not_run_at_once_run_in_the_topological_order(stack: Stack) -> None:
    run, folder = stack.shop("in_order")
    assert run.ended() == "success", run.states()
    for form in ("one_task", "tasks"):
        assert [line["step"] for line in (folder / form).lines if line["event"] == "begins"] == IN_ORDER
        assert (folder / form).peak == 1


@at_once
def test_a_step_that_hangs_ends_by_its_timeout_and_fails_the_flow(stack: Stack) -> None:
    run, folder = stack.shop("step_timeout")
    assert run.ended() == "failed"
    error = "step 'hangs' failed: StepTimeout: step 'hangs' took longer than its timeout of 2 s"
    assert f"flow failed: {error}" in run.log("one_task")
    assert run.left("tasks.hangs", "failure") == {"status": "failed", "error": error}
    assert run.states() == {
        "one_task": "failed",
        "tasks.quick": "success",
        "tasks.hangs": "failed",
        "tasks.result": "upstream_failed",
    }
    assert [(folder / form).counts() for form in ("one_task", "tasks")] == [{"quick": 1, "hangs": 1}] * 2


@at_once
def test_a_flow_that_uses_up_its_time_names_the_step_it_was_in(stack: Stack) -> None:
    run, _ = stack.shop("flow_timeout")
    assert run.ended() == "failed"
    error = "flow 'flow-timeout' used up its timeout of 15 s in step 'hangs'"
    assert f"flow timed_out: {error}" in run.log("one_task")
    assert run.left("tasks.hangs", "failure") == {"status": "timed_out", "error": error}
    assert run.states()["tasks.result"] == "upstream_failed"


@at_once
def test_after_a_stop_its_siblings_finish_and_nothing_new_starts(stack: Stack) -> None:
    with stack.room:
        orders = ("hold/stock", "stop/stock", "hold/credit")
        one, in_one_task = stack.shop("shop_in_one_task", *orders)
        tasks, as_tasks = stack.shop("shop_as_tasks", *orders)
        for folder in (in_one_task, as_tasks):
            assert folder.process("stock")
            assert folder.process("credit")
            folder.release("stock")
        within("stock ends", lambda: in_one_task.counts("ends").get("stock"))
        tasks.until("shop.stock", "success")
        in_one_task.release("credit")
        as_tasks.release("credit")
        assert (one.ended(), tasks.ended()) == ("success", "success")

    for returned, folder in ((one.returned("shop"), in_one_task), (tasks.returned("shop.result"), as_tasks)):
        assert returned["status"] == "out_of_stock"
        assert returned["data"]["product_id"] == "p-1"
        assert folder.counts("ends") == {"stock": 1, "credit": 1}
    states = tasks.states()
    assert [states[f"shop.{step}"] for step in ("decide", "charge", "fulfil", "undo")] == ["skipped"] * 4


# failures


@at_once
def test_a_flow_that_fails_is_undone_once_on_every_runtime_and_says_the_same(stack: Stack) -> None:
    runs = {dag: stack.shop(dag, "fail/fulfil") for dag in ("shop_in_one_task", "shop_as_tasks")}
    run, folder = runs["shop_on_temporal"] = stack.shop("shop_on_temporal", "fail/fulfil", "hold/fulfil")
    run.until_triggerer_waits("shop")
    folder.release("fulfil")
    error = "step 'fulfil' failed: InvalidInput: the truck is gone"
    for dag, (run, folder) in runs.items():
        assert run.ended() == "failed", dag
        assert folder.counts() == {**ONCE, "charge.undo": 1}
        keys = folder.idempotency_keys
        assert keys["charge.undo"] == {f"{key}.undo" for key in keys["charge"]}
    for dag in ("shop_in_one_task", "shop_on_temporal"):
        assert f"flow failed: {error}" in runs[dag][0].log("shop")
    tasks = runs["shop_as_tasks"][0]
    assert tasks.left("shop.fulfil", "failure") == {"status": "failed", "error": error}
    assert tasks.returned("shop.undo") == {"undone": {"charge": "undone"}}
    assert (tasks.states()["shop.undo"], tasks.states()["shop.result"]) == ("success", "upstream_failed")


@at_once
def test_in_a_mapped_group_each_order_comes_to_its_own_end(stack: Stack) -> None:
    run, folder = stack.shop("shop_mapped", "bad/fail/fulfil", "stopped/stop/stock")
    assert run.ended() == "failed"
    states = run.states()

    def ends(index: int) -> list[str | None]:
        return [states[f"order.shop.{step}[{index}]"] for step in ("stock", "charge", "fulfil", "undo", "result")]

    assert ends(0) == ["success", "success", "success", "skipped", "success"]
    assert ends(1) == ["success", "success", "failed", "success", "upstream_failed"]
    assert ends(2) == ["success", "skipped", "skipped", "skipped", "success"]
    assert run.returned("order.shop.result", index=0)["status"] == "completed"
    assert run.returned("order.shop.result", index=2)["status"] == "out_of_stock"
    assert (folder / "good").counts() == ONCE
    assert (folder / "bad").counts() == {**ONCE, "charge.undo": 1}
    assert (folder / "stopped").counts() == {"stock": 1, "credit": 1}


# killed processes


@at_once
def test_a_killed_task_goes_on_behind_its_finished_steps(stack: Stack) -> None:
    run, folder = stack.shop("shop_in_one_task", "hold/charge")
    kill(folder.process("charge"))
    folder.release("charge")
    assert run.ended() == "success"
    assert run.tasks()["shop"]["try_number"] == 2
    assert folder.counts() == {**ONCE, "charge": 2}
    assert folder.counts("ends") == ONCE
    assert folder.generations("charge") == [0, 0]
    assert len(folder.idempotency_keys["charge"]) == 1
    assert stack.asked(run) == {"shop/-1/decide@0": 1}


@at_once
def test_a_killed_step_of_a_group_is_tried_again(stack: Stack) -> None:
    run, folder = stack.shop("shop_as_tasks", "hold/charge")
    kill(folder.process("charge"))
    folder.release("charge")
    assert run.ended() == "success"
    assert folder.counts() == {**ONCE, "charge": 2}
    # it has used up an attempt of the step's Retry
    assert [(line["attempt"], line["generation"]) for line in folder.began("charge")] == [(1, 0), (2, 0)]
    assert len(folder.idempotency_keys["charge"]) == 1
    assert stack.asked(run) == {"shop/-1/decide@0": 1}
    assert run.returned("shop.result")["status"] == "completed"


# what users clear


@at_once
def test_a_running_task_that_is_cleared_starts_anew(stack: Stack) -> None:
    run, folder = stack.shop("shop_in_one_task", "hold/charge")
    first = folder.process("charge")
    run.clear("shop")
    assert folder.process("stock", time=2) != first
    assert is_gone(first), "never two at once"
    folder.release("charge")
    assert run.ended() == "success"
    assert folder.counts() == {**TWICE, "fulfil": 1}
    assert folder.generations("charge") == [0, 1]
    assert all(len(keys) == 1 for keys in folder.idempotency_keys.values())
    assert stack.asked(run) == {"shop/-1/decide@0": 1, "shop/-1/decide@1": 1}


@at_once
def test_after_a_lost_attempt_a_clear_of_another_task_counts_as_one_of_it(stack: Stack) -> None:
    # Airflow counts both alike; and what was cleared must not take an older run's outcomes
    run, folder = stack.shop("shop_in_one_task", "hold/charge")
    kill(folder.process("charge"))
    folder.release("charge")
    run.until("shop", "up_for_retry")
    run.clear("other")
    run.until("shop", "success")
    assert folder.counts() == {**TWICE, "fulfil": 1}
    assert folder.generations("charge") == [0, 1]
    assert len(folder.idempotency_keys["charge"]) == 1


@at_once
def test_after_a_failed_attempt_a_clear_of_another_task_is_none_of_it(stack: Stack) -> None:
    in_the_way = stack.state / "in-the-way"
    in_the_way.touch()
    extra = json.dumps({"url": f"sqlite:///{in_the_way}/state.db"})
    stack.call("POST", "/connections", {"connection_id": "system_state", "conn_type": "beluga_state", "extra": extra})
    run, folder = stack.shop("large_in_one_task")
    run.until("large", "up_for_retry")  # the state store, where large outcomes go, cannot be reached
    in_the_way.unlink()
    run.clear("other")
    run.until("large", "success")
    assert folder.counts() == {"small": 1, "large": 2, "after": 1}
    assert folder.generations("large") == [0, 0]


@at_once
def test_a_running_step_of_a_group_that_is_cleared_starts_anew_alone(stack: Stack) -> None:
    run, folder = stack.shop("shop_as_tasks", "hold/charge")
    folder.process("charge")
    run.clear("shop.charge", downstream=True)
    folder.process("charge", time=2)
    folder.release("charge")
    assert run.ended() == "success"
    assert folder.counts() == {**ONCE, "charge": 2}
    assert folder.generations("charge") == [0, 1]
    assert len(folder.idempotency_keys["charge"]) == 1
    assert run.returned("shop.result")["status"] == "completed"


@at_once
def test_a_waiting_temporal_task_that_is_cleared_cancels_its_workflow_and_starts_another(stack: Stack) -> None:
    run, folder = stack.shop("shop_on_temporal", "hold/fulfil")
    folder.process("fulfil")
    run.until_triggerer_waits("shop")
    first = run.workflow("shop")
    run.clear("shop")
    folder.process("fulfil", time=2)
    run.until_triggerer_waits("shop", try_number=2)
    folder.release("fulfil")
    assert run.ended() == "success"
    within("the first workflow is closed", lambda: stack.workflow(*first) == "CANCELED")
    assert stack.workflow(*run.workflow("shop")) == "COMPLETED"
    assert folder.counts() == {**TWICE, "charge.undo": 1}
    assert folder.generations("charge") == [0, 1]
    assert all(len(keys) == 1 for keys in folder.idempotency_keys.values())
    assert stack.asked(run) == {"shop/-1/decide@0": 1, "shop/-1/decide@1": 1}


# what users mark


@at_once
def test_a_marked_task_ends_its_flow_where_it_is_and_a_clear_runs_it_anew(stack: Stack) -> None:
    runs = {state: stack.shop("shop_in_one_task", "hold/fulfil") for state in ("success", "failed")}
    for state, (run, folder) in runs.items():
        process = folder.process("fulfil")
        run.mark("shop", state)
        assert run.ended() == state
        within("its process is gone", lambda process=process: is_gone(process))
        # nothing is undone, and nothing is returned
        assert folder.counts() == ONCE
        assert run.keys("shop") == set()
        folder.release("fulfil")
        run.clear("shop")
    for run, folder in runs.values():
        assert run.ended() == "success"
        assert folder.counts() == TWICE
        assert folder.generations("fulfil") == [0, 1]
        assert all(len(keys) == 1 for keys in folder.idempotency_keys.values())


@at_once
def test_a_running_step_that_is_marked_as_success_counts_as_one_that_returned_nothing(stack: Stack) -> None:
    run, folder = stack.shop("shop_as_tasks", "hold/charge")
    folder.process("charge")
    run.mark("shop.charge", "success")
    assert run.ended() == "success"
    assert folder.counts("ends") == {"stock": 1, "credit": 1, "fulfil": 1}
    returned = run.returned("shop.result")
    assert returned["status"] == "completed"
    assert {"fulfil", "handling"} < returned["data"].keys()
    assert "charge" not in returned["data"]


@at_once
def test_a_running_step_that_is_marked_as_failed_fails_the_flow_and_what_is_undone_must_be_cleared(
    stack: Stack,
) -> None:
    run, folder = stack.shop("shop_as_tasks", "hold/fulfil")
    folder.process("fulfil")
    run.mark("shop.fulfil", "failed")
    assert run.ended() == "failed"
    assert folder.counts() == {**ONCE, "charge.undo": 1}
    assert run.returned("shop.undo") == {"undone": {"charge": "undone"}}
    assert run.states()["shop.result"] == "upstream_failed"
    folder.release("fulfil")

    run.clear("shop.fulfil", downstream=True)
    assert run.ended() == "failed"
    assert folder.counts() == {**ONCE, "charge.undo": 1}
    assert "step 'charge' was undone when the flow had failed" in run.log("shop.fulfil", 2)

    run.clear("shop.charge", downstream=True)
    assert run.ended() == "success"
    assert folder.counts() == {**ONCE, "charge": 2, "fulfil": 2, "charge.undo": 1}
    assert run.returned("shop.result")["status"] == "completed"
    assert run.states()["shop.undo"] == "skipped"


@at_once
def test_siblings_of_a_step_that_is_marked_as_failed_finish_and_nothing_new_starts(stack: Stack) -> None:
    with stack.room:
        run, folder = stack.shop("shop_as_tasks", "hold/stock", "hold/credit")
        assert folder.process("stock") != folder.process("credit")
        run.mark("shop.stock", "failed")
        run.until("shop.decide", "upstream_failed")
        assert run.states()["shop.credit"] == "running"
        folder.release("credit")
        assert run.ended() == "failed"
    assert run.states()["shop.credit"] == "success"
    assert folder.counts() == {"stock": 1, "credit": 1}


@at_once
def test_a_failed_step_that_is_marked_as_success_leaves_to_clear_what_was_skipped_then(stack: Stack) -> None:
    with stack.room:
        run, folder = stack.shop("wide_as_tasks", "hold/a", "hold/c", "fail/a")
        assert folder.process("a") != folder.process("c")
        folder.release("a")
        run.until("wide.a", "failed")
        folder.release("c")
        assert run.ended() == "failed"
    assert run.states()["wide.d"] == "skipped"

    run.mark("wide.a", "success")
    assert run.ended() == "failed"
    assert folder.counts() == {"a": 1, "b": 1, "c": 1}
    assert "'d' did not run when it could not go on; clear" in run.log("wide.result")

    run.clear("wide.d", downstream=True)
    assert run.ended() == "success"
    assert folder.counts() == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert run.returned("wide.result")["status"] == "completed"


@at_once
def test_a_waiting_temporal_task_that_is_marked_as_failed_cancels_and_undoes_its_workflow(stack: Stack) -> None:
    run, folder = stack.shop("shop_on_temporal", "hold/fulfil")
    folder.process("fulfil")
    run.until_triggerer_waits("shop")
    first = run.workflow("shop")
    run.mark("shop", "failed")
    assert run.ended() == "failed"
    within("the workflow is closed", lambda: stack.workflow(*first) == "CANCELED")
    assert folder.counts() == {**ONCE, "charge.undo": 1}

    run.clear("shop")
    folder.process("fulfil", time=2)
    run.until_triggerer_waits("shop", try_number=2)
    folder.release("fulfil")
    assert run.ended() == "success"
    assert stack.workflow(*run.workflow("shop")) == "COMPLETED"
    assert folder.counts() == {**TWICE, "charge.undo": 1}
    assert folder.generations("charge") == [0, 1]
    assert stack.asked(run) == {"shop/-1/decide@0": 1, "shop/-1/decide@1": 1}
