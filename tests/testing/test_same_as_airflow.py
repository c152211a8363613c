"""The same DAG by Airflow, on a metadata database, and by the operator runner, on none."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow.testing import OperatorRunner, TaskRun

COMPARISON = Path(__file__).with_name("comparison_dag.py")
IN_ENV = '{"conn_type": "http", "extra": {"a": 1}}'


@pytest.fixture(scope="module")
def by_airflow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of every task, by `dag.test()`."""
    home = tmp_path_factory.mktemp("airflow")
    program = Path(shutil.copy(COMPARISON, home))
    result = home / "result.json"
    environment = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(home),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW_CONN_IN_ENV": IN_ENV,
    }
    done = subprocess.run(
        [sys.executable, program, result], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.exists(), (done.stdout + done.stderr)[-3000:]
    tasks: dict[str, dict[str, Any]] = json.loads(result.read_text())
    return tasks


async def test_every_task_comes_to_the_same(
    by_airflow: dict[str, dict[str, Any]],
    operator_runner: OperatorRunner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(COMPARISON.parent)
    monkeypatch.setenv("AIRFLOW_CONN_IN_ENV", IN_ENV)
    comparison = importlib.import_module("comparison_dag")

    ours: dict[str, dict[str, Any]] = {}
    for task in comparison.dag.topological_sort():
        run = await asyncio.to_thread(
            operator_runner.run, task, conf=comparison.CONF, logical_date=comparison.LOGICAL_DATE
        )
        run = await run.run_to_end()
        while run.state == "up_for_retry":
            run = await asyncio.to_thread(run.retry)
        ours[task.task_id] = _as_compared(run)
        if task.task_id == "flaky":
            ours["flaky"]["max_tries_after_a_clear"] = (await asyncio.to_thread(run.clear)).max_tries

    assert ours.keys() == by_airflow.keys()
    for task_id, expected in by_airflow.items():
        assert ours[task_id] == expected, task_id


def _as_compared(run: TaskRun) -> dict[str, Any]:
    links = {"_link_AskLink": run.links["The question"]} if run.links else {}
    return {
        "state": run.state.value,
        "try_number": run.try_number,
        "max_tries": run.max_tries,
        "xcoms": run.xcoms | links,
        "task_state": run.task_state,
    }
