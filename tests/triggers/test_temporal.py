"""What a real triggerer makes of a user who acts on a task that waits for a run on Temporal."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from uuid import uuid4

from temporalio.api.enums.v1 import EventType

from beluga_airflow.temporal.client import Run, Target, connect, start
from beluga_airflow.testing import TemporalServer

PROGRAM = Path(__file__).with_name("user_acts.py")
ACTIONS = [
    ("marked-success", -1, "success"),
    ("marked-failed", -1, "failed"),
    ("cleared", -1, "clear"),
    ("mapped", 0, "success"),
    ("mapped", 1, "failed"),
]


async def test_only_a_task_that_is_marked_as_success_leaves_its_workflow_alone(
    temporal_server: TemporalServer, tmp_path: Path
) -> None:
    target = Target(address=temporal_server.address)
    client = await connect(target)

    async def begun(name: str) -> Run:
        return await start(client, target, "beluga.flow", {}, workflow_id=name, task_queue="nobody", summary="a test")

    runs = [await begun(f"{task_id}-{index}-{uuid4().hex}") for task_id, index, _ in ACTIONS]
    waiting = [
        [task_id, index, run.workflow_id, run.run_id, action]
        for (task_id, index, action), run in zip(ACTIONS, runs, strict=True)
    ]
    shutil.copy(PROGRAM, tmp_path)
    environment = {
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{tmp_path}/airflow.db?timeout=60",
        "AIRFLOW_CONN_TEMPORAL_DEFAULT": json.dumps(temporal_server.connection),
    }
    program = await asyncio.create_subprocess_exec(
        sys.executable,
        str(tmp_path / PROGRAM.name),
        str(tmp_path),
        json.dumps(waiting),
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await program.communicate()
    assert program.returncode == 0, output.decode()[-6000:]

    asked_to_end = {}
    for (task_id, index, _), run in zip(ACTIONS, runs, strict=True):
        handle = client.get_workflow_handle(run.workflow_id, run_id=run.run_id)
        events = {event.event_type async for event in handle.fetch_history_events()}
        asked_to_end[task_id, index] = EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED in events
        await handle.terminate()
    assert asked_to_end == {(task_id, index): action != "success" for task_id, index, action in ACTIONS}
