"""The whole system, for real, as `make demo` and `make up` run it: Airflow, Temporal, our worker, the model server."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import psutil
import pytest
from rich.console import Console

from beluga_airflow.cli import demo

ROOT = Path(__file__).parents[2]
WITHIN_SECONDS = 240
RUNS = 4

pytestmark = pytest.mark.timeout(2 * WITHIN_SECONDS)


class Command:
    """One command of the launcher, with every process that was ever seen below it."""

    def __init__(self, name: str, state: Path) -> None:
        descriptor, path = tempfile.mkstemp(prefix=f"{name}-", dir=state.parent)
        self.output = Path(path)
        self.seen: set[psutil.Process] = set()
        # A key would make it ask a real model, for real money.
        env = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}
        argv = [sys.executable, "-m", "beluga_airflow.cli.stack", name, "--state-dir", str(state)]
        with os.fdopen(descriptor, "w") as output:
            self.process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)

    def says(self) -> str:
        return self.output.read_text()

    def wait_for(self, words: str | None) -> int | None:
        """Waits until it has said these words or, without any, until it has ended; returns its exit code."""
        deadline = monotonic() + WITHIN_SECONDS
        while monotonic() < deadline:
            with suppress(psutil.NoSuchProcess):
                self.seen.update(psutil.Process(self.process.pid).children(recursive=True))
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(timeout=0.2)
            if words and words in self.says():
                return None
        pytest.fail(f"It has not {'said ' + repr(words) if words else 'ended'}, but: {self.says()}")

    def left(self) -> list[str]:
        """The command lines of what it has left running."""
        lines = []
        for process in self.seen:
            with suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    lines.append(" ".join(process.cmdline()))
        return lines


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "state of it"
    yield folder
    if folder.exists():
        Command("down", folder).wait_for(None)


def numbers(table: str, title: str) -> dict[str, str]:
    """The rows of one block of the table."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    begin = next(number for number, row in enumerate(rows) if row[0].startswith(title))
    end = next((number for number, row in enumerate(rows) if number > begin and row[0]), len(rows))
    return {name: value for _, name, value in rows[begin:end]}


def test_the_demo(state: Path) -> None:
    command = Command("demo", state)

    code = command.wait_for(None)

    says = command.says()
    assert code == 0, says
    assert command.left() == []
    assert len(command.seen) > 8, "Airflow's four, Temporal, the worker, the model server, and theirs"

    assert "The model is a SIMULATION" in says
    orders = numbers(says, "orders by status")
    total = int(orders.pop("all"))
    assert total >= 200
    assert sum(map(int, orders.values())) == total
    assert int(orders["completed"]) > 0
    assert sum(map(int, numbers(says, "decisions by choice (SIMULATION)").values())) > 0
    assert int(numbers(says, "decisions by who decided (SIMULATION)")["model"]) > 0
    assert int(numbers(says, "tokens and cost (SIMULATION)")["input"]) > 0
    assert float(numbers(says, "time")["orders a second"]) > 0
    pages = re.search(r"Airflow http://127\.0\.0\.1:\d+, Temporal http://127\.0\.0\.1:\d+", says)
    assert pages is not None
    assert pages.end() < says.index("asked for a run"), "there is still time to look at them"
    results = re.search(r"The result of every order: (.+)", says)
    assert results is not None
    assert len(Path(results[1]).read_text().splitlines()) == total

    # the scheduler's own, where a task ends before Airflow has noted its start, are Airflow's
    assert not re.search(r"^(?!scheduler).*Traceback", (state / "logs" / "airflow.log").read_text(), re.MULTILINE)
    with closing(sqlite3.connect(state / "airflow" / "airflow.db")) as database:
        runs = database.execute("select dag_id, run_type, state from dag_run").fetchall()
    assert runs == [("order_batch", "manual", "success")], "switching the DAG on has started nothing else"
    secrets = json.loads((state / "secrets.json").read_text()).values()
    told = [says, *(log.read_text(errors="replace") for log in (state / "logs").iterdir())]
    assert not any(secret in text for secret in secrets for text in told)


def change_while_tasks_run(airflow: str) -> None:
    """A user changes a DAG again and again while its tasks write, and no change fails."""
    path = "/api/v2/dags/order_graph_tasks"
    with httpx.Client(base_url=airflow, timeout=WITHIN_SECONDS, trust_env=False) as http:
        http.headers["Authorization"] = f"Bearer {http.get('/auth/token').json()['access_token']}"

        def ask(method: str, path: str, body: object = None) -> Any:
            answer = http.request(method, path, json=body)
            assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
            return answer.json()

        ask("PATCH", path, {"is_paused": False})
        for _ in range(RUNS):
            ask("POST", f"{path}/dagRuns", {"logical_date": None, "conf": {}})
        deadline = monotonic() + WITHIN_SECONDS
        states: list[str] = []
        while states.count("success") < RUNS:
            assert "failed" not in states
            assert monotonic() < deadline, states
            sleep(0.2)
            ask("PATCH", path, {"is_paused": False})
            states = [run["state"] for run in ask("GET", f"{path}/dagRuns")["dag_runs"]]


def test_up_stays_until_it_is_asked_to_stop(state: Path) -> None:
    up = Command("up", state)
    assert up.wait_for("Everything is up") is None, up.says()
    pages = re.findall(r"http://127\.0\.0\.1:\d+", up.says())
    assert len(pages) == 2
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for page in pages:
        with direct.open(page, timeout=10) as answer:
            assert answer.status == 200

    second = Command("up", state)
    assert second.wait_for(None) == 1
    assert "A stack is running" in second.says()
    assert all(page in second.says() for page in pages)

    change_while_tasks_run(pages[0])

    guest = Command("demo", state)
    assert guest.wait_for(None) == 0, guest.says()
    assert "leaves it running" in guest.says()
    assert up.process.poll() is None

    down = Command("down", state)
    assert down.wait_for(None) == 0
    assert "Stopped; nothing is left running" in down.says()
    assert up.wait_for(None) == 0, up.says()
    assert f"Stopped by {signal.SIGTERM.name}" in up.says()
    assert up.left() == []


def test_the_table_says_what_was_simulated() -> None:
    manifest = demo.Manifest(
        total=3,
        statuses={"completed": 2, "out_of_stock": 1},
        decisions=demo.Decisions(choices={"expedite": 1, "[red]odd": 1}, decided_by={"model": 2}),
        tokens=demo.Tokens(input=100, output=20),
        cost_usd=None,
        simulated=True,
        duration_seconds=1.5,
        items_per_second=2.0,
        results="/somewhere",
    )
    console = Console(width=100, color_system=None)
    with console.capture() as shown:
        console.print(demo.table(manifest, elapsed=12.34))

    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.get().splitlines()]
    assert ["orders by status", "completed", "2"] in lines
    assert ["", "all", "3"] in lines
    assert ["", "[red]odd", "1"] in lines
    assert ["tokens and cost (SIMULATION)", "input", "100"] in lines
    assert ["", "cost", "unknown"] in lines
    assert ["time", "whole run", "12.3 s"] in lines
