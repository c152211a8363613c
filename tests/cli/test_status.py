"""`airflow beluga status`: the real command, in a terminal and in a pipe."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from beluga_airflow import Chain, run
from beluga_airflow.cli.owners import Owners
from beluga_airflow.cli.status import _Board
from beluga_airflow.errors import HistoryLost
from beluga_airflow.execute.settling import settled
from beluga_airflow.execute.status import RunStatus, moment
from beluga_airflow.state import Change
from beluga_airflow.state.memory import MemoryStore
from beluga_airflow.state.sqlite import SqliteStore
from tests.running import ONCE, nothing
from tests.task_group.running import runs_of

ROOT = Path(__file__).resolve().parents[2]
DAGS = """
from airflow.sdk import DAG

from beluga_airflow.task_group import GraphTaskGroup
from tests.task_group import sample_flows as flows

with DAG("shop", schedule=None):
    GraphTaskGroup("good", flow=flows.linear)
    GraphTaskGroup("bad", flow=flows.failure)
"""


def refuse(data: dict[str, Any]) -> None:
    raise ValueError("the bank \x1b[31mis\u202e closed")


def told_of(width: int = 120) -> dict[str, str]:
    return {"COLUMNS": str(width), "LINES": "40", "TERM": "xterm-256color"}


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    return SqliteStore(tmp_path / "beluga" / "state.db")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of the command: the store is where it is when no connection says."""
    return {
        **os.environ,
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PYTHONPATH": str(ROOT),
        **told_of(),
    }


# what a shell starts in its background, these tests with it, hands on that it takes no notice of Ctrl-C
IN_FRONT = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("airflow", run_name="__main__", alter_sys=True)
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", IN_FRONT, "beluga", "status", *arguments]


def shown(environment: Mapping[str, str], *arguments: str, **others: str) -> str:
    """What the command prints."""
    done = subprocess.run(
        command(*arguments), env={**environment, **others}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def waiting(gate: asyncio.Event) -> Chain:
    async def wait(data: dict[str, Any]) -> None:
        await gate.wait()

    return Chain("shop").add_step("check", nothing).add_step("pay", wait)


def lost(**changes: Any) -> dict[str, Any]:
    """The entry of a run of which nobody has heard for long."""
    told = moment(datetime.now(UTC) - timedelta(minutes=10))
    given: dict[str, Any] = {"status": "running", "runtime": "tasks", "run": "r", "started": told, "updated": told}
    return RunStatus(**given | changes).to_json()


# once


async def test_it_shows_runs_and_guards(store: SqliteStore, environment: dict[str, str]) -> None:
    await run(Chain("shop").add_step("check", nothing), {}, key="o-1", state=store)
    await run(Chain("billing", retry=ONCE).add_step("pay", refuse), {}, key="a\x1b[2Jb", state=store)
    await store.set(
        "beluga/flows/shop/lost", lost(runtime="run", steps={"check": "completed", "pay": "running"}, total=3)
    )
    await store.set(
        "beluga/breakers/bank", {"state": "open", "failures": 5, "changes": 3, "since": "2026-01-01T00:00:00+00:00"}
    )
    await store.set("beluga/flows/shop/junk", ["\x1b[31m"])
    out = await asyncio.to_thread(shown, environment)
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines() if "/" in line or "Run " in line]
    assert rows[0] == ["Run", "Status", "Steps", "Since", "Runtime", "Error"]
    # the newest first; what a terminal would obey is shown
    assert rows[1][:3] == ["billing/a%1B%5B2Jb", "failed", "1/1"]
    assert rows[1][5].startswith("step 'pay' failed: ValueError: the bank \\x1b[31mis\\u202e")
    assert (rows[2][:3], rows[2][4:]) == (["shop/o-1", "completed", "1/1"], ["run"])
    assert rows[3][:3] == ["shop/lost", "failed", "1/3"]
    assert rows[3][5].startswith("its worker was lost")
    assert "breaker bank: open, 5 failures in a row, 3 changes" in out
    assert "\x1b" not in out
    # and has settled what nobody goes on with
    assert (await store.get("beluga/flows/shop/lost"))["status"] == "failed"

    narrow = await asyncio.to_thread(shown, environment, "--flow", "shop", "--limit", "1", COLUMNS="40")
    assert "billing" not in narrow
    assert "shop/lost" not in narrow
    assert "1 older not shown" in narrow
    assert max(map(len, narrow.splitlines())) <= 40
    assert "in ascii" not in await asyncio.to_thread(shown, environment, PYTHONIOENCODING="ascii")
    await store.close()


@pytest.mark.parametrize("width", [30, 80, 120])
async def test_the_name_of_a_step_leaves_room_for_the_run(
    store: SqliteStore, environment: dict[str, str], width: int
) -> None:
    await store.set("beluga/flows/shop/order-1", lost(updated=moment(), steps={"deliver." * 12 + "pack": "running"}))
    out = await asyncio.to_thread(shown, environment, COLUMNS=str(width))
    assert ("shop/order" if width > 60 else "shop/o") in out
    assert "running" in out
    assert "0/1 " in out or width < 60
    await store.close()


async def test_a_reader_forgets_what_a_store_without_its_history_has_not_any_more() -> None:
    class Restarted(MemoryStore):
        """A store that was restarted, and has lost what it had, while somebody watched."""

        watches = 0

        async def watch(self, key: str, **options: Any) -> AsyncGenerator[Change]:
            self.watches += 1
            if self.watches == 1:
                await self.delete("beluga/flows/shop/old")
                await self.set("beluga/flows/shop/new", lost())
                raise HistoryLost("it was restarted")
            async for change in super().watch(key, **options):
                yield change

    store = Restarted()
    await store.set("beluga/flows/shop/old", lost(updated=moment()))
    board = _Board(store, Owners(store, "none"), Console(), flow=None, limit=5)
    await board.read()
    task = asyncio.create_task(board._follow("beluga/flows/"))
    await asyncio.sleep(0.1)
    task.cancel()
    assert list(board._runs) == ["beluga/flows/shop/new"]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://127.0.0.1:1/0", "beluga status: the state store redis://127.0.0.1:1/0 cannot be used now"),
        (
            "sqlite:////proc/none/state.db",
            "beluga status: the state store sqlite:////proc/none/state.db cannot be used",
        ),
        ("ftp://x", "beluga status: what connection 'beluga_state_default' names cannot be used"),
    ],
)
def test_a_store_that_cannot_be_reached_is_said(environment: dict[str, str], url: str, why: str) -> None:
    connection = json.dumps({"conn_type": "beluga_state", "extra": {"url": url}})
    done = subprocess.run(
        command(),
        env={**environment, "AIRFLOW_CONN_BELUGA_STATE_DEFAULT": connection},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(why)
    assert "Traceback" not in done.stderr


def test_airflow_says_whether_a_run_goes_on(tmp_path: Path, store: SqliteStore, environment: dict[str, str]) -> None:
    folder = tmp_path / "dags"
    folder.mkdir()
    (folder / "shop.py").write_text(DAGS)
    (dag_run,) = runs_of(folder, [["shop", {}, None]], home=tmp_path, environment={})
    keys = {
        name: f"beluga/flows/{flow}/shop/{dag_run['run_id'].replace('/', '%2F')}/{name}/-1"
        for name, flow in (("good", "linear"), ("bad", "failure"))
    }

    async def forget_the_ends() -> None:
        """As if nobody had been left to tell them."""
        for name, key in keys.items():
            owner = {"dag_id": "shop", "run_id": dag_run["run_id"], "task_id": f"{name}.result", "map_index": -1}
            told = RunStatus.from_json(await store.get(key))
            assert told is not None
            assert (told.status, told.owner) == ("completed" if name == "good" else "failed", owner)
            await store.set(key, lost(owner=owner, runtime="tasks"))
        unknown = {**owner, "run_id": "of another Airflow"}
        await store.set("beluga/flows/linear/unknown", lost(owner=unknown))

    async def told() -> dict[str, RunStatus | None]:
        entries = {name: RunStatus.from_json(await store.get(key)) for name, key in keys.items()}
        entries["unknown"] = RunStatus.from_json(await store.get("beluga/flows/linear/unknown"))
        await store.close()
        return entries

    asyncio.run(forget_the_ends())
    out = shown(environment, COLUMNS="200")
    ends = asyncio.run(told())
    assert {name: entry and entry.status for name, entry in ends.items()} == {
        "good": "completed",
        "bad": "failed",
        "unknown": "running",
    }
    assert ends["bad"] is not None
    assert str(ends["bad"].error).startswith("its task 'bad.result' of DAG run ")
    assert "ended (upstream_failed), and nobody told how the flow did" in str(ends["bad"].error)
    assert "cannot be asked" not in out


# live


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, environment: Mapping[str, str], *arguments: str) -> None:
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.execvpe(sys.executable, command(*arguments), environment)  # noqa: S606  # nothing of it is from outside
        self.said = ""

    def until(self, words: str, seconds: float = 30) -> None:
        """Until it has shown these words since the last time that this was asked."""
        ends, said = time.monotonic() + seconds, ""
        while words not in said:
            assert time.monotonic() < ends, f"{words!r} was never shown: {self.said[-3000:]}"
            if select.select([self._end], [], [], 0.2)[0]:
                said += os.read(self._end, 65_536).decode(errors="replace")
        self.said += said

    def types(self, text: str) -> int:
        """Type something that ends the command; its exit code."""
        os.write(self._end, text.encode())
        ends = time.monotonic() + 20
        while True:
            if select.select([self._end], [], [], 0.1)[0]:
                with suppress(OSError):  # the other end is closed
                    self.said += os.read(self._end, 65_536).decode(errors="replace")
            done, code = os.waitpid(self.pid, os.WNOHANG)
            if done:
                os.close(self._end)
                return os.waitstatus_to_exitcode(code)
            assert time.monotonic() < ends, self.said[-3000:]


async def test_in_a_terminal_it_shows_a_run_go_on_until_somebody_presses_ctrl_c(
    store: SqliteStore, environment: dict[str, str]
) -> None:
    gate = asyncio.Event()
    terminal = Terminal(environment, "--watch")
    await asyncio.to_thread(terminal.until, "no flow has run yet")
    task = asyncio.create_task(run(waiting(gate), {}, key="o-1", state=store))
    await asyncio.to_thread(terminal.until, "running")
    await asyncio.to_thread(terminal.until, "1/2 pay")
    gate.set()
    await task
    await asyncio.to_thread(terminal.until, "completed")
    await store.set("beluga/breakers/bank", {"state": "open", "failures": 5, "changes": 1, "since": moment()})
    await asyncio.to_thread(terminal.until, "breaker bank: open")
    assert await asyncio.to_thread(terminal.types, "\x03") == 0
    assert "Traceback" not in terminal.said
    assert terminal.said.rstrip().endswith("\x1b[?25h")  # the cursor is there again
    await store.close()


@contextmanager
def in_a_pipe(environment: Mapping[str, str], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command(*arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_in_a_pipe_it_prints_a_line_for_each_change(store: SqliteStore, environment: dict[str, str]) -> None:
    await run(Chain("shop").add_step("check", nothing), {}, key="before", state=store)
    gate = asyncio.Event()
    with in_a_pipe(environment, "--watch") as process:
        assert process.stdout is not None
        while "shop/before" not in await asyncio.to_thread(process.stdout.readline):
            pass
        await asyncio.sleep(0.5)
        task = asyncio.create_task(run(waiting(gate), {}, key="o-1", state=store))
        await asyncio.sleep(1.5)
        gate.set()
        await task
        lines = [""]
        while "completed" not in lines[-1]:
            lines.append(await asyncio.to_thread(process.stdout.readline))
        process.send_signal(signal.SIGINT)
        left, errors = await asyncio.to_thread(process.communicate)
    assert [line.split(maxsplit=1)[1].strip() for line in lines if line.strip()] == [
        "shop/o-1  running  0/2 check",
        "shop/o-1  running  1/2 pay",
        "shop/o-1  completed  2/2",
    ]
    assert (process.returncode, left, "Traceback" in errors) == (0, "", False), errors
    await store.close()


async def test_a_reader_who_goes_away_ends_it(store: SqliteStore, environment: dict[str, str]) -> None:
    with in_a_pipe(environment, "--watch") as process:
        assert process.stdout is not None
        while "no flow" not in await asyncio.to_thread(process.stdout.readline):
            pass
        process.stdout.close()
        await asyncio.sleep(0.5)
        await run(Chain("shop").add_step("check", nothing), {}, key="o-1", state=store)
        assert await asyncio.to_thread(process.wait, 20) == 1
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    await store.close()


async def test_a_reader_settles_a_run_whose_process_was_killed(store: SqliteStore, tmp_path: Path) -> None:
    program = f"""
import asyncio
from beluga_airflow import Chain, run
from beluga_airflow.state.sqlite import SqliteStore

async def wait(data):
    await asyncio.Event().wait()

asyncio.run(run(Chain("shop").add_step("pay", wait), {{}}, key="o-1", state=SqliteStore({str(store.url[10:])!r})))
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, cwd=ROOT)
    key = "beluga/flows/shop/o-1"
    async with asyncio.timeout(20):
        while not ((entry := await store.get(key)) and entry["steps"]):  # noqa: ASYNC110  # of another process
            await asyncio.sleep(0.05)
    process.kill()
    await process.wait()

    async def nobody(status: RunStatus) -> None:
        raise AssertionError(status)

    assert (await settled(store, key, nobody) or pytest.fail("gone")).status == "running"
    # half a minute later
    later = moment(datetime.now(UTC) - timedelta(seconds=31))
    await store.set(key, {**await store.get(key), "updated": later})
    assert (await settled(store, key, nobody) or pytest.fail("gone")).status == "failed"
    await store.close()
