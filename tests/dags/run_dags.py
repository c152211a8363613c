"""Runs DAGs by `dag.test()` on a fresh metadata database and writes what came of them to a file; for test_dags.py.

Arguments: the dags folder, the file to write, and a JSON list of [dag id, conf, logical date or null].
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any


def main(folder: str, result: str, wanted: str) -> None:
    from airflow.utils.db import initdb

    initdb()
    from airflow.dag_processing.dagbag import BundleDagBag

    bag = BundleDagBag(folder, bundle_path=Path(folder), bundle_name="dags-folder")
    assert not bag.import_errors, bag.import_errors
    ended: list[dict[str, Any]] = []
    for dag_id, conf, day in json.loads(wanted):
        run = bag.dags[dag_id].test(run_conf=conf, logical_date=datetime.fromisoformat(day) if day else None)
        (task,) = run.get_task_instances()
        keys = ("return_value", "decisions", "workflow_id")
        ended.append(
            {
                "dag": dag_id,
                "state": str(run.state),
                "task": str(task.state),
                **{key: task.xcom_pull(task_ids=task.task_id, key=key) for key in keys},
            }
        )
    Path(result).write_text(json.dumps(ended))


if __name__ == "__main__":
    main(*sys.argv[1:])
