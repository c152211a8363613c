"""Runs DAGs of task groups by `dag.test()` on a fresh metadata database, and writes what came of them to a file.

Arguments: the dags folder, the file to write, and a JSON list of [dag id, conf, pattern of the tasks that are marked as
success, or null].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KEYS = ("return_value", "failure", "decisions", "undone")


def main(folder: str, result: str, wanted: str) -> None:
    from airflow.utils.db import initdb

    initdb()
    from airflow.dag_processing.dagbag import BundleDagBag

    from tests.task_group import sample_flows

    bag = BundleDagBag(folder, bundle_path=Path(folder), bundle_name="dags-folder")
    assert not bag.import_errors, bag.import_errors
    ended: list[dict[str, Any]] = []
    for dag_id, conf, marked in json.loads(wanted):
        sample_flows.seen.clear()
        run = bag.dags[dag_id].test(run_conf=conf, mark_success_pattern=marked)
        ended.append(
            {
                "dag": dag_id,
                "state": str(run.state),
                "run_id": run.run_id,
                "seen": dict(sample_flows.seen),
                "times": dict(sample_flows.times),
                "tasks": [_task(ti) for ti in run.get_task_instances()],
            }
        )
    Path(result).write_text(json.dumps(ended))


def _task(ti: Any) -> dict[str, Any]:
    xcoms = {key: ti.xcom_pull(task_ids=ti.task_id, key=key, map_indexes=ti.map_index) for key in KEYS}
    return {
        "task_id": ti.task_id,
        "map_index": ti.map_index,
        "state": str(ti.state),
        "tries": ti.try_number,
        "xcoms": {key: value for key, value in xcoms.items() if value is not None},
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
