"""The supervisor, with small real programs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import pytest

from beluga_airflow.cli import processes, supervisor
from beluga_airflow.cli.supervisor import Change, HopelessError, Part, PartError, Probe, SignalledError, Supervisor

# A part that says when it serves, by making a file, and that ends as programs do.
SERVES = """
import pathlib, signal, sys, time
pathlib.Path(sys.argv[1]).touch()
print("serving", flush=True)
time.sleep(600)
"""
# The same, but with a child that has left for a session of its own.
WITH_CHILD = "import subprocess, sys; subprocess.Popen(['sleep', '600'], start_new_session=True)\n" + SERVES
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVES
DIES = "import sys; print('\\x1b[31mthe cellar is flooded\\x1b[0m'); sys.exit(3)"

MakePart = Callable[..., Part]


def exists(path: Path) -> Probe:
    def missing() -> str | None:
        return None if path.exists() else f"{path.name} is not there"

    async def lacks(_: int) -> str | None:
        return missing()

    return lacks


@pytest.fixture
def part(tmp_path: Path) -> MakePart:
    def make(name: str, program: str = SERVES, **more: Any) -> Part:
        argv = [sys.executable, "-c", program, str(tmp_path / name)]
        usual: dict[str, Any] = {"name": name, "argv": argv, "env": os.environ, "ready": exists(tmp_path / name)}
        return Part(**(usual | more))

    return make


class Stage:
    """A supervisor whose changes are kept, with the processes that there were while it worked."""

    def __init__(self, logs: Path, *some: Part) -> None:
        self.changes: list[tuple[str, Change]] = []
        self.processes: list[psutil.Process] = []
        self.supervisor = Supervisor(some, logs=logs, changed=lambda name, change: self.changes.append((name, change)))

    async def work(self) -> None:
        for leader, *others in self.supervisor.record().values():
            self.processes += [psutil.Process(each["pid"]) for each in (leader, *others)]

    async def work_for_ever(self) -> None:
        await self.work()
        await asyncio.Event().wait()

    @property
    def left(self) -> list[psutil.Process]:
        return [each for each in self.processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


async def test_parts_serve_while_the_work_is_done_and_are_gone_afterwards(part: MakePart, tmp_path: Path) -> None:
    stage = Stage(tmp_path, part("base", foundation=True), part("shop", WITH_CHILD, needs=("base",)))

    await stage.supervisor.run(stage.work)

    assert stage.changes == [
        ("base", "starting"),
        ("base", "ready"),
        ("shop", "starting"),
        ("shop", "ready"),
        ("shop", "stopping"),
        ("base", "stopping"),
    ]
    assert len(stage.processes) == 3, "the child that left its session is known too"
    assert stage.left == []
    assert (tmp_path / "shop.log").read_text() == "serving\n"


async def test_a_part_that_does_not_stop_is_killed(part: MakePart, tmp_path: Path) -> None:
    stage = Stage(tmp_path, part("deaf", DEAF, grace=0.3))

    await stage.supervisor.run(stage.work)

    assert len(stage.processes) == 1
    assert stage.left == []


async def test_a_part_that_dies_is_named_with_its_last_words_and_all_are_stopped(
    part: MakePart, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, part("good"), part("bad", DIES, needs=("good",)))

    with pytest.raises(PartError, match=r"^bad ended with exit code 3$") as failure:
        await stage.supervisor.run(stage.work)

    assert failure.value.last_words == ["the cellar is flooded"]
    assert failure.value.log == tmp_path / "bad.log"
    assert stage.left == []


async def test_a_part_that_is_killed_later_ends_the_work(part: MakePart, tmp_path: Path) -> None:
    stage = Stage(tmp_path, part("good"), part("bad", WITH_CHILD))

    async def work() -> None:
        await stage.work()
        os.kill(stage.supervisor.record()["bad"][0]["pid"], signal.SIGKILL)
        await asyncio.Event().wait()

    with pytest.raises(PartError, match="bad was killed by SIGKILL"):
        await stage.supervisor.run(work)
    assert stage.left == [], "nor its child, which had a session of its own"


async def test_a_part_that_is_never_ready_is_given_up(part: MakePart, tmp_path: Path) -> None:
    stage = Stage(tmp_path, part("slow", ready=exists(tmp_path / "never"), ready_within=0.5))

    with pytest.raises(PartError, match=r"slow was not ready within 0 s: never is not there"):
        await stage.supervisor.run(stage.work)

    assert stage.processes == [], "the work has not begun"
    assert stage.changes[-1] == ("slow", "stopping")


async def test_a_part_without_hope_is_given_up_at_once(part: MakePart, tmp_path: Path) -> None:
    async def hopeless(_: int) -> str | None:
        raise HopelessError("cannot import order_batch.py", about="serv")

    stage = Stage(tmp_path, part("odd", ready=hopeless))

    with pytest.raises(PartError, match=r"odd cannot import order_batch.py"):
        await stage.supervisor.run(stage.work)


async def test_a_part_that_gets_stuck_ends_the_work(
    part: MakePart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "HEALTH_SECONDS", 0.1)
    monkeypatch.setattr(supervisor, "HEALTH_FAILURES", 3)
    answers: Iterator[str | None] = iter(["busy", None, "busy", "busy", "its heart has stopped"])

    async def healthy(_: int) -> str | None:
        return next(answers)

    stage = Stage(tmp_path, part("stuck", healthy=healthy))

    with pytest.raises(PartError, match="stuck no longer works: its heart has stopped"):
        await stage.supervisor.run(stage.work_for_ever)
    assert stage.left == []


async def test_a_program_that_is_not_there(part: MakePart, tmp_path: Path) -> None:
    stage = Stage(tmp_path, part("good"), part("none", argv=["no-such-program"]))

    with pytest.raises(PartError, match=r"none could not be started: .*no-such-program"):
        await stage.supervisor.run(stage.work)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_stops_everything(part: MakePart, tmp_path: Path, number: signal.Signals) -> None:
    stage = Stage(tmp_path, part("shop", WITH_CHILD))

    async def work() -> None:
        await stage.work()
        os.kill(os.getpid(), number)
        await asyncio.Event().wait()

    with pytest.raises(SignalledError) as stopped:
        await stage.supervisor.run(work)

    assert stopped.value.number == number
    assert stage.left == []


async def test_a_second_signal_kills_what_is_slow(part: MakePart, tmp_path: Path) -> None:
    stage = Stage(tmp_path, part("deaf", DEAF, grace=600.0))

    async def work() -> None:
        await stage.work()
        asyncio.get_running_loop().call_later(0.3, os.kill, os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    with pytest.raises(SignalledError):
        await stage.supervisor.run(work)
    assert stage.left == []


# A supervisor in a process of its own, which writes down what it runs.
SUPERVISOR = """
import asyncio, json, os, pathlib, signal, sys
from beluga_airflow.cli.supervisor import Part, Supervisor

async def main():
    folder, program = pathlib.Path(sys.argv[1]), sys.argv[2]
    async def ready(_):
        return None if (folder / "serves").exists() else "not yet"
    part = Part(name="shop", argv=[sys.executable, "-c", program, str(folder / "serves")], env=os.environ, ready=ready,
                stop_signal=signal.SIGINT, grace=20.0)
    supervisor = Supervisor([part], logs=folder, changed=lambda name, change: None)
    async def work():
        print(json.dumps(supervisor.record()), flush=True)
        await asyncio.Event().wait()
    await supervisor.run(work)

asyncio.run(main())
"""


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], processes.Record]]]:
    started: list[subprocess.Popen[str]] = []

    def start(program: str, script: str = 'exec "$@"') -> tuple[subprocess.Popen[str], processes.Record]:
        argv = ["sh", "-c", script, "sh", sys.executable, "-c", SUPERVISOR, str(tmp_path), program]
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(child)
        assert child.stdout is not None
        return child, json.loads(child.stdout.readline())

    yield start
    for child in started:
        child.kill()
        child.communicate()


async def test_a_part_heeds_its_signal_though_the_shell_had_the_supervisor_ignore_it(supervise: Any) -> None:
    child, record = supervise(SERVES, script="trap '' INT; exec \"$@\"")
    begun = monotonic()

    child.send_signal(signal.SIGINT)
    child.communicate(timeout=30)

    assert monotonic() - begun < 15, "not killed after its grace"
    assert not psutil.pid_exists(record["shop"][0]["pid"])


async def test_leftovers_of_a_killed_supervisor_are_recognised_and_ended(supervise: Any) -> None:
    child, record = supervise(WITH_CHILD)
    child.kill()
    child.wait()
    leader = record["shop"][0]["pid"]
    assert psutil.pid_exists(leader)

    assert await processes.end_leftovers(record) == 2
    assert await processes.end_leftovers(record) == 0

    for each in record["shop"]:
        with suppress(psutil.NoSuchProcess):  # gone, or a zombie where nobody reaps orphans
            assert psutil.Process(each["pid"]).status() == psutil.STATUS_ZOMBIE
