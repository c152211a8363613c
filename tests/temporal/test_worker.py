"""The worker as a process: how it starts, stops, dies, and what it says."""

from __future__ import annotations

import sys
import threading
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from airflow.cli.cli_config import ActionCommand, GroupCommand
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from beluga_airflow.cli.commands import get_commands
from beluga_airflow.errors import InvalidSetting
from beluga_airflow.temporal.messages import FLOW_WORKFLOW
from beluga_airflow.temporal.worker import worker_for
from beluga_airflow.testing import TemporalServer
from tests.statuses import terminal, told_in
from tests.temporal.conftest import Side
from tests.temporal.worker_process import WorkerProcess, environment_of

Connections = dict[str, dict[str, Any]]

# connections and arguments that no worker can start with, and what it must say
FAULTS: dict[str, tuple[Connections, list[str], str]] = {
    "a module that is not there": (
        {},
        ["--import", "nowhere.flows"],
        "--import nowhere.flows: ModuleNotFoundError: No module named 'nowhere'; mend or install it here, or put its "
        "folder on PYTHONPATH",
    ),
    "a module with a flow that cannot run": (
        {},
        ["--import", "bad_flows"],
        "--import bad_flows: InvalidFlow: flow 'two words' cannot run",
    ),
    "a module that raises": ({}, ["--import", "raises_flows"], "--import raises_flows: ZeroDivisionError: division by"),
    "a server that is down": (
        {"temporal_default": {"port": 1}},
        [],
        "the Temporal server at 127.0.0.1:1, namespace 'default' cannot be reached; see that it runs",
    ),
    "a namespace that is not there": (
        {"temporal_default": {"extra": {"namespace": "elsewhere"}}},
        [],
        "namespace 'elsewhere' refused: Namespace elsewhere is not found",
    ),
    "a connection that is not there": (
        {},
        ["--temporal-conn-id", "elsewhere"],
        "there is no connection 'elsewhere'; make one of type 'temporal'",
    ),
    "a connection of another type": (
        {"ours": {"conn_type": "http", "host": "x", "password": "pass-4711"}},
        ["--temporal-conn-id", "ours"],
        "connection 'ours' is of type 'http', it must be of type 'temporal'",
    ),
    "a state store that nobody serves": (
        {"beluga_state_default": {"conn_type": "beluga_state", "extra": {"url": "mysql://:pass-4711@host"}}},
        [],
        "what connection 'beluga_state_default' names cannot be used",
    ),
    "no concurrency": ({}, ["--concurrency", "0"], "the worker's concurrency is 0, it must be 1 or more"),
}
# starting a process takes seconds: these suffice to see that it ends as the command in this process does
IN_A_PROCESS = ("a module that is not there", "a server that is down")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With modules that cannot be imported."""
    (tmp_path / "bad_flows.py").write_text(
        "from beluga_airflow import Chain\nflow = Chain('two words')\nflow.check()\n"
    )
    (tmp_path / "raises_flows.py").write_text("1 / 0\n")
    return tmp_path


def _connections(server: TemporalServer, faulty: Connections) -> Connections:
    return faulty | {"temporal_default": server.connection | faulty.get("temporal_default", {})}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_cannot_work_says_why(
    temporal_server: TemporalServer,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    faulty, arguments, words = FAULTS[fault]
    for name, value in environment_of(folder, _connections(temporal_server, faulty)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("_AIRFLOW_PROCESS_CONTEXT", "server")
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    command = _parser().parse_args(arguments)
    with pytest.raises(SystemExit) as caught:
        command.func(command)
    assert str(caught.value.code).startswith("beluga worker: ")
    assert words in str(caught.value.code)
    assert "pass-4711" not in f"{caught.value.code} {caplog.text}"
    # only code of the user's that broke is worth one
    assert ("Traceback" in caplog.text) is (fault == "a module that raises")


def _parser() -> ArgumentParser:
    """Of the command `worker`, as Airflow makes it of what the provider gives."""
    (group,) = get_commands()
    assert isinstance(group, GroupCommand)
    (command,) = (command for command in group.subcommands if command.name == "worker")
    assert isinstance(command, ActionCommand)
    parser = ArgumentParser()
    for argument in command.args:
        argument.add_to_parser(parser)
    parser.set_defaults(func=command.func)
    return parser


@pytest.mark.parametrize("fault", IN_A_PROCESS)
def test_the_process_ends_with_those_words_alone(temporal_server: TemporalServer, folder: Path, fault: str) -> None:
    faulty, arguments, words = FAULTS[fault]
    environment = environment_of(folder, _connections(temporal_server, faulty))
    with WorkerProcess(folder, environment, *arguments) as worker:
        assert worker.wait() == 1
    assert worker.log.startswith("beluga worker: ")
    assert words in worker.log
    assert len(worker.log.splitlines()) == 1


async def test_concurrency_must_be_at_least_one(side: Side) -> None:
    with pytest.raises(InvalidSetting, match="concurrency is -5, it must be 1 or more"):
        worker_for(side.client, side.backends, task_queue="x", concurrency=-5)


@pytest.fixture
def environment(side: Side, temporal_server: TemporalServer, tmp_path: Path) -> dict[str, str]:
    """For workers that run the sample flows, without a model that anybody knows."""
    temporal = dict(temporal_server.connection)
    temporal["extra"] = {**temporal["extra"], "task_queue": side.target.task_queue}
    llm = {"conn_type": "beluga_llm", "password": "sk-pass-4711", "extra": {"provider": "oracle-of-delphi"}}
    return environment_of(tmp_path, {"temporal_default": temporal, "beluga_llm_default": llm})


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Where spans can be sent to, and those that came."""
    came: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                came.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing on the screen."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}", came
        server.shutdown()


def _ran(log: Path) -> list[tuple[str, str]]:
    """The steps that began, each with its idempotency key."""
    return [(line.split()[0], line.split()[1]) for line in log.read_text().splitlines()] if log.exists() else []


def _pids(log: Path) -> list[int]:
    return [int(line.split()[2]) for line in log.read_text().splitlines()]


async def test_sigterm_lets_the_running_step_finish_and_nothing_runs_twice(
    side: Side,
    environment: dict[str, str],
    tmp_path: Path,
    eventually: Callable[..., Any],
    collector: tuple[str, list[Any]],
) -> None:
    url, spans = collector
    log, gate = tmp_path / "log", tmp_path / "gate"
    environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = url
    flows = ["--import", "tests.temporal.sample_flows"]
    with WorkerProcess(tmp_path, environment, *flows) as first:
        first.wait_until_ready()
        run = await side.start(FLOW_WORKFLOW, side.call("gated", {"log": str(log), "gate": str(gate)}))
        await eventually(lambda: _ran(log))
        first.process.terminate()
        first.wait_until("worker stops: finishing what it has begun")
        assert first.process.poll() is None
        gate.touch()
        assert first.wait() == 0
        assert "Traceback" not in first.log
        with WorkerProcess(tmp_path, environment, *flows) as second:
            result = await side.result(run)
            assert second.stop() == 0
            assert "Traceback" not in second.log
    assert result.status == "completed"
    assert _ran(log) == [("wait", "gated/item-1/wait"), ("end", "gated/item-1/end")]
    assert _pids(log) == [first.process.pid, second.process.pid]
    told = [span.name for span in spans]
    assert (told.count("workflow.execute"), told.count("workflow.step")) == (1, 2)


async def test_when_a_worker_is_killed_another_finishes_its_work(
    side: Side, environment: dict[str, str], tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    with WorkerProcess(tmp_path, environment) as first:
        run = await side.start(FLOW_WORKFLOW, side.call("gated", {"log": str(log), "gate": str(gate)}))
        await eventually(lambda: _ran(log))
        first.process.kill()
        first.process.wait()
    gate.touch()
    with WorkerProcess(tmp_path, environment) as second:
        result = await side.result(run)
        # the step that was lost ran again under the same key, though it has one attempt: it never failed
        wait, end = ("wait", "gated/item-1/wait"), ("end", "gated/item-1/end")
        assert _ran(log) == [wait, wait, end]
        assert _pids(log) == [first.process.pid, second.process.pid, second.process.pid]
        assert result.status == "completed"
        told = told_in(tmp_path / "state.db")
        assert terminal(told) == {
            ("beluga/flows/gated/item-1", f"{run.workflow_id}/{run.run_id}", 0, "completed"): 1,
        }
        assert told[-1][1].steps == {"wait": "completed", "end": "completed"}

        # while it is there: what a step fails of is told, without what is secret
        result, _ = await side.run("without_fallback", {"token": "x", "order_id": "o-1"})
        assert result.status == "failed"
        assert "InvalidSetting: " in str(result.error)
        assert "oracle-of-delphi" in str(result.error)
        assert second.stop() == 0
    assert "attempt 1 failed: InvalidSetting: " in second.log
    assert "attempt 2 failed" not in second.log
    assert "Traceback" not in second.log
    assert "4711" not in first.log + second.log + str(result)
