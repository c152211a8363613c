"""Runs the DAGs of a folder by `dag.test()` on a fresh metadata database, and writes what came of them to a file.

Arguments: the dags folder, and the file to write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: str, result: str) -> None:
    from airflow.utils.db import initdb

    initdb()
    from airflow.dag_processing.dagbag import BundleDagBag

    bag = BundleDagBag(folder, bundle_path=Path(folder), bundle_name="dags-folder")
    assert not bag.import_errors, bag.import_errors
    ended: dict[str, Any] = {}
    for dag_id, dag in sorted(bag.dags.items()):
        run = dag.test()
        ended[dag_id] = {"state": str(run.state), "tasks": {_name(ti): _task(ti) for ti in run.get_task_instances()}}
    Path(result).write_text(json.dumps(ended))


def _name(ti: Any) -> str:
    return ti.task_id if ti.map_index < 0 else f"{ti.task_id}[{ti.map_index}]"


def _task(ti: Any) -> dict[str, Any]:
    keys = ("return_value", "decision")
    xcoms = {key: ti.xcom_pull(task_ids=ti.task_id, key=key, map_indexes=ti.map_index) for key in keys}
    return {"state": str(ti.state), **xcoms}


if __name__ == "__main__":
    main(*sys.argv[1:])
