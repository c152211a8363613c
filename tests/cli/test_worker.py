"""`airflow beluga worker` and the configuration file: it follows it, and a fault in it fails nothing under way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import uuid4

from beluga_airflow.operators.batch import TemporalBatchOperator
from beluga_airflow.testing import OperatorRunner, TemporalServer
from tests.operators import settled_flows as flows
from tests.operators.conftest import lines_of
from tests.temporal.worker_process import WorkerProcess, environment_of


async def test_a_worker_follows_the_file(
    operator_runner: OperatorRunner, temporal_server: TemporalServer, tmp_path: Path
) -> None:
    connection = temporal_server.connection
    connection["extra"] = {**connection["extra"], "task_queue": f"tests-{uuid4().hex}"}
    state = {"conn_type": "beluga_state", "extra": {"url": f"sqlite:///{tmp_path / 'state.db'}"}}
    operator_runner.connections.update(temporal_default=connection, beluga_state_default=state)
    path = tmp_path / "worker.yaml"
    environment = environment_of(
        tmp_path, {"temporal_default": connection}, AIRFLOW_HOME=str(tmp_path), AIRFLOW__BELUGA__CONFIG_FILE=str(path)
    )

    async def error_of_an_item() -> str:
        operator = TemporalBatchOperator(task_id="t", flow=flows.stuck, items=[{"id": 1}])
        run = await asyncio.to_thread(operator_runner.run, operator, run_id=f"run-{uuid4().hex}")
        end = await run.run_to_end()
        (line,) = lines_of(end.return_value["results"])
        return str(line["error"])

    path.write_text("orchestration: {graph: {timeout: 0.2}}")
    with WorkerProcess(tmp_path, environment) as worker:
        await asyncio.to_thread(worker.wait_until_ready)
        assert "used up its timeout of 0.2 s" in await error_of_an_item()
        path.write_text("orchestration: {graph: {timeout: 0.3}}")
        assert "used up its timeout of 0.3 s" in await error_of_an_item()
        path.write_text("orchestration: {graph: {timeout: soon}}")
        assert "used up its timeout of 0.3 s" in await error_of_an_item()
        assert worker.log.count(f"{path}:1: 'orchestration.graph.timeout' is 'soon', it must be") == 1
        path.write_text("orchestration: {graph: {timeout: 0.4}}")
        assert "used up its timeout of 0.4 s" in await error_of_an_item()


def test_a_worker_does_not_start_with_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "worker.yaml"
    path.write_text("llm:\n  modle: x\n")
    with WorkerProcess(tmp_path, environment_of(tmp_path, {}, AIRFLOW__BELUGA__CONFIG_FILE=str(path))) as worker:
        assert worker.wait() == 1
    assert worker.log.startswith(f"beluga worker: {path}:2: unknown key 'llm.modle': did you mean 'llm.model'?")
    assert len(worker.log.splitlines()) == 1
