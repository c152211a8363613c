"""A DAG that Airflow and the operator runner both run, for test_same_as_airflow.py.

As a program it is Airflow's part: it runs the DAG on a fresh metadata database and writes what came of it to a file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, BaseHook, BaseOperator, BaseOperatorLink, Variable
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
from airflow.triggers.base import BaseTrigger, TriggerEvent

LOGICAL_DATE = datetime(2026, 1, 1, tzinfo=UTC)
CONF = {"day": "2026-01-01"}


class Call(BaseOperator):
    template_fields = ("text",)

    def __init__(self, *, function: Callable[[Any], Any], text: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.function = function
        self.text = text

    def execute(self, context: Any) -> Any:
        return self.function(context)


class Reply(BaseTrigger):
    def __init__(self, *, at: datetime, parts: list[int]) -> None:
        super().__init__()
        self.at = at
        self.parts = parts

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return f"{type(self).__module__}.Reply", {"at": self.at, "parts": self.parts}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        yield TriggerEvent({"at": self.at.isoformat(), "parts": self.parts})


class AskLink(BaseOperatorLink):
    name = "The question"

    def get_link(self, operator: BaseOperator, *, ti_key: Any) -> str:  # noqa: ARG002  # Airflow's signature
        return f"http://ask.example/{ti_key.task_id}"


class Ask(BaseOperator):
    operator_extra_links = (AskLink(),)

    def execute(self, context: Any) -> None:
        context["ti"].xcom_push("asked", True)
        context["task_state_store"].set("asked", True)
        self.defer(trigger=Reply(at=LOGICAL_DATE, parts=[1, 2]), method_name="resumed")

    def resumed(self, context: Any, event: Any) -> list[Any]:
        ti = context["ti"]
        return [event, ti.try_number, ti.xcom_pull("ask", key="asked"), context["task_state_store"].get("asked")]


def up(context: Any) -> dict[str, int]:
    context["ti"].xcom_push("decision", "yes")
    return {"n": 1}


def probe(context: Any) -> list[Any]:
    ti, store = context["ti"], context["task_state_store"]
    store.set("kept", {"list": [1, None, "é"], "float": 1.5})
    store.set("gone", 1)
    store.delete("gone")
    asked: list[Callable[[], Any]] = [
        lambda: ti.xcom_pull("up"),
        lambda: ti.xcom_pull("up", key="decision"),
        lambda: ti.xcom_pull("up", map_indexes=-1),
        lambda: ti.xcom_pull("up", map_indexes=3),
        lambda: ti.xcom_pull(["up", "absent"]),
        lambda: ti.xcom_pull("absent"),
        lambda: ti.xcom_pull("absent", map_indexes=-1, default="d"),
        lambda: ti.xcom_push("late", (1, {"a": None})),
        lambda: ti.xcom_pull("probe", key="late"),
        lambda: ti.xcom_push("object", object()),
        lambda: store.get("kept"),
        lambda: store.get("gone"),
        lambda: store.get("gone", "default"),
        lambda: store.set("none", None),
        lambda: store.set("a / key", 1),
        lambda: store.get("a / key"),
        lambda: BaseHook.get_connection("in_env").extra_dejson,
        lambda: BaseHook.get_connection("absent"),
        lambda: Variable.get("absent"),
        lambda: Variable.get("absent", default="d"),
        lambda: Variable.set("mode", "dry"),
        lambda: Variable.get("mode"),
        lambda: [ti.try_number, ti.max_tries, ti.map_index, context["dag_run"].conf, ti.task.text],
        lambda: sorted(context),
    ]
    return [_outcome(question) for question in asked]


def _outcome(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except Exception as error:
        return type(error).__name__


def flaky(context: Any) -> list[Any]:
    ti, store = context["ti"], context["task_state_store"]
    if not store.get("tried"):
        store.set("tried", ti.try_number)
        ti.xcom_push("half", 1)
        raise ConnectionError("lost")
    return [ti.try_number, ti.max_tries, ti.xcom_pull("flaky", key="half"), store.get("tried")]


def never(context: Any) -> None:
    context["ti"].xcom_push("before", 1)
    raise AirflowFailException("never again")


def skip(context: Any) -> None:
    raise AirflowSkipException("not today")


AT_ONCE = {"retry_delay": timedelta(0)}
with DAG("comparison", schedule=None, start_date=LOGICAL_DATE, default_args=AT_ONCE) as dag:
    up_task = Call(task_id="up", function=up)
    up_task >> Call(task_id="probe", function=probe, text="{{ ds }} {{ ti.xcom_pull('up').n }}", retries=2)
    Call(task_id="flaky", function=flaky, retries=1)
    Call(task_id="never", function=never, retries=3)
    Call(task_id="skip", function=skip, retries=3)
    Ask(task_id="ask", retries=1)


def run_by_airflow() -> dict[str, dict[str, Any]]:
    """Run the DAG on a fresh metadata database; its tasks by id. Then clear one, as a user would."""
    from airflow.models.task_state_store import TaskStateStoreModel
    from airflow.models.taskinstance import TaskInstance, clear_task_instances
    from airflow.models.xcom import XComModel
    from airflow.utils.db import initdb
    from airflow.utils.session import create_session
    from sqlalchemy import select

    initdb()
    dag.test(logical_date=LOGICAL_DATE, run_conf=CONF)
    with create_session() as session:
        tasks: dict[str, dict[str, Any]] = {
            ti.task_id: {
                "state": str(ti.state),
                "try_number": ti.try_number,
                "max_tries": ti.max_tries,
                "xcoms": {},
                "task_state": {},
            }
            for ti in session.scalars(select(TaskInstance))
        }
        for xcom in session.scalars(select(XComModel)):
            tasks[xcom.task_id]["xcoms"][xcom.key] = xcom.value
        for row in session.scalars(select(TaskStateStoreModel)):
            tasks[row.task_id]["task_state"][row.key] = json.loads(row.value)
        cleared = session.scalars(select(TaskInstance).where(TaskInstance.task_id == "flaky")).one()
        clear_task_instances([cleared], session)
        tasks["flaky"]["max_tries_after_a_clear"] = cleared.max_tries
    return tasks


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run_by_airflow()))
