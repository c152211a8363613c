"""StateSensor, run as Airflow's workers and its triggerer do."""

from __future__ import annotations

import asyncio
import json
import math
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG, Asset
from airflow.sdk.exceptions import AirflowFailException, AirflowSensorTimeout
from airflow.serialization.serialized_objects import DagSerialization

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.hooks.state import StateHook
from beluga_airflow.sensors import state as sensor_module
from beluga_airflow.sensors.state import StateSensor
from beluga_airflow.state.sqlite import SqliteStore
from beluga_airflow.testing import OperatorRunner, TaskRun
from beluga_airflow.triggers import state as trigger_module
from beluga_airflow.triggers.portable import is_portable

PAID = "tests.sensors.predicates:is_paid"


@pytest.fixture
def runner(operator_runner: OperatorRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OperatorRunner:
    monkeypatch.setattr(trigger_module, "SETTLED", 0.0)
    url = f"sqlite:///{tmp_path / 'state.db'}"
    operator_runner.connections["beluga_state_default"] = {"conn_type": "beluga_state", "extra": {"url": url}}
    return operator_runner


def sensor(**options: Any) -> StateSensor:
    return StateSensor(**{"task_id": "wait", "key": "order", **options})


async def started(runner: OperatorRunner, **options: Any) -> TaskRun:
    return await asyncio.to_thread(runner.run, sensor(**options))


async def put(value: Any, key: str = "order") -> None:
    await asyncio.to_thread(StateHook().set, key, value)


async def ended(run: TaskRun, *puts: Any) -> TaskRun:
    """The run at its end, when these values were stored while its trigger waits."""
    assert run.state == "deferred", run.error
    end = asyncio.create_task(run.run_to_end())
    await asyncio.sleep(0.2)
    for value in puts:
        assert not end.done()
        await put(value)
    async with asyncio.timeout(20):
        return await end


# what it waits for


@pytest.mark.parametrize("value", [{"state": "paid"}, 0, "", None])
def test_a_key_that_is_there_is_enough(runner: OperatorRunner, value: Any) -> None:
    StateHook().set("order", value)
    run = runner.run(sensor())
    assert (run.state, run.return_value) == ("success", value)


async def test_a_missing_key_is_waited_for(runner: OperatorRunner) -> None:
    run = await ended(await started(runner), {"state": "new"})
    assert (run.state, run.return_value) == ("success", {"state": "new"})


async def test_a_stored_null_is_not_a_missing_key(runner: OperatorRunner) -> None:
    run = await ended(await started(runner, equals=None), 1, None)
    assert (run.state, run.xcoms) == ("success", {"return_value": None})


@pytest.mark.parametrize(
    ("stored", "wanted"), [(1, True), (True, 1), (0, False), ({"a": [1]}, {"a": [True]}), ({"a": 1}, {"b": 1})]
)
def test_values_that_python_or_a_glance_may_take_for_equal(runner: OperatorRunner, stored: Any, wanted: Any) -> None:
    StateHook().set("order", stored)
    assert runner.run(sensor(equals=wanted)).state == "deferred"
    assert runner.run(sensor(equals=stored, task_id="same")).state == "success"


async def test_a_predicate_decides(runner: OperatorRunner) -> None:
    run = await ended(await started(runner, predicate=PAID), {"state": "new"}, {"state": "paid"})
    assert run.return_value == {"state": "paid"}


async def test_a_predicate_has_a_value_of_its_own(runner: OperatorRunner) -> None:
    await put({"a": 1})
    run = await started(runner, predicate="tests.sensors.predicates:takes_it_away", equals=sensor_module.UNSET)
    async with trigger_module.shared_store("beluga_state_default") as store:
        waits = asyncio.create_task(run.run_trigger())
        changes = store.watch("order", after=run.deferral.kwargs["after"])  # type: ignore[union-attr]
        await put({"b": 2})
        seen = await anext(changes)
        await asyncio.sleep(0.2)
        assert seen.value == {"b": 2}
        waits.cancel()
        await asyncio.wait([waits])
        await changes.aclose()


def test_templates_say_which_key_and_value(runner: OperatorRunner) -> None:
    StateHook().set("orders/7", {"state": "paid"})
    waits = sensor(key="orders/{{ dag_run.conf['id'] }}", equals={"state": "{{ dag_run.conf['state'] }}"})
    run = runner.run(waits, conf={"id": 7, "state": "paid"})
    assert (run.state, run.rendered_fields["key"]) == ("success", "orders/7")


# seen by nobody else


async def test_a_value_that_did_not_stay_is_seen(runner: OperatorRunner) -> None:
    await put({"state": "new"})
    run = await started(runner, predicate=PAID)
    # before its trigger runs, or while no triggerer does
    await put({"state": "paid"})
    await put({"state": "sent"})
    assert (await run.run_to_end()).return_value == {"state": "paid"}


async def test_where_history_is_lost_it_goes_on_with_what_is_there(
    runner: OperatorRunner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await put({"state": "new"})
    run = await started(runner, predicate=PAID)
    store = SqliteStore(tmp_path / "state.db", history=1)
    for _ in range(2_001):
        await store.set("other", 1)
    await store.set("order", {"state": "paid"})
    await store.close()
    assert (await run.run_to_end()).return_value == {"state": "paid"}
    assert "goes on with what is there now" in caplog.text


# how it ends


@pytest.mark.parametrize("value", ["x" * 60_000, "a\0b", json.loads("[" * 200 + "]" * 200)])
async def test_what_no_event_should_carry_a_worker_reads(runner: OperatorRunner, value: Any) -> None:
    run = await started(runner)
    await put(value)
    event = await run.run_trigger()
    assert event.payload == {"version": 1}
    await put("replaced")
    run = await asyncio.to_thread(run.resume, event)
    assert (run.state, run.return_value) == ("success", value)


@pytest.mark.parametrize("value", [10**30, "\ud800"])
async def test_what_no_xcom_can_hold_fails_its_task_and_no_triggerer(runner: OperatorRunner, value: Any) -> None:
    run = await ended(await started(runner), value)
    assert run.state == "failed"
    assert "can't serialize" in str(run.error) or "surrogates" in str(run.error)
    run = await started(runner, do_xcom_push=False, task_id="none_pushed")
    assert run.state == "success"


async def test_a_large_value_that_is_not_kept_is_a_reason(runner: OperatorRunner, tmp_path: Path) -> None:
    run = await started(runner)
    await put("x" * 60_000)
    event = await run.run_trigger()
    store = SqliteStore(tmp_path / "state.db", history=1)
    for _ in range(2_001):
        await store.set("order", 1)
    await store.close()
    run = await asyncio.to_thread(run.resume, event)
    assert run.state == "failed"
    assert "its value was replaced and is not kept any more; run the task again" in str(run.error)


async def test_outlets_and_hooks_have_a_worker(runner: OperatorRunner) -> None:
    seen: list[Any] = []
    for name, options in {
        "outlet": {"outlets": [Asset("paid")]},
        "hook": {"post_execute": lambda context, result: seen.append(result)},
    }.items():
        run = await started(runner, key=name, task_id=name, **options)
        await put(1, name)
        event = await run.run_trigger()
        assert event.payload.keys() == {"version"}
        assert (await asyncio.to_thread(run.resume, event)).return_value == 1
    assert seen == [1]


async def test_no_xcom_where_none_is_wanted(runner: OperatorRunner) -> None:
    run = await ended(await started(runner, do_xcom_push=False), 1)
    assert (run.state, run.xcoms) == ("success", {})


@pytest.mark.parametrize(
    ("options", "state"), [({}, "failed"), ({"soft_fail": True}, "skipped"), ({"never_fail": True}, "skipped")]
)
def test_the_timeout_is_that_of_sensors(runner: OperatorRunner, options: dict[str, Any], state: str) -> None:
    run = runner.run(sensor(timeout=90, retries=3, **options))
    assert run.deferral is not None
    assert run.deferral.timeout is not None
    assert run.deferral.timeout.total_seconds() == 90
    run = run.time_out()
    assert run.state == state
    if not options:
        assert isinstance(run.error, AirflowSensorTimeout), "which is not retried"


@pytest.mark.parametrize(
    ("options", "state"), [({}, "failed"), ({"retries": 1}, "up_for_retry"), ({"soft_fail": True}, "skipped")]
)
async def test_a_predicate_that_raises_is_the_reason(
    runner: OperatorRunner, options: dict[str, Any], state: str
) -> None:
    run = await ended(await started(runner, predicate=PAID, **options), {"no": "state"})
    assert run.state == state
    if not options:
        assert "'tests.sensors.predicates:is_paid' raised KeyError: 'state' for the value of state key 'order'" in str(
            run.error
        )


@pytest.mark.parametrize("text", ["nul \0", "half \ud800", "x" * 1_000_000])
async def test_what_a_predicate_raises_reaches_airflow_whatever_it_holds(runner: OperatorRunner, text: str) -> None:
    run = await started(runner, predicate="tests.sensors.predicates:tells_of_it")
    await put({"text": text})
    event = await run.run_trigger()
    assert is_portable(event.payload, 2_000)
    assert "raised ValueError: " in event.payload["error"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("speechless", "raised Speechless"),
        ("cancels", "raised CancelledError"),
        ("wrapped", "returned a coroutine, which says neither yes nor no"),
        ("generates", "returned a generator, which says neither yes nor no"),
    ],
)
async def test_a_predicate_that_says_nothing_is_a_reason(runner: OperatorRunner, name: str, says: str) -> None:
    run = await ended(await started(runner, predicate=f"tests.sensors.predicates:{name}"), 1)
    assert run.state == "failed"
    assert says in str(run.error)


def test_it_raises_at_the_first_look_too(runner: OperatorRunner) -> None:
    StateHook().set("order", {"no": "state"})
    assert "raised KeyError" in str(runner.run(sensor(predicate=PAID)).error)
    assert runner.run(sensor(predicate=PAID, retries=1, task_id="again")).state == "up_for_retry"
    assert runner.run(sensor(predicate=PAID, never_fail=True, task_id="never")).state == "skipped"


# settings


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"predicate": "is_paid"}, "write it as 'package.module:name'"),
        ({"predicate": "nowhere.at.all:is_paid"}, "cannot be imported in this process: ModuleNotFoundError"),
        ({"predicate": "tests.sensors.predicates:absent"}, "has nothing of that name where a plain function"),
        ({"predicate": "tests.sensors.predicates:NUMBER"}, "has a int where a plain function"),
        ({"predicate": "tests.sensors.predicates:later"}, "has an async function where a plain function"),
        ({"predicate": PAID, "equals": None}, "equals= and predicate= are both given"),
    ],
)
def test_a_condition_that_means_nothing_is_refused_with_the_dag(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidSetting, match=says):
        sensor(**options)


async def test_a_predicate_that_only_the_triggerer_lacks_is_a_reason(
    runner: OperatorRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await started(runner, predicate=PAID, retries=3)
    await put({"state": "paid"})
    monkeypatch.delattr("tests.sensors.predicates.is_paid")
    run = await run.run_to_end()
    assert isinstance(run.error, AirflowFailException), "somebody has to mend it: no retry"
    assert "where a plain function is wanted" in str(run.error)


@pytest.mark.parametrize("deferrable", [True, False])
@pytest.mark.parametrize("equals", [date(2026, 1, 1), Decimal("1.5"), {1: "a"}, [{"paid"}], math.nan, b"paid"])
def test_what_no_key_can_ever_hold_is_not_waited_for(runner: OperatorRunner, equals: Any, deferrable: bool) -> None:
    run = runner.run(sensor(equals=equals, deferrable=deferrable, retries=3))
    assert isinstance(run.error, AirflowFailException)
    assert "equals= is no JSON value" in str(run.error)


def test_a_tuple_is_a_list(runner: OperatorRunner) -> None:
    StateHook().set("order", {"a": [1, 2]})
    assert runner.run(sensor(equals={"a": (1, 2)})).state == "success"
    deferral = runner.run(sensor(equals={"a": (1, 3)}, task_id="other")).deferral
    assert deferral is not None
    # Airflow's database takes no tuples from triggers
    assert deferral.kwargs["condition"] == {"equals": {"a": [1, 3]}}


@pytest.mark.parametrize("deferrable", [True, False])
@pytest.mark.parametrize("key", ["{{ dag_run.conf.get('id', '') }}", " ", 7])
def test_a_key_that_came_out_empty_is_not_waited_for(runner: OperatorRunner, key: Any, deferrable: bool) -> None:
    run = runner.run(sensor(key=key, deferrable=deferrable, retries=3), conf={})
    assert isinstance(run.error, AirflowFailException)
    assert "which is no key once its templates are rendered" in str(run.error)


@pytest.mark.parametrize("deferrable", [True, False])
@pytest.mark.parametrize(("options", "state"), [({}, "failed"), ({"soft_fail": True}, "skipped")])
def test_a_missing_connection_is_not_retried(
    runner: OperatorRunner, deferrable: bool, options: dict[str, Any], state: str
) -> None:
    run = runner.run(sensor(state_conn_id="nowhere", deferrable=deferrable, retries=3, **options))
    assert run.state == state


@pytest.mark.parametrize("deferrable", [True, False])
async def test_a_store_that_is_away_is_waited_for(
    runner: OperatorRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deferrable: bool
) -> None:
    monkeypatch.setattr(sensor_module, "PATIENCE", 0.3)
    (tmp_path / "state.db").mkdir()
    waits = sensor(deferrable=deferrable, poke_interval=0.1, timeout=20)
    begun = asyncio.create_task(asyncio.to_thread(runner.run, waits))
    await asyncio.sleep(0.6)
    (tmp_path / "state.db").rmdir()
    await put(1)
    run = await (await begun).run_to_end()
    assert (run.state, run.return_value) == ("success", 1)


# without a triggerer


def test_it_pokes_where_it_is_not_deferrable(runner: OperatorRunner) -> None:
    StateHook().set("order", {"state": "new"})

    def waits(**options: Any) -> StateSensor:
        return sensor(deferrable=False, predicate=PAID, **options)

    assert runner.run(waits(mode="reschedule")).state == "up_for_reschedule"
    late = runner.run(waits(timeout=0.2, poke_interval=0.1, task_id="late"))
    assert isinstance(late.error, AirflowSensorTimeout)
    StateHook().set("order", {"state": "paid"})
    assert runner.run(waits(task_id="now")).return_value == {"state": "paid"}


def test_a_dag_with_it_is_the_same_each_time_it_is_read() -> None:
    def dag() -> Any:
        with DAG("orders", schedule=None) as dag:
            sensor()
            StateSensor.partial(task_id="each", key="k").expand(equals=[1, None])
        return DagSerialization.to_dict(dag)

    assert dag() == dag()
    assert "UNSET" in json.dumps(dag())


def test_one_task_for_each_value(runner: OperatorRunner) -> None:
    StateHook().set("order", 2)
    with DAG("orders", schedule=None):
        each = StateSensor.partial(task_id="each", key="order").expand(equals=[1, 2])
    states = [runner.run(each, map_index=index).state for index in (0, 1)]
    assert states == ["deferred", "success"]
