"""Runs of DAGs in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("run_groups.py")


def runs_of(folder: Path, wanted: list[list[Any]], *, home: Path, environment: Mapping[str, str]) -> list[Any]:
    """What came of runs of the DAGs in a folder; for ``wanted`` see the program."""
    result = home / "result.json"
    done = subprocess.run(
        [sys.executable, PROGRAM, folder, result, json.dumps(wanted)],
        env={
            **os.environ,
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(folder),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "PYTHONPATH": str(ROOT),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.exists(), (done.stdout + done.stderr)[-4000:]
    # shown by pytest where a test that uses this fails
    print(done.stdout[-20000:])
    runs: list[Any] = json.loads(result.read_text())
    return runs
