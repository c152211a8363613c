"""A program whose tasks die: it runs each attempt of one in a process of its own, which kills itself where it is told.

It reads a line of JSON an attempt, a `Plan`, and answers each with how the attempt ended. Processes are forked, as
Airflow's are: what is imported is imported once. Files stand for what outlives a process: the ledger of what steps did,
and Airflow's task state.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from beluga_airflow import Graph, Retry, StepContext
from beluga_airflow.operators.flow import GraphOperator
from beluga_airflow.testing import OperatorRunner
from beluga_airflow.testing.supervisor import TaskKey

__all__ = ["STEPS", "Ended", "Ledger", "Plan", "order"]

STEPS = ("validate", "inventory", "credit", "payment", "fulfil", "notify")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One attempt.

    Args:
        folder: where the files are; one for all attempts of a task.
        number: of the attempt, from 1.
        dies: the place at which the process kills itself: ``before`` what a step does and ``after`` it, ``saving`` its
            outcome and when it is ``kept``, each with the step's name; ``undo`` and ``step.undo`` are such names too.
        waits: at which place to wait until which other one is reached.
        inputs: of the flow.
    """

    folder: str
    number: int = 1
    dies: str = ""
    waits: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the process of an attempt ended, and, unless it died, the task."""

    exit: int
    state: str = ""
    returned: Any = None
    error: str = ""
    steps: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ledger:
    """What steps did, whatever became of their processes: attempt, step and idempotency key."""

    folder: str

    def add(self, *entry: Any) -> None:
        file = os.open(f"{self.folder}/ledger", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, (json.dumps(entry) + "\n").encode())
        os.fsync(file)
        os.close(file)

    def entries(self) -> list[tuple[int, str, str]]:
        return [tuple(json.loads(line)) for line in Path(self.folder, "ledger").read_text().splitlines()]


plan = Plan(folder="")
reached: set[str] = set()
changed = threading.Condition()


def reach(place: str) -> None:
    with changed:
        reached.add(place)
        changed.notify_all()
        changed.wait_for(lambda: plan.waits.get(place, place) in reached)
    if place == plan.dies:
        os.kill(os.getpid(), signal.SIGKILL)


def does(name: str) -> Any:
    """A step, or what undoes one; the input says what it fails of, in the first attempts of the task or in all."""

    def step(data: dict[str, Any], context: StepContext) -> dict[str, Any]:
        reach(f"before {name}")
        Ledger(plan.folder).add(plan.number, name, context.idempotency_key)
        reach(f"after {name}")
        if plan.number <= data.get(f"{name} fails until", 0):
            raise ConnectionError(f"no {name} today")
        size = data.get(f"{name} gives")
        return {name: context.idempotency_key} | ({"blob": "x" * size} if size else {})

    return step


order = Graph("order", retry=Retry(maximum_attempts=2, initial_interval=0))
for name in STEPS:
    order.add_node(name, does(name), compensate=does(f"{name}.undo") if name in ("inventory", "payment") else None)
for source, target in (
    ("validate", "inventory"),
    ("validate", "credit"),
    ("inventory", "payment"),
    ("credit", "payment"),
    ("payment", "fulfil"),
    ("fulfil", "notify"),
):
    order.add_edge(source, target)


def attempt() -> Ended:
    """The planned attempt, in this process."""
    url = f"sqlite:///{plan.folder}/state.db"
    connection = {"conn_type": "beluga_state", "extra": {"url": url}}
    with OperatorRunner(connections={"beluga_state_default": connection}) as runner:
        keep_task_state(runner, Path(plan.folder, "task_state.json"))
        operator = GraphOperator(task_id="t", flow=order, inputs=plan.inputs, key="order_id", retries=9)
        run = runner.run(operator, try_number=plan.number)
    error = "" if run.error is None else f"{type(run.error).__name__}: {run.error}"
    steps = run.xcoms.get("steps") or {}
    return Ended(exit=0, state=run.state.value, returned=run.return_value, error=error, steps=steps)


def keep_task_state(runner: OperatorRunner, file: Path) -> None:
    """Airflow keeps the task state in its database: here a file stands for it."""
    supervisor = runner._supervisor
    kept = supervisor._task_states[TaskKey("test-dag", "test-run", "t", -1)]
    kept.update(json.loads(file.read_text()) if file.exists() else {})
    answer = supervisor._task_state

    def answer_and_keep(msg: Any) -> Any:
        name = msg.key.rpartition("/")[2]
        is_kept = type(msg).__name__.startswith("Set")
        if is_kept:
            reach(f"saving {name}")
        answered = answer(msg)
        if is_kept:
            # whole or not at all, as in a database: another step may kill the process meanwhile
            written = file.with_suffix(".new")
            written.write_text(json.dumps(kept))
            written.replace(file)
            reach(f"kept {name}")
        return answered

    supervisor._task_state = answer_and_keep


def in_a_process(result: Path) -> Ended:
    """The planned attempt, in a process of its own."""
    pid = os.fork()
    if not pid:
        try:
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # where the answers go, nothing else must
            result.write_text(json.dumps(asdict(attempt())))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    exit_code = os.waitstatus_to_exitcode(status)
    return Ended(exit=exit_code) if exit_code else Ended(**json.loads(result.read_text()))


if __name__ == "__main__":
    for line in sys.stdin:
        plan = Plan(**json.loads(line))
        print(json.dumps(asdict(in_a_process(Path(plan.folder, "result.json")))), flush=True)
