"""Tasks that wait for runs on Temporal, a real triggerer that has their triggers, and a user who acts on each of them.

Arguments: a folder that is AIRFLOW_HOME and dags folder at once, and a JSON list of [task id, map index, workflow id,
run id, what the user does]: ``success`` or ``failed``, as which the task is marked, or ``clear``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG
from airflow.sdk.bases.operator import BaseOperator

WITHIN = 120.0
DAG_ID = "waiting"

with DAG(DAG_ID, schedule=None, start_date=datetime(2026, 1, 1, tzinfo=UTC)) as dag:
    for name in ("marked-success", "marked-failed", "cleared"):
        BaseOperator(task_id=name)
    BaseOperator.partial(task_id="mapped").expand(params=[{"a": 1}, {"a": 2}])


def within(what: str, look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN
    while not look():
        assert time.monotonic() < deadline, f"not within {WITHIN:g} s: {what}"
        time.sleep(0.2)


def defer(home: Path, waiting: list[list[Any]]) -> Any:
    """A run of the DAG whose tasks are deferred, as after their operators' ``defer``; the DAG as Airflow keeps it."""
    from airflow.dag_processing.bundles.manager import DagBundlesManager
    from airflow.dag_processing.dagbag import BundleDagBag, sync_bag_to_db
    from airflow.models.dagrun import get_or_create_dagrun
    from airflow.models.trigger import Trigger
    from airflow.serialization.serialized_objects import DagSerialization
    from airflow.utils.session import create_session
    from airflow.utils.state import TaskInstanceState
    from airflow.utils.types import DagRunTriggeredByType

    from beluga_airflow.triggers.temporal import TemporalRunTrigger

    DagBundlesManager().sync_bundles_to_db()  # type: ignore[no-untyped-call]  # Airflow's
    bag = BundleDagBag(home, bundle_path=home, bundle_name="dags-folder")
    assert not bag.import_errors, bag.import_errors
    sync_bag_to_db(bag, "dags-folder", None)
    kept = DagSerialization.deserialize_dag(DagSerialization.serialize_dag(bag.dags[DAG_ID]))
    now = datetime.now(UTC)
    with create_session() as session:
        run = get_or_create_dagrun(
            dag=kept,
            start_date=now,
            logical_date=None,
            data_interval=None,
            run_after=now,
            run_id="the-run",
            session=session,
            conf={},
            triggered_by=DagRunTriggeredByType.TEST,
            triggering_user_name="test",
        )
        instances = {(ti.task_id, ti.map_index): ti for ti in run.get_task_instances(session=session)}
        for task_id, map_index, workflow_id, run_id, _ in waiting:
            made = TemporalRunTrigger(temporal_conn_id="temporal_default", workflow_id=workflow_id, run_id=run_id)
            trigger = Trigger.from_object(made)
            session.add(trigger)
            session.flush()
            ti = instances[task_id, map_index]
            ti.state, ti.trigger_id, ti.start_date, ti.try_number = TaskInstanceState.DEFERRED, trigger.id, now, 1
            ti.next_method, ti.next_kwargs, ti.trigger_timeout = "execute_complete", {}, now + timedelta(hours=1)
    return kept


def act(kept: Any, task_id: str, map_index: int, action: str) -> None:
    """As Airflow's API does when a user acts."""
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session
    from airflow.utils.state import TaskInstanceState

    indexes = None if map_index < 0 else [map_index]
    if action == "clear":
        kept.clear(task_ids=[task_id], run_id="the-run")
        # a triggerer takes no notice of a clear until the scheduler has, which does not run here
        with create_session() as session:
            (ti,) = session.query(TaskInstance).filter_by(task_id=task_id, run_id="the-run")
            ti.state = TaskInstanceState.SCHEDULED
    else:
        state = TaskInstanceState(action)
        kept.set_task_instance_state(task_id=task_id, map_indexes=indexes, run_id="the-run", state=state)


def main(home: str, given: str) -> None:
    from airflow.utils.db import initdb

    initdb()
    waiting = json.loads(given)
    kept = defer(Path(home), waiting)
    log = Path(home, "triggerer.log")

    def told(words: str) -> int:
        texts = [path.read_text(errors="replace") for path in Path(home).rglob("*.log*")]
        return sum(text.count(words) for text in texts)

    with log.open("w") as output:
        command = [sys.executable, "-m", "airflow", "triggerer", "--skip-serve-logs"]
        triggerer = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        within("the triggerer has all triggers", lambda: told(" starting") >= len(waiting) or bool(triggerer.poll()))
        for task_id, map_index, _, _, action in waiting:
            act(kept, task_id, map_index, action)
        within("the triggerer has told them", lambda: told("goes on") + told("was asked to end") >= len(waiting))
    finally:
        triggerer.terminate()
        triggerer.wait(60)
        print(log.read_text()[-4000:])


if __name__ == "__main__":
    main(*sys.argv[1:])
