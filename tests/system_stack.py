"""A running stack as its users have it: Airflow's REST API, what it keeps on disk, the Temporal server."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
DAGS = (ROOT / "dags", ROOT / "tests" / "system_dags")
WITHIN = 240.0


def within(what: str, look: Callable[[], Any]) -> Any:
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + WITHIN
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.5)
    raise AssertionError(f"not within {WITHIN:g} s: {what}")


@contextmanager
def started(state: Path) -> Iterator[Stack]:
    """A stack with the example DAGs and those of the system's tests; it is stopped in the end."""
    for folder in DAGS:
        shutil.copytree(folder, state / "dags", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "beluga_airflow.cli.stack"]
    place = ["--state-dir", state, "--dags", state / "dags"]
    keyless = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    log = state / "up.log"
    with log.open("w") as output:
        up = subprocess.Popen([*command, "up", *place], cwd=ROOT, env=keyless, stdout=output, stderr=output)
    try:
        within("the stack is up", lambda: "Everything is up" in log.read_text() or up.poll() is not None)
        assert up.poll() is None, log.read_text()
        site = json.loads((state / "stack.json").read_text())["site"]
        stack = Stack(state, f"http://127.0.0.1:{site['airflow']}", temporal=f"127.0.0.1:{site['temporal']}")
        with closing(stack.http):
            read = ("order_batch", "order_chain", "order_durable", "order_graph", "order_watch", "shop_in_one_task")
            stack.unpause(*read)
            yield stack
    finally:
        subprocess.run([*command, "down", *place], cwd=ROOT, env=keyless, check=True)
        assert up.wait(60) == 0, log.read_text()


class Stack:
    """A running stack, and what a user asks of its Airflow. Its methods may be called from several threads."""

    def __init__(self, state: Path, airflow: str, *, temporal: str) -> None:
        self.state = state
        self.http = httpx.Client(base_url=airflow, timeout=60)
        token = self.http.get("/auth/token").json()["access_token"]
        self.http.headers["Authorization"] = f"Bearer {token}"
        self.room = threading.Lock()
        """Held by a test with several tasks that wait for each other: there is room for four tasks at once."""
        self._temporal = temporal
        self._numbers = itertools.count(1)

    def call(self, method: str, path: str, body: Any = None, **query: Any) -> dict[str, Any]:
        answer = self.http.request(method, f"/api/v2{path}", json=body, params=query)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text[:1000]}"
        found: dict[str, Any] = answer.json() if answer.content else {}
        return found

    def accepted(self, method: str, path: str, body: Any, *, but: int) -> bool:
        """Whether Airflow took this, or answered with the status that asks for another try."""
        answer = self.http.request(method, f"/api/v2{path}", json=body)
        assert answer.is_success or answer.status_code == but, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.is_success

    def unpause(self, *read: str) -> None:
        """Unpause all DAGs, once Airflow has read the files of these."""

        def missing() -> set[str]:
            return {*read} - {dag["dag_id"] for dag in self.call("GET", "/dags", limit=100)["dags"]}

        within(f"Airflow has read {', '.join(read)}", lambda: not missing())
        self.call("PATCH", "/dags", {"is_paused": False}, dag_id_pattern="~")

    def trigger(self, dag: str, conf: dict[str, Any] | None = None) -> Run:
        run = self.call("POST", f"/dags/{dag}/dagRuns", {"logical_date": None, "conf": conf or {}})
        return Run(self, dag, str(run["dag_run_id"]))

    def shop(self, dag: str, *orders: str) -> tuple[Run, Folder]:
        """Run a DAG of the system's tests, whose steps were told these orders (see ``Folder``)."""
        folder = Folder(self.state / "shop" / str(next(self._numbers)))
        folder.tell(*orders)
        return self.trigger(dag, {"folder": str(folder.path)}), folder

    def ledger(self) -> list[tuple[str, str, str]]:
        """The calls to the example shop's ledger: operation, order, key."""
        with closing(sqlite3.connect(next(self.state.rglob("ledger.db")))) as db:
            return list(db.execute("SELECT operation, order_id, idempotency_key FROM calls ORDER BY id"))

    def charges(self) -> dict[str, tuple[int, int]]:
        """Of each order that was charged: how many keys, and how many calls."""
        keys: dict[str, list[str]] = {}
        for operation, order, key in self.ledger():
            if operation == "charge":
                keys.setdefault(order, []).append(key)
        return {order: (len(set(used)), len(used)) for order, used in keys.items()}

    def asked(self, run: Run) -> dict[str, int]:
        """How often the model was asked for each record of a decision of a run."""
        prefix = f"beluga/decisions/{run.dag}/{run.id}/"
        with closing(sqlite3.connect(self.state / "state.db")) as db:
            rows = db.execute("SELECT key, value FROM entry WHERE substr(key, 1, ?) = ?", (len(prefix), prefix))
            return {key.removeprefix(prefix): json.loads(value)["calls"] for key, value in rows}

    def workflow(self, workflow_id: str, run_id: str) -> str:
        """Where a workflow stands: ``RUNNING``, ``COMPLETED``, ``CANCELED`` ..."""
        from temporalio.client import Client

        async def status() -> str:
            client = await Client.connect(self._temporal)
            described = await client.get_workflow_handle(workflow_id, run_id=run_id).describe()
            assert described.status is not None
            return described.status.name

        return asyncio.run(status())


@dataclass(frozen=True)
class Run:
    """One DAG run."""

    stack: Stack
    dag: str
    id: str

    @property
    def path(self) -> str:
        return f"/dags/{self.dag}/dagRuns/{self.id}"

    def ended(self) -> str:
        """The state of the run, once it has ended."""

        def look() -> str | None:
            state: str = self.stack.call("GET", self.path)["state"]
            return state if state in ("success", "failed") else None

        found: str = within(f"run {self.id} of {self.dag} ends", look)
        return found

    def tasks(self) -> dict[str, dict[str, Any]]:
        """The tasks by id; that of a mapped one has its map index behind it."""
        found = self.stack.call("GET", f"{self.path}/taskInstances", limit=100)["task_instances"]
        return {ti["task_id"] + (f"[{ti['map_index']}]" if ti["map_index"] >= 0 else ""): ti for ti in found}

    def states(self) -> dict[str, str | None]:
        return {task: ti["state"] for task, ti in self.tasks().items()}

    def until(self, task: str, state: str) -> None:
        """Wait until a task is in this state."""
        within(f"{task} of run {self.id} of {self.dag} is {state}", lambda: self.states()[task] == state)

    def until_triggerer_waits(self, task: str, *, try_number: int = 1) -> None:
        """Wait until the triggerer waits for a deferred task, in this try or a later one.

        Before, it does not hear what users do to the task; and Airflow may take it for lost when its wait ends, and
        try it again.
        """

        def waits() -> bool:
            now = self.tasks()[task]
            number = int(now["try_number"])
            is_there = number >= try_number and now["state"] == "deferred"
            return is_there and f"{task}/-1/{number} (ID" in self.log(task, number)

        within(f"the triggerer waits for {task} of run {self.id}", waits)

    def clear(self, *tasks: str, downstream: bool = False) -> None:
        body = {"dry_run": False, "dag_run_id": self.id, "task_ids": tasks, "only_failed": False}
        self.stack.call("POST", f"/dags/{self.dag}/clearTaskInstances", {**body, "include_downstream": downstream})

    def mark(self, task: str, state: str) -> None:
        self.stack.call("PATCH", f"{self.path}/taskInstances/{task}", {"new_state": state})

    def keys(self, task: str) -> set[str]:
        """Under which a task has left something."""
        entries = self.stack.call("GET", f"{self.path}/taskInstances/{task}/xcomEntries")["xcom_entries"]
        return {entry["key"] for entry in entries}

    def left(self, task: str, key: str, *, index: int = -1) -> Any:
        """What a task left under this key."""
        path = f"{self.path}/taskInstances/{task}/xcomEntries/{key}"
        value = self.stack.call("GET", path, map_index=index)["value"]
        return json.loads(value) if isinstance(value, str) and value[:1] in '{["' else value

    def returned(self, task: str, *, index: int = -1) -> Any:
        return self.left(task, "return_value", index=index)

    def workflow(self, task: str) -> tuple[str, str]:
        """The workflow and run id of the run on Temporal that a task waits for."""
        return self.left(task, "workflow_id"), self.left(task, "run_id")

    def log(self, task: str, try_number: int = 1) -> str:
        return json.dumps(self.stack.call("GET", f"{self.path}/taskInstances/{task}/logs/{try_number}"))


@dataclass(frozen=True)
class Folder:
    """What steps of ``system_flows`` are told, as ``hold/charge``, and what they noted."""

    path: Path

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.path / name)

    def tell(self, *orders: str) -> None:
        for order in orders:
            (self.path / order).parent.mkdir(parents=True, exist_ok=True)
            (self.path / order).touch()

    def release(self, *steps: str) -> None:
        for step in steps:
            (self.path / "hold" / step).unlink()

    @property
    def lines(self) -> list[dict[str, Any]]:
        journal = self.path / "journal.jsonl"
        return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []

    def began(self, step: str) -> list[dict[str, Any]]:
        """What was noted each time that the step began."""
        return [line for line in self.lines if (line["event"], line["step"]) == ("begins", step)]

    def process(self, step: str, *, time: int = 1) -> int:
        """In which process the step runs, once it has begun so many times."""
        within(f"{step} in {self.path} begins, time {time}", lambda: len(self.began(step)) >= time)
        return int(self.began(step)[time - 1]["pid"])

    def counts(self, event: str = "begins") -> dict[str, int]:
        """How often each step began, or ended."""
        steps = [line["step"] for line in self.lines if line["event"] == event]
        return {step: steps.count(step) for step in sorted(steps)}

    def generations(self, step: str) -> list[int]:
        return [line["generation"] for line in self.began(step)]

    @property
    def idempotency_keys(self) -> dict[str, set[str]]:
        """All keys of each step."""
        return {
            line["step"]: {other["key"] for other in self.lines if other["step"] == line["step"]} for line in self.lines
        }

    @property
    def peak(self) -> int:
        """How many steps were at work at once."""
        at_work = itertools.accumulate(1 if line["event"] == "begins" else -1 for line in self.lines)
        return max(at_work, default=0)


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def is_gone(process: int) -> bool:
    return not Path(f"/proc/{process}").exists()


def bodies_of(functions: Iterable[Any]) -> list[Callable[[Stack], None]]:
    """The bodies of those of these tests that ``at_once`` made."""
    return [function.body for function in functions if hasattr(function, "body")]


def at_once(body: Callable[[Stack], None]) -> Any:
    """A test whose body runs beside those of the others: nearly all of their time they wait for Airflow."""

    def test(outcomes: Any) -> None:
        outcomes[body].result()

    test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
    test.body = body
    return test
