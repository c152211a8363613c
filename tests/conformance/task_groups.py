"""The examples as task groups, one DAG each, in a process of Airflow's own: by `dag.test()`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from airflow.sdk import DAG

from beluga_airflow.hooks.llm import LLMHook
from beluga_airflow.hooks.state import StateHook
from beluga_airflow.task_group import GraphTaskGroup
from tests.conformance.examples import EXAMPLES
from tests.conformance.expected import KEY, Example
from tests.conformance.runtimes import Observed, Runs, inputs_of, model, told_in

__all__ = ["as_task_groups", "dags", "main"]

ROOT = Path(__file__).parents[2]
PROCESSES = 2
TRACES = "CONFORMANCE_TRACES"
"""The environment variable that names the folder of the traces."""
DAG_FILE = """
from airflow.sdk import DAG

from tests.conformance.task_groups import dags

globals().update(dags())
"""
PROGRAM = "import sys; from tests.conformance.task_groups import main; main(*sys.argv[1:])"

# what follows runs in the tests' process


async def as_task_groups(examples: Sequence[Example], folder: Path) -> Runs:
    """By ``dag.test()``, which runs one task at a time, in a few processes."""
    shares = [examples[number::PROCESSES] for number in range(PROCESSES)]
    ended = await asyncio.gather(
        *(_in_process(share, folder, folder / f"airflow-{number}") for number, share in enumerate(shares))
    )
    return {name: _observed(run, folder / name) for runs in ended for name, run in runs.items()}


async def _in_process(examples: Sequence[Example], folder: Path, home: Path) -> dict[str, Any]:
    dags, result = home / "dags", home / "result.json"
    dags.mkdir(parents=True)
    (dags / "conformance_dags.py").write_text(DAG_FILE)
    environment = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        TRACES: str(folder),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", PROGRAM, str(dags), str(result), json.dumps([example.name for example in examples])),
        cwd=ROOT,
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:  # the tests are broken off
            process.kill()
    assert result.exists(), said.decode(errors="replace")[-5_000:]
    runs: dict[str, Any] = json.loads(result.read_text())
    return runs


def _observed(run: dict[str, Any], folder: Path) -> Observed:
    """What the tasks tell: the last one, or the last of those that failed."""
    undone = (run["undone"] or {"undone": {}})["undone"]
    told = run["told"] and tuple(run["told"])
    if run["state"] == "success":
        steps = {step: state for step, state in run["tasks"].items() if step != "undo"}
        return Observed.of_task(run["returned"], None, run["decisions"], folder, steps=steps, undone=undone, told=told)
    said = run["failures"] or [f"no task says why: {run['tasks']}"]
    # the states of a failed group are Airflow's: all that comes after a failed task is upstream_failed
    return Observed.of_task(None, said[-1], run["decisions"], folder, undone=undone, told=told)


# what follows runs in a process of Airflow's own

now: list[Example] = []
"""Those that the DAG file has now: `dag.test()` parses and stores all of it, every time."""
failures: list[str] = []
"""The messages of the tasks that failed in the present run."""


def dags() -> dict[str, DAG]:
    """What the DAG file has."""
    return {example.name: _dag(example) for example in now}


def _dag(example: Example) -> DAG:
    with DAG(example.name, schedule=None, default_args={"on_failure_callback": _note}) as dag:
        inputs = inputs_of(example, Path(os.environ[TRACES]) / example.name)
        GraphTaskGroup("flow", flow=example.path, inputs=inputs, key=f"{{{{ {KEY!r} }}}}")
    return dag


def _note(context: Any) -> None:
    failures.append(str(context["exception"]))


def _run(example: Example, folder: str) -> dict[str, Any]:
    """Run the DAG of an example, and see what came of its tasks."""
    from airflow.dag_processing.dagbag import BundleDagBag

    now[:], failures[:] = [example], []
    bag = BundleDagBag(folder, bundle_path=Path(folder), bundle_name="dags-folder")
    assert not bag.import_errors, bag.import_errors
    run = bag.dags[example.name].test()
    tasks = {task.task_id.removeprefix("flow."): task for task in run.get_task_instances()}
    result = tasks["result"]
    # each step has its own too, which is all there is where the flow fails
    own = {step: result.xcom_pull(task.task_id, key="decision") for step, task in tasks.items()}
    decisions = result.xcom_pull("flow.result", key="decisions")
    return {
        "state": str(run.state),
        "tasks": {name: str(task.state) for name, task in tasks.items()},
        "failures": failures[:],
        "undone": result.xcom_pull("flow.undo"),
        "returned": result.xcom_pull("flow.result"),
        "decisions": decisions or {step: record for step, record in own.items() if record},
        "told": asyncio.run(_told(example)),
    }


async def _told(example: Example) -> tuple[str, str | None] | None:
    store = await StateHook().store()
    try:
        return await told_in(store, example)
    finally:
        await store.close()


def main(folder: str, result: str, names: str) -> None:
    """Run some of them, and write what came of them to a file."""
    from airflow.utils.db import initdb

    async def client(hook: LLMHook) -> Any:
        return model()

    initdb()
    wanted = [example for example in EXAMPLES if example.name in json.loads(names)]
    with patch.object(LLMHook, "client", client):
        Path(result).write_text(json.dumps({example.name: _run(example, folder) for example in wanted}))
