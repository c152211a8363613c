"""`airflow beluga worker` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

__all__ = ["ROOT", "WorkerProcess", "environment_of"]

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 90.0


def environment_of(folder: Path, connections: Mapping[str, Mapping[str, Any]], **others: str) -> dict[str, str]:
    """What a worker's process finds in its environment.

    Args:
        folder: where its state is; one for all that work together.
        connections: Airflow connections by id, in JSON form.
        others: further variables.
    """
    state = {"conn_type": "beluga_state", "extra": {"url": f"sqlite:///{folder / 'state.db'}"}}
    given = {"beluga_state_default": state, **connections}
    return (
        os.environ
        | {f"AIRFLOW_CONN_{name.upper()}": json.dumps(connection) for name, connection in given.items()}
        | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
        | others
    )


class WorkerProcess:
    """Starts a worker; a context manager, at whose end the worker is gone."""

    _count = 0

    def __init__(self, folder: Path, environment: Mapping[str, str], *arguments: str) -> None:
        WorkerProcess._count += 1
        self._file = folder / f"worker-{WorkerProcess._count}.log"
        command = [sys.executable, "-m", "airflow", "beluga", "worker", *arguments]
        with self._file.open("w") as output:
            self.process = subprocess.Popen(command, env=dict(environment), stdout=output, stderr=output)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self._file.read_text(errors="replace")

    def wait_until(self, words: str) -> Self:
        """Until it has said these words."""
        deadline = time.monotonic() + SECONDS
        while words not in self.log:
            assert self.process.poll() is None, f"the worker ended ({self.process.returncode}): {self.log[-3000:]}"
            assert time.monotonic() < deadline, f"the worker never said {words!r}: {self.log[-3000:]}"
            time.sleep(0.05)
        return self

    def wait_until_ready(self) -> Self:
        """Until it takes work."""
        return self.wait_until("worker is ready")

    def wait(self) -> int:
        """Its exit code, when it ends by itself."""
        return self.process.wait(SECONDS)

    def stop(self) -> int:
        """End it in an orderly way; its exit code."""
        self.process.terminate()
        return self.wait()
