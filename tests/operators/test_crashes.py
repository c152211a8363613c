"""A graph in one task whose process is killed (SIGKILL) in every place: the retry finishes, nothing is done twice."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException

from beluga_airflow import Chain, FlowResult
from beluga_airflow.execute.settling import settled
from beluga_airflow.execute.status import RunStatus
from beluga_airflow.operators import checkpoint
from beluga_airflow.operators.temporal import TemporalWorkflowOperator
from beluga_airflow.state.sqlite import SqliteStore
from tests.operators import sample_flows as flows
from tests.operators.conftest import Side, until_seen
from tests.operators.crashing import STEPS, Ended, Ledger, Plan
from tests.statuses import terminal, told_in

ROOT = Path(__file__).resolve().parents[2]
BESIDE = {"inventory": "credit", "credit": "inventory"}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """The program `crashing`, which waits for plans."""
    log = tmp_path_factory.mktemp("crashing") / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.operators.crashing"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    with process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0, log.read_text()[-3000:]


@dataclass
class Task:
    """A task, and what its steps did in all its attempts."""

    program: subprocess.Popen[str]
    folder: Path
    number: int = 0

    def attempt(self, dies: str = "", waits: dict[str, str] | None = None, **inputs: Any) -> Ended:
        """The next attempt."""
        self.number += 1
        self.folder.mkdir(exist_ok=True)
        plan = Plan(
            folder=str(self.folder),
            number=self.number,
            dies=dies,
            waits=waits or {},
            inputs={"order_id": "o-1", **inputs},
        )
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        print(json.dumps(asdict(plan)), file=self.program.stdin, flush=True)
        ended = Ended(**json.loads(self.program.stdout.readline()))
        assert ended.exit == (-signal.SIGKILL if dies else 0)
        return ended

    @property
    def done(self) -> Counter[tuple[int, str]]:
        """How often each step did its work, by attempt; always under its one key."""
        entries = Ledger(str(self.folder)).entries()
        for _, step, key in entries:
            assert key == f"order/o-1/{step}"
        return Counter((number, step) for number, step, _ in entries)


@pytest.fixture
def task(program: subprocess.Popen[str], tmp_path: Path) -> Task:
    return Task(program, tmp_path / "task")


@pytest.fixture(scope="module")
def undisturbed(program: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """How the task ends when nobody kills it."""
    ended = Task(program, tmp_path_factory.mktemp("undisturbed")).attempt()
    assert ended.state == "success"
    return ended


# forward

PLACES = {"before": [2], "after": [1, 2], "saving": [1, 2], "kept": [1]}
"""Where the process dies in a step, and in which attempts the step then does its work."""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("step", STEPS)
def test_a_killed_process_loses_no_finished_step(task: Task, undisturbed: Ended, step: str, place: str) -> None:
    # what runs beside it has finished by then
    waits = {f"before {step}": f"kept {BESIDE[step]}"} if step in BESIDE else {}

    task.attempt(dies=f"{place} {step}", waits=waits)
    ended = task.attempt()

    assert ended == undisturbed
    finished = {*STEPS[: STEPS.index(step)], BESIDE.get(step)}
    once = {(1 if other in finished else 2, other) for other in STEPS if other != step}
    assert task.done == Counter([*once, *((number, step) for number in PLACES[place])])


def test_steps_that_are_killed_side_by_side_run_again(task: Task, undisturbed: Ended) -> None:
    task.attempt(dies="after inventory", waits={"before inventory": "after credit", "after credit": "never"})
    assert task.done == Counter([(1, "validate"), (1, "credit"), (1, "inventory")])

    ended = task.attempt()

    assert ended == undisturbed
    assert task.done - Counter([(1, "validate"), (1, "credit"), (1, "inventory")]) == Counter(
        (2, step) for step in STEPS if step != "validate"
    )


def test_a_task_may_be_killed_again_and_again(task: Task, undisturbed: Ended) -> None:
    for dies in ("after payment", "after payment", "saving payment", "kept payment", "before fulfil", "kept fulfil"):
        task.attempt(dies=dies)

    assert task.attempt() == undisturbed
    assert task.done == Counter(
        [
            *((1, step) for step in ("validate", "inventory", "credit")),
            *((number, "payment") for number in (1, 2, 3, 4)),
            (6, "fulfil"),
            (7, "notify"),
        ]
    )


# its status in the state store


def statuses(task: Task) -> list[RunStatus]:
    """All that was told, in order."""
    return [status for _, status in told_in(task.folder / "state.db")]


def ends(task: Task) -> list[str]:
    """The terminal statuses."""
    return [status for (*_, status), times in terminal(told_in(task.folder / "state.db")).items() for _ in range(times)]


def test_the_retry_of_a_killed_process_tells_the_one_end(task: Task) -> None:
    task.attempt(dies="after payment")
    # what dies at once may not have come to tell of itself
    lost = statuses(task)
    assert [(status.status, status.attempt) for status in lost] == [("running", 1)] * len(lost)
    assert task.attempt().state == "success"
    end = statuses(task)[-1]
    assert (end.status, end.attempt) == ("completed", 2 if lost else 1)
    assert not lost or end.started == lost[-1].started
    assert end.steps == dict.fromkeys(STEPS, "completed")
    assert ends(task) == ["completed"]
    assert end.owner == {"dag_id": "test-dag", "run_id": "test-run", "task_id": "t", "map_index": -1}


def test_a_process_that_is_killed_again_and_again_tells_one_end(task: Task) -> None:
    for dies in ("before validate", "saving payment", "after fulfil", f"kept {STEPS[-1]}"):
        task.attempt(dies=dies, **{"fulfil fails until": 0})
    task.attempt()
    assert ends(task) == ["completed"]
    # one that dies at once may not have come to tell of itself; each that has is counted, and once
    told = [status.attempt for status in statuses(task)]
    assert told == sorted(told)
    assert {*told} == {*range(1, told[-1] + 1)}
    assert told[-1] <= 5


@pytest.mark.parametrize("dies", ["kept undo", "after payment.undo"])
def test_a_process_that_is_killed_while_it_undoes_tells_one_end(task: Task, dies: str) -> None:
    task.attempt(dies=dies, **{"fulfil fails until": 1})
    assert ends(task) == []
    task.attempt(**{"fulfil fails until": 1})
    assert ends(task) == ["failed"]
    end = statuses(task)[-1]
    assert (end.undone, end.steps["fulfil"]) == ({"payment": "undone", "inventory": "undone"}, "failed")


async def test_what_nobody_goes_on_with_is_settled_by_who_looks(task: Task) -> None:
    await asyncio.to_thread(task.attempt, dies="after payment")
    store = SqliteStore(task.folder / "state.db")

    async def none_left(status: RunStatus) -> FlowResult:
        return FlowResult(status="failed", error=f"task {status.owner['task_id']} was lost")

    settling = [settled(store, "beluga/flows/order/o-1", none_left) for _ in range(2)]
    assert [now and now.error for now in await asyncio.gather(*settling)] == ["task t was lost"] * 2
    await store.close()
    assert ends(task) == ["failed"]
    assert "running" not in statuses(task)[-1].steps.values()


# what is too large for Airflow's task state


def in_state_store(task: Task) -> list[str]:
    with closing(sqlite3.connect(task.folder / "state.db")) as db:
        return [
            key.rpartition("/")[2] for (key,) in db.execute("SELECT key FROM entry WHERE key NOT LIKE 'beluga/flows/%'")
        ]


LARGE = {"inventory gives": 2 * checkpoint.TASK_STATE_LIMIT}


@pytest.mark.parametrize("place", ["saving", "kept"])
def test_what_went_to_the_state_store_is_found_there(task: Task, place: str) -> None:
    task.attempt(dies=f"{place} inventory", waits={"before inventory": "kept credit"}, **LARGE)
    # it was in the store before the task state knew of it
    assert in_state_store(task) == ["inventory"]
    assert len((task.folder / "task_state.json").read_text()) < checkpoint.TASK_STATE_LIMIT

    ended = task.attempt(**LARGE)

    assert (ended.state, len(ended.returned["data"]["blob"])) == ("success", LARGE["inventory gives"])
    assert [number for number, step in task.done.elements() if step == "inventory"] == PLACES[place]
    assert [number for number, step in task.done.elements() if step == "credit"] == [1]


# undoing

FAILED = "AirflowFailException: flow failed: step 'fulfil' failed: ConnectionError: no fulfil today"
FORWARD = [*((1, step) for step in STEPS[:-1]), (1, "fulfil")]  # which has two attempts of its own
FIRST, SECOND = "payment.undo", "inventory.undo"
# where the process dies, and in which attempts of the task the two are undone
UNDOING = {
    "kept undo": ([2], [2]),
    f"before {FIRST}": ([2], [2]),
    f"after {FIRST}": ([1, 2], [2]),
    f"saving {FIRST}": ([1, 2], [2]),
    f"kept {FIRST}": ([1], [2]),
    f"before {SECOND}": ([1], [2]),
    f"after {SECOND}": ([1], [1, 2]),
    f"kept {SECOND}": ([1], [1]),
}


@pytest.mark.parametrize("dies", UNDOING)
def test_a_process_that_is_killed_while_it_undoes_goes_on_with_that(task: Task, dies: str) -> None:
    # it would succeed in the next attempt of the task, which must not be made
    task.attempt(dies=dies, **{"fulfil fails until": 1})
    ended = task.attempt(**{"fulfil fails until": 1})

    assert (ended.state, ended.error) == ("failed", FAILED)
    assert list(ended.steps["undone"].items()) == [(name.removesuffix(".undo"), "undone") for name in (FIRST, SECOND)]
    first, second = UNDOING[dies]
    undos = [*((number, FIRST) for number in first), *((number, SECOND) for number in second)]
    assert task.done == Counter([*FORWARD, *undos])


def test_a_failure_that_was_not_kept_yet_is_found_again(task: Task) -> None:
    task.attempt(dies="saving undo", **{"fulfil fails until": 9})
    ended = task.attempt(**{"fulfil fails until": 9})

    assert (ended.state, ended.error) == ("failed", FAILED)
    assert task.done == Counter([*FORWARD, (2, "fulfil"), (2, "fulfil"), (2, FIRST), (2, SECOND)])


def test_a_failure_that_was_not_kept_yet_may_be_none_any_more(task: Task, undisturbed: Ended) -> None:
    task.attempt(dies="saving undo", **{"fulfil fails until": 1})
    ended = task.attempt()

    assert ended == undisturbed
    assert task.done == Counter([*FORWARD, (2, "fulfil"), (2, "notify")])


@pytest.mark.parametrize("dies", [f"before {FIRST}", f"kept {FIRST}"])
def test_what_could_not_be_undone_is_told_by_the_retry(task: Task, dies: str) -> None:
    fails = {"fulfil fails until": 9, f"{FIRST} fails until": 9}
    task.attempt(dies=dies, **fails)
    ended = task.attempt(**fails)

    assert ended.state == "failed"
    why = "step 'payment' could not be undone: ConnectionError: no payment.undo today"
    assert ended.error == f"{FAILED}; {why}"
    assert task.done[2, SECOND] == 1
    assert task.done[1, FIRST] + task.done[2, FIRST] == 2


def test_undoing_may_be_killed_again_and_again(task: Task) -> None:
    for dies in ("after payment", f"after {FIRST}", f"saving {FIRST}", f"after {SECOND}"):
        task.attempt(dies=dies, **{"fulfil fails until": 9})
    ended = task.attempt()

    assert (ended.state, ended.error) == ("failed", FAILED)
    undos = [(2, FIRST), (3, FIRST), (4, FIRST), (4, SECOND), (5, SECOND)]
    steps = [*((1, step) for step in STEPS[:4]), (2, "payment"), (2, "fulfil"), (2, "fulfil")]
    assert task.done == Counter([*steps, *undos])


# on Temporal, where the task only waits for the flow

waiting = (
    Chain("waiting", retry=flows.ONCE)
    .add_step("charge", flows.charge, compensate=flows.refund)
    .add_step("wait", flows.at_gate)
)


@pytest.mark.parametrize("why", [None, "InvalidInput: the account is closed"])
async def test_a_task_tells_what_its_workflow_could_not_undo(side: Side, token: str, why: str | None) -> None:
    flows.broken.add(token)
    inputs = {"order_id": "o-1", "token": token, "end": "no refund" if why else ""}
    async with side.worker():
        run = await side.run(TemporalWorkflowOperator(task_id="t", flow=flows.refunded, inputs=inputs, retries=2))
        end = await run.run_to_end()
    assert (end.state, type(end.error)) == ("failed", AirflowFailException)
    told = f"; step 'charge' could not be undone: {why}" if why else "; undone: 'charge'"
    assert str(end.error) == f"flow failed: step 'fulfil' failed: ConnectionError: the bank is closed{told}"
    key = f"test-dag/{side.run_id}/t/-1/charge"
    assert flows.seen[token] == ["validate", "charge", "fragile", f"refund {key} by {key}.undo"]


async def test_a_user_who_ends_the_waiting_task_has_its_workflow_undone(side: Side, token: str) -> None:
    async with side.worker():
        run = await side.run(TemporalWorkflowOperator(task_id="t", flow=waiting, inputs={"token": token}))
        await until_seen(token, "waiting")
        assert run.deferral is not None
        await run.deferral.trigger().on_kill()  # what the triggerer does when a user acts
        key = f"test-dag/{side.run_id}/t/-1/charge"
        await until_seen(token, f"refund {key} by {key}.undo")
        end = await run.run_to_end()
    assert (end.state, await side.status(end)) == ("failed", "CANCELED")
    assert str(end.error) == "flow cancelled: the workflow was cancelled; undone: 'charge'"
